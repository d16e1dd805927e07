"""`SparsePlan` against its docstring: which pairs it computes, and that it keeps what it is given."""

from dataclasses import fields, replace
from typing import Any

import pytest
import torch
from definitions import allowed_pairs, call_in, everywhere, lists_of, plan_pairs
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import Extent, SparsePlan
from gossamer.plan import Grid
from gossamer.testing import random_plan

plans = st.builds(
    random_plan,
    st.integers(0, 10_000),
    batch=st.integers(0, 2),
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


@settings(max_examples=150, deadline=None)
@given(plans)
def test_the_mask_is_the_definition(plan: SparsePlan) -> None:
    assert torch.equal(plan.to_mask(), plan_pairs(plan))


@pytest.mark.parametrize("absent", ["q_order", "k_order"])
@pytest.mark.parametrize("seed", range(6))
def test_the_mask_is_the_definition_under_one_order_alone(seed: int, absent: str) -> None:
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 11, "key_len": 16, "block_q": 4, "block_k": 3}
    both = random_plan(seed, **size, permuted=True, padded=True)
    plan = random_plan(seed, **size, padded=True)
    order = {"q_order", "k_order"} - {absent}
    given = {name: getattr(both, name) for name in order}
    rows = plan.num_query_blocks if absent == "q_order" else both.num_query_blocks
    width = plan.num_key_blocks if absent == "k_order" else both.num_key_blocks
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(2, 2, rows, width, generator=generator) < 0.4
    plan = SparsePlan.from_block_mask(mask, 11, 16, extent=plan.extent, block_q=4, block_k=3, **given)
    assert torch.equal(plan.to_mask(), plan_pairs(plan))


def plan_for(situation: str, **more: Any) -> SparsePlan:
    """Every part of the union, on blocks that no border of a situation falls on."""
    call = call_in(situation, length=37)
    grid = Grid(call.extent, 6, 5)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(call.batch, 2, grid.query_blocks, grid.key_blocks, generator=generator) < 0.3
    groups = -(-grid.query_blocks // 2)
    listed = torch.rand(call.batch, 2, groups, call.extent.longest, generator=generator) < 0.1
    counts = listed.sum(dim=-1).flatten()
    return SparsePlan.from_block_mask(
        mask,
        call.query_len,
        call.key_len,
        extent=call.extent,
        block_q=6,
        block_k=5,
        **{
            "column_group": 2,
            "column_indptr": torch.nn.functional.pad(counts.cumsum(0), (1, 0)),
            "column_indices": listed.flatten(0, 2).nonzero()[:, 1].to(torch.int32),
            "sink": [2, 0],
            "window": [0, 3],
        }
        | more,
    )


@everywhere
def test_the_mask_is_the_definition_everywhere(situation: str) -> None:
    plan = plan_for(situation)
    assert torch.equal(plan.to_mask(), plan_pairs(plan))


def test_rows_of_the_mask_come_in_any_order() -> None:
    plan = plan_for("padded chunk")
    rows = torch.tensor([7, 2, 2, 11])
    assert torch.equal(plan.rows_mask(rows), plan_pairs(plan)[:, :, rows])


@everywhere
def test_rows_of_the_mask_may_differ_by_batch_row(situation: str) -> None:
    plan = plan_for(situation)
    rows = torch.stack([torch.tensor([3, 0, 5]) + b for b in range(plan.batch)]) % max(1, plan.query_len)
    of_rows = torch.stack([plan_pairs(plan)[b][:, rows[b]] for b in range(plan.batch)])
    assert torch.equal(plan.rows_mask(rows), of_rows)


@pytest.mark.parametrize(("band", "pairs"), [("window", 8 + 7 + 6), ("sink", 3 * 8 - 3)])
def test_bands_of_three_tokens_hold_three(band: str, pairs: int) -> None:
    bands: dict[str, Any] = {band: 3}
    assert int(SparsePlan(1, 8, 8, Extent.full(1, 8, 8), **bands).to_mask().sum()) == pairs


def test_a_window_reaches_both_ways_where_attention_is_not_causal() -> None:
    plan = SparsePlan(1, 8, 8, Extent.full(1, 8, 8, causal=False), window=2)
    assert plan.to_mask()[0, 0, 3].nonzero().flatten().tolist() == [2, 3, 4]


@everywhere
def test_a_dense_plan_computes_what_the_extent_allows(situation: str) -> None:
    call = call_in(situation)
    plan = SparsePlan.dense(3, call.query_len, call.key_len, call.extent)
    pairs = allowed_pairs(call.extent, call.query_len, call.key_len)[:, None].expand(-1, 3, -1, -1)
    assert torch.equal(plan.to_mask(), pairs)
    assert torch.equal(plan.count_pairs(), pairs.sum(dim=(2, 3)))
    assert plan.density() == 1.0


def test_a_whole_window_reaches_any_position() -> None:
    assert bool(SparsePlan.dense(1, 2, 3, Extent([1 << 28], [2], [0], [3])).to_mask().all())


def test_a_dense_plan_for_other_lengths_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"4 queries in batch row 0, .* but there are 3"):
        SparsePlan.dense(1, 3, 4, Extent.full(1, 4, 4))


