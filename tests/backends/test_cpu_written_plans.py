"""Plans and extents whose tensors were written after they were made: an error or a result, and nothing else."""

from typing import Any

import pytest
import torch
from cpu_checks import check, draw, needs_kernels
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.plan import Grid
from gossamer.plan.parts import plan_parts
from gossamer.testing import random_plan

pytestmark = needs_kernels

HUGE = (1 << 31) - 1
FAR = 1 << 40


def written_plan(name: str, at: int | None, value: int, *, permuted: bool = False) -> tuple[AttentionCall, SparsePlan]:
    """A plan with an entry of one tensor (or all) written through numpy, which leaves no trace in the tensor."""
    size: dict[str, Any] = {"batch": 2, "heads": 2, "query_len": 150, "key_len": 210}
    plan = random_plan(11, **size, permuted=permuted)
    assert plan.block_indices.numel() > 0
    assert plan.column_indices.numel() > 0
    call = draw(plan, heads=4, groups=2, dim=32)
    tensor = getattr(plan.extent if hasattr(plan.extent, name) else plan, name)
    tensor.numpy().reshape(-1)[slice(None) if at is None else at] = value
    return call, plan


@pytest.mark.parametrize(
    ("name", "at", "value", "message"),
    [
        ("block_indptr", 0, 1, r"block_indptr must rise from 0 to the number of indices \(\d+\), got first 1"),
        ("block_indptr", -1, FAR, f"block_indptr must rise .* last {FAR}"),
        ("column_indptr", 0, -3, "column_indptr must rise .* got first -3"),
        ("column_indptr", -1, 0, "column_indptr must rise .* last 0"),
        ("sink", 1, -1, "sink must be at least 0 .* got -1"),
        ("window", 0, -5, "window must be at least 0 .* got -5"),
        ("query_start", 1, FAR, f"query_start must be .* got {FAR}"),
        ("query_start", 1, -FAR, f"query_start must be .* got -{FAR}"),
        ("query_start", 1, -3, "names 153 queries in batch row 1, .* but there are 150"),
        ("query_count", 0, -1, "query_count must be at least 0 .* got -1"),
        ("query_count", 0, 151, "names 151 queries in batch row 0"),
        ("query_count", 0, 1 << 62, "query_count must be .* got 4611686018427387904"),
        ("key_start", 1, 1, "names 211 keys in batch row 1, .* but there are 210"),
        ("key_start", 1, -1, "key_start must be at least 0 .* got -1"),
        ("key_count", 1, HUGE, f"names {HUGE} keys in batch row 1"),
        ("key_count", 1, -HUGE, f"key_count must be at least 0 .* got -{HUGE}"),
    ],
)
def test_what_every_call_looks_at_is_named(name: str, at: int, value: int, message: str) -> None:
    call, plan = written_plan(name, at, value)
    with pytest.raises(ValueError, match=message):
        cpu.attend(call, plan)
    with pytest.raises(ValueError, match=message):
        cpu.count(plan)


@pytest.mark.parametrize("order", ["q_order", "k_order"])
@pytest.mark.parametrize("value", [-1, 3, 149, HUGE, -HUGE])
def test_an_order_that_is_no_permutation_is_named(order: str, value: int) -> None:
    call, plan = written_plan(order, None, value, permuted=True)
    with pytest.raises(
        ValueError, match=rf"{order} must be a permutation of 0\.\.\d+ in every row, got {value} at rank"
    ):
        cpu.attend(call, plan)


def test_more_query_blocks_than_lists_are_named() -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=150)
    call = draw(plan, heads=4, groups=2, dim=32)
    plan.extent.query_start.numpy()[0] = 50  # 150 queries then lie in four blocks of 64, not in three
    with pytest.raises(ValueError, match="has lists for 3 query blocks, but its extent has 4"):
        cpu.attend(call, plan)


@pytest.mark.parametrize("name", ["block_indptr", "block_indices", "column_indptr", "column_indices"])
@pytest.mark.parametrize("value", [-1, 0, 7, 300, HUGE, -HUGE])
def test_what_lies_inside_lists_is_bounded(name: str, value: int) -> None:
    for at in (1, 5, -2):
        call, plan = written_plan(name, at, value)
        out, lse = cpu.attend(call, plan)
        assert (out.shape, lse.shape) == ((2, 4, 150, 32), (2, 4, 150))
        cpu.count(plan)


