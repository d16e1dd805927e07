"""The development set-up has a C++ compiler: without kernels most of the executor's tests would skip in silence."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from gossamer.backends import cpu
from gossamer.backends.cpu import native


def test_kernels_are_built() -> None:
    assert cpu.is_available(), cpu.why_unavailable()


def test_the_stub_names_all_that_is_bound() -> None:
    """Types are checked against it; what it lacks is checked by nobody."""
    stub = Path(cpu.__file__).with_name("_kernels.pyi").read_text()
    bound = [name for name in dir(native.kernels()) if not name.startswith("_")]
    assert bound
    assert [name for name in bound if not re.search(rf"^(class|def) {name}\b", stub, re.MULTILINE)] == []


@pytest.mark.skipif(shutil.which("objdump") is None, reason="needs objdump, which comes with a compiler")
def test_inner_loops_keep_their_sums_in_registers() -> None:
    """GCC once stored all sums of a micro-kernel in each step: AVX2 was a fifth slower, and no result changed."""
    loops = [body for body in inner_loops(disassembled()) if sum("fmadd" in line for line in body) >= 8]
    assert len(loops) > 10
    stored = [body for body in loops if 2 * sum(map(stores_a_vector, body)) > sum("fmadd" in line for line in body)]
    assert not stored, "\n".join(stored[0])


def disassembled() -> list[tuple[int, str]]:
    from gossamer.backends.cpu import _kernels

    command = ["objdump", "-d", "--no-show-raw-insn", _kernels.__file__]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.finditer(r"^ +([0-9a-f]+):\t(.*)$", text, re.MULTILINE)
    return [(int(match[1], 16), match[2]) for match in found]


def inner_loops(code: list[tuple[int, str]], longest: int = 200) -> list[list[str]]:
    """Bodies of at most so many instructions that a jump repeats and that hold no other jump back."""
    at = {address: n for n, (address, _) in enumerate(code)}
    loops, last_end = [], -1
    for n, (_, line) in enumerate(code):
        target = re.match(r"j\w+ +([0-9a-f]+)", line)
        begin = at.get(int(target[1], 16)) if target else None
        if begin is None or begin > n:
            continue
        if n - begin <= longest and begin > last_end:
            loops.append([line for _, line in code[begin : n + 1]])
        last_end = n
    return loops


def stores_a_vector(line: str) -> bool:
    return re.match(r"vmov\w+ +%[xyz]mm\d+,[-\w]*\(%r[sb]p", line) is not None
