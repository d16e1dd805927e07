"""The definition of attention over a plan, against attention written out pair by pair."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import allowed_pairs, attention, call_in, everywhere, of_each_head, plan_pairs
from gradients import with_extras
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends.torch import attend
from gossamer.backends.torch.attend import attend_rows, cleared, cleared_queries, logits
from gossamer.testing import random_plan

pytestmark = pytest.mark.usefixtures("constants")

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def assert_attends(call: AttentionCall, plan: SparsePlan) -> None:
    out, lse = attend(call, plan)
    expected, expected_lse = attention(call, of_each_head(plan, call.heads, plan_pairs(plan)))
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


def plan_for(call: AttentionCall, heads: int, **more: Any) -> SparsePlan:
    empty = SparsePlan(heads, call.query_len, call.key_len, call.extent, block_q=6, block_k=5)
    chosen = torch.rand(empty.block_mask().shape, generator=torch.Generator().manual_seed(0)) < 0.4
    lengths = {"query_len": call.query_len, "key_len": call.key_len, "extent": call.extent}
    return SparsePlan.from_block_mask(chosen, **lengths, block_q=6, block_k=5, **more)


@everywhere
@pytest.mark.parametrize("heads", [4, 2], ids=["plan per head", "plan per key/value head"])
def test_blocks_and_bands_everywhere(situation: str, heads: int) -> None:
    call = call_in(situation)
    assert_attends(call, plan_for(call, heads, sink=[1, 0] * (heads // 2), window=[0, 2] * (heads // 2)))


@everywhere
def test_sinks_and_soft_cap_everywhere(situation: str) -> None:
    call = replace(call_in(situation), sinks=SINKS, softcap=1.5)
    assert_attends(call, plan_for(call, 2))


@everywhere
def test_a_bias_everywhere(situation: str) -> None:
    call = with_extras(call_in(situation), sinks=False)
    assert_attends(call, plan_for(call, 4))


@pytest.mark.parametrize("seed", range(8))
def test_random_plans(seed: int) -> None:
    heads, groups = ((4, 1), (6, 2), (4, 4), (6, 3))[seed % 4]
    call = call_in("no padding", length=14, heads=heads, groups=groups)
    size: dict[str, Any] = {"batch": 1, "query_len": 14, "key_len": 14, "block_q": 4, "block_k": 3}
    plan = random_plan(seed, heads=call.groups, **size, permuted=seed % 3 == 0, padded=True, causal=seed % 4 != 1)
    assert_attends(replace(call, extent=plan.extent), plan)


@pytest.mark.parametrize("name", ["scale", "sinks", "softcap"])
def test_no_argument_is_ignored(name: str) -> None:
    call = call_in("no padding")
    other = replace(call, **{"scale": {"scale": 0.1}, "sinks": {"sinks": SINKS}, "softcap": {"softcap": 0.5}}[name])
    plan = SparsePlan.dense(2, call.query_len, call.key_len, call.extent)
    for one, another in zip(attend(call, plan), attend(other, plan), strict=True):
        assert not torch.allclose(one, another)


def test_a_row_that_attends_nothing_is_zero() -> None:
    call = call_in("no padding")
    out, lse = attend(call, SparsePlan(2, call.query_len, call.key_len, call.extent))
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_a_row_that_attends_nothing_has_the_lse_of_its_sink() -> None:
    call = replace(call_in("no padding"), sinks=SINKS)
    out, lse = attend(call, SparsePlan(2, call.query_len, call.key_len, call.extent))
    assert bool((out == 0).all())
    torch.testing.assert_close(lse, SINKS[:, None].expand_as(lse))


@pytest.mark.parametrize(
    ("dtype", "of_lse"),
    [(torch.float64, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, torch.float32)],
)
def test_out_has_the_dtype_of_q_and_lse_is_at_least_fp32(dtype: torch.dtype, of_lse: torch.dtype) -> None:
    call = call_in("left padding", dtype=dtype)
    plan = SparsePlan.dense(2, call.query_len, call.key_len, call.extent)
    out, lse = attend(call, plan)
    assert (out.dtype, lse.dtype) == (dtype, of_lse)
    expected, expected_lse = attention(call, of_each_head(plan, 4, plan_pairs(plan)))
    tolerance = {torch.float64: 1e-12, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    exact = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(lse.double(), expected_lse, atol=exact, rtol=exact)


def test_logits_far_from_zero_do_not_overflow() -> None:
    q = torch.full((1, 1, 2, 4), 50.0)
    call = AttentionCall(q, q, torch.ones(1, 1, 2, 3), scale=1.0)
    out, lse = attend(call, SparsePlan.dense(1, 2, 2, call.extent))
    # Numbers of this size lie 1e-3 apart in fp32.
    torch.testing.assert_close(out, torch.ones(1, 1, 2, 3), atol=1e-3, rtol=0)
    torch.testing.assert_close(lse[0, 0], torch.tensor([1e4, 1e4 + math.log(2)]))


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 4, 4), (1, 0, 4), (1, 4, 0), (2, 0, 0)])
def test_nothing_gives_zeros(batch: int, query_len: int, key_len: int) -> None:
    row = [0] * batch
    extent = Extent(row, [query_len] * batch, row, [key_len] * batch)
    q, k = torch.ones(batch, 4, query_len, 8), torch.ones(batch, 2, key_len, 8)
    out, lse = attend(AttentionCall(q, k, k[..., :3], extent), SparsePlan.dense(2, query_len, key_len, extent))
    assert out.shape == (batch, 4, query_len, 3)
    assert bool((out == 0).all())
    assert torch.equal(lse, torch.full((batch, 4, query_len), -math.inf))


def test_some_rows_are_those_of_the_whole() -> None:
    call = call_in("padded chunk")
    plan, rows = plan_for(call, 4, window=1), torch.tensor([6, 0, 3])
    whole, lse = attend(call, plan)
    part, part_lse = attend_rows(call, plan, rows)
    torch.testing.assert_close(part, whole[:, :, rows])
    torch.testing.assert_close(part_lse, lse[:, :, rows])


def test_batch_rows_have_rows_of_their_own() -> None:
    call = call_in("padded chunk")
    plan, rows = plan_for(call, 4, window=1), torch.tensor([[6, 0, 3], [1, 1, 5]])
    whole = attend(call, plan)
    for part, all_rows in zip(attend_rows(call, plan, rows), whole, strict=True):
        for b in range(2):
            torch.testing.assert_close(part[b], all_rows[b][:, rows[b]])


def test_some_logits_are_those_of_the_whole() -> None:
    call = replace(call_in("no padding"), softcap=2.0)
    whole = logits(call, slice(None))
    rows = torch.tensor([5, 1])
    torch.testing.assert_close(logits(call, rows, slice(3, 9)), whole[:, :, rows, 3:9])


def test_dead_keys_are_cleared_and_live_ones_kept() -> None:
    call = call_in("left padding")
    live = call.extent.live_keys(call.key_len)[:, None, :, None]
    expected = torch.where(live, call.values, 0.0)
    assert torch.equal(cleared(call.values, call), expected)


def test_dead_queries_are_cleared_and_live_ones_kept() -> None:
    call = call_in("padded chunk")
    live = call.extent.live_queries(call.query_len)[:, None, :, None]
    assert torch.equal(cleared_queries(call), torch.where(live, call.q, 0.0))


def test_tensors_are_not_copied_where_all_is_live() -> None:
    call = call_in("chunk")
    assert cleared(call.values, call) is call.values
    assert cleared_queries(call) is call.q


def test_a_plan_for_another_call_is_an_error() -> None:
    call = call_in("no padding")
    with pytest.raises(ValueError, match=r"the plan is for batch 1, 3 queries and 20 keys"):
        attend(call, SparsePlan(2, 3, 20, Extent.full(1, 3, 20)))


def test_a_call_without_values_is_an_error() -> None:
    call = replace(call_in("no padding"), v=None)
    with pytest.raises(ValueError, match="this call has no values"):
        attend(call, SparsePlan.dense(2, 20, 20, call.extent))


@everywhere
def test_a_dense_plan_attends_what_the_extent_allows(situation: str) -> None:
    call = call_in(situation)
    pairs: Tensor = allowed_pairs(call.extent, call.query_len, call.key_len)[:, None].expand(-1, call.heads, -1, -1)
    out, _ = attend(call, SparsePlan.dense(4, call.query_len, call.key_len, call.extent))
    torch.testing.assert_close(out.double(), attention(call, pairs)[0], atol=1e-5, rtol=1e-5)
