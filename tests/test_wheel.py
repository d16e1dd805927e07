"""What is published has its kernels: a wheel is checked for them, and a release build stops without them."""

import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from repository import ROOT, script

from gossamer.backends import cpu

check = script("tools/check_wheel.py")
X86 = b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little")
ARM = b"\x7fELF" + bytes(14) + (183).to_bytes(2, "little")
MACOS = b"\xcf\xfa\xed\xfe" + bytes(16)
ABI3 = "gossamer-0.1.0-cp312-abi3-manylinux_2_27_x86_64.manylinux_2_28_x86_64"
PLAIN = "gossamer-0.1.0-cp311-cp311-manylinux_2_28_x86_64"
LIBRARY = {ABI3: "_kernels.abi3.so", PLAIN: "_kernels.cpython-311-x86_64-linux-gnu.so"}


@pytest.fixture
def wheel(tmp_path):
    """Makes a wheel with a library and the other files, without those that are left out."""

    def make(name, library=None, content=X86, leave_out=(), more=()):
        path = tmp_path / f"{name}.whl"
        files = {file: b"" for file in (*check.FILES, *more) if file not in leave_out}
        if library is not None:
            files[f"gossamer/backends/cpu/{library}"] = content
        with zipfile.ZipFile(path, "w") as archive:
            for file, data in files.items():
                archive.writestr(file, data)
        return path

    return make


@pytest.mark.parametrize("name", [ABI3, PLAIN])
def test_a_whole_wheel_has_no_fault(wheel, name):
    assert check.faults_of_file(wheel(name, LIBRARY[name])) == []


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("gossamer-0.1.0-cp312-abi3-macosx_11_0_arm64", MACOS),
        ("gossamer-0.1.0-cp312-abi3-manylinux_2_28_aarch64", ARM),
    ],
)
def test_other_platforms_have_libraries_of_their_own(wheel, name, content):
    assert check.faults_of_file(wheel(name, "_kernels.abi3.so", content)) == []
    assert "is no library for" in check.faults_of_file(wheel(name, "_kernels.abi3.so", X86))[0]


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        ({"name": "gossamer-0.1.0-py3-none-any"}, "it is pure Python"),
        ({"name": PLAIN}, "it has 0 files _kernels"),
        ({"name": PLAIN, "library": LIBRARY[PLAIN], "content": ARM}, "is no library for manylinux_2_28_x86_64"),
        ({"name": PLAIN, "library": LIBRARY[PLAIN], "content": b""}, "is no library for manylinux_2_28_x86_64"),
        ({"name": ABI3, "library": LIBRARY[PLAIN]}, "does not have the ABI of the wheel's name, abi3"),
        ({"name": PLAIN, "library": LIBRARY[ABI3]}, "does not have the ABI of the wheel's name, cp311"),
        ({"name": PLAIN, "library": LIBRARY[PLAIN], "leave_out": ("gossamer/py.typed",)}, "it lacks gossamer/py.typed"),
        ({"name": PLAIN, "library": LIBRARY[PLAIN], "more": ("gossamer.libs/libgomp-1.so",)}, "a libgomp of its own"),
        (
            {"name": "gossamer-0.1.0-cp311-cp311-linux_x86_64", "library": LIBRARY[PLAIN]},
            "its platform is linux_x86_64, which no index takes",
        ),
    ],
)
def test_a_fault_is_named(wheel, given, fault):
    faults = check.faults_of_file(wheel(**given))
    assert len(faults) == 1
    assert fault in faults[0]


def test_the_exit_code_says_whether_all_are_whole(wheel, capsys):
    whole, without = wheel(ABI3, LIBRARY[ABI3]), wheel(PLAIN)
    assert check.main([str(whole)]) == 0
    assert check.main([str(whole), str(without)]) == 1
    assert capsys.readouterr().out.count(": ok\n") == 2


def test_no_wheels_are_an_error(capsys):
    with pytest.raises(SystemExit, match="2"):
        check.main([])
    assert "give wheels" in capsys.readouterr().err


