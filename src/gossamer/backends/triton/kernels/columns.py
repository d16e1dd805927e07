"""Columns: single keys, gathered. One that lies in a selected block counts there; a bitmap of these blocks says so."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import allowed
from gossamer.backends.triton.kernels.matrices import ceil_div
from gossamer.backends.triton.kernels.ranges import banded, lower_bound
from gossamer.backends.triton.kernels.softmax import BY_KEY, BY_PAIR, fold

__all__ = ["ColumnRuns", "Columns", "column_runs", "full_columns", "mark_blocks", "partial_columns"]


class Columns(NamedTuple):
    """One list of columns: pointers to its row pointer, the indices, the row's selected blocks as bits, and the ranks
    of the head's permuted keys."""

    indptr: Any
    indices: Any
    selected: Any
    rank: Any
    LISTED: Any


class ColumnRuns(NamedTuple):
    """The entries of a list that matter: from ``first`` to ``past``, of which those from ``full`` to ``full_past`` are
    allowed for every row and in no band."""

    first: Any
    full: Any
    full_past: Any
    past: Any


@triton.jit
def column_runs(columns, ranges):
    begin = tl.load(columns.indptr)
    end = tl.load(columns.indptr + 1)
    first = lower_bound(columns.indices, begin, end, ranges.outer_low)
    past = lower_bound(columns.indices, first, end, ranges.outer_high)
    full = lower_bound(columns.indices, first, past, ranges.full_low)
    full_past = lower_bound(columns.indices, full, past, ranges.full_high)
    return ColumnRuns(first, full, full_past, past)


@triton.jit
def full_columns(state, queries, keys, logits, blocks, columns, runs):
    """Full columns need a mask by key alone.

    Each pass finds the mask of the next. Places beyond the last column repeat it, so that every load is of a live key.
    """
    key = tl.arange(0, keys.TILE_N)
    count = (runs.full_past - runs.full).to(tl.int32)
    indices = columns.indices + runs.full
    positions = tl.load(indices + tl.minimum(key, count - 1), mask=key < tl.minimum(count, 1) * keys.TILE_N, other=0)
    low, high = unselected(positions, key < count, blocks, columns)
    for n in range(0, ceil_div(count, keys.TILE_N)):
        place = (n + 1) * keys.TILE_N + key
        following = tl.load(indices + tl.minimum(place, count - 1))
        keep = unpacked(low, high, keys.TILE_N)
        low, high = unselected(following, place < count, blocks, columns)
        state = fold(state, queries, keys, logits, positions, keep, keep, BY_KEY)
        positions = following
    return state


@triton.jit
def partial_columns(state, queries, keys, logits, extent, bands, blocks, columns, runs):
    """The columns before and after the full ones, few."""
    key = tl.arange(0, keys.TILE_N)
    before = (runs.full - runs.first).to(tl.int32)
    count = before + (runs.past - runs.full_past).to(tl.int32)
    for n in tl.range(0, ceil_div(count, keys.TILE_N), num_stages=1):
        place = n * keys.TILE_N + key
        keep = place < count
        entry = tl.where(place < before, runs.first + place, runs.full_past + (place - before))
        positions = tl.load(columns.indices + entry, mask=keep, other=0)
        low, high = unselected(positions, keep, blocks, columns)
        keep = unpacked(low, high, keys.TILE_N)
        mask = keep[None, :] & allowed(extent, queries.positions, positions)
        mask = mask & ~banded(bands, queries.positions, positions)
        state = fold(state, queries, keys, logits, positions, keep, mask, BY_PAIR)
    return state


@triton.jit
def unselected(positions, keep, blocks, columns):
    """Which of the columns ``positions`` are kept and do not lie in a selected block: bits of two 64-bit words.

    Each thread of a matrix product needs many keys' masks; as scalars, they are looked up once for all threads.
    """
    TILE_N: tl.constexpr = positions.shape[0]
    if blocks.LISTED:
        rank = positions
        if blocks.PERMUTED:
            rank = tl.load(columns.rank + positions, mask=keep, other=0)
        block = rank // blocks.BLOCK_K
        bits = tl.load(columns.selected + block // 32, mask=keep, other=0)
        keep = keep & (((bits >> (block % 32)) & 1) == 0)
    key = tl.arange(0, TILE_N)
    bit = keep.to(tl.int64) << (key % 64)
    low = tl.sum(tl.where(key < 64, bit, 0), 0)
    high = low
    if TILE_N > 64:
        high = tl.sum(tl.where(key < 64, 0, bit), 0)
    return low, high


@triton.jit
def unpacked(low, high, TILE_N: tl.constexpr):
    key = tl.arange(0, TILE_N)
    return ((tl.where(key < 64, low, high) >> (key % 64)) & 1) != 0


@triton.jit(do_not_specialize=["first_row", "words"])
def mark_blocks(block_indptr, block_indices, selected_bits, first_row, words, TILE: tl.constexpr):
    """One bit for each key block selected by the CSR rows from ``first_row`` on.

    ``selected_bits`` is int32 ``[rows, words]``, zero before.
    """
    row = tl.program_id(0).to(tl.int64)
    block_indptr += first_row
    begin = tl.load(block_indptr + row)
    count = (tl.load(block_indptr + row + 1) - begin).to(tl.int32)
    for n in range(0, ceil_div(count, TILE)):
        place = n * TILE + tl.arange(0, TILE)
        index = tl.load(block_indices + begin + place, mask=place < count, other=0)
        bit = tl.full([TILE], 1, dtype=tl.int32) << (index % 32)
        tl.atomic_or(selected_bits + row * words + index // 32, bit, mask=place < count)
