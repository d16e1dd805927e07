"""What one query reads of a cache, defined: scores of pages, and the tokens of the best ones."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.paged import FORMS, Paged
from gossamer.plan import ceil_div, on_device
from gossamer.rules import top_k
from gossamer.summaries.base import raised

__all__ = ["choose", "forced", "forget_slots", "keep_bounds", "page_scores", "page_tokens", "shared"]


def page_scores(call: AttentionCall, bounds: Tensor, size: int) -> Tensor:
    """The largest logit that a page's bounds allow each query head (Quest, 2406.10774, equation 2).

    ``scale * sum_d max(q_d * largest_d, q_d * smallest_d)``: no key of the page has a larger one. As one product: the
    positive part of q meets the largest values, the negative part the smallest.

    Args:
        bounds: ``[B, G, N, 2 * D]``, the largest, then the smallest; see `gossamer.summaries.PageBounds`.
        size: tokens of a page.

    Returns:
        fp32 ``[B, H, N]``; -inf for pages that a row does not have.
    """
    q = signed_parts(call).unflatten(1, (call.groups, call.share))
    scores = (q @ bounds.float().transpose(-1, -2)).flatten(1, 2)
    keys = on_device(call.extent.key_count, call.device)[:, None]
    present = torch.arange(bounds.shape[2], device=call.device) * size < keys
    return scores.masked_fill(~present[:, None], float("-inf"))


def signed_parts(call: AttentionCall) -> Tensor:
    """The positive and the negative part of the query, scaled: fp32 ``[B, H, 2 * D]``."""
    q = call.q[:, :, 0].float() * call.scale
    return torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)


def page_tokens(call: AttentionCall, scores: Tensor, size: int, count: int, heads: int) -> tuple[Tensor, Tensor]:
    """The tokens of the best pages, for heads that choose: H, or G, whose query heads choose together (`shared`).

    Args:
        scores: fp32 ``[B, H, N]``, -inf for pages that a row does not have.
        size: tokens of a page.
        count: pages for each head, those of `forced` among them.

    Returns:
        tokens: int32, ascending, head after head.
        counts: int64 ``[B, heads]``, how many they are.
    """
    chosen = choose(shared(scores, heads), forced(call, size, scores.shape[2]), count)
    live = on_device(call.extent.key_count * (call.extent.query_count > 0), call.device)
    row, page = chosen.flatten(0, 1).nonzero(as_tuple=True)
    tokens = page[:, None] * size + torch.arange(size, device=call.device)
    inside = tokens < live.repeat_interleave(heads)[row, None]
    counts = torch.zeros(call.batch * heads, dtype=torch.int64, device=call.device)
    counts.index_add_(0, row, inside.sum(dim=1))
    return tokens[inside].to(torch.int32), counts.view(call.batch, heads)


def shared(scores: Tensor, heads: int) -> Tensor:
    """One score for the query heads of each head that chooses: the sum of their softmaxes over what they choose from.

    Logits of different heads are no measure of each other; the share that each head gives a candidate is.

    Args:
        scores: logits fp32 ``[B, H, N]``, -inf for what is not there.

    Returns:
        ``[B, heads, N]``; -inf for what is not there.
    """
    if scores.shape[1] == heads:
        return scores
    weights = scores.softmax(dim=-1).unflatten(1, (heads, -1)).sum(dim=2)
    return weights.masked_fill(scores[:, :1] == float("-inf"), float("-inf"))


def forced(call: AttentionCall, size: int, count: int) -> Tensor:
    """The pages that every choice holds: bool ``[B, 1, count]``.

    The one with the newest token, which may be partly filled; and those with the store's sinks and recent tokens.
    """
    assert call.store is not None
    if call.batch == 1:  # as most steps have it: fewer operations
        newest = int(call.extent.key_count)
        found = torch.zeros(1, 1, count, dtype=torch.bool, device=call.device)
        last = (newest - 1) // size + 1
        found[..., : min(last, ceil_div(call.store.sinks, size))] = True
        found[..., max(newest - max(call.store.recent, 1), 0) // size : last] = True
        return found
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


def keep_bounds(keys: Paged, counts: Tensor, bounds: Tensor, held: Tensor) -> None:
    """Bring up to date what is kept of the bounds of a paged cache's keys, by page of the cache.

    A page of the cache may be of several sequences, whose first tokens are the same. Tokens behind ``counts`` are not
    looked at.

    Args:
        counts: int64 ``[B]``, tokens of each sequence.
        bounds: ``[pages of the cache, G, n, 2 * D]``, of each n-th of a page, as `gossamer.summaries.PageBounds` has
            them. What it has for tokens that are not held is anything. Written to.
        held: int32 ``[pages of the cache]``, of how many of its first tokens the bounds are. Written to.
    """
    size, dim = keys.page // bounds.shape[2], keys.shape[3]
    for table, count in zip(keys.table.tolist(), counts.tolist(), strict=True):
        for place in range(ceil_div(count, keys.page)):
            number, end = table[place], min(keys.page, count - place * keys.page)
            for first in range(int(held[number]) // size * size, end, size) if held[number] < end else ():
                page = FORMS[keys.form](keys.pages[number : number + 1], keys.page, dim)
                rows = page.reshape(-1, keys.page, dim)[:, first : min(first + size, end)]
                largest, smallest = rows.amax(dim=1), rows.amin(dim=1)
                if rows.dtype != bounds.dtype:
                    largest, smallest = raised(largest), -raised(-smallest)
                bounds[number, :, first // size] = torch.cat([largest, smallest], dim=-1)
            held[number] = max(int(held[number]), end)


def forget_slots(slots: Tensor, page: int, held: Tensor) -> None:
    """Tokens of a paged cache were written: what is held of their pages ends before the first of them.

    Args:
        slots: int64, ``page * number + place``; those below 0 are none.
        page: tokens of a page.
        held: as `keep_bounds` has it. Written to.
    """
    written = slots[slots >= 0]
    held.scatter_reduce_(0, written // page, (written % page).to(held.dtype), "amin")