@everywhere
def test_masks_of_blocks_and_columns_are_the_lists(situation: str) -> None:
    plan = plan_for(situation)
    blocks, columns = plan.block_mask(), plan.column_mask()
    assert blocks.shape == (plan.batch, 2, plan.num_query_blocks, plan.num_key_blocks)
    assert columns.shape == (plan.batch, 2, plan.num_column_groups, plan.extent.longest)
    for b in range(plan.batch):
        for h in range(2):
            listed = lists_of(plan.block_indptr, plan.block_indices, 2 * b + h, plan.num_query_blocks)
            assert [row.nonzero().flatten().tolist() for row in blocks[b, h]] == listed
            listed = lists_of(plan.column_indptr, plan.column_indices, 2 * b + h, plan.num_column_groups)
            assert [row.nonzero().flatten().tolist() for row in columns[b, h]] == listed


# From a mask of blocks


def same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return isinstance(other, Tensor) and one.dtype == other.dtype and torch.equal(one, other)
    return one == other


def assert_same_fields(one: SparsePlan, other: SparsePlan) -> None:
    for part in fields(SparsePlan):
        if part.init:
            assert same(getattr(one, part.name), getattr(other, part.name)), part.name


@settings(max_examples=50, deadline=None)
@given(plans)
def test_a_plan_made_of_its_own_blocks_is_the_same_in_every_field(plan: SparsePlan) -> None:
    given = {part.name: getattr(plan, part.name) for part in fields(plan) if part.init}
    for name in ("heads", "block_indptr", "block_indices"):
        del given[name]
    assert_same_fields(SparsePlan.from_block_mask(plan.block_mask(), **given), plan)


def test_blocks_have_64_tokens_unless_told_otherwise() -> None:
    plan = SparsePlan(1, 200, 200, Extent.full(1, 200, 200), window=1)
    assert (plan.block_q, plan.block_k, plan.num_query_blocks, plan.num_key_blocks) == (64, 64, 4, 4)


