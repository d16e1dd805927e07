"""The arithmetic that this machine does on registers: benchmarks/native/peak.cpp, compiled when a benchmark asks."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from gossamer.backends import cpu

SOURCE = Path(__file__).parent / "native" / "peak.cpp"
# Of each instruction set that has multiply-adds of its own: what the compiler must be told.
FLAGS = {
    "portable": (),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": ("-mavx512f",),
    "avx512_bf16": ("-mavx512f", "-mavx512bf16"),
    "amx": (),
}


def peak_flops(isa: str, threads: int, seconds: float) -> float | None:
    """FLOP/s of independent multiply-adds of the kind that an instruction set's kernels are made of.

    bf16 dot products for ``avx512_bf16`` and ``amx``, fp32 otherwise; on that many threads, for about that long. None
    where this machine lacks the instruction set, where it is emulated, and where no compiler knows it.
    """
    program = compiled(isa) if isa in cpu.supported_isas() else None
    if program is None:
        return None
    command = [str(program), str(threads), str(seconds)]
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@functools.cache
def compiled(isa: str) -> Path | None:
    """The program for an instruction set; None if it cannot be."""
    return program(SOURCE, f"peak-{isa}", (f"-DGOSSAMER_PEAK_{isa.upper()}", *FLAGS[isa])) if isa in FLAGS else None


def program(source: Path, name: str, flags: Sequence[str], headers: Sequence[Path] = ()) -> Path | None:
    """A compiled source, kept under ~/.cache/gossamer by what it is made of; None where no compiler takes it."""
    compiler = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        return None
    options = ["-std=c++17", "-O3", "-pthread", *flags]
    texts = [path.read_bytes() for path in (source, *headers)]
    made_of = hashlib.sha256(b"\0".join([*texts, compiler.encode(), *map(str.encode, options)])).hexdigest()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gossamer"
    built = folder / f"{name}-{made_of[:16]}"
    if built.exists():
        return built
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch) / built.name
        done = subprocess.run([compiler, *options, str(source), "-o", str(target)], capture_output=True, check=False)
        if done.returncode != 0:
            return None
        target.replace(built)
    return built
