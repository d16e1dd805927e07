"""Which instruction set runs, and in whose threads."""

import os
import subprocess
import sys

import pytest
import torch
from cpu_checks import BF16_ISAS, DTYPES, draw, every_isa, needs_kernels, poisoned

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu

pytestmark = [needs_kernels, poisoned]


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


def dense(heads: int, query_len: int, key_len: int) -> SparsePlan:
    return SparsePlan.dense(heads, query_len, key_len, Extent.full(1, query_len, key_len))


def test_unknown_instruction_set_is_named(force) -> None:
    plan = dense(1, 4, 4)
    force("sse9")
    with pytest.raises(ValueError, match=r"GOSSAMER_CPU_ISA='sse9' is not supported here; use one of: portable"):
        cpu.attend(draw(plan, heads=1, groups=1, dim=8), plan)


@every_isa
def test_forced_instruction_set_is_used(force, isa: str) -> None:
    force(isa)
    assert cpu.active_isa(torch.bfloat16) == isa
    assert (cpu.active_isa(torch.float32) == isa) == (isa not in BF16_ISAS)


def test_emulation_is_never_chosen() -> None:
    assert "amx_emulated" not in {cpu.active_isa(dtype) for dtype in DTYPES.values()}


@pytest.mark.skipif(sys.platform != "linux" or not cpu.has_openmp(), reason="reads /proc; needs OpenMP")
@pytest.mark.parametrize("first", ["torch", "gossamer.backends.cpu"])
def test_shares_the_openmp_runtime_of_torch(first: str) -> None:
    code = (
        f"import {first}, torch, gossamer.backends.cpu\n"
        "from gossamer import AttentionCall, SparsePlan\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "x = torch.randn(1, 1, 9, 16)\n"
        "call = AttentionCall(x, x, x)\n"
        "gossamer.backends.cpu.attend(call, SparsePlan.dense(1, 9, 9, call.extent))\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert done.stdout.strip() == "1"


@every_isa
@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_below_the_normal_range_count_as_nothing(force, isa: str, dtype: str) -> None:
    """On every instruction set alike. Of a weight of e^-88.5 of the row's largest nothing is left, not even of 1e38."""
    force(isa)
    if DTYPES[dtype] == torch.float16:
        pytest.skip("has no value large enough to show it")
    q = torch.ones(1, 1, 1, 32, dtype=DTYPES[dtype])
    k = torch.zeros(1, 1, 2, 32, dtype=DTYPES[dtype])
    k[:, :, 1, 0] = -88.5
    v = torch.ones(1, 1, 2, 32, dtype=DTYPES[dtype])
    v[:, :, 1] = 1e38
    call = AttentionCall(q, k, v, scale=1.0)
    out, _ = cpu.attend(call, SparsePlan.dense(1, 1, 2, call.extent))
    assert torch.equal(out, torch.ones_like(out))
