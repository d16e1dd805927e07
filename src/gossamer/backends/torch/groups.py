"""Scores of single keys for groups of query blocks, in plain torch: definitions, as those of `torch.scores`."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.attend import wide
from gossamer.backends.torch.scores import CHUNK_BYTES, visible
from gossamer.call import AttentionCall
from gossamer.plan import Grid
from gossamer.rules import AtLeast, PerHead

__all__ = ["group_differences", "group_shares", "mean_row_maxima", "near_keys"]


def mean_row_maxima(call: AttentionCall, grid: Grid, regions: Tensor, part: range) -> Tensor:
    """Mean over a query block's rows of the largest logit among the keys of some regions (AnchorAttention, 2505.23520).

    Rows that see no key there do not count; a block without any that does has -inf.

    Args:
        regions: int64 ``[B, M, R, 2]``, half-open ranges of positions, which may reach outside the live keys.
        part: rows of the plan.

    Returns:
        fp32 ``[B, H, len(part)]``.
    """
    means = torch.full((call.batch, call.heads, len(part)), float("-inf"), device=call.device)
    chunk = max(64, CHUNK_BYTES // max(1, 4 * call.heads * grid.block_q))
    for b in range(call.batch):
        row = int(call.extent.first_query[b] - call.extent.first_position[b])  # of position 0
        start = int(call.extent.key_start[b])
        for m in part:
            first, last = (int(n) for n in grid.queries[b, m])
            if first == last:
                continue
            q = wide(call.q[b, :, row + first : row + last]).reshape(call.groups, -1, call.q.shape[-1]) * call.scale
            position = torch.arange(first, last, device=call.device)
            top = torch.full((call.heads, last - first), float("-inf"), device=call.device)
            low_seen, high_seen = (int(n) for n in grid.keys[b, m])
            for low, high in regions[b, m].tolist():
                for j in range(max(low, low_seen), min(high, high_seen), chunk):
                    stop = min(j + chunk, high, high_seen)
                    logits = (q @ wide(call.k[b, :, start + j : start + stop]).transpose(-1, -2)).float()
                    hidden = ~visible(call, position, torch.arange(j, stop, device=call.device))
                    logits = logits.view(call.heads, last - first, -1).masked_fill_(hidden, float("-inf"))
                    top = top.maximum(logits.amax(dim=-1))
            some = top > float("-inf")
            mean = torch.where(some, top, 0.0).sum(dim=-1) / some.sum(dim=-1).clamp(min=1)
            means[b, :, m - part.start] = mean.masked_fill(~some.any(dim=-1), float("-inf"))
    return means


def group_differences(
    call: AttentionCall, grid: Grid, queries: Tensor, anchors: Tensor | None, group: int, part: range
) -> Tensor:
    """How far a key's logit rises above the anchor, in the query block of a group where it rises most.

    ``max over query blocks m of the group that see key j of scale * mean query[m] . k_j - anchor[m]``
    (AnchorAttention, 2505.23520).

    Args:
        queries: of `pool_queries`, in q's dtype; part: of the groups of so many consecutive plan rows.
        anchors: ``[B, H, M]``; None: each mean query's largest logit (VecAttention, in Tencent's AngelSlim).

    Returns:
        fp32 ``[B, H, len(part), positions]``; -inf where no block of the group sees a key.
    """
    width, rows = call.extent.longest, range(part.start * group, min(part.stop * group, grid.query_blocks))
    out = torch.full((call.batch, call.heads, len(part), width), float("-inf"), device=call.device)
    means = wide(queries[:, :, rows.start : rows.stop]) * call.scale
    if anchors is None:
        anchors = _largest_logits(call, grid, queries, range(rows.start, rows.stop))
    else:
        anchors = anchors[:, :, rows.start : rows.stop]
    chunk = max(64, CHUNK_BYTES // max(1, 4 * call.heads * len(rows)))
    short = -len(rows) % group
    for b in range(call.batch):
        start, end = int(call.extent.key_start[b]), int(grid.keys[b, rows.start : rows.stop].max()) if rows else 0
        seen = grid.keys[b, rows.start : rows.stop].to(call.device)
        stacked = means[b].reshape(call.groups, call.share * len(rows), means.shape[-1])
        for j in range(0, end, chunk):
            stop = min(j + chunk, end)
            key = torch.arange(j, stop, device=call.device)
            products = (stacked @ wide(call.k[b, :, start + j : start + stop]).transpose(-1, -2)).float()
            above = products.view(call.heads, len(rows), -1) - anchors[b, :, :, None]
            above = above.masked_fill_((key < seen[:, :1]) | (key >= seen[:, 1:]), float("-inf"))
            above = F.pad(above, (0, 0, 0, short), value=float("-inf")).unflatten(1, (-1, group))
            out[b, :, :, j:stop] = above.amax(dim=2)
    return out


def near_keys(
    call: AttentionCall,
    grid: Grid,
    queries: Tensor,
    anchors: Tensor | None,
    group: int,
    part: range,
    bar: PerHead,
    left_out: Tensor,
) -> tuple[Tensor, Tensor]:
    """The keys whose `group_differences` are `AtLeast` a bar, as lists for `ListWriter.take`.

    Args:
        left_out: int64 ``[B, groups, R, 2]``, half-open ranges of positions that are not taken.

    Returns:
        counts int64 ``[B, H, len(part)]``, and ascending positions int32 of all lists.
    """
    above = group_differences(call, grid, queries, anchors, group, part)
    key = torch.arange(above.shape[-1], device=call.device)
    low, high = left_out[:, part.start : part.stop, :, None].to(call.device).unbind(-1)
    hidden = ((key >= low) & (key < high)).any(dim=2)[:, None]
    chosen = AtLeast(bar).select(above, hidden) & ~hidden
    return chosen.sum(dim=-1), chosen.flatten(0, 2).nonzero()[:, 1].to(torch.int32)


def _largest_logits(call: AttentionCall, grid: Grid, queries: Tensor, part: range) -> Tensor:
    """Of the mean queries of some plan rows, among the keys that each sees: ``[B, H, len(part)]``, -inf for none."""
    means = wide(queries[:, :, part.start : part.stop]) * call.scale
    top = torch.full((call.batch, call.heads, len(part)), float("-inf"), device=call.device)
    chunk = max(64, CHUNK_BYTES // max(1, 4 * call.heads * len(part)))
    for b in range(call.batch):
        start, seen = int(call.extent.key_start[b]), grid.keys[b, part.start : part.stop]
        stacked, end = means[b].reshape(call.groups, -1, means.shape[-1]), int(seen.max()) if part else 0
        seen = seen.to(call.device)
        for j in range(0, end, chunk):
            key = torch.arange(j, min(j + chunk, end), device=call.device)
            logits = stacked @ wide(call.k[b, :, start + j : start + min(j + chunk, end)]).transpose(-1, -2)
            hidden = (key < seen[:, :1]) | (key >= seen[:, 1:])
            logits = logits.float().view(call.heads, len(part), -1).masked_fill_(hidden, float("-inf"))
            top[b] = top[b].maximum(logits.amax(dim=-1))
    return top


def group_shares(call: AttentionCall, grid: Grid, queries: Tensor, group: int, part: range) -> Tensor:
    """The largest share that each key has in the attention of a mean query of the group.

    ``max over query blocks m of the group of softmax(scale * mean query[m] . k)[j]``, each softmax over the keys that
    some query of its block may attend.

    Args:
        queries: of `pool_queries`, in q's dtype; part: of the groups of so many consecutive plan rows.

    Returns:
        fp32 ``[B, H, len(part), positions]``; 0 where no block of the group sees a key.
    """
    rows = range(part.start * group, min(part.stop * group, grid.query_blocks))
    shares = torch.zeros(call.batch, call.heads, len(part), call.extent.longest, device=call.device)
    means = wide(queries[:, :, rows.start : rows.stop]) * call.scale
    for b in range(call.batch):
        start = int(call.extent.key_start[b])
        for n, first in enumerate(range(0, len(rows), group)):
            seen = grid.keys[b, rows.start + first : rows.start + min(first + group, len(rows))].to(call.device)
            end = int(seen.max())
            if end == 0:
                continue
            stacked = means[b, :, first : first + group].reshape(call.groups, -1, means.shape[-1])
            logits = (stacked @ wide(call.k[b, :, start : start + end]).transpose(-1, -2)).float()
            key = torch.arange(end, device=call.device)
            hidden = (key < seen[:, :1]) | (key >= seen[:, 1:])
            logits = logits.view(call.heads, len(seen), end).masked_fill_(hidden, float("-inf"))
            share = logits.softmax(dim=-1).masked_fill_(hidden, 0.0)
            shares[b, :, n, :end] = share.amax(dim=1)
    return shares