def test_without_an_extent_the_queries_are_the_last_tokens() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(2, 1, 2, 3, dtype=torch.bool), 7, 12, block_q=4, block_k=4)
    assert torch.equal(plan.to_mask()[:, 0], allowed_pairs(Extent.full(2, 7, 12), 7, 12))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(1, 1, 2, 2), r"must be bool .* got torch\.float32 \(1, 1, 2, 2\)"),
        (torch.ones(1, 2, 2, dtype=torch.bool), r"must be bool .* got torch\.bool \(1, 2, 2\)"),
        (torch.ones(1, 1, 2, 3, dtype=torch.bool), r"\[batch, heads, 2, 2\] for lengths 8, 8 .* \(1, 1, 2, 3\)"),
        (torch.ones(1, 1, 1, 2, dtype=torch.bool), r"\[batch, heads, 2, 2\] for .* blocks 4, 4; .* \(1, 1, 1, 2\)"),
    ],
)
def test_bad_block_masks_are_named(mask: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparsePlan.from_block_mask(mask, 8, 8, block_q=4, block_k=4)


# Counts


def test_a_pair_selected_by_every_part_counts_once() -> None:
    everything = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    columns = {"column_group": 2, "column_indptr": torch.tensor([0, 8]), "column_indices": torch.arange(8).int()}
    plan = SparsePlan.from_block_mask(everything, 8, 8, block_q=4, block_k=4, sink=8, window=16, **columns)
    assert plan.count_pairs().tolist() == [[8 * 9 // 2]]
    assert plan.density() == 1.0


def test_density_is_the_share_of_allowed_pairs_that_is_computed() -> None:
    plan = plan_for("left padding")
    pairs, allowed = plan_pairs(plan), allowed_pairs(plan.extent, plan.query_len, plan.key_len)
    assert plan.density() == pytest.approx(int(pairs.sum()) / (2 * int(allowed.sum())), abs=1e-12)


def test_density_of_nothing_is_one() -> None:
    assert SparsePlan(1, 4, 4, Extent([0], [0], [0], [4])).density() == 1.0


def test_what_a_backend_counted_is_not_counted_again() -> None:
    given = plan_for("no padding")
    plan = SparsePlan.unchecked(**all_fields(given), pairs=torch.tensor([[3, 4]]))
    assert plan.count_pairs().tolist() == [[3, 4]]
    plan.count_pairs().zero_()
    assert plan.count_pairs().tolist() == [[3, 4]]


def test_memory_is_that_of_all_tensors() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 128, 128)
    # 3 block pointers, 3 column pointers, 4 fields of the extent (8 bytes); 4 indices, a sink and a window (4 bytes)
    assert plan.memory_bytes() == (3 + 3 + 4) * 8 + (4 + 1 + 1) * 4


# Without validation, and on another device


def all_fields(plan: SparsePlan) -> dict[str, Any]:
    return {part.name: getattr(plan, part.name) for part in fields(plan) if part.init}


def full_plan() -> SparsePlan:
    """No field has its default, but the attributes that are for plans of blocks alone."""
    plan = random_plan(5, batch=2, heads=2, query_len=11, key_len=16, block_q=4, block_k=3, permuted=True, padded=True)
    rows = 2 * 2 * 3
    lists = {"block_indptr": torch.arange(rows + 1), "block_indices": torch.arange(rows).int() % 6}
    columns = {"column_indptr": torch.arange(2 * 2 * 2 + 1), "column_indices": torch.arange(8).int() % 4}
    return replace(plan, **lists, **columns, column_group=2, sink=[1, 2], window=[3, 4], quantised=True)


def test_a_full_plan_has_no_default() -> None:
    default = SparsePlan(2, 11, 16, full_plan().extent)
    always_given = ("heads", "query_len", "key_len", "extent", "pruned_mean", "skip")
    for name, value in all_fields(full_plan()).items():
        if name not in always_given:
            assert not same(value, getattr(default, name)), name


def test_an_unchecked_plan_keeps_every_field() -> None:
    attributed = SparsePlan(2, 5, 70, Extent.full(1, 5, 70), pruned_mean=True, skip=1.5)
    for plan in (full_plan(), attributed):
        assert_same_fields(SparsePlan.unchecked(**all_fields(plan)), plan)


def test_an_unchecked_plan_has_the_defaults_of_a_checked_one() -> None:
    given: dict[str, Any] = {"heads": 3, "query_len": 5, "key_len": 9, "extent": Extent.full(2, 5, 9)}
    assert_same_fields(SparsePlan.unchecked(**given), SparsePlan(**given))


@pytest.mark.parametrize("band", [7, torch.tensor(7), torch.tensor([7, 7], dtype=torch.int64)])
def test_an_unchecked_plan_takes_bands_as_numbers_and_tensors(band: Tensor | int) -> None:
    plan = SparsePlan.unchecked(heads=2, query_len=5, key_len=9, extent=Extent.full(1, 5, 9), sink=band, window=band)
    for got in (plan.sink, plan.window):
        assert same(got, torch.tensor([7, 7], dtype=torch.int32))


SIZES: dict[str, Any] = {"heads": 2, "query_len": 8, "key_len": 8, "block_q": 4, "block_k": 4}


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads must be at least 1 .* got 0"),
        ({"query_len": 7}, ValueError, "names 8 queries in batch row 0, .* but there are 7"),
        ({"key_len": 7}, ValueError, "names 8 keys in batch row 0, .* but there are 7"),
        (
            {"block_indptr": torch.zeros(6, dtype=torch.int64)},
            ValueError,
            r"block_indptr must have shape \(5,\) .* \(6,\)",
        ),
        ({"block_indptr": torch.zeros(5, dtype=torch.int32)}, TypeError, r"block_indptr must be int64 .* torch\.int32"),
        ({"block_indices": torch.zeros(3, dtype=torch.int64)}, TypeError, r"block_indices int32, got .* torch\.int64"),
        ({"column_indptr": torch.zeros(4, dtype=torch.int64)}, ValueError, r"column_indptr must have shape \(5,\)"),
        ({"column_indices": torch.zeros(1, 3, dtype=torch.int32)}, ValueError, r"one-dimensional, got \(1, 3\)"),
        ({"sink": torch.zeros(3, dtype=torch.int64)}, ValueError, r"sink must hold one integer .* 2 heads, got .*3"),
        (
            {"window": torch.zeros(3, dtype=torch.int32)},
            ValueError,
            r"window must hold one integer .* 2 heads, got .*3",
        ),
        ({"window": torch.zeros(2)}, (TypeError, ValueError), r"window must hold .*integer.*, got torch\.float32"),
        (
            {"q_order": torch.zeros(1, 2, 7, dtype=torch.int32)},
            ValueError,
            r"q_order must be int32 of shape \(1, 2, 8\)",
        ),
        ({"k_order": torch.zeros(1, 2, 8, dtype=torch.int64)}, ValueError, "k_order must be int32 .* got torch.int64"),
    ],
)
def test_sizes_and_dtypes_of_an_unchecked_plan_are_checked(
    change: dict[str, Any], error: Any, message: str, device: str
) -> None:
    nothing = torch.empty(0, dtype=torch.int32, device=device)
    on = {name: value.to(device) if isinstance(value, Tensor) else value for name, value in change.items()}
    with pytest.raises(error, match=message):
        SparsePlan.unchecked(**{**SIZES, "extent": Extent.full(1, 8, 8), "block_indices": nothing} | on)


