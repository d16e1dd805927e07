"""A bias as dimensions of queries and keys, on every instruction set, against the definition."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned
from definitions import EVERYWHERE, call_in
from gradients import plan_under, reaching, with_extras

import gossamer
from gossamer import AttentionCall, SparsePlan, backends
from gossamer.backends import cpu
from gossamer.backends import torch as definition
from gossamer.backends.torch.backward import Needs

pytestmark = [needs_kernels, poisoned]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def call_of(bias: Any, *, length: int = 40, **more: Any) -> AttentionCall:
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 2, length, 16, generator=generator) for _ in range(3))
    return AttentionCall(q, k, v, bias=torch.as_tensor(bias).float().expand(1, 2, length), **more)


def both(call: AttentionCall) -> list[torch.Tensor]:
    plan = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    return [cpu.attend(call, plan)[0], definition.attend(call, plan)[0]]


@every_kernel
def test_attention_with_a_bias_everywhere(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    for number, situation in enumerate(EVERYWHERE):
        call = with_extras(call_in(situation, length=70, dim=24, dtype=dtype), sinks=number % 2 == 0, softcap=False)
        plan = plan_under(call, block=16)
        if dtype == torch.float16:
            with pytest.raises(ValueError, match="knows no bias"):
                cpu.attend(call, plan)
            continue
        (out, lse), (expected, expected_lse) = cpu.attend(call, plan), definition.attend(call, plan)
        live = call.extent.live_queries(call.query_len)[:, None].expand(lse.shape)
        torch.testing.assert_close(out[live], expected[live], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
        torch.testing.assert_close(lse[live], expected_lse[live], atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("scale", [0.25, -0.7, 3.0])
@pytest.mark.parametrize("size", [0.0, 1.0, 300.0, 1e30, torch.finfo(torch.float32).max])
def test_a_bias_of_any_size(scale: float, size: float) -> None:
    for sign in (1, -1):
        torch.testing.assert_close(*both(call_of(sign * size, scale=scale)), atol=2e-4, rtol=1e-4)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1, 2, 40, generator=generator) * min(size, 1e30)
    torch.testing.assert_close(*both(call_of(drawn, scale=scale)), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("scale", [0.25, -0.7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_bias_of_minus_infinity_leaves_a_key_out(scale: float, dtype: torch.dtype) -> None:
    bias = torch.zeros(40).masked_fill(torch.arange(40) % 3 == 0, -math.inf)
    given = call_of(bias, scale=scale)
    call = replace(given, q=given.q.to(dtype), k=given.k.to(dtype), v=given.values.to(dtype))
    out, expected = both(call)
    assert not out[:, :, 0].any()  # the first query sees the first key alone
    torch.testing.assert_close(out, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_bf16_holds_a_bias_as_exactly_as_fp32() -> None:
    """Rounded to bf16, 1000 + 1/8 and 1000 would be one number."""
    bias = torch.where(torch.arange(40) % 2 == 0, 1000.0, 1000.125)
    call = call_of(bias)
    call = replace(call, q=torch.zeros_like(call.q).bfloat16(), k=call.k.bfloat16(), v=call.values.bfloat16())
    lse = cpu.attend(call, SparsePlan.dense(2, 40, 40, call.extent))[1]
    expected = bias.double().expand(40, 40).masked_fill(torch.ones(40, 40).triu(1).bool(), -math.inf).logsumexp(-1)
    torch.testing.assert_close(lse[0, 0].double(), expected, atol=2e-4, rtol=0)


@pytest.mark.parametrize("asked", range(5))
def test_only_what_is_asked_for_is_computed(asked: int) -> None:
    call = with_extras(call_in("padded chunk", length=40, dim=16), softcap=False)
    plan, given = plan_under(call, block=16), reaching(call)
    out, lse = cpu.attend(call, plan)
    whole = cpu.attend_backward(call, plan, out, lse, given.out, given.lse)
    part = cpu.attend_backward(call, plan, out, lse, given.out, given.lse, Needs(*(n == asked for n in range(5))))
    for n, (own, other) in enumerate(zip(part, whole, strict=True)):
        assert (own is not None) == (n == asked)
        if own is not None and other is not None:
            assert torch.equal(own, other)


def test_the_kernels_are_chosen_where_they_can() -> None:
    call = call_of(0.5)
    assert backends.name_of(call).startswith("cpu/")
    assert backends.name_of(replace(call, softcap=2.0)) == "torch"
    q, k, v = (torch.randn(1, 1, 4, 256) for _ in range(3))
    wide = AttentionCall(q, k, v, bias=torch.zeros(1, 1, 4))
    assert backends.name_of(wide) == "torch"
    plan = SparsePlan.from_block_mask(torch.ones(1, 2, 1, 1).bool(), 40, 40, extent=call.extent, pruned_mean=True)
    with pytest.raises(ValueError, match="a bias goes with plans that have neither"):
        cpu.attend(call, plan)


@pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path")
def test_training_with_a_bias_runs_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """And gives what the definition gives, by autograd."""
    found = []
    for backend in ("cpu", "torch"):
        monkeypatch.setenv("GOSSAMER_BACKEND", backend)
        call = call_of(torch.linspace(-1, 1, 40))
        assert call.bias is not None
        q, k, v, bias = leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.values, call.bias)]
        method = gossamer.methods.create("a_shape", sink=4, window=9)
        policy = gossamer.Policy(method, min_tokens=1)
        out = gossamer.sparse_attention(q, k, v, policy, bias=bias)
        out.square().sum().backward()
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-4)
