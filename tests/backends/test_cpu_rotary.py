"""Pools of queries and keys before their rotary embedding, in C++ against the definition."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads

from gossamer import AttentionCall
from gossamer.backends import cpu
from gossamer.backends import torch as definition
from gossamer.plan import Grid
from gossamer.rotary import Rotary
from gossamer.testing import SITUATIONS, make_call

pytestmark = [needs_kernels, poisoned]

KINDS = {
    "all channels": Rotary.of_base(44),
    "some channels": Rotary.of_base(18, 100.0),
    "scaled": Rotary(torch.linspace(0.01, 1.0, 20), 1.3),
    "interleaved": Rotary(torch.linspace(0.01, 1.0, 20), 1.3, True),
    "offsets": Rotary(torch.linspace(0.01, 1.0, 20), offsets=torch.tensor([3, 40])),
}


@every_kernel
@pytest.mark.parametrize("kind", KINDS)
def test_pools_are_of_what_was_turned(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, kind: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    call = make_call("padded chunk", length=90, heads=4, groups=2, dim=44, dtype=dtype)
    call = replace(call, rotary=KINDS[kind])
    grid = Grid(call.extent, 7, 12)
    got = same_on_threads(lambda: cpu.pool_before_rotary(call, grid))
    # The last bit of 16 may be rounded otherwise.
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}[dtype]
    for pool, expected in zip(got, definition.pool_before_rotary(call, grid), strict=True):
        assert pool.dtype == torch.float32
        torch.testing.assert_close(pool, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [1, 30])
def test_any_strides_and_situations(situation: str, length: int) -> None:
    call = make_call(situation, length=length, heads=4, groups=2, dim=16)
    q, k = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (call.q, call.k))
    grid = Grid(call.extent, 8, 8)
    got = cpu.pool_before_rotary(replace(call, q=q, k=k), grid)
    for pool, expected in zip(got, definition.pool_before_rotary(call, grid), strict=True):
        torch.testing.assert_close(pool, expected, atol=1e-5, rtol=1e-4)


def test_calls_that_do_not_say_how_are_named() -> None:
    q = torch.randn(1, 1, 3, 6)
    call = AttentionCall(q, q)
    with pytest.raises(ValueError, match="does not say how q and k were turned"):
        cpu.pool_before_rotary(call, Grid(call.extent, 2, 2))
