"""Choosing what one query reads of a cache: scores of pages, choices with forced members, and plans of them."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.backends.torch.pages import choose, forced, shared
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan, on_device, starts_of

__all__ = ["choose", "forced", "plan_of_blocks", "plan_of_tokens", "share_read", "shared"]


def plan_of_tokens(call: AttentionCall, scores: Tensor, size: int, count: int, heads: int) -> SparsePlan:
    """The plan of the query that reads the best pages, as single tokens: backends gather them, and read no more.

    Args:
        scores: fp32 ``[B, H, N]``, -inf for pages that a row does not have.
        size: tokens of a page.
        count: pages for each head, forced ones among them.
        heads: those that choose, H or G.
    """
    tokens, counts = backend_of(call, "page_tokens").page_tokens(call, scores, size, count, heads)
    return SparsePlan.unchecked(
        heads=heads,
        query_len=call.query_len,
        key_len=call.key_len,
        extent=call.extent,
        column_indptr=starts_of(counts),
        column_indices=tokens,
        pairs=counts.cpu(),
    )


def plan_of_blocks(
    call: AttentionCall, chosen: Tensor, size: int, *, sink: Tensor | None = None, window: Tensor | None = None
) -> SparsePlan:
    """The plan of the query that reads whole pages, as key blocks, for sizes that kernels are tuned for (64, 128).

    Args:
        chosen: bool ``[B, heads, N]``, with heads H or G.
        sink, window: bands int32 ``[heads]`` in place of pages, for heads that choose none; see `SparsePlan`.
    """
    batch, heads, count = chosen.shape
    live = call.extent.key_count * (call.extent.query_count > 0)
    keys = on_device(live, call.device)[:, None]
    fits = batch == 1 and int(live) > (count - 1) * size  # as most steps have it: fewer operations
    if not fits:
        chosen = chosen & (torch.arange(count, device=call.device) * size < keys)[:, None]
    counts = chosen.sum(dim=2)
    last = chosen[..., -1] if fits else chosen.gather(2, _last_page(keys, size, heads))[..., 0]
    pairs = counts * size - last * (-keys % size)
    pages = torch.arange(count, dtype=torch.int32, device=call.device).expand_as(chosen)[chosen]
    if sink is not None and window is not None:
        banded = (sink + window.long()).to(call.device).expand(batch, -1)
        pairs = torch.where(banded > 0, banded.minimum(keys), pairs)
    return SparsePlan.unchecked(
        heads=heads,
        query_len=call.query_len,
        key_len=call.key_len,
        extent=call.extent,
        block_k=size,
        block_indptr=starts_of(counts),
        block_indices=pages,
        sink=0 if sink is None else sink,
        window=0 if window is None else window,
        pairs=pairs.cpu(),
    )


def _last_page(keys: Tensor, size: int, heads: int) -> Tensor:
    """Of rows of ``keys`` ``[B, 1]``: the page that their newest token is in, ``[B, heads, 1]``."""
    return ((keys - 1) // size).clamp(min=0)[:, :, None].expand(-1, heads, -1)


def share_read(call: AttentionCall, budget: int, page: int) -> float:
    """A share of the keys that any choice of ``budget // page`` pages reads: 1 where a row has no more pages."""
    pages = budget // page
    keys = call.extent.key_count.tolist()
    read = sum(n if n <= pages * page else (pages - 1) * page + 1 for n in keys)
    return read / sum(keys) if sum(keys) else 1.0
