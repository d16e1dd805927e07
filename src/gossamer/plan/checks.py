"""Validation of a plan's tensors: sizes and dtypes, which cost nothing and are always checked, and numbers, which a
device is waited for. The messages name the first offending value."""

from __future__ import annotations

import os

import torch
from torch import Tensor

__all__ = ["CHECK", "check_band", "check_csr", "check_csr_sizes", "check_order", "check_order_sizes", "checks_numbers"]

CHECK = "GOSSAMER_CHECK"


def checks_numbers() -> bool:
    """Whether ``GOSSAMER_CHECK=1`` asks for every number of a plan to be checked in every call.

    Raises:
        ValueError: another value than 0 and 1.
    """
    value = os.environ.get(CHECK, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{CHECK}={value!r} is not known; use one of: 0, 1")
    return value == "1"


def check_csr_sizes(indptr: Tensor, indices: Tensor, rows: int, name: str) -> None:
    if indptr.dtype != torch.int64 or indices.dtype != torch.int32:
        raise TypeError(
            f"SparsePlan.{name}_indptr must be int64 and {name}_indices int32, got {indptr.dtype}, {indices.dtype}"
        )
    if indptr.shape != (rows + 1,) or indices.ndim != 1:
        raise ValueError(
            f"SparsePlan.{name}_indptr must have shape ({rows + 1},) for this plan's batch, heads and blocks, "
            f"got {tuple(indptr.shape)}; {name}_indices must be one-dimensional, got {tuple(indices.shape)}"
        )


def check_csr(indptr: Tensor, indices: Tensor, rows: int, limit: int, name: str, unit: str) -> None:
    """Validate the numbers of ascending CSR rows, whose sizes were checked."""
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
        entry = int((~rising).nonzero()[0])
        raise ValueError(
            f"SparsePlan.{name}_indices must rise strictly within each row, "
            f"got {int(indices[entry])} followed by {int(indices[entry + 1])} at entry {entry}"
        )


def check_order_sizes(order: Tensor, shape: tuple[int, int, int], name: str) -> None:
    if order.dtype != torch.int32 or tuple(order.shape) != shape:
        raise ValueError(
            f"SparsePlan.{name} must be int32 of shape {shape}, got {order.dtype} of shape {tuple(order.shape)}"
        )


def check_order(order: Tensor, name: str) -> None:
    """Validate that every row of ``[B, heads, length]`` is a permutation."""
    shape = order.shape
    expected = torch.arange(shape[-1], device=order.device)
    if not torch.equal(order.sort(dim=-1).values, expected.expand(shape)):
        raise ValueError(f"SparsePlan.{name} must be a permutation of 0..{shape[-1] - 1} in every row")


def check_band(band: Tensor, heads: int, name: str) -> None:
    if band.dtype != torch.int32 or tuple(band.shape) != (heads,):
        raise ValueError(
            f"SparsePlan.{name} must be int32 of shape ({heads},), got {band.dtype} of shape {tuple(band.shape)}"
        )
