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
    batch, heads, _ = chosen.shape
    keys = on_device(call.extent.key_count * (call.extent.query_count > 0), call.device)[:, None]
    chosen = chosen & (torch.arange(chosen.shape[2], device=call.device) * size < keys)[:, None]
    page = chosen.nonzero(as_tuple=True)[2]
    counts = chosen.sum(dim=2)
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
        block_indptr=starts_of(counts),
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
