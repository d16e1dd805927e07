"""Every Triton kernel compiles for Ampere or Hopper, without a GPU, and to what it is meant to be."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gossamer.backends import triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux"),
]


@pytest.fixture(scope="module", params=[80, 90])
def compiled(request, tmp_path_factory) -> tuple[int, dict[str, list[str]]]:
    """A capability, and by kernel what `compile_triton` tells of it."""
    cache = str(tmp_path_factory.mktemp("triton"))
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": cache}
    script = Path(__file__).with_name("compile_triton.py")
    command = [sys.executable, str(script), str(request.param)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return request.param, {name: words for name, *words in map(str.split, done.stdout.splitlines())}


def test_products_are_of_tensor_cores_and_loads_asynchronous(compiled) -> None:
    """By descriptors where consecutive keys are loaded; gathered columns stay copies by pointers. fp32 is exact."""
    capability, kernels = compiled
    usual = {"asynchronous-copy", "warpgroup-matrix" if capability >= 90 else "warp-matrix"}
    expected = {"attend": usual, "attend-attributes": usual, "attend-int8": usual | {"int8-matrix"}}
    of_gradients = ("query_gradients", "key_gradients") if capability >= 90 else ("column_gradients", "mean_gradients")
    expected |= dict.fromkeys(of_gradients, usual)
    if capability >= 90:
        expected |= dict.fromkeys(("probe_sums", "probe_mass", "row_energies", "antidiagonal_mass"), usual)
        expected |= dict.fromkeys(("attend", "attend-attributes"), usual | {"tensor-copy"})
        expected |= {"attend-fp32": set(), "sums-fp32": set()}
    assert {name: set(words[2:]) for name, words in kernels.items()} == expected


def test_operands_fit_the_registers(compiled) -> None:
    """A few addresses may spill, in bytes of a stack; where operands do, it has thousands."""
    assert [name for name, words in compiled[1].items() if int(words[1]) > 384] == []
