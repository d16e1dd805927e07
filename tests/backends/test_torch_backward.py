"""The definition of the gradients, against torch.autograd over dense fp64 attention and finite differences."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import EVERYWHERE, call_in
from gradients import NAMES, Reaching, assert_near, plan_under, reaching, with_extras
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import AttentionCall, SparsePlan
from gossamer.backends.torch import attend, attend_backward
from gossamer.backends.torch.backward import Needs

KINDS: dict[str, dict[str, Any]] = {
    "blocks, columns and bands": {},
    "shared by heads": {"heads": 2},
    "permuted": {"permuted": True},
    "means": {"pruned_mean": True},
    "other parts": {"seed": 5},
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def plan_in(call: AttentionCall, kind: str) -> SparsePlan:
    """A random plan for a call, under the call's own extent."""
    return plan_under(call, **KINDS[kind])


def gradients(
    call: AttentionCall, plan: SparsePlan, given: Reaching, needs: Needs | None = None
) -> dict[str, Tensor | None]:
    out, lse = attend(call, plan)
    found = attend_backward(call, plan, out, lse, given.out, given.lse, needs or Needs())
    return dict(zip(NAMES, found, strict=True))


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("situation", EVERYWHERE)
@every_kind
def test_gradients_everywhere(situation: str, kind: str) -> None:
    call = call_in(situation, dtype=torch.float64)
    plan = plan_in(call, kind)
    given = reaching(call)
    # What reaches dead rows says nothing.
    dead = ~call.extent.live_queries(call.query_len)[:, None]
    given.out.masked_fill_(dead[..., None], math.nan)
    assert given.lse is not None
    given.lse.masked_fill_(dead, math.nan)
    assert_near(call, plan, given, gradients(call, plan, given))


@pytest.mark.parametrize("extras", [{}, {"bias": False}, {"softcap": False}, {"sinks": False}], ids=str)
@pytest.mark.parametrize("situation", ["padded chunk", "random 1", "bidirectional", "rows without tokens"])
def test_sinks_soft_cap_and_bias(situation: str, extras: dict[str, bool]) -> None:
    call = with_extras(call_in(situation, dtype=torch.float64), **extras)
    plan = plan_in(call, "blocks, columns and bands")
    given = reaching(call)
    assert_near(call, plan, given, gradients(call, plan, given))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@every_kind
def test_gradients_of_narrower_numbers(kind: str, dtype: torch.dtype) -> None:
    call = call_in("padded chunk", dim=16, dtype=dtype)
    plan = plan_in(call, kind)
    given = reaching(call, lse=False)
    found = gradients(call, plan, given)
    for name in "qkv":
        assert getattr(found[name], "dtype", None) == dtype
    assert_near(call, plan, given, found)


@pytest.mark.parametrize("name", NAMES)
def test_finite_differences(name: str) -> None:
    call = with_extras(call_in("no padding", dtype=torch.float64))
    plan, given = plan_in(call, "blocks, columns and bands"), reaching(call)
    assert given.lse is not None
    found = gradients(call, plan, given)[name]
    assert found is not None
    way = torch.randn(found.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def loss(step: float) -> float:
        out, lse = attend(replace(call, **{name: getattr(call, name) + step * way}), plan)
        assert given.lse is not None
        return float((out * given.out).sum() + (lse * given.lse)[lse.isfinite()].sum())

    slope = (loss(1e-6) - loss(-1e-6)) / 2e-6
    assert float((found * way).sum()) == pytest.approx(slope, rel=1e-6)


def test_rows_and_plans_that_attend_nothing() -> None:
    call = call_in("padded chunk", dtype=torch.float64)
    plan = SparsePlan(call.heads, call.query_len, call.key_len, call.extent)
    given = Reaching(torch.full_like(reaching(call).out, math.nan), torch.full(call.q.shape[:3], math.nan).double())
    for name, found in gradients(call, plan, given).items():
        assert found is None or bool((found == 0).all()), name


@pytest.mark.parametrize("chosen", NAMES)
def test_what_is_not_asked_for_is_not_computed(chosen: str) -> None:
    call = with_extras(call_in("no padding", dtype=torch.float64))
    plan, given = plan_in(call, "means"), reaching(call)
    plan = plan.with_attributes()
    needs = Needs(*(name == chosen for name in NAMES))
    products = 0

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal products
            products += func in (torch.ops.aten.bmm.default, torch.ops.aten.mm.default)
            return func(*args, **(kwargs or {}))

    out, lse = attend(call, plan)
    whole = attend_backward(call, plan, out, lse, given.out, given.lse)
    with Count():
        found = attend_backward(call, plan, out, lse, given.out, given.lse, needs)
    for name, some, all_of_it in zip(NAMES, found, whole, strict=True):
        assert (some is None) == (name != chosen)
        assert some is None or (all_of_it is not None and torch.equal(some, all_of_it))
    # Logits; then what reaches weights, for all but v and sinks; then the gradient's own.
    assert products == {"q": 3, "k": 3, "v": 2, "sinks": 1, "bias": 2}[chosen]


def test_memory_is_linear_in_the_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.backends.torch.backward._LOGITS", 1 << 13)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            for x in result if isinstance(result, tuple | list) else [result]:
                largest = max(largest, x.numel() if isinstance(x, Tensor) else 0)
            return result

    call = call_in("no padding", length=512, heads=2, groups=1, dim=8)
    plan = SparsePlan(2, 512, 512, call.extent, sink=4, window=60)
    out, lse = attend(call, plan)
    with Watch():
        attend_backward(call, plan, out, lse, out, None)
    assert largest <= 1 << 14


def test_plans_that_skip_are_refused() -> None:
    call = call_in("no padding", length=70, dtype=torch.float64)
    plan = SparsePlan(2, 70, 70, call.extent).with_attributes(skip=1.0)
    out, lse = attend(call, plan)
    with pytest.raises(ValueError, match="a plan with skip has no gradient; make the plan without"):
        attend_backward(call, plan, out, lse, out)


@pytest.mark.parametrize("attribute", [{"pruned_mean": True}, {"skip": 1.0}])
def test_a_bias_goes_without_attributes(attribute: dict[str, Any]) -> None:
    call = with_extras(call_in("no padding", length=70, dtype=torch.float64))
    plan = SparsePlan(2, 70, 70, call.extent).with_attributes(**attribute)
    with pytest.raises(ValueError, match="a bias goes with plans that have neither pruned_mean nor skip"):
        attend(call, plan)


@pytest.mark.parametrize("name", NAMES)
def test_a_wrong_gradient_is_caught(name: str) -> None:
    """The check itself: one element of a thousandth of the norm, and a gradient that is absent."""
    call = with_extras(call_in("padded chunk", dtype=torch.float64))
    plan, given = plan_in(call, "blocks, columns and bands"), reaching(call)
    found = gradients(call, plan, given)
    assert_near(call, plan, given, found)
    right = found[name]
    assert right is not None
    wrong = right.clone()
    wrong.view(-1)[int(right.abs().argmax())] += right.norm() / 1000
    with pytest.raises(AssertionError, match=f"d{name}: error"):
        assert_near(call, plan, given, found | {name: wrong})
    with pytest.raises(AssertionError):
        assert_near(call, plan, given, found | {name: None})
