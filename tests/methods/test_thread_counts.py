"""A part of the conformance matrix and random plans under OMP_NUM_THREADS 1, 2 and 5: the same bits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.backends import cpu

PROGRAM = Path(__file__).with_name("thread_digests.py")


def digests(threads: int) -> list[str]:
    # MKL, which torch asks for the number, would use no more threads than cores; and idle threads should not spin.
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))
    environment = {**os.environ, **counts, "MKL_DYNAMIC": "FALSE", "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(PROGRAM)], capture_output=True, text=True, env=environment, timeout=300, check=True
    )
    count, *lines = done.stdout.splitlines()
    assert count == f"{threads} threads"
    return lines


@pytest.mark.slow
@pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
def test_plans_and_outputs_are_the_same_bits() -> None:
    expected = digests(1)
    assert len(expected) > 100
    for threads in (2, 5):
        assert digests(threads) == expected, f"{threads} threads"