def test_the_instruction_sets_of_a_machine_are_expected():
    avx2 = {"avx2", "fma", "f16c"}
    avx512 = avx2 | {"avx512f", "avx512bw", "avx512vl", "avx512dq"}
    expected = check.expected_instruction_sets
    assert expected("x86_64", ()) == ["portable", "amx_emulated"]
    assert expected("x86_64", avx2) == ["portable", "avx2", "amx_emulated"]
    assert expected("x86_64", avx2 - {"fma"}) == ["portable", "amx_emulated"]
    assert expected("x86_64", avx512) == ["portable", "avx2", "avx512", "amx_emulated"]
    assert expected("x86_64", avx512 | {"avx512_bf16"})[-2:] == ["avx512_bf16", "amx_emulated"]
    assert expected("aarch64", ["asimd", "bf16"]) == ["portable", "amx_emulated"]


needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")


@needs_kernels
def test_this_build_has_no_fault():
    assert installed() == ""


@needs_kernels
def test_an_instruction_set_that_is_not_listed_is_a_fault():
    faults = installed(
        "import gossamer.cli.doctor as doctor",
        "whole = doctor.examine",
        "doctor.examine = lambda: whole() | {'kernels': {'instruction_sets': ['portable']}}",
    )
    assert "the kernels do not list amx_emulated; they list ['portable']" in faults


def test_missing_kernels_are_a_fault():
    assert "the C++ kernels are not built" in installed("sys.modules['gossamer.backends.cpu._kernels'] = None")


@needs_kernels
def test_a_call_that_runs_elsewhere_is_a_fault():
    assert "float32 runs on torch, expected a kernel of cpu/" in installed("os.environ['GOSSAMER_BACKEND'] = 'torch'")


def installed(*changes):
    """The faults of the package as it is installed here, after some changes, a line each.

    In a process of its own: torch's threads, and which libraries are loaded, belong to a process.
    """
    code = ["import os, sys", *changes, f"sys.path.insert(0, {str(ROOT / 'tools')!r})", "import check_wheel"]
    code.append("print(*check_wheel.faults_of_installed(), sep='\\n')")
    done = subprocess.run([sys.executable, "-c", "\n".join(code)], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_a_build_for_release_does_not_fall_back():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    (fallback,) = [o for o in project["tool"]["scikit-build"]["overrides"] if o.get("wheel", {}).get("cmake") is False]
    assert fallback["if"] == {"failed": True, "env": {"GOSSAMER_REQUIRE_KERNELS": False}}
    # The wheel of the stable ABI is of a platform, which the one without kernels is not.
    assert fallback["wheel"] == {"cmake": False, "py-api": "py3"}
    ci = project["tool"]["cibuildwheel"]
    assert ci["environment"]["GOSSAMER_REQUIRE_KERNELS"] == "1"
    assert "tools/check_wheel.py --installed" in ci["test-command"]


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("g++") is None or importlib.util.find_spec("nanobind") is None, reason="needs g++, cmake and nanobind"
)
@pytest.mark.parametrize("required", [True, False])
def test_a_build_for_release_stops_where_the_compiler_lacks_an_instruction_set(tmp_path: Path, required: bool):
    tools = [
        shutil.which(name, path=f"{Path(sys.executable).parent}:{os.environ['PATH']}") for name in ("cmake", "ninja")
    ]
    if None in tools or check.platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("needs cmake and ninja, on x86")
    compiler = tmp_path / "compiler"
    compiler.write_text('#!/bin/sh\ncase "$*" in *-mavx512bw*) exit 1;; esac\nexec g++ "$@"\n')
    compiler.chmod(0o755)
    done = subprocess.run(
        [
            *(str(tools[0]), "-S", str(ROOT), "-B", str(tmp_path / "build"), "-G", "Ninja"),
            *(f"-DCMAKE_MAKE_PROGRAM={tools[1]}", f"-DPython_EXECUTABLE={sys.executable}"),
            *(f"-DCMAKE_CXX_COMPILER={compiler}", f"-DGOSSAMER_REQUIRE_KERNELS={'1' if required else 'OFF'}"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    message = "the compiler lacks avx512, and GOSSAMER_REQUIRE_KERNELS is set"
    assert (done.returncode != 0, message in done.stderr) == (required, required), done.stdout + done.stderr
