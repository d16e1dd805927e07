"""Validation of a plan's lists; the messages name the first offending value."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["check_csr", "check_order"]


def check_csr(indptr: Tensor, indices: Tensor, rows: int, limit: int, name: str, unit: str) -> None:
    """Validate ascending CSR rows; the messages name the first offending value."""
    if indptr.dtype != torch.int64 or indices.dtype != torch.int32:
        raise TypeError(
            f"SparsePlan.{name}_indptr must be int64 and {name}_indices int32, got {indptr.dtype}, {indices.dtype}"
        )
    if indptr.shape != (rows + 1,) or indices.ndim != 1:
        raise ValueError(
            f"SparsePlan.{name}_indptr must have shape ({rows + 1},) for this plan's batch, heads and blocks, "
            f"got {tuple(indptr.shape)}; {name}_indices must be one-dimensional, got {tuple(indices.shape)}"
        )
    lengths = indptr.diff()
    if int(indptr[0]) != 0 or int(indptr[-1]) != indices.numel() or (rows and int(lengths.min()) < 0):
        raise ValueError(
            f"SparsePlan.{name}_indptr must rise from 0 to the number of indices ({indices.numel()}), "
            f"got first {int(indptr[0])}, last {int(indptr[-1])}, "
            f"smallest step {int(lengths.min()) if rows else 0}"
        )
    if not indices.numel():
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= limit:
        raise ValueError(f"SparsePlan.{name}_indices must lie in [0, {limit}) ({unit}), got {low if low < 0 else high}")
    rising = indices.diff() > 0
    starts = indptr[1:-1]
    rising[starts[(starts > 0) & (starts < indices.numel())] - 1] = True
    if not bool(rising.all()):
        at = int((~rising).nonzero()[0])
        raise ValueError(
            f"SparsePlan.{name}_indices must rise strictly within each row, "
            f"got {int(indices[at])} followed by {int(indices[at + 1])} at entry {at}"
        )


def check_order(order: Tensor, shape: tuple[int, int, int], name: str) -> None:
    if order.dtype != torch.int32 or tuple(order.shape) != shape:
        raise ValueError(
            f"SparsePlan.{name} must be int32 of shape {shape}, got {order.dtype} of shape {tuple(order.shape)}"
        )
    expected = torch.arange(shape[-1], dtype=torch.int32, device=order.device)
    if not torch.equal(order.sort(dim=-1).values, expected.expand(shape)):
        raise ValueError(f"SparsePlan.{name} must be a permutation of 0..{shape[-1] - 1} in every row")
