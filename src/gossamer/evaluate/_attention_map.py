"""A head's attention as a small picture."""

from __future__ import annotations

import itertools
from collections.abc import Collection
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall

__all__ = ["attention_map", "chosen_heads", "one_row"]

_ROWS = 8  # of each tile
_DECADES = 3
_BYTES = 16 << 20


def attention_map(call: AttentionCall, head: int, size: int = 64, *, row: int = 0) -> Tensor:
    """A head's attention from afar: uint8 ``[n, n]`` on the CPU, queries down and keys across.

    The live queries and the live keys are cut into ``n`` parts each; n is ``size``, or less if there are fewer. A tile
    is 255 where the mean weight of its allowed pairs is the largest of the map, logarithmic, and 0 for a thousandth of
    that or less. At most 8 evenly spaced queries of each part are looked at.

    Raises:
        ValueError: no such head or row, no live query, or a size below 1.
    """
    if size < 1:
        raise ValueError(f"an attention map needs a size of at least 1, got {size}")
    call = one_row(call, row)
    chosen_heads(call, [head])
    live = call.extent.live_queries(call.query_len)[0].nonzero()[:, 0]
    start, count = int(call.extent.key_start), int(call.extent.key_count)
    if not len(live) or not count:
        raise ValueError(f"row {row} of this call has no live query or no live key: there is nothing to draw")
    n = min(size, len(live), count)
    device = call.device
    keys = call.k[0, head // call.share, start : start + count].float()
    into_tiles = F.one_hot(torch.arange(count, device=device) * n // count, n).float()
    edges = [tile * len(live) // n for tile in range(n + 1)]
    picks = [torch.arange(a, b, -(-(b - a) // _ROWS)) for a, b in itertools.pairwise(edges)]
    weight, pairs = torch.zeros(n, n, device=device), torch.zeros(n, n, device=device)
    together = max(1, _BYTES // (4 * _ROWS * count))
    for at in range(0, n, together):
        tiles = picks[at : at + together]
        queries = live[torch.cat(tiles)]
        logits = call.q[0, head, queries.to(device)].float() @ keys.T * call.scale
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        visible = call.extent.allowed(queries, call.key_len, device)[0, :, start : start + count]
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
    if not 0 <= row < call.batch:
        raise ValueError(f"this call has {call.batch} batch rows, got row {row}; rows count from 0")
    part = slice(row, row + 1)
    return replace(
        call,
        q=call.q[part],
        k=call.k[part],
        v=None if call.v is None else call.v[part],
        extent=call.extent.of_rows(part),
        state=None if call.state is None else call.state[part],
    )


def chosen_heads(call: AttentionCall, heads: Collection[int] | None) -> list[int]:
    """Heads in order, all of them for None."""
    count = call.heads
    chosen = list(range(count)) if heads is None else sorted(set(heads))
    if chosen and not 0 <= chosen[0] <= chosen[-1] < count:
        wrong = chosen[0] if chosen[0] < 0 else chosen[-1]
        raise ValueError(f"layer {call.layer} has heads 0 to {count - 1}, got {wrong}")
    return chosen
