"""Memory that is freed and asked for again."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import resource, sys, torch
from gossamer.backends.cpu import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def touched():
    for _ in range(2):
        torch.ones(64 << 20, dtype=torch.uint8, device="cpu")  # the first may grow the heap
    before = faults()
    for _ in range(4):
        torch.ones(64 << 20, dtype=torch.uint8, device="cpu")
    return faults() - before

given_back = touched()
if not keep_freed_memory():
    sys.exit(77)
print(given_back, touched())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc alone has the option")
def test_freed_memory_is_used_again_without_new_pages() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=120)
    if done.returncode == 77:
        pytest.skip("no glibc here")
    assert done.returncode == 0, done.stderr
    given_back, kept = map(int, done.stdout.split())
    assert given_back > 4 * 30, "64 MiB tensors took no new pages before: nothing to compare with"  # of 2 MiB or less
    assert kept < given_back / 10


def test_elsewhere_nothing_is_done(monkeypatch: pytest.MonkeyPatch) -> None:
    from gossamer.backends.cpu import keep_freed_memory

    monkeypatch.setattr(sys, "platform", "darwin")
    assert not keep_freed_memory()
