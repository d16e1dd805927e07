"""Keys in an order of their own inside segments of positions: what methods that permute keys share."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import Extent, ceil_div

__all__ = ["order_in_segments", "reorder_keys"]


def order_in_segments(call: AttentionCall, mass: Tensor, segment: int) -> Tensor:
    """Key positions by rank: inside each segment the largest mass first, of equal ones the lower position.

    Segments that are not full of live keys stay in order (PBS-Attn, 2510.21270).

    Args:
        mass: ``[B, heads, positions]``; segment: positions.

    Returns:
        int64 ``[B, heads, T]``, as `SparsePlan.k_order` has them.
    """
    number = ceil_div(call.key_len, segment)
    rows = F.pad(mass, (0, number * segment - mass.shape[-1])).unflatten(-1, (number, segment))
    ranks = rows.argsort(dim=-1, descending=True, stable=True)
    full = torch.arange(number, device="cpu") < (call.extent.key_count // segment)[:, None]
    place = torch.arange(segment, device=call.device)
    ranks = torch.where(full.to(call.device)[:, None, :, None], ranks, place)
    return (ranks + torch.arange(number, device=call.device)[:, None] * segment).flatten(-2)[..., : call.key_len]


def reorder_keys(call: AttentionCall, order: Tensor, segment: int) -> AttentionCall:
    """The call with each head's keys by rank, for scores of their blocks; it has as many key heads as the order.

    Its window reaches a segment further, so that it sees all blocks of the segments that are seen. Holds a copy of the
    keys: where the query heads of a group have orders of their own, one for each.

    Args:
        order: ``[B, heads, T]`` of `order_in_segments`, with G or H heads.
    """
    extent, length = call.extent, call.key_len
    slots = torch.arange(length, device=call.device)
    start, count = (x.to(call.device)[:, None] for x in (extent.key_start, extent.key_count))
    rank = slots - start
    source = order.gather(2, rank.clamp(0, max(0, length - 1))[:, None].expand_as(order)) + start[:, None]
    source = torch.where(((rank >= 0) & (rank < count))[:, None], source, slots)
    source = source.unflatten(1, (call.groups, order.shape[1] // call.groups))
    keys = call.k[:, :, None].take_along_dim(source[..., None], dim=3).flatten(1, 2)
    given = (extent.query_start, extent.query_count, extent.key_start, extent.key_count)
    limit = None if extent.limit is None else extent.limit + segment - 1
    return replace(call, k=keys, v=None, extent=Extent(*given, causal=extent.causal, limit=limit))
