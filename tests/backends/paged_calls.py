"""Keys and values put into pages by hand, for tests of what reads them there."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.paged import Paged

# Forms of keys and of values, as vLLM's kernels have them; tiles are of 16 bits.
LAYOUTS = {"columns": ("columns", "rows"), "tiles": ("key_tiles", "value_tiles")}


def places(form: str, token: Tensor, channel: Tensor, page: int, dim: int) -> Tensor:
    """Where a number stands among the ``page * dim`` of a head in a page, written out."""
    return {
        "rows": token * dim + channel,
        "columns": channel * page + token,
        "key_tiles": ((token // 16 * (dim // 2) + channel // 2) * 16 + token % 16) * 2 + channel % 2,
        "value_tiles": ((channel // 16 * (page // 2) + token // 2) * 16 + channel % 16) * 2 + token % 2,
    }[form]


def in_pages(x: Tensor, form: str, page: int, table: Tensor, number: int) -> Paged:
    """Rows ``[1, G, T, D]`` in the pages that a table names, of ``number``; all else in them is NaN."""
    _, groups, tokens, dim = x.shape
    pages = torch.full((number, groups, page * dim), math.nan, dtype=x.dtype)
    token, channel = torch.arange(tokens)[:, None], torch.arange(dim)
    inside = places(form, token % page, channel, page, dim)
    own = table.long()[token // page].expand(-1, dim)
    for group in range(groups):
        pages[own, group, inside] = x[0, group]
    return Paged(pages, table, tokens, page, form)


def of_sequences(x: Tensor, counts: list[int], form: str, page: int, table: Tensor, number: int) -> Paged:
    """Rows ``[B, G, T, D]`` of sequences of so many tokens in the pages that ``table`` ``[B, n]`` names; else NaN."""
    parts = [in_pages(x[b : b + 1, :, :count], form, page, table[b], number).pages for b, count in enumerate(counts)]
    pages = parts[0]
    for part in parts[1:]:
        pages = torch.where(part.isnan(), pages, part)
    return Paged(pages, table, x.shape[2], page, form)


def first_row(call: AttentionCall) -> AttentionCall:
    """Of a batch: a cache has each sequence in pages of its own."""
    of = call.extent
    numbers = (of.query_start[:1], of.query_count[:1], of.key_start[:1], of.key_count[:1])
    extent = Extent(*(one.tolist() for one in numbers), causal=of.causal, limit=of.limit)
    v = None if call.v is None else call.v[:1]
    return replace(call, q=call.q[:1], k=call.k[:1], v=v, extent=extent)


def paged(call: AttentionCall, layout: str, page: int, seed: int = 0) -> AttentionCall:
    """The same call with its keys and values in pages in no order, beside three that belong to nobody."""
    number = -(-call.key_len // page) + 3
    table = torch.randperm(number, generator=torch.Generator().manual_seed(seed))[:-3].to(torch.int32)
    of_keys, of_values = LAYOUTS[layout]
    v = None if call.v is None else in_pages(call.v, of_values, page, table, number)
    return replace(call, k=in_pages(call.k, of_keys, page, table, number), v=v)


def is_untouched(x: Tensor) -> bool:
    """Whether it was not copied out of the pages."""
    return isinstance(x, Paged) and x.at_hand() is x


def untouched(call: AttentionCall) -> bool:
    return is_untouched(call.k) and (call.v is None or is_untouched(call.v))
