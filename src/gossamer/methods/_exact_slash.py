"""MInference's index construction for token-exact slashes, as a plan.

In a row block that ends before position ``end``, the diagonal at distance d touches the 64 keys
``[end - 64 - d, end - d)``, moved up to start at 0 at the sequence's start. The ranges of all chosen diagonals are
merged from the farthest on; a range that begins inside the current one lengthens it by a whole 64 (which may
overshoot the range, as in the authors' code). What the ranges cover becomes blocks of the plan where a whole aligned
block is covered, and single columns elsewhere; chosen columns outside all ranges are added.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.backends.planners import cpu_planner
from gossamer.plan import Extent, SparsePlan, ceil_div
from gossamer.selectors import CsrBuilder

BLOCK = 64
_CHUNK_ENTRIES = 1 << 26
_BITMAP_BYTES = 64 << 20


def merged_ranges(slashes: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """Starts and ends of the merged key ranges of each row block.

    Args:
        slashes: bool ``[R, T]``, chosen distances of each row of (batch, head).
        ends: int64 ``[R, m]``, one past the last position of each row block.

    Returns:
        low, high: int64 ``[R, m, K]`` for the K-th farthest chosen distance: the range flushed when it was reached,
        empty (low == high) where none was.
    """
    count = slashes.sum(dim=-1)
    most = int(count.max()) if count.numel() else 0
    # Chosen distances in descending order, -1 behind the last.
    distance = torch.arange(slashes.shape[-1], device=slashes.device)
    keys = torch.where(slashes, distance, -1)
    order = keys.sort(dim=-1, descending=True).values[:, :most]
    low = torch.zeros(*ends.shape, most + 1, dtype=torch.int64, device=ends.device)
    high = torch.zeros_like(low)
    current_low = torch.zeros_like(ends)
    current_high = torch.zeros_like(ends)  # 0: no range yet
    for step in range(most):
        d = order[:, step, None]
        applies = (d >= 0) & (d < ends)
        top = (ends - d).clamp(min=BLOCK)
        started = current_high > 0
        flush = applies & started & (top > current_high + BLOCK)
        low[..., step] = torch.where(flush, current_low, 0)
        high[..., step] = torch.where(flush, current_high, 0)
        extend = applies & started & ~flush & (top > current_high)
        begin = flush | (applies & ~started)
        current_low = torch.where(begin, top - BLOCK, current_low)
        current_high = torch.where(begin, top, torch.where(extend, current_high + BLOCK, current_high))
    low[..., most] = current_low
    high[..., most] = current_high
    return low, high


def exact_slash_blocks(columns: Tensor, slashes: Tensor, extent: Extent, query_len: int) -> SparsePlan:
    """The plan for chosen columns (slots) and distances, bool ``[B, H, T]`` each. In C++ for CPU tensors."""
    native = cpu_planner(columns.device)
    blocks, key_len = ceil_div(query_len, BLOCK), columns.shape[-1]
    block_csr, column_csr = CsrBuilder(), CsrBuilder()
    if native is not None:
        step = max(1, _BITMAP_BYTES // max(1, columns.numel() // 8))
        for at in range(0, blocks, step):
            chosen = native.exact_slashes(columns, slashes, extent, at=at, stop=min(at + step, blocks))
            block_csr.add_lists(*chosen[0])
            column_csr.add_lists(*chosen[1])
    else:
        for whole, single in _covered_in_torch(columns, slashes, extent, blocks):
            block_csr.add(whole)
            column_csr.add(single)
    block_indptr, block_indices = block_csr.build()
    column_indptr, column_indices = column_csr.build()
    return SparsePlan(
        columns.shape[1],
        query_len,
        key_len,
        extent,
        block_q=BLOCK,
        block_k=BLOCK,
        block_indptr=block_indptr,
        block_indices=block_indices,
        column_group=1,
        column_indptr=column_indptr,
        column_indices=column_indices,
    )


def _covered_in_torch(columns: Tensor, slashes: Tensor, extent: Extent, blocks: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Key blocks that are covered whole, bool ``[B, H, m, N]``, and single columns ``[B, H, m, T]``, by chunks."""
    batch, heads, key_len = columns.shape
    device = columns.device
    rows = batch * heads
    key_start = extent.key_start.to(device)[:, None, None, None]
    ends = (torch.arange(blocks, device=device) + 1) * BLOCK + extent.query_start.to(device)[:, None]
    ends = ends[:, None].expand(batch, heads, blocks).reshape(rows, blocks)
    distances = max(1, int(slashes.sum(-1).max()) if slashes.numel() else 1)
    step = max(1, _CHUNK_ENTRIES // max(1, rows * (key_len + 2 * distances)))
    slots = torch.arange(key_len, device=device)
    for at in range(0, blocks, step):
        stop = min(at + step, blocks)
        low, high = merged_ranges(slashes.view(rows, key_len), ends[:, at:stop])
        low, high = (t.view(batch, heads, stop - at, t.shape[-1]) + key_start for t in (low, high))
        edges = torch.zeros(batch, heads, stop - at, key_len + 1, dtype=torch.int32, device=device)
        used = (high > low).to(torch.int32)
        edges.scatter_add_(3, low.clamp(0, key_len), used)
        edges.scatter_add_(3, high.clamp(0, key_len), -used)
        covered = edges.cumsum(dim=3)[..., :key_len] > 0
        padded = torch.nn.functional.pad(covered, (0, -key_len % BLOCK), value=True)
        whole = padded.unflatten(-1, (-1, BLOCK)).all(-1)
        single = (covered | columns[:, :, None]) & ~whole[..., slots // BLOCK]
        reach = ends.view(batch, heads, blocks)[:, :, at:stop, None] + key_start
        yield whole & (torch.arange(whole.shape[-1], device=device) * BLOCK < reach), single & (slots < reach)
