"""SparsePlan and Extent: the definition, validation, counting, conversion."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer import Extent, SparsePlan
from gossamer.plan.count import dense_pairs
from gossamer.testing import random_plan


def naive_attend(plan: SparsePlan, b: int, h: int, i: int, j: int) -> bool:
    """The definition, pair by pair, with Python integers."""
    extent = plan.extent
    kpos, qpos = j - int(extent.key_start[b]), i + int(extent.query_start[b])
    if not 0 <= kpos < int(extent.key_count[b]):
        return False
    if plan.causal and kpos > qpos:
        return False
    if plan.limit is not None and abs(qpos - kpos) >= plan.limit:
        return False
    rank_i = i if plan.q_order is None else plan.q_order[b, h].tolist().index(i)
    rank_j = j if plan.k_order is None else plan.k_order[b, h].tolist().index(j)
    block = rank_i // plan.block_q
    row = (b * plan.heads + h) * plan.num_query_blocks + block
    blocks = plan.block_indices[int(plan.block_indptr[row]) : int(plan.block_indptr[row + 1])].tolist()
    row = (b * plan.heads + h) * plan.num_column_groups + block // plan.column_group
    columns = plan.column_indices[int(plan.column_indptr[row]) : int(plan.column_indptr[row + 1])].tolist()
    sink, window = torch.as_tensor(plan.sink), torch.as_tensor(plan.window)
    return rank_j // plan.block_k in blocks or j in columns or kpos < int(sink[h]) or abs(qpos - kpos) < int(window[h])


plans = st.builds(
    random_plan,
    st.integers(0, 10_000),
    batch=st.integers(1, 2),
    heads=st.integers(1, 2),
    query_len=st.integers(0, 14),
    key_len=st.integers(14, 22),
    block_q=st.sampled_from([1, 3, 4, 16]),
    block_k=st.sampled_from([1, 4, 5, 16]),
    permuted=st.booleans(),
    causal=st.booleans(),
    limit=st.sampled_from([None, 1, 4, 30]),
    padded=st.booleans(),
)


@settings(max_examples=60, deadline=None)
@given(plans)
def test_mask_is_the_definition(plan: SparsePlan) -> None:
    mask = plan.to_mask()
    assert mask.shape == (plan.batch, plan.heads, plan.query_len, plan.key_len)
    for b, h, i, j in itertools.product(*(range(n) for n in mask.shape)):
        assert bool(mask[b, h, i, j]) == naive_attend(plan, b, h, i, j), (b, h, i, j)


@settings(max_examples=200, deadline=None)
@given(plans)
def test_count_equals_the_mask(plan: SparsePlan) -> None:
    mask = plan.to_mask()
    assert torch.equal(plan.count_pairs(), mask.sum(dim=(2, 3)))
    allowed = SparsePlan.dense(
        plan.heads, plan.query_len, plan.key_len, plan.extent, causal=plan.causal, limit=plan.limit
    ).to_mask()
    expected = mask.sum().item() / allowed.sum().item() if allowed.any() else 1.0
    assert plan.density() == pytest.approx(expected)


@pytest.mark.parametrize("seed", range(12))
def test_count_equals_the_mask_at_tile_size(seed: int) -> None:
    plan = random_plan(
        seed,
        batch=2,
        heads=2,
        query_len=300,
        key_len=411,
        block_k=128,
        padded=seed % 2 == 0,
        causal=seed % 3 > 0,
        limit=[None, 77, 200][seed % 3],
    )
    assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)))


@settings(max_examples=50, deadline=None)
@given(plans)
def test_block_mask_round_trip(plan: SparsePlan) -> None:
    again = SparsePlan.from_block_mask(
        plan.block_mask(),
        plan.query_len,
        plan.key_len,
        extent=plan.extent,
        block_q=plan.block_q,
        block_k=plan.block_k,
    )
    assert torch.equal(again.block_mask(), plan.block_mask())


@pytest.mark.parametrize("seed", range(6))
def test_flex_block_mask_covers_the_same_pairs(seed: int) -> None:
    plan = random_plan(
        seed,
        batch=2,
        heads=2,
        query_len=128,
        key_len=192,
        block_q=32,
        block_k=32,
        padded=seed % 2 == 0,
        causal=seed % 3 > 0,
        limit=[None, 50][seed % 2],
    )
    flex = plan.to_block_mask(4)
    batch, head, query, key = torch.meshgrid(
        torch.arange(2), torch.arange(4), torch.arange(128), torch.arange(192), indexing="ij"
    )

    def tiles(counts: torch.Tensor | None, order: torch.Tensor | None) -> torch.Tensor:
        assert counts is not None
        assert order is not None
        listed = torch.zeros(2, 4, 4, 6, dtype=torch.bool)
        listed.scatter_(3, order.long(), torch.arange(6) < counts[..., None])
        return listed.repeat_interleave(32, 2).repeat_interleave(32, 3)

    partial = tiles(flex.kv_num_blocks, flex.kv_indices)
    whole = tiles(flex.full_kv_num_blocks, flex.full_kv_indices)
    assert not bool((partial & whole).any())
    pairs = flex.mask_mod(batch, head, query, key) & partial | whole
    assert torch.equal(pairs, plan.to_mask().repeat_interleave(2, 1))


def test_flex_lists_blocks_below_the_diagonal_as_whole() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 250, 250)
    whole = plan.to_block_mask().full_kv_num_blocks
    assert whole is not None
    assert whole.tolist() == [[[0, 1, 2, 0]]]  # the last query block is cut off by the length


def test_flex_refuses_permuted_plans() -> None:
    plan = random_plan(0, batch=1, heads=1, query_len=64, key_len=64, permuted=True)
    with pytest.raises(ValueError, match="permuted"):
        plan.to_block_mask()


def test_a_pair_selected_twice_counts_once() -> None:
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    plan = SparsePlan.from_block_mask(everything, 128, 128, sink=128, window=256)
    assert plan.count_pairs().tolist() == [[128 * 129 // 2]]
    assert plan.density() == 1.0


def test_memory_bytes_counts_all_tensors() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 128, 128)
    # 3 block pointers, 3 column pointers (8 bytes), 4 indices, 1 sink, 1 window (4 bytes), 3 extent fields (8 bytes)
    assert plan.memory_bytes() == 6 * 8 + 6 * 4 + 3 * 8


def test_extent_of_left_padding() -> None:
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]]).bool()
    extent = Extent.from_key_mask(mask, query_len=5)
    assert extent.query_start.tolist() == [-2, 0]
    assert extent.key_start.tolist() == [2, 0]
    assert extent.key_count.tolist() == [3, 5]


def test_extent_of_chunk_on_a_static_cache() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 0, 0]]).bool()
    extent = Extent.from_key_mask(mask, query_len=2)
    assert (extent.query_start.tolist(), extent.key_count.tolist()) == ([2], [4])


def test_extent_rejects_holes() -> None:
    with pytest.raises(ValueError, match="batch row 1 have a hole"):
        Extent.from_key_mask(torch.tensor([[1, 1, 1], [1, 0, 1]]).bool(), 1)


def test_extent_rejects_more_queries_than_keys() -> None:
    with pytest.raises(ValueError, match="5 queries cannot be the last tokens of 4 keys"):
        Extent.full(1, 5, 4)


def _plan(**fields: object) -> SparsePlan:
    values = {"heads": 1, "query_len": 128, "key_len": 128, "extent": Extent.full(1, 128, 128)} | fields
    return SparsePlan(**values)  # type: ignore[arg-type]


def _csr(indptr: list[int], indices: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor(indptr), torch.tensor(indices, dtype=torch.int32)


@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1, 2], [0, 2], r"lie in \[0, 2\).*got 2"),
        ([0, 1, 2], [0, -1], r"lie in \[0, 2\).*got -1"),
        ([0, 0, 2], [1, 0], "got 1 followed by 0 at entry 0"),
        ([0, 0, 2], [1, 1], "got 1 followed by 1"),
        ([0, 2, 1], [0, 1], "rise from 0"),
        ([0, 1, 1], [0, 1], "rise from 0"),
        ([0, 1], [0], r"shape \(3,\)"),
    ],
)
def test_bad_blocks_are_named(indptr: list[int], indices: list[int], message: str) -> None:
    pointers, entries = _csr(indptr, indices)
    with pytest.raises(ValueError, match=message):
        _plan(block_indptr=pointers, block_indices=entries)


def test_a_fall_between_rows_is_allowed() -> None:
    pointers, entries = _csr([0, 2, 3], [0, 1, 0])
    assert _plan(block_indptr=pointers, block_indices=entries).block_mask().sum() == 3


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads must be at least 1, got 0"),
        ({"block_q": 0}, ValueError, "block_q must be at least 1"),
        ({"limit": 0}, ValueError, "limit must be at least 1"),
        ({"sink": [1, 2]}, ValueError, "each of the plan's 1 heads"),
        ({"window": -1}, ValueError, "window must not be negative, got -1"),
        ({"window": 1.5}, ValueError, "one integer"),
        ({"extent": Extent([0], [10], [120])}, ValueError, "up to slot 130, but key_len is 128"),
        ({"q_order": torch.zeros(1, 1, 128, dtype=torch.int32)}, ValueError, "permutation"),
        ({"k_order": torch.arange(128)[None, None]}, ValueError, "int32"),
        ({"block_indptr": torch.zeros(3, dtype=torch.int32)}, TypeError, "must be int64"),
    ],
)
def test_bad_fields_are_named(fields: dict, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        _plan(**fields)


@pytest.mark.parametrize("limit", [None, 1, 7, 1000])
@pytest.mark.parametrize("causal", [True, False])
def test_dense_pairs_in_closed_form(causal: bool, limit: int | None) -> None:
    """Those that a dense plan counts: padding on either side, chunks, caches with empty slots, nothing at all."""
    for query_len, key_len, start, first, count in (
        (20, 20, 0, 0, 20),
        (20, 20, -6, 6, 14),
        (20, 50, 30, 0, 50),
        (20, 50, 12, 0, 32),
        (20, 50, 5, 9, 10),
        (1, 50, 49, 0, 50),
        (5, 9, 3, 2, 0),
        (0, 9, 9, 0, 9),
    ):
        extent = Extent([start, 0], [first, 0], [count, key_len])
        dense = SparsePlan.dense(1, query_len, key_len, extent, causal=causal, limit=limit)
        pairs = dense_pairs(extent, query_len, causal=causal, limit=limit)
        assert pairs == int(dense.to_mask().sum()) == int(dense.count_pairs().sum())
        assert dense.density() == 1.0
