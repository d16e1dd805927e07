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
    for b, row, logits, seen in _cells(call, grid, stride, part):
        share = logits.flatten(2).softmax(dim=-1).view_as(logits).masked_fill_(~seen, 0.0)
        mass[b, :, row, : logits.shape[2]] = share.sum(dim=(1, 3))
    return mass


def antidiagonal_means(
    call: AttentionCall, grid: Grid, stride: int, part: range, bonus: Tensor | None = None
) -> Tensor:
    """Mean logit of the cells of each block pair, of those that count (Stem, in AngelSlim).

    Args:
        bonus: fp32 ``[B, G, cells]``, added to the logits of all cells of these keys.

    Returns:
        fp32 ``[B, H, len(part), N]``, 0 where nothing is seen.
    """
    means = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    per_block = grid.block_k // stride
    for b, row, logits, seen in _cells(call, grid, stride, part):
        blocks = logits.shape[2]
        if bonus is not None:
            own = F.pad(bonus[b], (0, -bonus.shape[-1] % per_block)).unflatten(-1, (-1, per_block))[:, :blocks]
            logits = (logits.unflatten(0, (call.groups, call.share)) + own[:, None, None]).flatten(0, 1)
        cells = seen.sum(dim=(0, 2)).clamp(min=1)
        means[b, :, row, :blocks] = logits.masked_fill_(~seen, 0.0).sum(dim=(1, 3)) / cells
    return means


def antidiagonal_peaks(call: AttentionCall, grid: Grid, stride: int, part: range, near: float) -> tuple[Tensor, Tensor]:
    """The largest cell of each block pair in every row of cells, beside the row's largest (CoSA, 2607.25291).

    With ``x`` the logits of a row of cells, ``E[j] = exp(max x in block j - max x)``.

    Returns:
        E summed over the rows of cells of a query block, fp32 ``[B, H, len(part), N]``; and whether E is at least
        ``near`` in one of them, bool.
    """
    size = call.batch, call.heads, len(part), grid.key_blocks
    scores, attained = torch.zeros(size, device=call.device), torch.zeros(size, dtype=torch.bool, device=call.device)
    for b, row, logits, _ in _cells(call, grid, stride, part):
        peaks = logits.amax(dim=-1)
        highest = peaks.amax(dim=-1, keepdim=True)
        beside = peaks.sub_(highest.masked_fill(highest == float("-inf"), 0.0)).exp_()
        scores[b, :, row, : peaks.shape[-1]] = beside.sum(dim=1)
        attained[b, :, row, : peaks.shape[-1]] = (beside >= near).any(dim=1)
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


def _cells(call: AttentionCall, grid: Grid, stride: int, part: range) -> Iterator[tuple[int, int, Tensor, Tensor]]:
    """Logits of the cells of each query block.

    Yields:
        batch row, row of the part, logits fp32 ``[H, rows of cells, key blocks, cells of a key block]`` for the first
        key blocks, -inf where a cell does not count; and where it does, bool without heads. Nothing for query blocks
        that are empty or see no key.
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
            low, high = torch.where(live[:, None], cells.seen[b, index.clamp(0, cells.query_blocks - 1)], 0).unbind(-1)
            blocks = ceil_div(int(high.max()), per_key)
            if blocks == 0:
                continue
            q = _query_cells(call, grid, b, m, stride).reshape(call.groups, call.share * per_query, -1)
            logits = (q @ keys[:, : blocks * per_key].transpose(-1, -2)).float().mul_(call.scale / stride)
            cell = torch.arange(blocks * per_key, device=call.device)
            low, high = low.to(call.device)[:, None], high.to(call.device)[:, None]
            seen = ((cell >= low) & (cell < high)).unflatten(-1, (blocks, per_key))
            logits = logits.view(call.heads, per_query, blocks, per_key)
            yield b, m - part.start, logits.masked_fill_(~seen, float("-inf")), seen


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


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
