"""Counting a plan's pairs, against its mask: `tests/plan/test_plan.py` says that the mask is right."""

from typing import Any

import pytest
import torch
from definitions import call_in, everywhere, plan_pairs

from gossamer import Extent, SparsePlan
from gossamer.plan.count import count_pairs
from gossamer.testing import random_plan


def assert_counts(plan: SparsePlan) -> None:
    counts = count_pairs(plan)
    assert (counts.dtype, counts.device.type) == (torch.int64, "cpu")
    assert torch.equal(counts, plan.to_mask().sum(dim=(2, 3)))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("limit", [None, 1, 4, 30])
@pytest.mark.parametrize("causal", [True, False])
def test_small_plans(causal: bool, limit: int | None, permuted: bool) -> None:
    for seed in range(6):
        block_q, block_k = ((1, 1), (3, 4), (4, 5), (16, 16), (2, 7), (7, 2))[seed]
        plan = random_plan(
            seed,
            batch=2,
            heads=2,
            query_len=14,
            key_len=14 + seed % 2 * 6,
            block_q=block_q,
            block_k=block_k,
            padded=seed % 3 > 0,
            causal=causal,
            limit=limit,
            permuted=permuted,
        )
        assert_counts(plan)


@pytest.mark.parametrize("seed", range(8))
def test_plans_of_many_tiles(seed: int) -> None:
    """Most tiles are counted whole: bands and limits are wider than a block, and blocks are not square."""
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 150, "key_len": 211, "block_q": 16, "block_k": 24}
    limit = (None, 41, 100)[seed % 3]
    assert_counts(random_plan(seed, **size, padded=seed % 2 == 0, causal=seed % 4 > 1, limit=limit))


@pytest.mark.usefixtures("smallest_constants")
@pytest.mark.parametrize("seed", range(8))
def test_plans_that_are_counted_in_many_pieces(seed: int) -> None:
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 26, "key_len": 31, "block_q": 4, "block_k": 6}
    limit = (None, 11)[seed // 2 % 2]
    assert_counts(random_plan(seed, **size, padded=seed > 3, causal=seed % 2 == 0, limit=limit, permuted=seed == 5))


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("limit", [None, 1, 9, 60])
@pytest.mark.parametrize("seed", range(4))
def test_plans_of_blocks_of_ordered_keys(seed: int, limit: int | None) -> None:
    """Dead numbers stand anywhere in an order."""
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 50, "key_len": 57, "block_q": 8, "block_k": 6}
    plan = random_plan(seed, **size, padded=seed > 1, causal=seed % 2 == 0, limit=limit)
    generator = torch.Generator().manual_seed(seed)
    order = torch.stack([torch.randperm(57, generator=generator) for _ in range(4)]).view(2, 2, 57)
    lists = (torch.rand(2, 2, plan.num_query_blocks, 10, generator=generator) < 0.6).float()
    fields = {"extent": plan.extent, "block_q": 8, "block_k": 6, "k_order": order.to(torch.int32)}
    ordered = SparsePlan.from_block_mask(lists.bool(), 50, 57, **fields)
    assert_counts(ordered)
    assert int(ordered.count_pairs().sum()) > 0 or (seed == 3 and limit is not None)  # queries beyond the keys


@everywhere
def test_each_part_of_the_union_by_itself(situation: str) -> None:
    call = call_in(situation, length=37)
    rows = SparsePlan(1, call.query_len, call.key_len, call.extent, block_q=8, block_k=6).num_query_blocks
    every_third = torch.arange(0, call.extent.longest, 3, dtype=torch.int32)
    many = call.batch * rows
    columns: dict[str, Any] = {
        "column_indptr": torch.arange(many + 1) * every_third.numel(),
        "column_indices": every_third.repeat(many),
    }
    bands: list[dict[str, Any]] = [{"sink": 4}, {"window": 7}, {"sink": 10, "window": 9}]
    narrow: dict[str, Any] = {**columns, "window": 3}
    for part in (*bands, columns, narrow):
        plan = SparsePlan(1, call.query_len, call.key_len, call.extent, block_q=8, block_k=6, **part)
        assert torch.equal(count_pairs(plan), plan_pairs(plan).sum(dim=(2, 3)))


@pytest.mark.parametrize("position", range(0, 16))
@pytest.mark.parametrize("window", [1, 2, 3])
def test_a_column_that_a_narrow_window_crosses_between_the_rows_of_a_tile(window: int, position: int) -> None:
    columns: dict[str, Any] = {
        "column_indptr": torch.tensor([0, 1]),
        "column_indices": torch.tensor([position], dtype=torch.int32),
    }
    extent = Extent.full(1, 16, 16, causal=False)
    assert_counts(SparsePlan(1, 16, 16, extent, block_q=16, block_k=4, window=window, **columns))


def test_a_plan_may_compute_more_pairs_than_an_int32_holds() -> None:
    many = 1 << 17
    extent = Extent.full(1, many, many)
    blocks = torch.ones(1, 1, 8, 8, dtype=torch.bool)
    plan = SparsePlan.from_block_mask(blocks, many, many, extent=extent, block_q=many // 8, block_k=many // 8)
    assert count_pairs(plan).tolist() == [[many * (many + 1) // 2]]


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 4, 4), (1, 0, 4), (1, 4, 0), (2, 0, 0)])
@pytest.mark.parametrize("permuted", [False, True])
def test_nothing_has_no_pairs(batch: int, query_len: int, key_len: int, permuted: bool) -> None:
    row = [0] * batch
    extent = Extent(row, [query_len] * batch, row, [key_len] * batch)
    order = torch.arange(query_len, dtype=torch.int32).expand(batch, 2, -1)
    plan = SparsePlan(2, query_len, key_len, extent, window=9, q_order=order if permuted else None)
    assert torch.equal(count_pairs(plan), torch.zeros(batch, 2, dtype=torch.int64))


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("limit", [None, 1, 9, 60])
@pytest.mark.parametrize("seed", range(6))
def test_plans_of_blocks_and_columns_of_ordered_queries(seed: int, limit: int | None) -> None:
    """With keys in an order of their own or in none; dead numbers stand anywhere."""
    causal = seed % 2 == 0
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 50, "key_len": 57, "block_q": 8, "block_k": 6}
    extent = random_plan(seed, **size, padded=seed > 1, causal=causal, limit=limit).extent
    generator = torch.Generator().manual_seed(seed)

    def order(length: int) -> torch.Tensor:
        return torch.stack([torch.randperm(length, generator=generator) for _ in range(4)]).view(2, 2, length).int()

    given: dict[str, Any] = {"q_order": order(50)} | ({"k_order": order(57)} if seed % 3 else {})
    keys = 10 if "k_order" in given else -(-extent.longest // 6)
    mask = torch.rand(2, 2, 7, keys, generator=generator) < 0.4
    listed = torch.rand(2, 2, 3, extent.longest, generator=generator) < 0.2
    given |= {
        "column_group": 3,
        "column_indptr": torch.cat([torch.zeros(1), listed.sum(-1).flatten().cumsum(0)]).long(),
    }
    given["column_indices"] = listed.nonzero()[:, 3].int()
    plan = SparsePlan.from_block_mask(mask, 50, 57, extent=extent, block_q=8, block_k=6, **given)
    assert_counts(plan)
    assert int(plan.count_pairs().sum()) > 0 or limit is not None
