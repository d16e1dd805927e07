"""A step's queries on keys and values that are gathered for it."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.plan import Extent, SparsePlan, on_device

__all__ = ["chosen_slots", "dense_on", "on_keys"]


def chosen_slots(plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """What a plan of one query a row names: slots int64, ascending, head after head, and their counts ``[B, heads]``.

    Plans of columns or of blocks alone, as methods for decoding make them, are read from their lists, where the query
    is its row's newest token and nothing but its row's length limits what it sees; others from their mask.
    """
    extent, shape = plan.extent, (plan.batch, plan.heads)
    newest = bool((extent.first_position == extent.key_count - 1).all()) and extent.limit is None
    bands = any(bool((torch.as_tensor(x, device=plan.device) != 0).any()) for x in (plan.sink, plan.window))
    both = plan.block_indices.numel() and plan.column_indices.numel()
    if not newest or bands or both or plan.permuted or bool((extent.query_count == 0).any()):
        mask = plan.to_mask()[:, :, 0]
        return mask.nonzero()[:, 2], mask.sum(dim=2)
    start = on_device(extent.key_start, plan.device)
    if plan.column_indices.numel():
        counts = plan.column_indptr.diff()
        head = torch.arange(counts.numel(), device=plan.device).repeat_interleave(counts)
        return plan.column_indices + start[head // plan.heads], counts.view(shape)
    counts = plan.block_indptr.diff()
    head = torch.arange(counts.numel(), device=plan.device).repeat_interleave(counts)
    row = head // plan.heads
    tokens = plan.block_indices[:, None].long() * plan.block_k + torch.arange(plan.block_k, device=plan.device)
    inside = tokens < on_device(extent.key_count, plan.device)[row, None]
    number = torch.zeros_like(counts).index_add_(0, head, inside.sum(dim=1))
    return (tokens + start[row, None])[inside], number.view(shape)


def on_keys(call: AttentionCall, keys: Tensor, values: Tensor, extent: Extent, sinks: Tensor | None) -> AttentionCall:
    """The call's queries on other keys and values, in the call's dtype."""
    keys, values = (x.to(call.q) for x in (keys, values))
    return AttentionCall(call.q, keys, values, extent, call.scale, sinks, call.softcap, call.layer)


def dense_on(
    call: AttentionCall, keys: Tensor, values: Tensor, extent: Extent, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All of these keys: out and LSE."""
    own = on_keys(call, keys, values, extent, sinks)
    return backends.attend(own, SparsePlan.dense(own.groups, own.query_len, own.key_len, extent))
