"""A head's attention as a small picture."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.integrations.transformers.attention import AttentionCall
from gossamer.oracle import live_rows
from gossamer.plan import Extent

__all__ = ["attention_map", "chosen_heads", "one_row"]

_ROWS = 8  # of each tile
_DECADES = 3
_BYTES = 16 << 20


def attention_map(call: AttentionCall, head: int, size: int = 64, *, row: int = 0) -> Tensor:
    """A head's attention from afar: uint8 ``[n, n]`` on the CPU, queries down and keys across.

    The live queries and the live keys are cut into ``n`` parts each; n is ``size``, or less if there are fewer. A tile
    is 255 where the mean weight of its causal pairs is the largest of the map, logarithmic, and 0 for a thousandth of
    that or less. At most 8 evenly spaced queries of each part are looked at.

    Raises:
        ValueError: no such head or row, no live query, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"an attention map needs a size of at least 1, got {size}")
    call = one_row(call, row)
    chosen_heads(call, [head])
    live = live_rows(call.extent, call.q.shape[2])[0].nonzero()[:, 0]
    start, count = int(call.extent.key_start), int(call.extent.key_count)
    if not len(live):
        raise ValueError(f"row {row} of this call has no query whose own key is live: there is nothing to draw")
    n = min(size, len(live), count)
    device = call.q.device
    keys = call.k[0, head // (call.q.shape[1] // call.k.shape[1]), start : start + count].float()
    key_position = torch.arange(count, device=device)
    into_tiles = F.one_hot(key_position * n // count, n).float()
    edges = [tile * len(live) // n for tile in range(n + 1)]
    picks = [torch.arange(a, b, -(-(b - a) // _ROWS)) for a, b in itertools.pairwise(edges)]
    weight, pairs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    together = max(1, _BYTES // (4 * _ROWS * count))
    for at in range(0, n, together):
        tiles = picks[at : at + together]
        queries = live[torch.cat(tiles)]
        position = (queries + call.extent.query_start).to(device)[:, None]
        logits = call.q[0, head, queries.to(device)].float() @ keys.T * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        visible = key_position <= position
        if call.limit is not None:
            visible &= position - key_position < call.limit
        logits = logits.masked_fill_(~visible, float("-inf"))
        lse = logits.logsumexp(-1)
        if call.sinks is not None:
            lse = torch.logaddexp(lse, call.sinks[head].float())
        tile = torch.repeat_interleave(torch.arange(at, at + len(tiles)), torch.tensor([len(t) for t in tiles]))
        weight.index_add_(0, tile.to(device), (logits - lse[:, None]).exp() @ into_tiles)
        pairs.index_add_(0, tile.to(device), visible.float() @ into_tiles)
    mean = weight / pairs.clamp(min=1.0)
    level = 1 + torch.log10(mean / mean.max()) / _DECADES
    return (255 * level.clamp(0.0, 1.0)).round().to(torch.uint8).cpu()


def one_row(call: AttentionCall, row: int) -> AttentionCall:
    """The call of one row of its batch."""
    if not 0 <= row < call.q.shape[0]:
        raise ValueError(f"this call has {call.q.shape[0]} batch rows, got row {row}; rows count from 0")
    part, extent = slice(row, row + 1), call.extent
    return replace(
        call,
        q=call.q[part],
        k=call.k[part],
        v=call.v[part],
        out=call.out[part],
        extent=Extent(extent.query_start[part], extent.key_start[part], extent.key_count[part]),
    )


def chosen_heads(call: AttentionCall, heads: Collection[int] | None) -> list[int]:
    """Heads in order, all of them for None."""
    count = call.q.shape[1]
    chosen = list(range(count)) if heads is None else sorted(set(heads))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ValueError(f"layer {call.layer} has heads 0 to {count - 1}, got {wrong}")
    return chosen