def test_a_wrong_index_changes_only_the_rows_of_its_list() -> None:
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 2, 2, dtype=torch.bool), 128, 128)
    call = draw(plan, heads=1, groups=1, dim=32)
    expected, _ = cpu.attend(call, plan)
    plan.block_indices[-1] = HUGE  # block 1 of the second query block
    out, _ = cpu.attend(call, plan)
    assert torch.equal(out[:, :, :64], expected[:, :, :64])
    without = SparsePlan.from_block_mask(torch.tensor([[[[True, True], [True, False]]]]), 128, 128)
    check(call, without)
    assert torch.equal(out, cpu.attend(call, without)[0])


# Tensors of another size or dtype


@pytest.mark.parametrize("name", ["block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window"])
def test_tensors_that_were_resized_are_named(name: str) -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    call = draw(plan, heads=4, groups=2, dim=32)
    getattr(plan, name).resize_(1)
    with pytest.raises(ValueError, match=r"must have \d+ elements here, got 1|must rise from 0 to the number"):
        cpu.attend(call, plan)


@pytest.mark.parametrize("name", ["block_indptr", "block_indices", "column_indptr", "column_indices"])
def test_tensors_that_lost_their_memory_are_named(name: str) -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    call = draw(plan, heads=4, groups=2, dim=32)
    getattr(plan, name).untyped_storage().resize_(0)
    with pytest.raises(ValueError, match="lost its memory"):
        cpu.attend(call, plan)


@pytest.mark.parametrize("name", ["query_start", "query_count", "key_start", "key_count"])
def test_an_extent_of_other_batch_rows_is_named(name: str) -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    call = draw(plan, heads=4, groups=2, dim=32)
    getattr(plan.extent, name).resize_(1)
    with pytest.raises(ValueError, match=r"batch|Extent\.\w+ must have"):
        cpu.attend(call, plan)


@pytest.mark.parametrize("name", ["block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window"])
def test_tensors_of_another_dtype_are_named(name: str) -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    call = draw(plan, heads=4, groups=2, dim=32)
    tensor = getattr(plan, name)
    object.__setattr__(plan, name, tensor.to(torch.int16))  # half as many bytes, or a quarter
    with pytest.raises(TypeError, match=r"must be .* got .*torch\.int16"):
        cpu.attend(call, plan)


@pytest.mark.parametrize(
    ("number", "value"),
    [
        (0, 0), (0, 3), (0, 1 << 62), (1, 151), (1, -1), (2, 1 << 40), (3, 2), (3, 1 << 61), (3, -1), (4, 0),
        (5, 0), (5, (1 << 63) - 1), (6, 0), (6, -64), (6, (1 << 63) - 1), (8, 0), (8, 1 << 31),
    ],
)  # fmt: skip
def test_the_operator_refuses_numbers_that_do_not_fit(number: int, value: int) -> None:
    """What `torch.ops.gossamer.cpu_attend` is called with by itself, as in a compiled graph."""
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    call = draw(plan, heads=4, groups=2, dim=32)
    tensors, sizes = plan_parts(plan)
    sizes[number] = value
    with pytest.raises(ValueError, match=r"must|overflow|but"):
        torch.ops.gossamer.cpu_attend(call.q, call.k, call.values, torch.empty(0), tensors, sizes, 1.0, 0.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 3, 210, 32)}, "the 4 query heads must be a multiple of the 3"),
        ({"k": (2, 2, 209, 32)}, "v's tokens must have 209 elements here, got 210"),
        ({"k": (1, 2, 210, 32)}, "k's batch"),
        ({"k": (2, 2, 210, 31)}, "k's dimensions"),
        ({"v": (2, 1, 210, 32)}, "v's heads"),
        ({"v": (2, 2, 210, 300)}, "takes head dimensions 1 to 256, got 300"),
        ({"q": (2, 4, 149, 32)}, "the plan's queries"),
        ({"q": (2, 8, 150, 32), "k": (2, 4, 210, 32), "v": (2, 4, 210, 32)}, "the plan's heads must be q's or k's"),
        ({"sinks": (3,)}, "sinks must have 4 elements"),
    ],
)
def test_the_operator_refuses_tensors_that_do_not_fit(change: dict, message: str) -> None:
    shapes = {"q": (2, 4, 150, 32), "k": (2, 2, 210, 32), "v": (2, 2, 210, 32), "sinks": (0,)} | change
    tensors = [torch.zeros(*shape) for shape in shapes.values()]
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    with pytest.raises(ValueError, match=message):
        torch.ops.gossamer.cpu_attend(*tensors, *plan_parts(plan), 1.0, 0.0)


