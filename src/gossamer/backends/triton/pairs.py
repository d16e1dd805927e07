"""Pairs in a plan, counted on the device: see `gossamer.plan.count`, the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.triton.config import power_of_two
from gossamer.backends.triton.device import UNLIMITED, check_device, extent_on, fetch, integers_on, kernels, run
from gossamer.plan import SparsePlan, ceil_div
from gossamer.plan.count import count_pairs

__all__ = ["count", "count_on_cpu", "countable", "pairs_of_bits"]

_BITMAP_BYTES = 1 << 30
_MARK_TILE = 128
_KEY_BLOCKS = 128  # that a program looks at together
_EDGE = 64  # queries and keys that are counted pair by pair


def count(plan: SparsePlan) -> Tensor:
    """Pairs that the plan computes, int64 ``[B, heads]`` on the CPU. Waits for the device, once.

    Permuted plans, and those whose bitmaps would take more than a GiB, are counted by the definition.

    Raises:
        RuntimeError, ValueError: kernels do not run where the plan lies.
    """
    check_device(plan.device)
    if not countable(plan):
        return count_pairs(plan)
    blocks = columns = None
    if plan.block_indices.numel():
        blocks = _marked(plan.block_indptr, plan.block_indices, plan.num_key_blocks)
    if plan.column_indices.numel():
        columns = _marked(plan.column_indptr, plan.column_indices, plan.extent.longest)
    pairs = pairs_of_bits(plan, plan.device, blocks=blocks, columns=columns)
    return torch.tensor(fetch(pairs.flatten()), dtype=torch.int64, device="cpu").view(plan.batch, plan.heads)


def countable(plan: SparsePlan) -> bool:
    """Whether kernels count a plan's pairs."""
    words = plan.num_query_blocks * ceil_div(plan.num_key_blocks, 32)
    words += plan.num_column_groups * ceil_div(plan.extent.longest, 32)
    return not plan.permuted and 4 * plan.batch * plan.heads * words <= _BITMAP_BYTES


def count_on_cpu(plan: SparsePlan) -> Tensor:
    """Pairs of a plan that lies on the CPU, without a device: in C++ where that is there."""
    from gossamer.backends import cpu

    return cpu.count(plan) if cpu.is_available() else count_pairs(plan)


def pairs_of_bits(
    plan: SparsePlan, device: torch.device, *, blocks: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Pairs that a plan computes, int64 ``[B, heads]`` on the device, from the bits of its blocks and columns.

    Args:
        plan: says the rest; its own lists are not read.
        blocks: int32 ``[.., M, ceil(N / 32)]``; columns: int32 ``[.., column groups, ceil(longest / 32)]``.
    """
    rows, key_blocks, lists = plan.num_query_blocks, plan.num_key_blocks, plan.num_column_groups
    pairs = torch.zeros(plan.batch, plan.heads, rows, dtype=torch.int64, device=device)
    if pairs.numel() == 0 or key_blocks == 0:
        return pairs.sum(dim=2)
    nothing = torch.zeros(1, dtype=torch.int32, device=device)
    in_block = nothing
    if columns is not None:
        in_block = torch.empty(plan.batch * plan.heads * lists, key_blocks, dtype=torch.int32, device=device)
        pieces = ceil_div(key_blocks, _KEY_BLOCKS)
        run(
            kernels().count_columns, in_block.shape[0] * pieces, columns, in_block, columns.shape[-1], key_blocks,
            pieces, BLOCK_K=plan.block_k, TILE=_KEY_BLOCKS,
        )  # fmt: skip
    bands = [
        integers_on(torch.as_tensor(band, device=plan.device).clamp(max=UNLIMITED), device)
        for band in (plan.sink, plan.window)
    ]
    run(
        kernels().count_pairs, pairs.numel(), nothing if blocks is None else blocks,
        nothing if columns is None else columns, in_block, *bands, extent_on(plan.extent, device), pairs,
        plan.heads, rows, key_blocks, ceil_div(key_blocks, 32), ceil_div(plan.extent.longest, 32), lists,
        plan.column_group, BLOCK_Q=plan.block_q, BLOCK_K=plan.block_k, HAS_BLOCKS=blocks is not None,
        HAS_COLUMNS=columns is not None, TILE=_KEY_BLOCKS, EDGE_M=min(_EDGE, power_of_two(plan.block_q)),
        EDGE_N=min(_EDGE, power_of_two(plan.block_k)), num_warps=4,
    )  # fmt: skip
    return pairs.sum(dim=2)


def _marked(indptr: Tensor, indices: Tensor, width: int) -> Tensor:
    """CSR rows as bits."""
    rows, words = indptr.numel() - 1, ceil_div(width, 32)
    bits = torch.zeros(rows, words, dtype=torch.int32, device=indices.device)
    run(kernels().mark_blocks, rows, indptr, indices, bits, 0, words, TILE=_MARK_TILE)
    return bits
