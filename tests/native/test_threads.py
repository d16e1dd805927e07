"""Where the system refuses to start a thread, the work is done by the threads there are."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SOURCES = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("clang++")
pytestmark = pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")


def build(folder: Path, *options: str) -> str:
    program = str(folder / "threads")
    sources = [str(Path(__file__).with_name("threads.cpp")), str(SOURCES / "runtime" / "parallel.cpp")]
    done = subprocess.run(
        [str(COMPILER), "-std=c++17", "-pthread", f"-I{SOURCES}", *options, *sources, "-o", program, "-ldl"],
        capture_output=True,
        text=True,
        check=False,
    )
    if "-fopenmp" in options and done.returncode != 0:
        pytest.skip("the compiler has no OpenMP")
    assert done.returncode == 0, done.stderr
    return program


def jobs_done(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=True).stdout.strip()


def test_without_openmp(tmp_path: Path) -> None:
    program = build(tmp_path)
    assert [jobs_done(program, limit) for limit in ("0", "1", "2", "9")] == ["100"] * 4


def test_in_a_forked_child(tmp_path: Path) -> None:
    program = build(tmp_path, "-fopenmp")
    assert [jobs_done(program, limit, "fork") for limit in ("0", "9")] == ["100"] * 2
