"""What a plan is not made of: lists and fields that do not fit are named."""

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import Extent, SparsePlan


def csr(indptr: list[int], indices: list[int]) -> tuple[Tensor, Tensor]:
    return torch.tensor(indptr), torch.tensor(indices, dtype=torch.int32)


def test_lists_may_fall_between_rows_and_be_empty() -> None:
    pointers, entries = csr([0, 2, 2, 3], [0, 1, 0])
    plan = SparsePlan(1, 12, 12, Extent.full(1, 12, 12), 4, 4, block_indptr=pointers, block_indices=entries)
    assert plan.block_mask()[0, 0].nonzero().tolist() == [[0, 0], [0, 1], [2, 0]]


@pytest.mark.parametrize("kind", ["block", "column"])
@pytest.mark.parametrize(
    ("indptr", "indices", "message"),
    [
        ([0, 1, 2], [0, 8], r"must lie in \[0, 8\) .* got 8"),
        ([0, 1, 2], [0, -1], r"must lie in \[0, 8\) .* got -1"),
        ([0, 0, 2], [1, 0], "rise strictly within each row, got 1 followed by 0 at entry 0"),
        ([0, 1, 3], [0, 3, 3], "got 3 followed by 3 at entry 1"),
        ([0, 2, 1], [0, 1], r"rise from 0 to the number of indices \(2\), got first 0, last 1"),
        ([0, 1, 1], [0, 1], "got first 0, last 1, smallest step 0"),
        ([1, 1, 2], [0, 1], "got first 1, last 2"),
        ([0, 3, 2], [0, 1], "smallest step -1"),
        ([0, 1], [0], r"must have shape \(3,\) .* got \(2,\)"),
    ],
)
def test_bad_lists_are_named(kind: str, indptr: list[int], indices: list[int], message: str) -> None:
    pointers, entries = csr(indptr, indices)
    sizes = (4, 1) if kind == "block" else (4, 64)
    lists: dict[str, Any] = {f"{kind}_indptr": pointers, f"{kind}_indices": entries}
    with pytest.raises(ValueError, match=f"SparsePlan.{kind}_.*{message}"):
        SparsePlan(1, 8, 8, Extent.full(1, 8, 8), *sizes, **lists)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"heads": 0}, ValueError, "heads must be at least 1 .* got 0"),
        ({"heads": 1.0}, TypeError, r"heads must be an integer, got 1\.0"),
        ({"block_q": 0}, ValueError, "block_q must be at least 1 .* got 0"),
        ({"block_k": -3}, ValueError, "block_k must be at least 1 .* got -3"),
        ({"column_group": 0}, ValueError, "column_group must be at least 1 .* got 0"),
        ({"query_len": -1}, ValueError, "query_len must be at least 0 .* got -1"),
        ({"key_len": 1 << 31}, ValueError, "key_len .* at most 2147483647, got 2147483648"),
        ({"sink": [1, 2]}, ValueError, r"sink .* each of the plan's 1 heads, got shape \(2,\)"),
        ({"window": -1}, ValueError, "window must not be negative .* got -1"),
        ({"window": 1.5}, TypeError, "window must hold integers, got torch.float32"),
        ({"block_indptr": torch.zeros(3, dtype=torch.int32)}, TypeError, "block_indptr must be int64 .* torch.int32"),
        ({"column_indices": torch.zeros(1)}, TypeError, "column_indices int32, got torch.int64, torch.float32"),
        ({"block_indices": csr([], [[0]])[1]}, ValueError, r"block_indices must be one-dimensional, got \(1, 1\)"),  # type: ignore[list-item]
        ({"q_order": torch.zeros(1, 1, 8, dtype=torch.int32)}, ValueError, r"q_order must be a permutation of 0\.\.7"),
        ({"k_order": torch.arange(8)[None, None]}, ValueError, "k_order must be int32 .* got torch.int64"),
        ({"k_order": torch.arange(9).int()[None, None]}, ValueError, r"k_order .* \(1, 1, 8\), got .* \(1, 1, 9\)"),
    ],
)
def test_bad_fields_are_named(change: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"heads": 1, "query_len": 8, "key_len": 8, "extent": Extent.full(1, 8, 8)}
    good |= {"block_q": 4, "block_k": 4} | change
    with pytest.raises(error, match=message):
        SparsePlan(**good)


def test_an_extent_beyond_the_lengths_is_named() -> None:
    with pytest.raises(ValueError, match=r"9 keys in batch row 0, .* but there are 8"):
        SparsePlan(1, 8, 8, Extent([0], [8], [1], [8]))
