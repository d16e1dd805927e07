"""The gradients of the C++ kernels: on every instruction set, in every dtype, against dense attention in fp64."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_checks import every_isa, every_kernel, needs_kernels, poisoned, same_on_threads
from definitions import EVERYWHERE, call_in
from gradients import NAMES, Reaching, assert_near, plan_under, reaching, with_extras
from torch import Tensor

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as definition
from gossamer.backends.torch.backward import ALL, Needs
from gossamer.testing import random_plan

pytestmark = [needs_kernels, poisoned]

KINDS: dict[str, dict[str, Any]] = {
    "blocks, columns and bands": {"block": 16},
    "shared by heads": {"block": 64, "heads": 2},
    "other parts": {"block": 128, "seed": 5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def gradients(call: AttentionCall, plan: SparsePlan, given: Reaching, needs: Needs = ALL) -> dict[str, Tensor | None]:
    out, lse = cpu.attend(call, plan)
    return dict(zip(NAMES, cpu.attend_backward(call, plan, out, lse, given.out, given.lse, needs), strict=True))


def poison(call: AttentionCall, given: Reaching) -> None:
    """What reaches dead rows is not read."""
    dead = ~call.extent.live_queries(call.query_len)[:, None]
    given.out.masked_fill_(dead[..., None], math.nan)
    if given.lse is not None:
        given.lse.masked_fill_(dead, math.nan)


@every_kernel
@every_kind
def test_gradients_everywhere(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, kind: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    length = 70 if isa == "amx_emulated" else 140
    turn = list(KINDS).index(kind)
    for number, situation in list(enumerate(EVERYWHERE))[turn :: len(KINDS)]:
        call = call_in(situation, length=length, dim=24, dtype=dtype)
        if number % 2:
            # A bias is computed as dimensions, but beside a soft-cap and in fp16.
            call = with_extras(call, bias=number % 4 == 3 and dtype != torch.float16, softcap=number % 4 == 1)
        plan, given = plan_under(call, **KINDS[kind]), reaching(call, lse=number % 3 == 0)
        poison(call, given)
        assert_near(call, plan, given, gradients(call, plan, given))


@every_kernel
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_head_dimensions(monkeypatch: pytest.MonkeyPatch, isa: str, dtype: torch.dtype, dim: int) -> None:
    """Values are wider than keys by one."""
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    call = call_in("padded chunk", length=70, dim=dim - 1, dtype=dtype)
    plan, given = plan_under(call, block=32), reaching(call, lse=False)
    assert_near(call, plan, given, gradients(call, plan, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("causal", [True, False])
def test_long_inputs_in_several_strips_on_several_threads(dtype: torch.dtype, causal: bool) -> None:
    """Bit for bit what one thread computes, and near the definition."""
    plan = random_plan(4, batch=2, heads=2, query_len=2300, key_len=2500, causal=causal)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, n, length, 32, generator=generator) for n, length in ((4, 2300), (2, 2500), (2, 2500)))
    call = AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, sinks=torch.randn(4, generator=generator))
    given = reaching(call)
    found = same_on_threads(lambda: [x for x in gradients(call, plan, given).values() if x is not None])
    assert call.sinks is not None
    exact = replace(call, q=call.q.double(), k=call.k.double(), v=call.values.double(), sinks=call.sinks.double())
    out, lse = definition.attend(exact, plan)
    assert given.lse is not None
    expected = definition.attend_backward(exact, plan, out, lse, given.out.double(), given.lse.double())
    for got, right in zip(found, expected, strict=False):
        assert right is not None
        error = float((got.double() - right).norm() / right.norm())
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@every_isa
def test_queries_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch, isa: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)
    call = call_in("padded chunk", length=90, dim=16)
    plan = plan_under(call, block=16, permuted="q")
    given = reaching(call)
    poison(call, given)
    assert_near(call, plan, given, gradients(call, plan, given))


@pytest.mark.parametrize("kind", [{"permuted": True}, {"pruned_mean": True}, {"bias": True}], ids=str)
def test_what_the_kernels_lack_the_definition_computes(kind: dict[str, Any]) -> None:
    call = call_in("padded chunk", length=60, dim=16)
    if "bias" in kind:  # beside a soft-cap
        call = with_extras(call, sinks=False)
    plan, given = plan_under(call, **{name: value for name, value in kind.items() if name != "bias"}), reaching(call)
    out, lse = definition.attend(call, plan)
    for mine, right in zip(
        cpu.attend_backward(call, plan, out, lse, *given),
        definition.attend_backward(call, plan, out, lse, *given),
        strict=True,
    ):
        assert (mine is None) == (right is None)
        assert mine is None or (right is not None and torch.equal(mine, right))


@pytest.mark.parametrize("chosen", NAMES[:4])
def test_what_is_not_asked_for_is_not_made(chosen: str) -> None:
    call = with_extras(call_in("no padding", length=90, dim=16), bias=False)
    plan, given = plan_under(call, block=16), reaching(call)
    whole = gradients(call, plan, given)
    some = gradients(call, plan, given, Needs(*(name == chosen for name in NAMES)))
    for name in NAMES:
        assert (some[name] is None) == (name != chosen)
    assert torch.equal(torch.as_tensor(some[chosen]), torch.as_tensor(whole[chosen]))


def test_tensors_of_any_strides() -> None:
    call = call_in("no padding", length=90, dim=16)
    plan, given = plan_under(call, block=16), reaching(call)
    expected = gradients(call, plan, given)
    turned = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    odd = Reaching(given.out.transpose(2, 3).contiguous().transpose(2, 3), given.lse)
    found = gradients(replace(call, **turned), plan, odd)
    for name in "qkv":
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))


def test_rows_that_attend_nothing_have_no_gradient() -> None:
    call = call_in("padded chunk", length=90, dim=16)
    plan = SparsePlan(call.heads, call.query_len, call.key_len, call.extent)
    given = Reaching(torch.full_like(reaching(call).out, math.nan), None)
    for found in gradients(call, plan, given).values():
        assert found is None or bool((found == 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_reaches_rows_that_attend_their_sink_alone_is_not_read(dtype: torch.dtype, bad: float) -> None:
    call = with_extras(call_in("no padding", length=90, dim=16, dtype=dtype), softcap=False, bias=False)
    lists = {"column_group": 90, "column_indptr": torch.arange(call.batch * call.heads + 1)}
    columns = torch.full((call.batch * call.heads,), 10, dtype=torch.int32)
    plan = SparsePlan(call.heads, 90, 90, call.extent, column_indices=columns, **lists)
    given = reaching(call)
    expected = gradients(call, plan, given)
    alone = ~plan.to_mask().any(dim=-1)
    assert bool(alone.any())
    given.out.masked_fill_(alone[..., None], bad)
    found = gradients(call, plan, given)
    for name in NAMES[:4]:
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])), name


def test_nothing_to_attend() -> None:
    call = call_in("rows without tokens", length=20, dim=16)
    empty = replace(call, q=call.q[:, :, :0], extent=call.extent.of_queries(0, 0))
    plan = SparsePlan.dense(4, 0, call.key_len, empty.extent)
    out, lse = cpu.attend(empty, plan)
    q, k, v, *_ = cpu.attend_backward(empty, plan, out, lse, out)
    assert q is not None
    assert q.shape == empty.q.shape
    for found in (k, v):
        assert found is not None
        assert bool((found == 0).all())


def test_plans_that_skip_are_refused() -> None:
    call = call_in("no padding", length=70, dim=16)
    plan = SparsePlan(2, 70, 70, call.extent).with_attributes(skip=1.0)
    out, lse = cpu.attend(call, plan)
    with pytest.raises(ValueError, match="a plan with skip has no gradient"):
        cpu.attend_backward(call, plan, out, lse, out)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_a_wrong_gradient_is_caught(name: str) -> None:
    call = with_extras(call_in("no padding", length=90, dim=16), bias=False)
    plan, given = plan_under(call, block=16), reaching(call)
    found = gradients(call, plan, given)
    right = found[name]
    assert right is not None
    with pytest.raises(AssertionError, match=f"d{name}: error"):
        assert_near(call, plan, given, found | {name: right * 1.001})
