"""The definition of a plan's attributes, against attention written out key by key, mean by mean and tile by tile."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import Row, attention, call_in, everywhere, lists_of, of_each_head, plan_pairs, rows_of
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import flex
from gossamer.backends.torch import attend
from gossamer.backends.torch.attend import attend_rows
from gossamer.methods.merging import merge_plans
from gossamer.plan import Grid
from gossamer.plan.count import count_pairs

pytestmark = pytest.mark.usefixtures("constants")

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])


def blocks_by_chance(call: AttentionCall, heads: int, *, share: float = 0.4, **fields: Any) -> SparsePlan:
    sizes = {"extent": call.extent, "block_q": 6, "block_k": 5} | fields
    grid = Grid(call.extent, sizes["block_q"], sizes["block_k"])
    generator = torch.Generator().manual_seed(0)
    chosen = torch.rand(call.batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < share
    return SparsePlan.from_block_mask(chosen, call.query_len, call.key_len, **sizes)


def logit(call: AttentionCall, query: Tensor, key: Tensor) -> float:
    product = float(query.double() @ key) * call.scale
    return product if call.softcap is None else call.softcap * math.tanh(product / call.softcap)


def pruned(plan: SparsePlan, row: Row, head: int, m: int) -> list[list[int]]:
    """Key slots of each block that is not selected, though all queries of the block may attend all of it."""
    listed = lists_of(plan.block_indptr, plan.block_indices, head, plan.num_query_blocks)[m]
    first = max(row.query_start, 0) // plan.block_q
    queries = [position for position in row.positions() if position // plan.block_q == first + m]
    found = []
    for j in range(-(-row.key_count // plan.block_k)):
        keys = range(j * plan.block_k, min((j + 1) * plan.block_k, row.key_count))
        if j not in listed and queries and all(row.allows(query, key) for query in queries for key in keys):
            found.append([row.key_start + key for key in keys])
    return found


def written_out(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """``SparsePlan``'s docstring, query by query, in fp64."""
    out = torch.zeros(*call.q.shape[:3], call.values.shape[-1], dtype=torch.float64)
    lse = torch.full(call.q.shape[:3], -math.inf, dtype=torch.float64)
    pairs = plan_pairs(plan).tolist()
    share = call.heads // plan.heads
    for b, row in enumerate(rows_of(plan.extent)):
        for h in range(call.heads):
            k, v = (x[b, h // call.share].double() for x in (call.k, call.values))
            for i in range(call.query_len):
                q, position = call.q[b, h, i], row.query_start + i
                tiles: dict[int, list[int]] = {}
                for j in range(call.key_len):
                    if pairs[b][h // share][i][j]:
                        tiles.setdefault((j - row.key_start) // 64, []).append(j)
                terms: list[tuple[float, Tensor]] = []
                running = -math.inf
                for tile in sorted(tiles):
                    logits = [logit(call, q, k[j]) for j in tiles[tile]]
                    if plan.skip is not None and max(logits) < running - plan.skip:
                        continue
                    running = max(running, *logits)
                    terms += [(one, v[j]) for one, j in zip(logits, tiles[tile], strict=True)]
                m = position // plan.block_q - max(row.query_start, 0) // plan.block_q
                if plan.pruned_mean and i in row.live_queries():
                    for keys in pruned(plan, row, b * plan.heads + h // share, m):
                        mean = logit(call, q, k[keys].mean(0)) + math.log(len(keys))
                        terms.append((mean, v[keys].mean(0)))
                total = sum(math.exp(one) for one, _ in terms)
                total += 0.0 if call.sinks is None else math.exp(float(call.sinks[h]))
                if total:
                    lse[b, h, i] = math.log(total)
                    out[b, h, i] = sum((math.exp(one) / total * value for one, value in terms), out[b, h, i])
    return out, lse


def assert_attends(call: AttentionCall, plan: SparsePlan) -> None:
    expected, expected_lse = written_out(call, plan)
    out, lse = attend(call, plan)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)


# pruned_mean


@everywhere
@pytest.mark.parametrize("heads", [4, 2], ids=["plan per head", "plan per key/value head"])
def test_pruned_blocks_count_by_their_mean_everywhere(situation: str, heads: int) -> None:
    call = call_in(situation)
    assert_attends(call, blocks_by_chance(call, heads, pruned_mean=True))


@everywhere
def test_means_have_the_model_s_soft_cap_and_sinks(situation: str) -> None:
    call = replace(call_in(situation, length=14), sinks=SINKS, softcap=1.5, scale=-0.8)
    assert_attends(call, blocks_by_chance(call, 2, pruned_mean=True))


def test_the_last_block_weighs_what_it_holds() -> None:
    """Three keys of eight in the last block, which all queries may attend: a mean of three weighs three."""
    extent = Extent([0], [4], [0], [11], causal=False)
    q, k, v = torch.zeros(1, 1, 4, 2), torch.randn(1, 1, 11, 2), torch.zeros(1, 1, 11, 1)
    v[:, :, 8:] = 1.0
    plan = SparsePlan.from_block_mask(
        torch.tensor([[[[True, False]]]]), 4, 11, extent=extent, block_q=4, block_k=8, pruned_mean=True
    )
    out, lse = attend(AttentionCall(q, k, v, extent), plan)
    torch.testing.assert_close(out, torch.full_like(out, 3 / 11))
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(11)))


def test_blocks_that_a_query_of_the_block_sees_in_part_have_no_mean() -> None:
    """Of 32 queries in blocks of 8 and keys in blocks of 4: the query block at 8 to 15 sees blocks 0 and 1 whole."""
    plan = SparsePlan(1, 32, 32, Extent.full(1, 32, 32), block_q=8, block_k=4, pruned_mean=True)
    assert plan.pruned_blocks()[0, 0].sum(-1).tolist() == [0, 2, 4, 6]
    limited = SparsePlan(1, 32, 32, Extent.full(1, 32, 32, limit=12), block_q=8, block_k=4, pruned_mean=True)
    # Of the query at 31 the model's window begins at 20, of the one at 24 at 13.
    assert limited.pruned_blocks()[0, 0, 3].nonzero().flatten().tolist() == [5]


def test_nothing_selected_and_all_pruned_is_attention_to_means() -> None:
    call = call_in("no padding", length=20)
    plan = SparsePlan(2, 20, 20, call.extent, block_q=10, block_k=5, pruned_mean=True)
    out, lse = attend(call, plan)
    assert bool((out[:, :, :10] == 0).all())  # they see no block whole together
    assert bool(lse[:, :, 10:].isfinite().all())
    assert_attends(call, plan)


def test_without_live_queries_there_is_nothing() -> None:
    extent = Extent([0], [0], [0], [20])
    call = AttentionCall(torch.ones(1, 2, 3, 4), torch.ones(1, 1, 20, 4), torch.ones(1, 1, 20, 2), extent)
    out, lse = attend(call, SparsePlan(1, 3, 20, extent, pruned_mean=True, skip=1.0))
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_selected_blocks_have_no_mean() -> None:
    call = call_in("no padding")
    everything = blocks_by_chance(call, 4, share=1.1, pruned_mean=True)
    assert not bool(everything.pruned_blocks().any())
    expected, _ = attention(call, of_each_head(everything, 4, plan_pairs(everything)))
    torch.testing.assert_close(attend(call, everything)[0].double(), expected, atol=1e-5, rtol=1e-5)


def test_means_are_no_pairs() -> None:
    call = call_in("left padding")
    with_means = blocks_by_chance(call, 2, pruned_mean=True, skip=None)
    without = blocks_by_chance(call, 2)
    assert torch.equal(count_pairs(with_means), count_pairs(without))
    assert torch.equal(with_means.to_mask(), without.to_mask())
    assert not torch.allclose(attend(call, with_means)[0], attend(call, without)[0])
    assert not bool(without.pruned_blocks().any())


# skip


def peaked(call: AttentionCall) -> AttentionCall:
    """Logits that differ by much from tile to tile."""
    return replace(call, scale=2.5 * call.scale)


@pytest.mark.parametrize("skip", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("situation", ["left padding", "padded chunk", "model window", "bidirectional"])
def test_rows_leave_tiles_out(situation: str, skip: float) -> None:
    call = peaked(call_in(situation, length=150, heads=2, groups=1))
    plan = blocks_by_chance(call, 2 if skip else 1, share=0.8, block_q=48, block_k=[64, 128][skip > 1], skip=skip)
    assert_attends(call, plan)
    if skip < 4:
        without, _ = attend(call, plan.with_attributes())
        assert not torch.allclose(attend(call, plan)[0], without, atol=1e-3)


def test_both_attributes_with_sinks_and_soft_cap() -> None:
    call = replace(call_in("no padding", length=200, heads=2, groups=1), softcap=3.0, sinks=SINKS[:2])
    assert_attends(
        peaked(call), blocks_by_chance(call, 1, share=0.5, block_q=16, block_k=64, pruned_mean=True, skip=0.5)
    )


def test_a_high_threshold_leaves_nothing_out() -> None:
    call = call_in("no padding", length=150)
    plan = blocks_by_chance(call, 2, block_q=64, block_k=64, skip=1e4)
    assert torch.equal(attend(call, plan)[0], attend(call, plan.with_attributes())[0])


def test_a_tile_that_is_left_out_is_compared_with_the_tiles_before_alone() -> None:
    """Largest logits 0, 5, 3, 6 of four tiles and a threshold of 1: the third is out, the first not."""
    k = torch.tensor([0.0, 5.0, 3.0, 6.0]).repeat_interleave(64).view(1, 1, 256, 1)
    v = torch.eye(4).repeat_interleave(64, dim=0).view(1, 1, 256, 4)
    call = AttentionCall(torch.ones(1, 1, 1, 1), k, v, scale=1.0)
    mask = torch.ones(1, 1, 1, 4, dtype=torch.bool)
    out, _ = attend(call, SparsePlan.from_block_mask(mask, 1, 256, skip=1.0))
    weights = torch.tensor([0.0, 5.0, -math.inf, 6.0]).exp()
    torch.testing.assert_close(out[0, 0, 0], weights / weights.sum())


def test_rows_decide_by_themselves() -> None:
    call = peaked(call_in("padded chunk", length=150))
    plan, rows = blocks_by_chance(call, 4, share=0.8, block_q=64, block_k=64, skip=0.5), torch.tensor([6, 0, 3])
    whole, _ = attend(call, plan)
    part, _ = attend_rows(call, plan, rows)
    torch.testing.assert_close(part, whole[:, :, rows])


# Where they are refused


@pytest.mark.parametrize("attribute", [{"pruned_mean": True}, {"skip": 3.0}])
@pytest.mark.parametrize(
    ("part", "name"),
    [
        ({"sink": 1}, "sink"),
        ({"window": torch.tensor([0, 4])}, "window"),
        (
            {"column_indptr": torch.tensor([0, 1, 1]), "column_indices": torch.tensor([5]).int(), "column_group": 9},
            "columns",
        ),
        ({"q_order": torch.arange(128).int().repeat(1, 2, 1)}, "an order"),
        ({"k_order": torch.arange(128).int().repeat(1, 2, 1)}, "an order"),
    ],
)
def test_plans_of_more_than_blocks_are_refused(attribute: dict[str, Any], part: dict, name: str) -> None:
    given: dict[str, Any] = {"heads": 2, "query_len": 128, "key_len": 128, "extent": Extent.full(1, 128, 128)}
    message = f"SparsePlan.{next(iter(attribute))} is for plans of blocks alone, and this one has {name};"
    for make in (SparsePlan, SparsePlan.unchecked):
        with pytest.raises(ValueError, match=message):
            make(**given, **part, **attribute)
    plan = SparsePlan(**given, **part)
    with pytest.raises(ValueError, match=message):
        plan.with_attributes(**attribute)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"pruned_mean": 1}, TypeError, "pruned_mean must be true or false, got 1"),
        ({"skip": -0.5}, ValueError, "skip must be at least 0 and finite, or None for no skipping, got -0.5"),
        ({"skip": math.inf}, ValueError, "got inf"),
        ({"skip": math.nan}, ValueError, "got nan"),
        ({"skip": True}, TypeError, "skip must be a number of nats, or None, got True"),
        ({"skip": "3"}, TypeError, "got '3'"),
        ({"skip": 3, "block_k": 96}, ValueError, "skip needs a block_k that is a multiple of 64, got 96"),
    ],
)
def test_values_that_do_not_fit_are_named(given: dict, error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        SparsePlan(1, 128, 128, Extent.full(1, 128, 128), **given)


def test_attributes_written_beside_are_found_by_a_check() -> None:
    plan = SparsePlan(1, 128, 128, Extent.full(1, 128, 128), pruned_mean=True)
    torch.as_tensor(plan.window).fill_(3)
    with pytest.raises(ValueError, match="for plans of blocks alone, and this one has window"):
        plan.check()


def test_a_plan_keeps_its_attributes() -> None:
    plan = SparsePlan(1, 128, 128, Extent.full(1, 128, 128)).with_attributes(pruned_mean=True, skip=2.5)
    for kept in (plan, plan.to("meta")):
        assert (kept.pruned_mean, kept.skip) == (True, 2.5)
    bare = plan.with_attributes()
    assert (bare.pruned_mean, bare.skip) == (False, None)
    assert bare.block_indices is plan.block_indices


@pytest.mark.parametrize("attribute", [{"pruned_mean": True}, {"skip": 1.0}])
def test_flex_attention_refuses_them(attribute: dict[str, Any]) -> None:
    call = call_in("no padding", length=70)
    plan = blocks_by_chance(call, 2, block_q=64, block_k=64, **attribute)
    with pytest.raises(ValueError, match="FlexAttention knows neither pruned_mean nor skip"):
        flex.attend(call, plan)


def test_skip_has_no_gradient() -> None:
    call = call_in("no padding", length=70)
    call = replace(call, q=call.q.requires_grad_())
    plan = blocks_by_chance(call, 2, block_q=64, block_k=64, skip=1.0)
    with pytest.raises(ValueError, match="a plan with skip has no gradient"):
        attend(call, plan)
    with torch.no_grad():
        attend(call, plan)


def test_means_have_a_gradient() -> None:
    call = call_in("no padding", length=12)
    call = replace(call, v=call.values.requires_grad_())
    attend(call, blocks_by_chance(call, 2, share=0.0, pruned_mean=True))[0].sum().backward()
    assert call.v is not None
    assert call.v.grad is not None
    assert bool((call.v.grad[:, :, :5] > 0).all())


def test_plans_with_the_same_attributes_merge() -> None:
    call = call_in("padded chunk", length=90)
    plans = [blocks_by_chance(call, heads, block_k=64, pruned_mean=True, skip=0.4) for heads in (2, 4)]
    merged = merge_plans(plans, [0, 1, 1, 0])
    out, lse = attend(call, merged)
    for head, owner in enumerate([0, 1, 1, 0]):
        expected = attend(call, plans[owner])
        assert torch.equal(out[:, head], expected[0][:, head])
        assert torch.equal(lse[:, head], expected[1][:, head])


def test_plans_with_other_attributes_do_not_merge() -> None:
    call = call_in("no padding", length=90)
    plan = blocks_by_chance(call, 4, block_k=64)
    others: list[dict[str, Any]] = [{"pruned_mean": True}, {"skip": 1.0}]
    for other in others:
        with pytest.raises(ValueError, match="heads of one layer must share pruned_mean and skip and quantised, got"):
            merge_plans([plan, plan.with_attributes(**other)], [0, 1, 0, 1])
    finer = blocks_by_chance(call, 4, block_k=32, pruned_mean=True)
    with pytest.raises(ValueError, match="must have the same blocks, got"):
        merge_plans([plan.with_attributes(pruned_mean=True), finer], [0, 1, 0, 1])
    coarser = blocks_by_chance(call, 4, block_k=128, skip=1.0)
    assert merge_plans([plan.with_attributes(skip=1.0), coarser], [0, 1, 0, 1]).skip == 1.0
