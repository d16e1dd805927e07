"""`Blocks` with block columns, groups of query blocks, rules for some heads, and keys in an order of their own."""

from __future__ import annotations

import pytest
import torch
from blocks_checks import INTERPRETED, block_scores, call_in, every_planner, naive, on

from gossamer.blocks import Blocks
from gossamer.plan.count import count_pairs
from gossamer.rules import Rule, TopK, TopPOfAllRows
from gossamer.testing import SITUATIONS

__all__ = ["on"]
pytestmark = INTERPRETED


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_block_columns_are_taken_as_far_as_they_are_seen(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 16)
    flags = torch.arange(2 * blocks.grid.key_blocks).view(1, 2, -1).expand(call.batch, -1, -1) % 3 == 0
    blocks.block_columns(flags)
    mask = blocks.plan().block_mask()
    for b in range(call.batch):
        for h in range(2):
            for m in range(mask.shape[2]):
                seen, own = (range(*ends[b, m].tolist()) for ends in (blocks.grid.seen, blocks.grid.own()))
                expected = {n for n in seen if bool(flags[b, h, n]) or n in own}
                assert set(mask[b, h, m].nonzero().flatten().tolist()) == expected


@every_planner
@pytest.mark.parametrize("rule", [TopK(3), TopPOfAllRows(0.5)], ids=repr)
def test_a_rule_may_be_for_some_heads_alone(on, rule: Rule) -> None:
    call = call_in("left padding")
    blocks, heads = Blocks(call, 16, 24), torch.tensor([[True, False], [False, True]])
    scores = block_scores(blocks)
    blocks.choose(range(3), scores[:, :, :3], rule, heads=heads)
    blocks.choose(range(3, blocks.grid.query_blocks), scores[:, :, 3:], rule, heads=heads)
    everywhere, nowhere = naive(call, rule), naive(call, TopK(0))
    assert torch.equal(blocks.plan().block_mask(), torch.where(heads[:, :, None, None], everywhere, nowhere))


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_columns_of_groups_are_those_that_their_queries_see(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 16)
    groups = -(-blocks.grid.query_blocks // 3)
    scores = torch.rand(call.batch, 2, groups, call.extent.longest, generator=torch.Generator().manual_seed(2))
    for part in (range(1, groups), range(1)):
        blocks.group_columns(part, scores[:, :, part.start : part.stop], TopK([3, 7]), group=3)
    plan = blocks.plan(sink=2)
    assert (plan.column_group, plan.num_column_groups, plan.block_indices.numel()) == (3, groups, 0)
    for b in range(call.batch):
        for group in range(groups):
            seen = {j for m in range(3 * group, min(3 * group + 3, blocks.grid.query_blocks))
                    for j in range(*blocks.grid.keys[b, m].tolist())}  # fmt: skip
            for h, count in enumerate((3, 7)):
                best = sorted(seen, key=lambda j: (-float(scores[b, h, group, j]), j))[:count]
                assert plan.column_mask()[b, h, group].nonzero().flatten().tolist() == sorted(best)
    assert torch.equal(plan.count_pairs(), count_pairs(plan))


def test_groups_of_columns_are_of_one_size_and_come_once() -> None:
    blocks, scores = Blocks(call_in("no padding"), 16, 16), torch.rand(1, 2, 1, 150)
    blocks.group_columns(range(1), scores, TopK(1), group=2)
    with pytest.raises(ValueError, match="groups of 2 query blocks, got others of 3"):
        blocks.group_columns(range(1, 2), scores, TopK(1), group=3)
    with pytest.raises(ValueError, match="choose each query block once"):
        blocks.group_columns(range(1), scores, TopK(1), group=2)
    assert blocks.plan(window=1).column_mask()[0, :, 1:].sum() == 0


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_blocks_of_a_group_keep_each_other(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 24)
    blocks.keep(group=3)
    mask, grid = blocks.plan().block_mask(), blocks.grid
    for b in range(call.batch):
        for m in range(grid.query_blocks):
            begin = (int(grid.first_block[b]) + m // 3 * 3) * 16
            together = {j // 24 for j in range(begin, begin + 48)} | set(range(*grid.own()[b, m].tolist()))
            expected = together & set(range(*grid.seen[b, m].tolist()))
            assert set(mask[b, 0, m].nonzero().flatten().tolist()) == expected


@every_planner
@pytest.mark.parametrize("situation", SITUATIONS)
def test_query_blocks_see_whole_segments_of_ordered_keys_and_keep_their_own(on, situation: str) -> None:
    call = call_in(situation)
    blocks = Blocks(call, 16, 8)
    order = torch.arange(call.key_len).expand(call.batch, 2, -1)
    blocks.order_keys(order, 32)
    scores = block_scores(blocks)
    blocks.choose(range(blocks.grid.query_blocks), scores, TopK(2))
    plan, grid, segments = blocks.plan(), blocks.grid, range(0, 4 * blocks.grid.key_blocks, 4)
    assert plan.k_order is not None
    assert torch.equal(plan.k_order.long(), order)
    outside = blocks.outside(range(grid.query_blocks))
    for b in range(call.batch):
        keys = -(-int(call.extent.key_count[b]) // 8)
        for m in range(grid.query_blocks):
            seen, own = (
                {n for s in segments for n in range(s, min(s + 4, keys)) if any(n // 4 == r // 4 for r in range(*ends))}
                for ends in (grid.seen[b, m].tolist(), grid.own()[b, m].tolist())
            )
            own &= seen
            assert set(outside[b, 0, m].nonzero().flatten().tolist()) == seen - own
            for h in range(2):
                best = sorted(seen, key=lambda n: (-float(scores[b, h, m, n]), n))[:2]
                assert set(plan.block_mask()[b, h, m].nonzero().flatten().tolist()) == own | set(best)
    assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)))


def test_an_order_comes_first_and_once() -> None:
    call = call_in("no padding")
    order = torch.arange(150).expand(1, 2, -1)
    blocks = Blocks(call, 16, 16)
    with pytest.raises(ValueError, match="multiple of block_k = 16, got 24"):
        blocks.order_keys(order, 24)
    with pytest.raises(ValueError, match="say `order_keys` before"):
        blocks.outside(range(1))
    blocks.keep(first=1)
    with pytest.raises(ValueError, match="`order_keys` is said once"):
        blocks.order_keys(order, 32)
