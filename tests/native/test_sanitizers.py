"""The C++ code under AddressSanitizer (with undefined behaviour) and under ThreadSanitizer."""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gossamer.backends import cpu

SOURCES = Path(__file__).parents[2] / "csrc"
STRESS = Path(__file__).parent / "stress.cpp"
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
FLAGS = {
    "isa_avx2.cpp": AVX2,
    "isa_avx512.cpp": AVX512,
    "isa_avx512_bf16.cpp": [*AVX512, "-mavx512bf16"],
    "isa_amx.cpp": [*AVX512, "-mavx512bf16"],
}
X86 = platform.machine() in ("x86_64", "AMD64")
COMPILER = shutil.which("g++") or shutil.which("clang++")


@pytest.mark.slow
@pytest.mark.skipif(COMPILER is None or sys.platform != "linux", reason="needs a C++ compiler on Linux")
@pytest.mark.parametrize(
    ("sanitizer", "options"),
    [
        # Built without OpenMP, whose own threads ThreadSanitizer cannot follow: the kernels then start their own.
        ("thread", []),
        ("address,undefined", ["-fno-sanitize-recover=all"]),
    ],
)
def test_nothing_is_reported(sanitizer: str, options: list[str], tmp_path: Path) -> None:
    common = ["-std=c++17", "-O1", "-g1", "-fno-strict-aliasing", "-pthread", f"-I{SOURCES}", *options]
    common += [f"-fsanitize={sanitizer}", "-DGOSSAMER_SMALL_BUDGETS"]
    common += ["-DGOSSAMER_X86", *(f"-DGOSSAMER_HAS_{Path(name).stem[4:].upper()}" for name in FLAGS)] if X86 else []
    sources = [
        path for path in SOURCES.rglob("*.cpp") if path.parent.name != "python" and (X86 or path.name not in FLAGS)
    ]

    def build(source: Path) -> str:
        target = str(tmp_path / f"{source.stem}.o")
        flags = [*common, *FLAGS.get(source.name, [])]
        subprocess.run([str(COMPILER), *flags, "-w", "-c", str(source), "-o", target], check=True)
        return target

    with ThreadPoolExecutor(max_workers=2) as pool:
        objects = list(pool.map(build, [*sources, STRESS]))
    program = str(tmp_path / "stress")
    subprocess.run([str(COMPILER), *common, *objects, "-o", program], check=True)
    done = subprocess.run(
        [program, "40"],
        capture_output=True,
        text=True,
        env={**os.environ, "TSAN_OPTIONS": "halt_on_error=1", "ASAN_OPTIONS": "detect_leaks=0"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert "0 wrong" in done.stdout
    if cpu.is_available():
        assert f"each of {len(cpu.supported_isas())} instruction sets" in done.stdout
