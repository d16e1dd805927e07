"""The definition of a quantised plan, against attention with integers written out number by number."""

import importlib
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import attention, call_in, everywhere, of_each_head, plan_pairs, rows_of

from gossamer import AttentionCall, Extent, SparsePlan, backends
from gossamer.backends import cpu
from gossamer.backends.torch import attend, attend_rows
from gossamer.backends.torch.integers import integers_of
from gossamer.methods.merging import merge_plans
from gossamer.plan import Grid
from gossamer.testing import assert_accurate

definition = importlib.import_module("gossamer.backends.torch.attend")  # the package has a function of its name

pytestmark = pytest.mark.usefixtures("constants")


def plan_of(call: AttentionCall, heads: int, **fields: Any) -> SparsePlan:
    grid = Grid(call.extent, 6, 5)
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(call.batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < 0.4
    sizes = {"extent": call.extent, "block_q": 6, "block_k": 5, "sink": 2, "quantised": True}
    return SparsePlan.from_block_mask(chosen, call.query_len, call.key_len, **(sizes | fields))


def rounded(numbers: list[float]) -> list[float]:
    """To 255 whole numbers of steps."""
    step = max(map(abs, numbers)) / 127
    return [round(number / step) * step if step else 0.0 for number in numbers]


def with_integers(call: AttentionCall) -> AttentionCall:
    """A call in fp64 whose products are those of integers: one dimension more adds what the keys' mean gives."""
    q = torch.zeros(*call.q.shape[:3], call.q.shape[3] + 1, dtype=torch.float64)
    k = torch.zeros(*call.k.shape[:3], call.k.shape[3] + 1, dtype=torch.float64)
    for b, row in enumerate(rows_of(call.extent)):
        keys = list(row.live_keys())
        for g in range(call.groups):
            own = call.k[b, g].double()
            mean = sum(own[j] for j in keys) / max(1, len(keys))
            for j in keys:
                k[b, g, j] = torch.tensor([*rounded((own[j] - mean).tolist()), 1.0])
            for h in range(g * call.share, (g + 1) * call.share):
                for i in row.live_queries():
                    query = call.q[b, h, i].double()
                    q[b, h, i] = torch.tensor([*rounded(query.tolist()), float((query * mean).sum())])
    return replace(call, q=q, k=k, v=call.values.double(), scale=call.scale)


def assert_attends(call: AttentionCall, plan: SparsePlan) -> None:
    pairs = of_each_head(plan, call.heads, plan_pairs(plan))
    expected, expected_lse = attention(with_integers(call), pairs)
    out, lse = attend(call, plan)
    assert out.dtype == call.q.dtype
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


@everywhere
@pytest.mark.parametrize("heads", [4, 2], ids=["plan per head", "plan per key/value head"])
def test_products_are_of_integers_everywhere(situation: str, heads: int) -> None:
    call = call_in(situation)
    assert_attends(call, plan_of(call, heads))


def test_sinks_and_soft_cap_see_whole_logits() -> None:
    call = replace(call_in("padded chunk"), sinks=torch.tensor([0.3, -1.0, 2.0, 0.0]), softcap=1.5, scale=-0.8)
    assert_attends(call, plan_of(call, 4))


def test_what_all_keys_share_costs_nothing() -> None:
    """An offset of 100 of all keys, exact in binary: the same weights, and an LSE that knows of it."""
    call = call_in("no padding", dtype=torch.float64)
    plan = plan_of(call, 4)
    out, lse = attend(call, plan)
    shifted, shifted_lse = attend(replace(call, k=call.k + 100.0, scale=call.scale), plan)
    torch.testing.assert_close(shifted, out, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(shifted_lse, lse + 100 * call.scale * call.q.sum(-1), atol=1e-9, rtol=1e-9)


def test_it_is_near_attention_and_is_not_it() -> None:
    call = call_in("no padding", length=60, dim=32)
    plan = plan_of(call, 4)
    exact = attend(call, plan.with_attributes())[0]
    error = float((attend(call, plan)[0] - exact).norm() / exact.norm())
    assert 1e-4 < error < 2e-2


def test_codes_reach_from_end_to_end() -> None:
    """The largest number of every token is 127 steps; tokens of zeros, and dead ones, are zeros."""
    q, k = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 4, 8)
    q[:, :, 1] = 0.0
    live = torch.tensor([[True, True, False, True]])
    k[:, :, 2] = 0.0
    codes = integers_of(q, k, live)
    assert codes.q.dtype == codes.k.dtype == torch.int8
    assert codes.q.abs().amax(-1).tolist() == [[[127, 0, 127]] * 2]
    assert codes.k.abs().amax(-1).tolist() == [[[127, 127, 0, 127]]]
    mean = k[:, :, live[0]].mean(2)
    torch.testing.assert_close(codes.shifts, (q * mean[:, :, None]).sum(-1))
    torch.testing.assert_close(codes.k[0, 0, 0] * codes.k_steps[0, 0, 0], k[0, 0, 0] - mean[0, 0], atol=0.02, rtol=0)


def test_no_keys_is_no_attention() -> None:
    q, nothing = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 0, 4)
    call = AttentionCall(q, nothing, nothing, Extent([0], [3], [0], [0]))
    out, lse = attend(call, SparsePlan(1, 3, 0, call.extent, quantised=True))
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_the_cpu_computes_the_ordinary_product() -> None:
    call = call_in("padded chunk", dim=16)
    plan = plan_of(call, 2)
    for got, expected in zip(cpu.attend(call, plan), cpu.attend(call, plan.with_attributes()), strict=True):
        assert torch.equal(got, expected)
    assert_accurate(call, plan, *cpu.attend(call, plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("integers", [True, False])
def test_a_backend_is_held_to_what_it_computes(dtype: torch.dtype, *, integers: bool) -> None:
    """Both products pass, and neither with an error that lies between them."""
    call = call_in("padded chunk", length=60, dim=32)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.values.to(dtype))
    plan = plan_of(call, 4)
    out, lse = attend(call, plan if integers else plan.with_attributes())
    assert_accurate(call, plan, out, lse)
    with pytest.raises(AssertionError, match=r"error .* exceeds"):
        assert_accurate(call, plan, out * 1.02, lse)
    with pytest.raises(AssertionError, match="lse is off"):
        assert_accurate(call, plan, out, lse + 0.03)


def test_queries_and_keys_are_rounded_once_for_all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    monkeypatch.setattr(definition, "_LOGITS", 1)
    monkeypatch.setattr(definition, "integers_of", lambda *given: called.append(1) or integers_of(*given))
    call = call_in("no padding", dim=16)
    plan = plan_of(call, 2)
    parts = [attend(call, plan), attend_rows(call, plan, torch.arange(call.query_len))]
    assert len(called) == 2
    monkeypatch.undo()
    for part in parts:
        torch.testing.assert_close(part, attend(call, plan))


def test_it_goes_with_skip_and_not_with_means() -> None:
    plan = SparsePlan(1, 128, 128, Extent.full(1, 128, 128))
    both = plan.with_attributes(skip=2.0, quantised=True)
    assert (both.skip, both.quantised, both.to("meta").quantised) == (2.0, True, True)
    assert plan.with_attributes().quantised is False
    with pytest.raises(ValueError, match="has pruned_mean and quantised, but means are not multiplied in int8"):
        plan.with_attributes(pruned_mean=True, quantised=True)
    with pytest.raises(TypeError, match="quantised must be true or false, got 8"):
        SparsePlan(1, 128, 128, Extent.full(1, 128, 128), quantised=8)  # type: ignore[arg-type]


@pytest.mark.parametrize("attend", [attend, backends.attend], ids=["definition", "dispatch"])
def test_it_has_no_gradient(attend: Any) -> None:
    call = call_in("no padding")
    call = replace(call, q=call.q.requires_grad_(), scale=call.scale)
    with pytest.raises(ValueError, match="a quantised plan has no gradient"):
        attend(call, plan_of(call, 2))
    with torch.no_grad():
        attend(call, plan_of(call, 2))


def test_heads_of_a_layer_are_all_quantised_or_none() -> None:
    call = call_in("no padding")
    plan = plan_of(call, 4)
    assert merge_plans([plan, plan], [0, 1, 0, 1]).quantised
    with pytest.raises(ValueError, match=r"must share .*quantised, got .*quantised=False.* and .*quantised=True"):
        merge_plans([plan, plan.with_attributes()], [0, 1, 0, 1])
