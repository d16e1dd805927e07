"""Scores by cells of ``stride x stride`` tokens, in plain torch: definitions. One antidiagonal stands for a cell.

A cell pairs ``stride`` consecutive query positions with ``stride`` consecutive key positions; its logit is the mean of
the scaled products on its antidiagonal, so that every query and every key counts once (XAttention, 2503.16428, 3.1). A
cell counts if some query of it may attend some key of it: on the diagonal a few later keys take part, as in the paper.
Dead queries and keys count as zeros.

One query block at a time, against the keys that it sees: the logits of its cells in all heads are the working set.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.scores import _wide
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div

__all__ = ["antidiagonal_means", "antidiagonal_peaks", "antidiagonal_scores", "value_norms"]


def antidiagonal_scores(call: AttentionCall, grid: Grid, stride: int, part: range) -> Tensor:
    """Attention mass of each block pair: the softmax over a row of cells, summed by block (XAttention, 2503.16428).

    Args:
        stride: of a cell; it divides both blocks. part: rows of the plan.

    Returns:
        fp32 ``[B, H, len(part), N]``; the scores of a query block sum to the number of its cells that see any key.
    """
    mass = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    for b, row, blocks, logits, seen in _cells(call, grid, stride, part):
        share = logits.flatten(2).softmax(dim=-1).view_as(logits).masked_fill_(~seen, 0.0)
        mass[b, :, row, blocks] = share.sum(dim=(1, 3))
    return mass


def antidiagonal_means(
    call: AttentionCall, grid: Grid, stride: int, part: range, bonus: Tensor | None = None
) -> Tensor:
    """Mean logit of the cells of each block pair, of those that count (Stem, in AngelSlim).

    Where all cells of a pair count, their mean is a single product: of what a block's cells sum to, place by place in a
    cell, queries from the last place on and keys from the first. So no logits are formed but on the edges of what a
    query block sees.

    Args:
        bonus: fp32 ``[B, G, cells]``, added to the logits of all cells of these keys.

    Returns:
        fp32 ``[B, H, len(part), N]``, 0 where nothing is seen.
    """
    means = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    per_block = grid.block_k // stride
    bonus = torch.zeros(1, device=call.device) if bonus is None else bonus
    cells = ceil_div(call.extent.longest, stride)
    bonus = F.pad(bonus.expand(call.batch, call.groups, cells), (0, grid.key_blocks * per_block - cells))
    bonus = bonus.unflatten(-1, (grid.key_blocks, per_block))
    for b in range(call.batch):
        means[b] = _products_of_sums(call, grid, stride, part, b) + _mean_bonus(call, stride, b, bonus[b])
    for b, row, blocks, logits, seen in _cells(call, grid, stride, part, edges=True):
        with_bonus = (logits.unflatten(0, (call.groups, call.share)) + bonus[b, :, None, None, blocks]).flatten(0, 1)
        sums = with_bonus.masked_fill_(~seen, 0.0).sum(dim=(1, 3))
        means[b, :, row, blocks] = sums / seen.sum(dim=(0, 2)).clamp(min=1)
    return means.masked_fill_(~grid.sees(part, call.device)[:, None], 0.0)


def _products_of_sums(call: AttentionCall, grid: Grid, stride: int, part: range, b: int) -> Tensor:
    """Mean logit of all cells of each block pair of live query and key cells: fp32 ``[H, len(part), N]``."""
    if int(call.extent.key_count[b]) == 0:
        return torch.zeros(call.heads, len(part), grid.key_blocks, device=call.device)
    per_key = grid.block_k // stride
    keys = _key_cells(call, b, stride, per_key).unflatten(1, (-1, per_key)).sum(dim=2)  # [G, blocks, stride * D]
    queries = torch.stack([_query_cells(call, grid, b, m, stride).sum(dim=1) for m in part], dim=1)
    queries = queries.reshape(call.groups, call.share * len(part), -1)
    sums = (queries @ keys.transpose(-1, -2)).float().view(call.heads, len(part), -1)
    low, high = grid.queries[b, part.start : part.stop].unbind(-1)
    of_queries = -(-high // stride) - low // stride
    of_keys = _live_cells(call, b, stride, keys.shape[1], per_key)
    products = sums * (call.scale / stride) / (of_queries.clamp(min=1)[:, None] * of_keys).to(call.device)
    return F.pad(products, (0, grid.key_blocks - keys.shape[1]))


def _mean_bonus(call: AttentionCall, stride: int, b: int, bonus: Tensor) -> Tensor:
    """Of the live cells of each key block, of ``[G, N, cells of a block]``: ``[H, 1, N]``."""
    live = _live_cells(call, b, stride, bonus.shape[1], bonus.shape[2]).to(call.device)
    place = torch.arange(bonus.shape[2], device=call.device)
    sums = bonus.masked_fill(place >= live[:, None], 0.0).sum(dim=-1) / live.clamp(min=1)
    return sums[:, None].expand(-1, call.share, -1).flatten(0, 1)[:, None]


def _live_cells(call: AttentionCall, b: int, stride: int, blocks: int, per_block: int) -> Tensor:
    """How many cells of each key block hold a live key, int64 on the CPU."""
    live = ceil_div(int(call.extent.key_count[b]), stride)
    return (live - torch.arange(blocks, device="cpu") * per_block).clamp(0, per_block)


def antidiagonal_peaks(call: AttentionCall, grid: Grid, stride: int, part: range, near: float) -> tuple[Tensor, Tensor]:
    """The largest cell of each block pair in every row of cells, beside the row's largest (CoSA, 2607.25291).

    With ``x`` the logits of a row of cells, ``E[j] = exp(max x in block j - max x)``.

    Returns:
        E summed over the rows of cells of a query block, fp32 ``[B, H, len(part), N]``; and whether E is at least
        ``near`` in one of them, bool.
    """
    size = call.batch, call.heads, len(part), grid.key_blocks
    scores, attained = torch.zeros(size, device=call.device), torch.zeros(size, dtype=torch.bool, device=call.device)
    for b, row, blocks, logits, _ in _cells(call, grid, stride, part):
        peaks = logits.amax(dim=-1)
        highest = peaks.amax(dim=-1, keepdim=True)
        beside = peaks.sub_(highest.masked_fill(highest == float("-inf"), 0.0)).exp_()
        scores[b, :, row, blocks] = beside.sum(dim=1)
        attained[b, :, row, blocks] = (beside >= near).any(dim=1)
    return scores, attained


def value_norms(call: AttentionCall, stride: int) -> Tensor:
    """The largest norm of the live values in each run of ``stride`` keys: fp32 ``[B, G, cells]``, 0 where none is."""
    cells = ceil_div(call.extent.longest, stride)
    norms = torch.zeros(call.batch, call.groups, cells, device=call.device)
    for b in range(call.batch):
        start, count = int(call.extent.key_start[b]), int(call.extent.key_count[b])
        lengths = torch.linalg.vector_norm(call.values[b, :, start : start + count], dim=-1, dtype=torch.float32)
        norms[b] = F.pad(lengths, (0, cells * stride - count)).unflatten(-1, (cells, stride)).amax(dim=-1)
    return norms


def _cells(
    call: AttentionCall, grid: Grid, stride: int, part: range, edges: bool = False
) -> Iterator[tuple[int, int, slice, Tensor, Tensor]]:
    """Logits of the cells of each query block.

    Args:
        edges: of the block pairs alone in which some cells count and others do not.

    Yields:
        batch row, row of the part, key blocks, logits fp32 ``[H, rows of cells, key blocks, cells of a key block]``,
        -inf where a cell does not count; and where it does, bool without heads. Nothing for query blocks that are empty
        or see no key.
    """
    cells = Grid(call.extent, stride, stride)
    per_query, per_key = grid.block_q // stride, grid.block_k // stride
    for b in range(call.batch):
        if int(call.extent.key_count[b]) == 0:
            continue
        keys = _key_cells(call, b, stride, per_key)  # [G, cells, stride * D]
        # Row of cells of the plan's row 0, among those of the call.
        origin = int(grid.first_block[b]) * per_query - int(cells.first_block[b])
        for m in part:
            index = origin + m * per_query + torch.arange(per_query, device="cpu")
            live = (index >= 0) & (index < cells.row_blocks[b])
            if not bool(live.any()):
                continue
            seen = torch.where(live[:, None], cells.seen[b, index.clamp(0, cells.query_blocks - 1)], 0)
            q = None
            for blocks in _seen_blocks(seen[live], per_key, ceil_div(int(call.extent.key_count[b]), stride), edges):
                if q is None:
                    q = _query_cells(call, grid, b, m, stride).reshape(call.groups, call.share * per_query, -1)
                here = slice(blocks.start * per_key, blocks.stop * per_key)
                logits = (q @ keys[:, here].transpose(-1, -2)).float().mul_(call.scale / stride)
                cell = torch.arange(here.start, here.stop, device=call.device)
                low, high = seen.to(call.device)[:, None].unbind(-1)
                counts = ((cell >= low) & (cell < high)).unflatten(-1, (len(blocks), per_key))
                logits = logits.view(call.heads, per_query, len(blocks), per_key).masked_fill_(~counts, float("-inf"))
                yield b, m - part.start, slice(blocks.start, blocks.stop), logits, counts


def _seen_blocks(seen: Tensor, per_block: int, live: int, edges: bool) -> Iterator[range]:
    """Key blocks of which some live row of cells sees a cell; with ``edges``, not all rows all ``live`` cells."""
    low, high = seen[seen[:, 1] > seen[:, 0]].unbind(-1)
    if low.numel() == 0:
        return
    first, stop = int(low.min()) // per_block, ceil_div(int(high.max()), per_block)
    if not edges:
        yield range(first, stop)
        return
    whole = range(0)
    if low.numel() == len(seen):
        end = int(high.min())
        whole = range(
            ceil_div(int(low.max()), per_block), ceil_div(end, per_block) if end >= live else end // per_block
        )
    for edge in (range(first, whole.start), range(whole.stop, stop)) if whole else (range(first, stop),):
        if edge:
            yield edge


def _key_cells(call: AttentionCall, b: int, stride: int, per_block: int) -> Tensor:
    """Live keys in cells, up to whole blocks: ``[G, cells, stride * D]``."""
    start, count = int(call.extent.key_start[b]), int(call.extent.key_count[b])
    keys = _wide(call.k[b, :, start : start + count])
    return F.pad(keys, (0, 0, 0, -count % (stride * per_block))).unflatten(1, (-1, stride)).flatten(2)


def _query_cells(call: AttentionCall, grid: Grid, b: int, m: int, stride: int) -> Tensor:
    """Queries of one block in cells, last token first: ``[H, cells, stride * D]``."""
    first, last = (int(n) for n in grid.queries[b, m])
    begin = (int(grid.first_block[b]) + m) * grid.block_q
    row = int(call.extent.first_query[b] - call.extent.first_position[b])  # of position 0
    q = _wide(call.q[b, :, row + first : row + last])
    q = F.pad(q, (0, 0, first - begin, begin + grid.block_q - last)).unflatten(1, (-1, stride))
    return q.flip(2).flatten(2)
