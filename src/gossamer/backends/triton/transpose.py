"""A plan's lists by key instead of by query, made with sorts on their device: who owns a key finds who names it.

Sorting takes some 100 bytes an entry, so that long lists are sorted some heads at a time. Of short ones nothing waits
for the device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.backends.triton.device import fetch
from gossamer.plan import ceil_div

__all__ = ["MOST_ENTRIES", "Columns", "query_blocks_of", "transposed_columns"]

MOST_ENTRIES = 1 << 24  # sorted at once, but for a key/value head that has more


class Columns(NamedTuple):
    """Columns of consecutive key/value heads, counted through the batch, from ``first_group`` on.

    Fields:
        gathered: int32, for each head the positions that some list of it names, ascending, each once; those of head n
            from ``gathered_indptr[n]`` on.
        tiles: of so many positions that every head could have. Tile t of head n has number ``n * tiles + t``.
        lists: int32, for each tile the lists that name some of its positions, ascending; from ``list_indptr`` of its
            number on. List l is list ``l % column_lists`` of the head's plan head ``l // column_lists``.
        members: int32 ``[entries of lists, 2]``, which positions of its tile each names, as bits.
    """

    first_group: int
    groups: int
    tiles: int
    gathered: Tensor
    gathered_indptr: Tensor
    list_indptr: Tensor
    lists: Tensor
    members: Tensor


def query_blocks_of(indptr: Tensor, indices: Tensor, blocks: int, key_blocks: int) -> tuple[Tensor, Tensor]:
    """Query blocks by key block, from key blocks by query block.

    Args:
        indptr: of ``heads * blocks`` lists, int64; indices: int32, below ``key_blocks``.

    Returns:
        int64 ``[heads * key_blocks + 1]``, and int32, ascending in each list.
    """
    heads = (indptr.numel() - 1) // max(1, blocks)
    found, starts = torch.empty_like(indices), []
    for first, past, begin, end in _parts(indptr, indices.numel(), heads, blocks):
        row = _rows(indptr[first * blocks : past * blocks + 1], end - begin)
        key = row // blocks * key_blocks + indices[begin:end]
        key, order = key.sort(stable=True)
        found[begin:end] = row[order] % blocks
        where = torch.arange((past - first) * key_blocks, device=indices.device)
        starts.append(torch.searchsorted(key, where) + begin)
    total = torch.full((1,), indices.numel(), dtype=torch.int64, device=indices.device)
    return torch.cat([*starts, total]), found


def transposed_columns(indptr: Tensor, indices: Tensor, groups: int, width: int, tile: int) -> Iterator[Columns]:
    """Columns by key, some key/value heads at a time.

    Args:
        indptr: of as many lists for each of ``groups`` heads (batch times key/value heads); indices: int32, below
            ``width``, ascending and distinct in each list.
        tile: positions of a tile, at most 64.
    """
    per_group = (indptr.numel() - 1) // groups
    for first, past, begin, end in _parts(indptr, indices.numel(), groups, per_group):
        row = _rows(indptr[first * per_group : past * per_group + 1], end - begin)
        yield _columns(first, past - first, row, indices[begin:end].long(), per_group, width, tile)


def _columns(first: int, groups: int, row: Tensor, position: Tensor, per_group: int, width: int, tile: int) -> Columns:
    every = torch.arange(groups + 1, device=row.device)
    key, order = (row // per_group * width + position).sort(stable=True)
    number, firsts = _numbered(key)  # of positions, each once
    starts = _at(number, torch.searchsorted(key, every * width))
    gathered = (key[firsts] % width).int()
    group = key // width
    place = number[:-1] - starts[group]
    tiles = ceil_div(min(width, row.numel()), tile)
    own = (group * tiles + place // tile) * per_group + row[order] % per_group
    own, again = own.sort(stable=True)
    which, firsts = _numbered(own)
    lists = (own[firsts] % per_group).int()
    bit = (place % tile)[again]
    ends = torch.searchsorted(which[:-1], torch.arange(row.numel() + 1, device=row.device))
    members = torch.stack([_bits(bit, ends), _bits(bit - 32, ends)], dim=1)
    of_tiles = torch.arange(groups * tiles + 1, device=row.device) * per_group
    list_indptr = _at(which, torch.searchsorted(own, of_tiles))
    return Columns(first, groups, tiles, gathered, starts, list_indptr, lists, members)


def _parts(indptr: Tensor, entries: int, heads: int, lists: int) -> Iterator[tuple[int, int, int, int]]:
    """Consecutive heads of so many lists each, half-open, and their entries."""
    if entries <= MOST_ENTRIES:
        yield 0, heads, 0, entries
        return
    starts = fetch(indptr[::lists])
    first = 0
    while first < heads:
        past = first + 1
        while past < heads and starts[past + 1] - starts[first] <= MOST_ENTRIES:
            past += 1
        yield first, past, starts[first], starts[past]
        first = past


def _rows(indptr: Tensor, entries: int) -> Tensor:
    """Number of the list of each entry."""
    where = torch.arange(entries, device=indptr.device) + indptr[0]
    return torch.searchsorted(indptr[1:], where, right=True)


def _numbered(ascending: Tensor) -> tuple[Tensor, Tensor]:
    """For each entry the number of its value, and how many values there are; where each value begins, and the last
    entry for numbers beyond."""
    new = torch.ones_like(ascending)
    new[1:] = ascending[1:] != ascending[:-1]
    number = torch.nn.functional.pad(new.cumsum(0), (0, 1))
    number[:-1] -= 1
    number[-1:] = new.sum()
    where = torch.arange(ascending.numel(), device=ascending.device)
    return number, torch.searchsorted(number[:-1], where).clamp(max=max(0, ascending.numel() - 1))


def _at(numbers: Tensor, entries: Tensor) -> Tensor:
    return numbers[entries]


def _bits(bit: Tensor, ends: Tensor) -> Tensor:
    """Bits from 0 to 31 of entries, united from one end to the next: int32."""
    one = torch.where((bit >= 0) & (bit < 32), torch.ones_like(bit) << bit.clamp(0, 31), 0)
    sums = torch.nn.functional.pad(one.cumsum(0), (1, 0))
    united = sums[ends[1:]] - sums[ends[:-1]]
    return torch.where(united >= 1 << 31, united - (1 << 32), united).int()
