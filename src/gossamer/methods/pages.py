"""Choosing what one query reads of a cache: scores of pages, choices with forced members, and plans of them."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan, ceil_div, on_device
from gossamer.rules import top_k

__all__ = ["choose", "forced", "page_scores", "plan_of_blocks", "plan_of_columns", "share_read", "shared"]


def page_scores(call: AttentionCall, size: int) -> Tensor:
    """The largest logit that a page's bounds allow each query head (Quest, 2406.10774, equation 2).

    ``scale * sum_d max(q_d * largest_d, q_d * smallest_d)``: no key of the page has a larger one. As one product: the
    positive part of q meets the largest values, the negative part the smallest.

    Args:
        size: tokens of a page.

    Returns:
        fp32 ``[B, H, N]``; -inf for pages that a row does not have.
    """
    assert call.store is not None
    bounds = call.store.page_bounds(size)
    q = call.q[:, :, 0].float() * call.scale
    q = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1).unflatten(1, (call.groups, call.share))
    scores = (q @ bounds.transpose(-1, -2)).flatten(1, 2)
    return scores.masked_fill(~_present(call, size, bounds.shape[2])[:, None], float("-inf"))


def shared(scores: Tensor, groups: int) -> Tensor:
    """One score for the query heads of each key/value head: the sum of their softmaxes over what they choose from.

    Logits of different heads are no measure of each other; the share that each head gives a candidate is.

    Args:
        scores: logits fp32 ``[B, H, N]``, -inf for what is not there.

    Returns:
        ``[B, groups, N]``; -inf for what is not there.
    """
    if scores.shape[1] == groups:
        return scores
    weights = scores.softmax(dim=-1).unflatten(1, (groups, -1)).sum(dim=2)
    return weights.masked_fill(scores[:, :1] == float("-inf"), float("-inf"))


def forced(call: AttentionCall, size: int, count: int) -> Tensor:
    """The pages that every choice holds: bool ``[B, 1, count]``.

    The one with the newest token, which may be partly filled; and those with the store's sinks and recent tokens.
    """
    assert call.store is not None
    page = torch.arange(count, device=call.device)
    keys = on_device(call.extent.key_count, call.device)[:, None]
    last = (keys - 1) // size
    recent = (keys - max(call.store.recent, 1)).clamp(min=0) // size
    held = (page < ceil_div(call.store.sinks, size)) | (page >= recent)
    return (held & (page <= last))[:, None]


def choose(scores: Tensor, held: Tensor, count: int) -> Tensor:
    """The ``count`` best candidates of each head, those that are held among them; all that are held if they are more.

    Args:
        scores: ``[B, heads, N]``, -inf for what is not there; ties break by the lower index.
        held: bool ``[B, 1, N]``.

    Returns:
        bool ``[B, heads, N]``.
    """
    return top_k(scores.masked_fill(held, float("inf")), count) | held


def plan_of_columns(call: AttentionCall, chosen: Tensor, size: int = 1) -> SparsePlan:
    """The plan of the query that reads whole pages, as single tokens: backends gather them, and read no more.

    Args:
        chosen: bool ``[B, heads, N]``, with heads H or G; pages behind a row's last key are ignored.
        size: tokens of a page.
    """
    batch, heads, _ = chosen.shape
    live = on_device(call.extent.key_count * (call.extent.query_count > 0), call.device)
    row, page = chosen.flatten(0, 1).nonzero(as_tuple=True)
    tokens = page[:, None] * size + torch.arange(size, device=call.device)
    inside = tokens < live.repeat_interleave(heads)[row, None]
    counts = torch.zeros(batch * heads, dtype=torch.int64, device=call.device)
    counts.index_add_(0, row, inside.sum(dim=1))
    indptr = torch.zeros(batch * heads + 1, dtype=torch.int64, device=call.device)
    torch.cumsum(counts, 0, out=indptr[1:])
    return SparsePlan.unchecked(
        heads=heads,
        query_len=call.query_len,
        key_len=call.key_len,
        extent=call.extent,
        column_indptr=indptr,
        column_indices=tokens[inside].to(torch.int32),
        pairs=counts.view(batch, heads).cpu(),
    )


def plan_of_blocks(
    call: AttentionCall, chosen: Tensor, size: int, *, sink: Tensor | None = None, window: Tensor | None = None
) -> SparsePlan:
    """The plan of the query that reads whole pages, as key blocks, for sizes that kernels are tuned for (64, 128).

    Args:
        chosen: bool ``[B, heads, N]``, with heads H or G.
        sink, window: bands int32 ``[heads]`` in place of pages, for heads that choose none; see `SparsePlan`.
    """
    batch, heads, _ = chosen.shape
    keys = on_device(call.extent.key_count * (call.extent.query_count > 0), call.device)[:, None]
    chosen = chosen & (torch.arange(chosen.shape[2], device=call.device) * size < keys)[:, None]
    page = chosen.nonzero(as_tuple=True)[2]
    counts = chosen.sum(dim=2)
    indptr = torch.zeros(batch * heads + 1, dtype=torch.int64, device=call.device)
    torch.cumsum(counts.flatten(), 0, out=indptr[1:])
    last = ((keys - 1) // size).clamp(min=0)[:, :, None].expand(-1, heads, -1)
    pairs = counts * size - chosen.gather(2, last)[..., 0] * (-keys % size)
    if sink is not None and window is not None:
        banded = (sink + window.long()).to(call.device).expand(batch, -1)
        pairs = torch.where(banded > 0, banded.minimum(keys), pairs)
    return SparsePlan.unchecked(
        heads=heads,
        query_len=call.query_len,
        key_len=call.key_len,
        extent=call.extent,
        block_k=size,
        block_indptr=indptr,
        block_indices=page.to(torch.int32),
        sink=0 if sink is None else sink,
        window=0 if window is None else window,
        pairs=pairs.cpu(),
    )


def share_read(call: AttentionCall, budget: int, page: int) -> float:
    """A share of the keys that any choice of ``budget // page`` pages reads: 1 where a row has no more pages."""
    pages = budget // page
    keys = call.extent.key_count.tolist()
    read = sum(n if n <= pages * page else (pages - 1) * page + 1 for n in keys)
    return read / sum(keys) if sum(keys) else 1.0


def _present(call: AttentionCall, size: int, pages: int) -> Tensor:
    """The pages that a row has, bool ``[B, pages]``."""
    keys = on_device(call.extent.key_count, call.device)[:, None]
    return torch.arange(pages, device=call.device) * size < keys
