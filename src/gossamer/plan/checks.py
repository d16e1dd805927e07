"""Validation of a plan's tensors: sizes and dtypes, which cost nothing and are always checked, and numbers, which a
device is waited for. The messages name the first offending value."""

from __future__ import annotations

import math
import os
from typing import Any

import torch
from torch import Tensor

from gossamer.plan.integers import bounded

__all__ = [
    "CHECK",
    "LISTS",
    "SKIP_TILE",
    "check_attributes",
    "check_band",
    "check_blocks_alone",
    "check_csr",
    "check_csr_sizes",
    "check_numbers",
    "check_order",
    "check_order_sizes",
    "check_sizes",
    "checks_numbers",
]

CHECK = "GOSSAMER_CHECK"
LISTS = ("block_indptr", "block_indices", "column_indptr", "column_indices", "q_order", "k_order")
# Keys of a tile that `SparsePlan.skip` leaves out: consecutive positions, the first a multiple of it.
SKIP_TILE = 64


def checks_numbers() -> bool:
    """Whether ``GOSSAMER_CHECK=1`` asks for every number of a plan to be checked in every call.

    Raises:
        ValueError: another value than 0 and 1.
    """
    value = os.environ.get(CHECK, "")
    if value not in ("", "0", "1"):
        raise ValueError(f"{CHECK}={value!r} is not known; use one of: 0, 1")
    return value == "1"


def check_attributes(
    pruned_mean: bool, skip: float | None, block_k: int, owner: str = "SparsePlan", *, quantised: bool = False
) -> None:
    """Validate a plan's attributes by themselves; ``owner`` has them in a message."""
    for name, value in (("pruned_mean", pruned_mean), ("quantised", quantised)):
        if not isinstance(value, bool):
            raise TypeError(f"{owner}.{name} must be true or false, got {value!r}")
    if pruned_mean and quantised:
        raise ValueError(f"{owner} has pruned_mean and quantised, but means are not multiplied in int8; choose one")
    if skip is None:
        return
    if isinstance(skip, bool) or not isinstance(skip, (int, float)):
        raise TypeError(f"{owner}.skip must be a number of nats, or None, got {skip!r}")
    if not 0 <= skip < math.inf:
        raise ValueError(f"{owner}.skip must be at least 0 and finite, or None for no skipping, got {skip}")
    if block_k % SKIP_TILE:
        raise ValueError(f"{owner}.skip needs a block_k that is a multiple of {SKIP_TILE}, got {block_k}")


def check_blocks_alone(plan: Any, *, wait: bool = False) -> None:
    """Validate that a plan with an attribute has nothing but blocks; bands on a device only if it may be waited for."""
    name = "pruned_mean" if plan.pruned_mean else "skip" if plan.skip is not None else None
    if name is None:
        return
    parts = {"columns": plan.column_indices.numel() > 0, "an order": plan.permuted}
    if wait or plan.device.type == "cpu":
        parts |= {band: bool((getattr(plan, band) != 0).any()) for band in ("sink", "window")}
    for part, present in parts.items():
        if present:
            raise ValueError(
                f"SparsePlan.{name} is for plans of blocks alone, and this one has {part}; choose blocks in its place, "
                f"or leave {name} out"
            )


def check_sizes(plan: Any) -> None:
    """Validate the shapes, dtypes and devices of a plan's tensors."""
    rows = plan.batch * plan.heads
    check_csr_sizes(plan.block_indptr, plan.block_indices, rows * plan.num_query_blocks, "block")
    check_csr_sizes(plan.column_indptr, plan.column_indices, rows * plan.num_column_groups, "column")
    for name in ("sink", "window"):
        check_band(torch.as_tensor(getattr(plan, name), device=plan.device), plan.heads, name)
    for name, length in (("q_order", plan.query_len), ("k_order", plan.key_len)):
        order = getattr(plan, name)
        if order is not None:
            check_order_sizes(order, (plan.batch, plan.heads, length), name)
    for name in (*LISTS, "sink", "window"):
        tensor = getattr(plan, name)
        if tensor is not None and tensor.numel() and tensor.device != plan.device:
            raise ValueError(f"SparsePlan.{name} must lie on {plan.device} as the others, got {tensor.device}")


def check_numbers(plan: Any) -> None:
    """Validate the numbers of a plan's tensors, whose sizes were checked."""
    rows = plan.batch * plan.heads
    block_rows, column_rows = rows * plan.num_query_blocks, rows * plan.num_column_groups
    width, longest = plan.num_key_blocks, plan.extent.longest
    check_csr(plan.block_indptr, plan.block_indices, block_rows, width, "block", "key blocks")
    check_csr(plan.column_indptr, plan.column_indices, column_rows, longest, "column", "key positions")
    for name in ("sink", "window"):
        bounded(getattr(plan, name), f"SparsePlan.{name}", 0)
    for name in ("q_order", "k_order"):
        order = getattr(plan, name)
        if order is not None:
            check_order(order, name)
    check_blocks_alone(plan, wait=True)


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
