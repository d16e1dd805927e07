"""Attention of some queries to all keys, and what grid heads and modality boundaries read from it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.call import AttentionCall

__all__ = ["by_distance", "padded_order", "probed_rows"]

PART_BYTES = 64 << 20


def probed_rows(call: AttentionCall, row: int, positions: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Softmax weights of some live queries of a batch row, for a few key/value heads at a time.

    Args:
        positions: of the queries, int64 ``[L]`` on the CPU.

    Yields:
        query heads, and their weights fp32 ``[heads, L, keys]``, by position; 0 where a pair is not allowed. A sink's
        logit takes its part.
    """
    extent, device = call.extent, call.device
    start, count = int(extent.key_start[row]), int(extent.key_count[row])
    query, key = positions.to(device)[:, None], torch.arange(count, device=device)
    pairs = torch.ones(len(positions), count, dtype=torch.bool, device=device)
    if extent.causal:
        pairs = pairs & (key <= query)
    if extent.limit is not None:
        pairs = pairs & ((query - key).abs() < extent.limit)
    rows = (positions - int(extent.query_start[row])).to(device)
    together = max(1, PART_BYTES // max(1, 4 * call.share * len(positions) * count))
    for first in range(0, call.groups, together):
        groups = slice(first, min(first + together, call.groups))
        heads = slice(groups.start * call.share, groups.stop * call.share)
        q = call.q[row, heads, rows].float().unflatten(0, (-1, call.share)).flatten(1, 2)
        k = call.k[row, groups, start : start + count].float()
        logits = (q @ k.transpose(-1, -2)).unflatten(1, (call.share, -1)).flatten(0, 1) * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        logits = logits.masked_fill(~pairs, float("-inf"))
        total = logits.logsumexp(dim=-1, keepdim=True)
        if call.sinks is not None:
            total = torch.logaddexp(total, call.sinks[heads, None, None].float())
        yield heads, (logits - total).exp().masked_fill(~pairs, 0.0)


def by_distance(weights: Tensor, positions: Tensor) -> Tensor:
    """Sums of weights ``[heads, L, keys]`` over pairs at each distance ``pos(i) - pos(j) >= 0``: ``[heads, keys]``.

    Args:
        positions: of the queries, ``[L]``.
    """
    keys = weights.shape[2]
    index = positions.to(weights.device)[:, None] - torch.arange(keys, device=weights.device)
    inside = (index >= 0) & (index < keys)
    taken = weights.gather(2, index.clamp(0, max(0, keys - 1)).expand_as(weights))
    return (taken * inside).sum(dim=1)


def padded_order(order: Tensor, length: int) -> Tensor:
    """An order of the first numbers ``[heads, n]``, with the others behind them: int32 ``[heads, length]``."""
    rest = torch.arange(order.shape[1], length, device=order.device).expand(order.shape[0], -1)
    return torch.cat([order, rest], dim=1).int()
