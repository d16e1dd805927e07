"""`SparsePlan.check`: what somebody wrote to a plan's tensors after it was made is named."""

import pytest

from gossamer import SparsePlan
from gossamer.testing import random_plan


def written(name: str, at: int, value: int, *, permuted: bool = False) -> SparsePlan:
    """A plan of which one entry was written by an alias, which leaves no trace in the tensor."""
    plan = random_plan(11, batch=2, heads=2, query_len=14, key_len=20, block_q=4, block_k=5, permuted=permuted)
    tensor = getattr(plan.extent if hasattr(plan.extent, name) else plan, name)
    assert tensor.numel() > 3 or name in ("sink", "window") or hasattr(plan.extent, name)
    tensor.numpy().reshape(-1)[at] = value
    return plan


@pytest.mark.parametrize("permuted", [False, True])
def test_a_plan_that_nobody_wrote_to_passes(permuted: bool) -> None:
    random_plan(11, batch=2, heads=2, query_len=14, key_len=20, block_q=4, block_k=5, permuted=permuted).check()


WRITTEN = [
    ("block_indptr", 1, 99, "block_indptr must rise"),
    ("block_indptr", 1, -1, "block_indptr must rise .* smallest step -1"),
    ("block_indptr", 0, 1, "block_indptr must rise .* got first 1"),
    ("block_indices", 2, 4, r"block_indices must lie in \[0, 4\) .* got 4"),
    ("block_indices", -1, -2, r"block_indices must lie in \[0, 4\) .* got -2"),
    ("column_indptr", -1, 0, "column_indptr must rise .* last 0"),
    ("column_indices", 0, 20, r"column_indices must lie in \[0, 20\) .* got 20"),
    ("sink", 1, -1, "sink must not be negative .* got -1"),
    ("window", 0, -7, "window must not be negative .* got -7"),
    ("query_start", 0, -15, r"names 29 queries in batch row 0"),
    ("query_start", 1, 1 << 40, "batch row 1 of the extent has query_start 1099511627776"),
    ("query_count", 1, -1, "batch row 1 of the extent has .* query_count -1"),
    ("key_start", 0, -1, "batch row 0 of the extent has .* key_start -1"),
    ("key_count", 0, -1, "batch row 0 of the extent has .* key_count -1"),
    ("key_count", 0, 21, "names 21 keys in batch row 0"),
    ("query_start", 0, 3, "made for 4 x 4 blocks, but its extent now has 5 x 4"),
]


@pytest.mark.parametrize(("name", "at", "value", "message"), WRITTEN)
def test_what_was_written_is_named(name: str, at: int, value: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        written(name, at, value).check()


@pytest.mark.parametrize("order", ["q_order", "k_order"])
@pytest.mark.parametrize("value", [-1, 30])
def test_an_order_that_was_written_is_named(order: str, value: int) -> None:
    with pytest.raises(ValueError, match=f"{order} must be a permutation"):
        written(order, 3, value, permuted=True).check()
