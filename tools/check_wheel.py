"""Whether a wheel has its kernels: of files before they are published, of the installed package where it was built.

    python tools/check_wheel.py dist/*.whl     what the files hold
    python tools/check_wheel.py --installed    what the installed package can do on this machine

A build without a compiler gives a wheel without kernels, which installs, works, and is slower than dense attention.
That is right for who builds it on a machine of their own, and wrong for anything that is published.
"""

from __future__ import annotations

import argparse
import platform
import re
import sys
import zipfile
from collections.abc import Iterable
from pathlib import Path

KERNELS = re.compile(r"gossamer/backends/cpu/_kernels\.[^/]*so")
# What a package without them would lack in silence.
FILES = ("gossamer/py.typed", "gossamer/backends/cpu/_kernels.pyi", "gossamer/evaluate/haystack.txt.gz")
# The first bytes of a library; for Linux also the processor that it is for, at byte 18.
ELF, MACH_O = b"\x7fELF", b"\xcf\xfa\xed\xfe"
PROCESSORS = {"x86_64": 62, "aarch64": 183}
# What Linux calls the features of a processor that each instruction set needs. AMX is left out: whether a process may
# use it also depends on the system, and the build itself stops where it cannot be built.
NEEDS = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_bf16": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_bf16"},
}
DTYPES = ("bfloat16", "float16", "float32")


def faults_of_file(path: Path) -> list[str]:
    """What is wrong with a wheel, a sentence each; nothing of it is run."""
    platforms = path.stem.split("-")[-1]
    if platforms == "any":
        return ["it is pure Python, so its kernels were not built: set GOSSAMER_REQUIRE_KERNELS=1 to see why"]
    faults = []
    with zipfile.ZipFile(path) as wheel:
        names = wheel.namelist()
        kernels = [name for name in names if KERNELS.fullmatch(name)]
        if len(kernels) == 1:
            faults += faults_of_library(kernels[0], wheel.read(kernels[0])[:20], path.stem)
        else:
            faults.append(f"it has {len(kernels)} files _kernels.*.so in gossamer/backends/cpu, expected 1")
    faults += [f"it lacks {name}" for name in FILES if name not in names]
    if any("libgomp" in name for name in names):
        faults.append(
            "it brings a libgomp of its own, whose threads would compete with torch's: give auditwheel "
            "--exclude libgomp.so.1"
        )
    if platforms.startswith("linux_"):
        faults.append(f"its platform is {platforms}, which no index takes: run auditwheel repair")
    return faults


def faults_of_library(name: str, head: bytes, wheel: str) -> list[str]:
    """Whether a library, by its name and first bytes, is of the kind that the wheel's name promises."""
    faults = []
    _, abi, platforms = wheel.split("-")[-3:]
    if (abi == "abi3") != name.endswith(".abi3.so"):
        faults.append(f"{name} does not have the ABI of the wheel's name, {abi}")
    if "linux" not in platforms:
        return faults if head.startswith(MACH_O) else [*faults, f"{name} is no library for {platforms}"]
    processor = next((number for part, number in PROCESSORS.items() if platforms.endswith(part)), None)
    if not head.startswith(ELF) or int.from_bytes(head[18:20], "little") != processor:
        faults.append(f"{name} is no library for {platforms}")
    return faults


def expected_instruction_sets(machine: str, features: Iterable[str]) -> list[str]:
    """Those that kernels for this processor must list, with these features as Linux names them."""
    x86 = machine in ("x86_64", "AMD64")
    found = set(features)
    return ["portable", *(name for name, needs in NEEDS.items() if x86 and needs <= found), "amx_emulated"]


def faults_of_installed() -> list[str]:
    """What the installed package cannot do here, a sentence each."""
    from gossamer.backends import cpu
    from gossamer.cli.doctor import examine

    if not cpu.is_available():
        return [str(cpu.why_unavailable())]
    report = examine()
    listed = report["kernels"]["instruction_sets"]
    expected = expected_instruction_sets(platform.machine(), report["cpu"]["features"])
    faults = [f"the kernels do not list {name}; they list {listed}" for name in expected if name not in listed]
    for dtype in DTYPES:
        backend, tested = report["backend"][dtype], report["self_test"][dtype]
        if not backend.startswith("cpu/") or tested != "ok":
            faults.append(f"{dtype} runs on {backend}, expected a kernel of cpu/; its self-test says {tested}")
    if sys.platform == "linux":
        if not cpu.has_openmp():
            faults.append("the kernels were built without OpenMP, and do not share torch's threads")
        # After the self-tests above, which ran on threads.
        libraries = sorted(set(re.findall(r"/\S*libgomp\S*", Path("/proc/self/maps").read_text())))
        if len(libraries) != 1:
            faults.append(f"{len(libraries)} copies of libgomp are loaded, expected torch's alone: {libraries}")
    return faults


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("wheels", nargs="*", type=Path, metavar="WHEEL")
    parser.add_argument("--installed", action="store_true", help="check the gossamer that Python imports here")
    arguments = parser.parse_args(argv)
    if not arguments.wheels and not arguments.installed:
        parser.error("give wheels, or --installed")
    found = {str(path): faults_of_file(path) for path in arguments.wheels}
    if arguments.installed:
        found["the installed gossamer"] = faults_of_installed()
    for what, faults in found.items():
        print("\n  ".join([f"{what}:", *faults]) if faults else f"{what}: ok")
    return int(any(found.values()))


if __name__ == "__main__":
    sys.exit(main())
