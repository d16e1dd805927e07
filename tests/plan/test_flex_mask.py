"""A plan as FlexAttention's `BlockMask`: the tiles that it lists and its mask, against the definition."""

import pytest
import torch
from definitions import call_in, everywhere, plan_pairs
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from gossamer import Extent, SparsePlan
from gossamer.testing import random_plan


def listed(counts: Tensor | None, order: Tensor | None) -> Tensor:
    """Listed tiles as flags, ``[B, H, rows, columns]``."""
    assert counts is not None
    assert order is not None
    flags = torch.zeros(order.shape, dtype=torch.bool)
    for at in torch.cartesian_prod(*(torch.arange(n) for n in counts.shape)).tolist():
        flags[tuple(at)][order[tuple(at)][: int(counts[tuple(at)])].long()] = True
    return flags


def tiles(mask: BlockMask) -> tuple[Tensor, Tensor]:
    """Tiles that the mask function decides, and tiles that are computed whole."""
    return listed(mask.kv_num_blocks, mask.kv_indices), listed(mask.full_kv_num_blocks, mask.full_kv_indices)


def pairs_of(mask: BlockMask, plan: SparsePlan, heads: int) -> Tensor:
    """What FlexAttention computes of it."""
    size = (plan.batch, heads, plan.query_len, plan.key_len)
    index = torch.meshgrid(*(torch.arange(n) for n in size), indexing="ij")
    partial, whole = (
        flags.repeat_interleave(plan.block_q, 2).repeat_interleave(plan.block_k, 3)[:, :, : size[2], : size[3]]
        for flags in tiles(mask)
    )
    assert not bool((partial & whole).any())
    return mask.mask_mod(*index) & partial | whole


def assert_same_pairs(plan: SparsePlan, share: int) -> None:
    heads = plan.heads * share
    mask = plan.to_block_mask(heads)
    assert torch.equal(pairs_of(mask, plan, heads), plan_pairs(plan).repeat_interleave(share, dim=1))


@pytest.mark.parametrize("seed", range(16))
def test_random_plans(seed: int) -> None:
    plan = random_plan(
        seed,
        batch=2,
        heads=2,
        query_len=21,
        key_len=26,
        block_q=(4, 8)[seed % 2],
        block_k=(8, 3)[seed % 2],
        padded=seed % 4 < 3,
        causal=seed % 3 > 0,
        limit=(None, 9, 1)[seed % 3],
    )
    assert_same_pairs(plan, share=1 + seed % 2)


@everywhere
def test_blocks_and_bands_everywhere(situation: str) -> None:
    call = call_in(situation, length=37)
    empty = SparsePlan(2, call.query_len, call.key_len, call.extent, block_q=8, block_k=4)
    shape = empty.block_mask().shape
    chosen = torch.rand(shape, generator=torch.Generator().manual_seed(0)) < 0.5
    lengths = {"query_len": call.query_len, "key_len": call.key_len, "extent": call.extent}
    plan = SparsePlan.from_block_mask(chosen, **lengths, block_q=8, block_k=4, sink=[0, 3], window=[2, 0])
    assert_same_pairs(plan, share=1)


def test_tiles_that_nothing_touches_are_not_listed() -> None:
    chosen = torch.zeros(1, 1, 4, 4, dtype=torch.bool)
    chosen[0, 0, 2, 1] = True
    partial, whole = tiles(SparsePlan.from_block_mask(chosen, 16, 16, block_q=4, block_k=4).to_block_mask())
    assert whole[0, 0].nonzero().tolist() == [[2, 1]]
    assert not bool(partial.any())


def test_tiles_beyond_a_limit_are_not_listed() -> None:
    extent = Extent.full(1, 16, 16, limit=2)
    plan = SparsePlan(1, 16, 16, extent, block_q=4, block_k=4, window=32)
    partial, _ = tiles(plan.to_block_mask())
    assert partial[0, 0].nonzero().tolist() == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [3, 3]]


def test_blocks_below_the_diagonal_are_whole_where_no_length_cuts_them() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 250, 250)
    assert tiles(plan.to_block_mask())[1][0, 0].nonzero().tolist() == [[1, 0], [2, 0], [2, 1]]


@pytest.mark.parametrize(("limit", "whole"), [(8, [[1, 0], [2, 1]]), (7, [])])
def test_a_limit_leaves_whole_what_it_does_not_cut(limit: int, whole: list) -> None:
    extent = Extent.full(1, 12, 12, limit=limit)
    blocks = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    plan = SparsePlan.from_block_mask(blocks, 12, 12, extent=extent, block_q=4, block_k=4)
    assert tiles(plan.to_block_mask())[1][0, 0].nonzero().tolist() == whole


@pytest.mark.parametrize("limit", [4, 5, 7, 8, 9])
def test_whole_tiles_are_those_all_of_whose_pairs_are_allowed(limit: int) -> None:
    extent = Extent.full(1, 12, 12, causal=False, limit=limit)
    plan = SparsePlan.from_block_mask(
        torch.ones(1, 1, 3, 3, dtype=torch.bool), 12, 12, extent=extent, block_q=4, block_k=4
    )
    allowed = extent.allowed(torch.arange(12), 12)[0].view(3, 4, 3, 4).all(dim=3).all(dim=1)
    assert torch.equal(tiles(plan.to_block_mask())[1][0, 0], allowed)


@pytest.mark.parametrize("seed", range(4))
def test_the_mask_may_be_asked_up_to_the_end_of_the_last_tiles(seed: int) -> None:
    """As compiled kernels do, which round lengths up; what it says there is clipped."""
    plan = random_plan(seed, batch=2, heads=1, query_len=21, key_len=26, block_q=8, block_k=8, padded=True)
    index = torch.meshgrid(torch.arange(2), torch.arange(1), torch.arange(24), torch.arange(32), indexing="ij")
    mask = plan.to_block_mask().mask_mod(*index)
    assert torch.equal(mask[:, :, :21, :26], plan_pairs(plan))


def test_the_mask_is_for_as_many_heads_as_the_plan_unless_told_otherwise() -> None:
    mask = random_plan(0, batch=1, heads=3, query_len=16, key_len=16).to_block_mask()
    assert mask.kv_num_blocks.shape[1] == 3


def test_a_permuted_plan_is_refused() -> None:
    plan = random_plan(0, batch=1, heads=1, query_len=64, key_len=64, permuted=True)
    with pytest.raises(ValueError, match="cannot express a permuted plan"):
        plan.to_block_mask()


def test_heads_that_do_not_share_the_plan_evenly_are_named() -> None:
    plan = random_plan(0, batch=1, heads=2, query_len=64, key_len=64)
    with pytest.raises(ValueError, match=r"num_heads \(5\) must be a multiple of the plan's heads \(2\)"):
        plan.to_block_mask(5)