def test_tensors_of_an_unchecked_plan_lie_on_one_device() -> None:
    indptr = torch.zeros(5, dtype=torch.int64, device="meta")
    with pytest.raises(ValueError, match=r"SparsePlan.column_indptr must lie on cpu as the others, got meta"):
        SparsePlan.unchecked(**SIZES, extent=Extent.full(1, 8, 8), column_indptr=indptr)


def test_bands_of_an_unchecked_plan_that_lie_on_a_device_are_not_read() -> None:
    for band in (torch.tensor(1 << 40, device="meta"), torch.zeros(2, dtype=torch.int64, device="meta")):
        nothing = torch.empty(0, dtype=torch.int32, device="meta")
        plan = SparsePlan.unchecked(**SIZES, extent=Extent.full(1, 8, 8), block_indices=nothing, window=band)
        assert isinstance(plan.window, Tensor)
        assert (plan.window.dtype, plan.window.shape, plan.window.device.type) == (torch.int32, (2,), "meta")


def test_a_tensor_that_was_resized_is_named() -> None:
    plan = full_plan()
    plan.column_indptr.resize_(3)
    with pytest.raises(ValueError, match=r"column_indptr must have shape \(9,\) .* got \(3,\)"):
        plan.check()


@pytest.mark.parametrize("name", ["windw", "grid", "_pairs"])
def test_an_unchecked_plan_takes_fields_alone(name: str) -> None:
    given: dict[str, Any] = {"heads": 1, "query_len": 5, "key_len": 5, "extent": Extent.full(1, 5, 5), name: 3}
    with pytest.raises(TypeError, match=f"SparsePlan has no field {name}"):
        SparsePlan.unchecked(**given)


def test_a_plan_on_another_device_keeps_every_field() -> None:
    plan = SparsePlan.unchecked(**all_fields(full_plan()), pairs=torch.tensor([[1, 2], [3, 4]]))
    moved = plan.to("meta")
    assert moved.device == torch.device("meta")
    for name, value in all_fields(plan).items():
        got = getattr(moved, name)
        if isinstance(value, Tensor):
            assert (got.device.type, got.shape, got.dtype) == ("meta", value.shape, value.dtype), name
        else:
            assert got is value, name
    assert moved.count_pairs().tolist() == [[1, 2], [3, 4]]


def test_a_plan_is_not_copied_to_the_device_that_it_lies_on() -> None:
    plan = full_plan()
    assert plan.to("cpu") is plan


def test_a_changed_plan_forgets_what_a_backend_counted() -> None:
    extent = Extent.full(1, 8, 8)
    plan = replace(SparsePlan.dense(1, 8, 8, extent), window=1)
    assert plan.count_pairs().tolist() == [[8]]


# Construction


def test_tensors_are_copied() -> None:
    plan = full_plan()
    given: dict[str, Any] = {
        name: value.clone() for name, value in all_fields(plan).items() if isinstance(value, Tensor)
    }
    again = SparsePlan(**all_fields(plan) | given)
    for tensor in given.values():
        tensor.zero_()
    assert_same_fields(again, plan)


def test_a_plan_is_frozen() -> None:
    with pytest.raises(AttributeError):
        SparsePlan(1, 2, 2, Extent.full(1, 2, 2)).window = 3  # type: ignore[misc]
