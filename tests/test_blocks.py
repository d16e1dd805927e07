"""`Blocks`: parts in any order, rules that need all rows, what is kept, columns, bands, nothing lost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
import torch
from blocks_checks import INTERPRETED, block_scores, call_in, every_planner, naive, on
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.blocks import Blocks
from gossamer.plan.count import count_pairs
from gossamer.rules import AtLeast, RelativeToMax, Rule, TopK, TopP, TopPBelow, TopPOfAllRows, TopPReaching
from gossamer.testing import SITUATIONS

__all__ = ["on"]
pytestmark = INTERPRETED
RULES: list[Rule] = [
    RelativeToMax(0.6),
    RelativeToMax(0.0),
    RelativeToMax([0.3, 0.9]),
    TopK(2),
    TopK([1, 3]),
    TopP(0.5),
    TopP([0.2, 0.7], forced_first=True),
    TopPReaching(0.3),
    TopPBelow(0.6),
    TopPOfAllRows(0.5),
    AtLeast(0.4),
]


def chosen(call: AttentionCall, rule: Rule, cuts: list[int], *, turned: bool = False, **kept: Any) -> Tensor:
    """The block mask of a plan that is chosen in parts that end at the cuts."""
    blocks = Blocks(call, 16, 24)
    if kept:
        blocks.keep(**kept)
    scores, rows = block_scores(blocks), blocks.grid.query_blocks
    edges = [0, *[cut for cut in cuts if cut < rows], rows]
    parts = [range(low, high) for low, high in pairwise(edges)]
    for part in reversed(parts) if turned else parts:
        blocks.choose(part, scores[:, :, part.start : part.stop], rule)
    plan = blocks.plan()
    assert torch.equal(plan.count_pairs(), count_pairs(plan))
    return plan.block_mask()


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_choice_is_the_rule_on_what_is_seen_and_what_is_forced(on, rule: Rule, situation: str) -> None:
    call = call_in(situation)
    assert torch.equal(chosen(call, rule, []), naive(call, rule))


@every_planner
@pytest.mark.parametrize("kept", [{"first": 2}, {"own": 3}, {"last_rows": 20}, {"first": 1, "own": 2, "last_rows": 1}])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_what_is_kept(on, situation: str, kept: dict[str, Any]) -> None:
    call = call_in(situation)
    assert torch.equal(chosen(call, TopK(1), [3], **kept), naive(call, TopK(1), **kept))


@every_planner
@pytest.mark.parametrize("turned", [False, True], ids=["in order", "backwards"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_parts_in_any_order_give_the_same_plan(on, rule: Rule, turned: bool) -> None:
    call = call_in("padded chunk", 300)
    assert torch.equal(chosen(call, rule, [1, 4, 5], turned=turned), chosen(call, rule, []))


@every_planner
def test_a_query_block_is_chosen_once(on) -> None:
    blocks = Blocks(call_in("no padding"), 16, 24)
    scores = block_scores(blocks)
    blocks.choose(range(0, 4), scores[:, :, :4], TopK(1))
    with pytest.raises(ValueError, match="choose each query block once"):
        blocks.choose(range(3, 6), scores[:, :, 3:6], TopK(1))


@every_planner
def test_query_blocks_without_a_choice_keep_what_is_kept(on) -> None:
    blocks = Blocks(call_in("no padding"), 16, 24)
    blocks.keep(first=1)
    blocks.choose(range(4, 6), block_scores(blocks)[:, :, 4:6], TopK(0))
    found = [row.nonzero().flatten().tolist() for row in blocks.plan().block_mask()[0, 0]]
    assert found == [sorted({0, *range(m * 16 // 24, (m * 16 + 15) // 24 + 1)}) for m in range(10)]


@every_planner
def test_parts_without_scores_may_be_small(on, monkeypatch) -> None:
    whole = Blocks(call_in("padded chunk"), 16, 24)
    whole.keep(first=1, last_rows=20)
    expected = whole.plan()
    monkeypatch.setattr("gossamer.blocks.MASK_BYTES", 1)
    again = Blocks(call_in("padded chunk"), 16, 24)
    again.keep(first=1, last_rows=20)
    assert torch.equal(again.plan().block_mask(), expected.block_mask())


@every_planner
def test_some_heads_alone_keep(on) -> None:
    blocks = Blocks(call_in("no padding"), 16, 24)
    blocks.keep(own=1, first=2, heads=torch.tensor([[True, False]]))
    mask = blocks.plan().block_mask()
    assert bool(mask[0, 0].any(-1).all())
    assert not bool(mask[0, 1].any())


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_diagonals_count_from_the_own_block(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 16)
    flags = torch.tensor([[True, False, True, False], [False, False, False, True]])
    blocks.diagonals(flags.expand(call.batch, 2, 4))
    mask = blocks.plan().block_mask()
    for b in range(call.batch):
        first = int(blocks.grid.first_block[b])
        for h in range(2):
            for m in range(mask.shape[2]):
                low, high = blocks.grid.seen[b, m].tolist()
                distance = {n: first + m - n for n in range(low, high)}
                if not call.extent.causal:
                    distance = {n: abs(d) for n, d in distance.items()}
                expected = {n for n, d in distance.items() if d == 0 or (0 <= d < 4 and bool(flags[h, d]))}
                assert set(mask[b, h, m].nonzero().flatten().tolist()) == expected


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_columns_are_live_positions_for_all_rows(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 16)
    scores = torch.rand(call.batch, 2, call.extent.longest, generator=torch.Generator().manual_seed(2))
    blocks.columns(scores, TopK([3, 7]))
    plan = blocks.plan(sink=2)
    assert plan.block_indices.numel() == 0
    assert plan.num_column_groups == 1
    for b in range(call.batch):
        keys = int(call.extent.key_count[b])
        for h, count in enumerate((3, 7)):
            expected = set(scores[b, h, :keys].topk(min(count, keys)).indices.tolist())
            assert set(plan.column_mask()[b, h, 0].nonzero().flatten().tolist()) == expected
    assert torch.equal(plan.count_pairs(), count_pairs(plan))


@every_planner
def test_lists_are_taken_as_they_are(on) -> None:
    call = call_in("chunk")
    blocks = Blocks(call, 16, 16)
    generator = torch.Generator().manual_seed(3)
    rows, keys = blocks.grid.query_blocks, call.extent.longest
    of_blocks = torch.rand(1, 2, rows, blocks.grid.key_blocks, generator=generator) < 0.3
    of_columns = torch.rand(1, 2, rows, keys, generator=generator) < 0.1

    def listed(chosen: Tensor, part: range) -> tuple[Tensor, Tensor]:
        chosen = chosen[:, :, part.start : part.stop]
        return chosen.sum(-1), chosen.nonzero()[:, -1].to(torch.int32)

    parts = [range(2, rows), range(0, 2)]
    blocks.lists(iter([(part, listed(of_blocks, part), listed(of_columns, part)) for part in parts]))
    plan = blocks.plan()
    assert torch.equal(plan.block_mask(), of_blocks)
    assert torch.equal(plan.column_mask(), of_columns)
    assert torch.equal(plan.count_pairs(), count_pairs(plan))


@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_a_plan_is_per_head_or_per_key_value_head(per: Any) -> None:
    call = call_in("no padding")
    assert Blocks(call, per=per).plan(window=4).heads == {"head": 2, "kv_head": 1}[per]


def test_bands_may_differ_between_heads() -> None:
    plan = Blocks(call_in("no padding")).plan(sink=torch.tensor([0, 3]), window=torch.tensor([1, 5]))
    assert plan.to_mask()[0, :, 20].sum(-1).tolist() == [1, 3 + 5]


@dataclass(frozen=True, eq=False)
class EveryOther(Rule):
    """Of another package: the candidates whose score is among the larger half."""

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return scores > scores.median(dim=-1, keepdim=True).values


@every_planner
def test_a_rule_of_another_package_works_everywhere(on) -> None:
    call = call_in("padded chunk")
    assert torch.equal(chosen(call, EveryOther(), [2]), naive(call, EveryOther()))


def test_a_rule_of_all_rows_misses_none() -> None:
    blocks = Blocks(call_in("no padding"), 16, 24)
    blocks.choose(range(0, 4), block_scores(blocks)[:, :, :4], TopPOfAllRows(0.5))
    with pytest.raises(ValueError, match="TopPOfAllRows needs all 10 query blocks, got 4"):
        blocks.plan()


@pytest.mark.parametrize("causal", [True, False])
def test_the_plan_knows_the_call(causal: bool) -> None:
    call = call_in("no padding")
    call = AttentionCall(call.q, call.k, extent=Extent.full(1, 150, 150, causal=causal, limit=33))
    plan = Blocks(call, 16, 24).plan(window=9)
    assert plan.extent is call.extent
    assert (plan.query_len, plan.key_len, plan.block_q, plan.block_k) == (150, 150, 16, 24)
    assert (int(plan.to_mask()[0, 0, 75].sum()), plan.density() < 1) == (9 if causal else 17, True)


@every_planner
def test_parts_of_one_choice_for_all_rows_fit_each_other(on) -> None:
    call = call_in("no padding", 256)
    blocks = Blocks(call)
    scores = block_scores(blocks)
    rule = TopPOfAllRows(0.3)
    blocks.choose(range(2), scores[:, :, :2], rule)
    with pytest.raises(ValueError, match="query blocks 1 to 2 were given before"):
        blocks.choose(range(1, 3), scores[:, :, 1:3], rule)
    with pytest.raises(ValueError, match="give one rule for all parts"):
        blocks.choose(range(2, 4), scores[:, :, 2:], TopPOfAllRows(0.9))
    blocks.choose(range(2, 4), scores[:, :, 2:], rule)
    assert blocks.plan().block_indices.numel()


def test_what_is_said_twice_or_too_late_is_an_error() -> None:
    call = call_in("no padding", 256)
    columns, diagonals = torch.rand(1, 2, 256), torch.zeros(1, 2, 4, dtype=torch.bool)
    blocks = Blocks(call)
    blocks.keep(first=1)
    blocks.diagonals(diagonals)
    blocks.columns(columns, TopK(1))
    with pytest.raises(ValueError, match="`keep` is said once, and before `choose`"):
        blocks.keep(first=2)
    with pytest.raises(ValueError, match="`diagonals` is said once"):
        blocks.diagonals(diagonals)
    blocks.block_columns(diagonals)
    with pytest.raises(ValueError, match="`block_columns` is said once"):
        blocks.block_columns(diagonals)
    with pytest.raises(ValueError, match="columns are chosen once"):
        blocks.columns(columns, TopK(1))
    late = Blocks(call)
    late.choose(range(4), block_scores(late), TopK(1))
    with pytest.raises(ValueError, match="`keep` is said once, and before `choose`"):
        late.keep()


@every_planner
@pytest.mark.parametrize(("queries", "live"), [(0, 0), (70, 0)])
def test_columns_for_no_query_are_none(on, queries: int, live: int) -> None:
    extent = Extent([0, 0], [live, live], [0, 0], [70, 70])
    call = AttentionCall(torch.randn(2, 2, queries, 16), torch.randn(2, 1, 70, 16), extent=extent)
    blocks = Blocks(call)
    blocks.columns(torch.rand(2, 2, 70), TopK(3))
    plan = blocks.plan(window=3)
    assert plan.column_indices.numel() == 0
    assert int(plan.count_pairs().sum()) == 0


@every_planner
@pytest.mark.parametrize("limit", [None, 90])
@pytest.mark.parametrize("last_rows", [None, 3])
def test_bands_leave_no_query_beyond_the_keys_without_one(on, last_rows: int | None, limit: int | None) -> None:
    extent = Extent([0, 0], [200, 150], [0, 3], [130, 40], causal=False, limit=limit)
    call = AttentionCall(torch.randn(2, 2, 200, 16), torch.randn(2, 1, 130, 16), extent=extent)
    blocks = Blocks(call, 16, 16)
    if last_rows is not None:
        blocks.keep(own=0, last_rows=last_rows)
    mask = blocks.plan(window=5).to_mask()
    allowed = extent.allowed(torch.arange(200), 130)[:, None]
    assert torch.equal(mask.any(-1), allowed.any(-1).expand_as(mask.any(-1)))
    if last_rows is None and limit is None:
        assert Blocks(call, 16, 16).plan(window=5, sink=1).block_indices.numel() == 0  # one key is enough
    within = Blocks(AttentionCall(call.q[:, :, :130], call.k, extent=Extent.full(2, 130, 130, causal=False)), 16, 16)
    assert within.plan(window=5).block_indices.numel() == 0  # a window alone, exact to the token


@pytest.mark.parametrize(("name", "what"), [("query_count", "queries"), ("key_count", "keys")])
def test_an_extent_that_was_written_to_is_refused_before_anything_is_as_large_as_it_says(name: str, what: str) -> None:
    call = call_in("no padding")
    getattr(call.extent, name)[0] = (1 << 31) - 1
    with pytest.raises(ValueError, match=f"the extent names 2147483647 {what} in batch row 0, .* but there are 150"):
        Blocks(call, 16, 16)
