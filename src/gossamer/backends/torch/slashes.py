"""MInference's index construction for token-exact slashes, in plain torch with a step for each diagonal.

In a block of 64 queries that ends before position ``end``, the diagonal at distance d touches the 64 keys
``[end - 64 - d, end - d)``, moved up to start at 0 at the sequence's start. The ranges of all chosen diagonals are
merged from the farthest on; a range that begins inside the current one lengthens it by a whole 64 (which may
overshoot the range, as in the authors' code). What the ranges cover becomes blocks of the plan where a whole aligned
block is covered, and single columns elsewhere; chosen columns outside all ranges are added.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.plan import Grid

__all__ = ["BLOCK", "exact_slashes", "merged_ranges"]

BLOCK = 64


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


def exact_slashes(
    columns: Tensor, slashes: Tensor, grid: Grid, part: range
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Whole key blocks and single columns for some rows of a plan with blocks of 64.

    Args:
        columns, slashes: bool ``[B, H, positions]``, chosen key positions and distances.
        part: rows of the plan.

    Returns:
        counts int64 ``[B, H, len(part)]`` and ascending int32 indices of key blocks; the same of key positions.
    """
    batch, heads, width = columns.shape
    device, rows = columns.device, batch * heads
    end = (grid.first_block[:, None] + torch.tensor(part, device="cpu") + 1) * BLOCK
    end = torch.where(grid.queries[:, part.start : part.stop].diff(dim=-1)[..., 0] > 0, end, 0).to(device)
    ends = end[:, None].expand(batch, heads, len(part))
    low, high = merged_ranges(slashes.view(rows, width), ends.reshape(rows, len(part)))
    low, high = (t.view(batch, heads, len(part), t.shape[-1]) for t in (low, high))
    edges = torch.zeros(batch, heads, len(part), width + 1, dtype=torch.int32, device=device)
    used = (high > low).to(torch.int32)
    edges.scatter_add_(3, low.clamp(0, width), used)
    edges.scatter_add_(3, high.clamp(0, width), -used)
    position = torch.arange(width, device=device)
    dead = position >= grid.extent.key_count.to(device)[:, None, None, None]
    covered = edges.cumsum(dim=3)[..., :width] > 0
    padded = torch.nn.functional.pad(covered | dead, (0, -width % BLOCK), value=True)
    whole = padded.unflatten(-1, (-1, BLOCK)).all(-1)
    reach = ends[..., None]
    whole &= torch.arange(whole.shape[-1], device=device) * BLOCK < reach.minimum(_key_count(grid, device))
    single = (covered | columns[:, :, None]) & ~whole[..., position // BLOCK] & (position < reach) & ~dead
    return _listed(whole), _listed(single)


def _key_count(grid: Grid, device: torch.device) -> Tensor:
    return grid.extent.key_count.to(device)[:, None, None, None]


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    return mask.sum(dim=-1), mask.flatten(0, 2).nonzero()[:, 1].to(torch.int32)
