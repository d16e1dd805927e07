"""A bias of each key in Triton, against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import EVERYWHERE, call_in
from gradients import plan_under, with_extras
from triton_checks import check, draw, plan_for, run
from triton_support import MARKS

from gossamer import AttentionCall, Extent, SparsePlan, backends
from gossamer.backends import torch as definition

pytestmark = MARKS


def call_of(bias: torch.Tensor | float, **more: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, 40, 16, generator=generator) for _ in range(3))
    return AttentionCall(q, k, v, bias=torch.as_tensor(bias).float().expand(1, 2, 40), **more)


def dense(call: AttentionCall) -> SparsePlan:
    return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)


@pytest.mark.parametrize("situation", EVERYWHERE)
def test_a_bias_everywhere(situation: str) -> None:
    number = list(EVERYWHERE).index(situation)
    call = call_in(situation, length=70, dim=24, dtype=torch.float32)
    call = with_extras(call, sinks=number % 2 == 0, softcap=number % 3 == 0)
    assert call.bias is not None
    check(call, plan_under(call, block=16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_blocks_columns_and_bands(dtype: torch.dtype) -> None:
    plan = SparsePlan.dense(2, 100, 100, Extent.full(2, 100, 100))
    call = draw(plan, heads=4, groups=2, dim=32, dtype=dtype)
    bias = torch.randn(2, 2, 100, generator=torch.Generator().manual_seed(2))
    check(replace(call, bias=bias.to(dtype)), plan_for(call, 1, heads=2))


@pytest.mark.parametrize("scale", [0.25, -0.7, 0.0])
@pytest.mark.parametrize("size", [1.0, 300.0, torch.finfo(torch.float32).max])
def test_a_bias_of_any_size(scale: float, size: float) -> None:
    for call in (
        call_of(size, scale=scale),
        call_of(-size, scale=scale),
        call_of(torch.linspace(-1, 1, 40) * min(size, 1e30), scale=scale),
    ):
        out, expected = run(call, dense(call))[0], definition.attend(call, dense(call))[0]
        torch.testing.assert_close(out, expected, atol=2e-4, rtol=1e-4)


def test_a_bias_of_minus_infinity_leaves_a_key_out() -> None:
    call = call_of(torch.zeros(40).masked_fill(torch.arange(40) % 3 == 0, -math.inf))
    out, lse = run(call, dense(call))
    assert not out[:, :, 0].any()  # the first query sees the first key alone
    assert bool((lse[:, :, 0] == -math.inf).all())
    torch.testing.assert_close(out, definition.attend(call, dense(call))[0], atol=1e-5, rtol=1e-5)


def test_beside_attributes_it_is_refused() -> None:
    call = call_of(0.5)
    plan = SparsePlan.from_block_mask(torch.ones(1, 2, 1, 1).bool(), 40, 40, extent=call.extent, pruned_mean=True)
    with pytest.raises(ValueError, match="a bias goes with plans that have neither"):
        run(call, plan)


def test_its_gradient_is_that_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for backend in ("triton", "torch"):
        monkeypatch.setenv("GOSSAMER_BACKEND", backend)
        call = call_of(torch.linspace(-1, 1, 40))
        assert call.bias is not None
        leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.values, call.bias)]
        call = AttentionCall(leaves[0], leaves[1], leaves[2], bias=leaves[3])
        backends.attend(call, dense(call))[0].square().sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
