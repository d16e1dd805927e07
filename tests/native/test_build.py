"""The build with a compiler that lacks an instruction set: those kernels are left out, and the others are built."""

import importlib.util
import os
import platform
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.backends import cpu

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which("g++") or shutil.which("clang++")
TOOLS = [shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in ("cmake", "ninja")]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instruction sets of x86"),
    pytest.mark.skipif(
        COMPILER is None or None in TOOLS or importlib.util.find_spec("nanobind") is None,
        reason="needs a C++ compiler, cmake, ninja and nanobind",
    ),
]
# Knows no -mavx512bf16, nor, in kernels, what it stands for; without optimization, since only what is built matters.
REJECTING = """#!/bin/sh
for option in "$@"; do
  case "$option" in
    -mavx512bf16) echo "unrecognized option $option" >&2; exit 1;;
  esac
done
case "$*" in
  *kernels/isa_*) exec {compiler} "$@" -O0 -include {poison};;
  *) exec {compiler} "$@" -O0;;
esac
"""
POISON = "#include <immintrin.h>\n#pragma GCC poison _mm512_dpbf16_ps _mm512_cvtneps_pbh\n"


def test_a_rejected_flag_costs_only_its_kernels(tmp_path: Path) -> None:
    wrapper = tmp_path / "compiler"
    poison = tmp_path / "poison.h"
    poison.write_text(POISON)
    wrapper.write_text(REJECTING.format(compiler=COMPILER, poison=poison))
    wrapper.chmod(wrapper.stat().st_mode | stat.S_IXUSR)
    cmake, ninja = (str(tool) for tool in TOOLS)
    folder = str(tmp_path / "build")
    configured = run(
        cmake,
        *("-S", str(ROOT), "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}"),
        *(f"-DPython_EXECUTABLE={sys.executable}", f"-DCMAKE_CXX_COMPILER={wrapper}"),
    )
    assert "the compiler lacks avx512_bf16: gossamer is built without these kernels" in configured
    run(cmake, "--build", folder, "--parallel", "2")
    code = f"import sys; sys.path.insert(0, {folder!r}); import _kernels; print(_kernels.supported())"
    left_out = ("avx512_bf16", "amx")
    assert run(sys.executable, "-c", code).strip() == str([n for n in cpu.supported_isas() if n not in left_out])


def run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