# Planning


def planned_by(verb: str, name: str, value: int) -> None:
    """Runs a verb on a call whose extent was written after it and its grid were made."""
    extent = Extent.full(1, 300, 300)
    q, k = torch.randn(1, 2, 300, 32), torch.randn(1, 1, 300, 32)
    call, grid = AttentionCall(q, k, extent=extent), Grid(extent, 64, 64)
    rows, means = range(grid.query_blocks), torch.zeros(1, 1, grid.key_blocks, 32)
    getattr(extent, name).fill_(value)
    verbs: dict[str, Any] = {
        "probe": lambda: cpu.last_query_probe(call, 64),
        "pool_queries": lambda: cpu.pool_queries(call, grid),
        "pool_keys": lambda: cpu.pool_keys(call, grid),
        "energy": lambda: cpu.row_block_energy(call, grid, means, rows),
        "antidiagonal": lambda: cpu.antidiagonal_scores(call, grid, 16, rows),
    }
    verbs[verb]()


@pytest.mark.parametrize("verb", ["probe", "pool_queries", "energy", "antidiagonal"])
@pytest.mark.parametrize(("name", "value"), [("query_count", 400), ("query_count", 1 << 62), ("query_start", -3)])
def test_planning_refuses_queries_beyond_the_tensor(verb: str, name: str, value: int) -> None:
    with pytest.raises(ValueError, match=r"queries in batch row 0|batch row 0 of the extent has"):
        planned_by(verb, name, value)


@pytest.mark.parametrize("verb", ["probe", "pool_keys", "antidiagonal"])
@pytest.mark.parametrize(("name", "value"), [("key_count", 400), ("key_start", 2)])
def test_planning_refuses_keys_beyond_the_tensor(verb: str, name: str, value: int) -> None:
    with pytest.raises(ValueError, match="keys in batch row 0"):
        planned_by(verb, name, value)


@pytest.mark.parametrize("verb", ["energy", "antidiagonal"])
def test_planning_refuses_more_key_blocks_than_the_grid_was_made_for(verb: str) -> None:
    extent = Extent([0], [100], [0], [100])
    call = AttentionCall(torch.randn(1, 2, 300, 32), torch.randn(1, 1, 300, 32), extent=extent)
    grid = Grid(extent, 64, 64)
    rows, means = range(grid.query_blocks), torch.zeros(1, 1, grid.key_blocks, 32)
    extent.key_count.fill_(300)
    verbs: dict[str, Any] = {
        "energy": lambda: cpu.row_block_energy(call, grid, means, rows),
        "antidiagonal": lambda: cpu.antidiagonal_scores(call, grid, 16, rows),
    }
    with pytest.raises(ValueError, match="300 keys in batch row 0, more than 2 blocks of 64"):
        verbs[verb]()


def test_an_extent_does_not_see_what_its_maker_writes() -> None:
    """The caller's own counter, advanced for the next chunk."""
    count = torch.tensor([256])
    extent = Extent([0], [256], [0], count)
    plan = SparsePlan(2, 256, 256, extent, window=600)
    count += 1 << 24
    assert int(extent.key_count) == 256
    check(draw(plan, heads=2, groups=2, dim=32), plan)


def bytes_of(tensors: list[Tensor]) -> list[bytes]:
    return [tensor.numpy().tobytes() for tensor in tensors]


def test_attending_writes_nothing_to_a_plan() -> None:
    plan = random_plan(11, batch=2, heads=2, query_len=150, key_len=210)
    before = bytes_of(plan_parts(plan)[0])
    cpu.attend(draw(plan, heads=4, groups=2, dim=32), plan)
    assert bytes_of(plan_parts(plan)[0]) == before
