"""Choices as bitmaps, and bitmaps as lists. Bits are int32 words, candidate ``32 w + i`` in bit ``i`` of word ``w``."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div

__all__ = ["ALL", "BEST", "FLAGGED", "FORCED", "RELATIVE", "choose_rows", "list_bits"]

# Rules: only what is forced; at least a share of the largest score; the best ones; everything seen; what flags say.
FORCED = tl.constexpr(0)
RELATIVE = tl.constexpr(1)
BEST = tl.constexpr(2)
ALL = tl.constexpr(3)
FLAGGED = tl.constexpr(4)

_LEAST = tl.constexpr(-2147483648)


class Row(NamedTuple):
    """One row of scores, and the half-open range of candidates that it sees."""

    scores: Any
    low: Any
    high: Any


@triton.jit
def ordered(x):
    """int32 in the order of the floats; NaN counts as the largest."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def pack(flags, WORDS: tl.constexpr):
    """``32 * WORDS`` flags as bits of int32 words."""
    bits = tl.reshape(flags.to(tl.int32), [WORDS, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, :], 1)


@triton.jit
def relative_threshold(row, alpha, TILE: tl.constexpr):
    """``alpha`` times the largest score; NaN if any is, which none reaches."""
    best = float("-inf")
    undefined = 0
    for n in range(row.low // TILE, ceil_div(row.high, TILE)):
        j = n * TILE + tl.arange(0, TILE)
        x = tl.load(row.scores + j, mask=(j >= row.low) & (j < row.high), other=float("-inf"))
        best = tl.maximum(best, tl.max(tl.where(x == x, x, float("-inf")), 0))
        undefined += tl.sum((x != x).to(tl.int32), 0)
    return tl.where(undefined > 0, float("nan"), alpha * best)


@triton.jit
def count_reaching(row, key, value, ONE: tl.constexpr, TILE: tl.constexpr):
    """How many scores are ``value`` or more, in the order of `ordered`."""
    lane = tl.arange(0, TILE)
    if ONE:
        count = tl.sum(((key >= value) & (lane >= row.low) & (lane < row.high)).to(tl.int32), 0)
    else:
        count = 0
        for n in range(row.low // TILE, ceil_div(row.high, TILE)):
            j = n * TILE + lane
            inside = (j >= row.low) & (j < row.high)
            tile = ordered(tl.load(row.scores + j, mask=inside, other=0.0))
            count += tl.sum(((tile >= value) & inside).to(tl.int32), 0)
    return count


@triton.jit
def best_threshold(row, budget, ONE: tl.constexpr, TILE: tl.constexpr):
    """The largest value that at least ``budget`` scores reach, in the order of `ordered`, and how many of those that
    equal it are to be taken. NaN uses up its part of the budget."""
    lane = tl.arange(0, TILE)
    key = tl.zeros([TILE], dtype=tl.int32)
    if ONE:
        key = ordered(tl.load(row.scores + lane, mask=(lane >= row.low) & (lane < row.high), other=0.0))
    least = tl.full([], _LEAST, dtype=tl.int32)
    if (budget > 0) & (budget < row.high - row.low):
        # A bisection of all 2^32 values.
        lower = tl.full([], _LEAST, dtype=tl.int64)
        upper = tl.full([], 2147483647, dtype=tl.int64)
        for _ in range(32):
            middle = (lower + upper + 1) >> 1
            reach = count_reaching(row, key, middle.to(tl.int32), ONE, TILE)
            lower = tl.where(reach >= budget, middle, lower)
            upper = tl.where(reach >= budget, upper, middle - 1)
        least = lower.to(tl.int32)
    above = 0
    for n in range(row.low // TILE, ceil_div(row.high, TILE)):
        j = n * TILE + lane
        inside = (j >= row.low) & (j < row.high)
        x = tl.load(row.scores + j, mask=inside, other=0.0)
        above += tl.sum((inside & (ordered(x) > least) & (x == x)).to(tl.int32), 0)
    return least, budget - above


@triton.jit(do_not_specialize=["heads", "rows", "width", "start", "all_rows", "first", "diagonals", "words"])
def choose_rows(
    scores_ptr, flags_ptr, ranges_ptr, forced_heads_ptr, budgets_ptr, diagonals_ptr, everywhere_ptr, bits_ptr,
    counts_ptr, heads, rows, width, start, all_rows, first, diagonals, words, alpha,
    RULE: tl.constexpr, DIAGONALS: tl.constexpr, MIRRORED: tl.constexpr, EVERYWHERE: tl.constexpr, ONE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """The choice of one row as bits, and how many they are. Grid: ``B * heads * rows``.

    ``ranges`` is int32 ``[B, rows, 5]``: what is seen and what is forced, half-open, and the candidate on diagonal 0;
    the ``first`` candidates are forced, too. ONE: a tile holds the row.
    Rows go to ``start ..`` of ``bits`` ``[B * heads, all_rows, words]`` and ``counts`` ``[B * heads, all_rows]``.
    """
    program = tl.program_id(0)
    m = program % rows
    bh = program // rows
    ranges = ranges_ptr + 5 * (bh // heads * rows + m)
    low = tl.maximum(tl.load(ranges), 0)
    row = Row(scores_ptr + program.to(tl.int64) * width, low, tl.maximum(tl.minimum(tl.load(ranges + 1), width), low))
    forced_low, forced_high, origin = tl.load(ranges + 2), tl.load(ranges + 3), tl.load(ranges + 4)
    forced_heads = tl.load(forced_heads_ptr + bh) != 0
    threshold = 0.0
    least = tl.full([], _LEAST, dtype=tl.int32)
    room = 0
    if RULE == RELATIVE:
        threshold = relative_threshold(row, alpha, TILE)
    if RULE == BEST:
        budget = tl.load(budgets_ptr + bh % heads)
        least, room = best_threshold(row, budget, ONE, TILE)
    count = 0
    out = bh.to(tl.int64) * all_rows + start + m
    for n in range(ceil_div(words * 32, TILE)):
        j = n * TILE + tl.arange(0, TILE)
        inside = (j >= row.low) & (j < row.high)
        chosen = (((j >= forced_low) & (j < forced_high)) | (j < first)) & forced_heads
        if RULE == RELATIVE:
            x = tl.load(row.scores + j, mask=inside, other=0.0)
            chosen = chosen | ((x >= threshold) & (x > 0.0))
        if RULE == BEST:
            x = tl.load(row.scores + j, mask=inside, other=float("-inf"))
            real = inside & (x == x) & (x > float("-inf"))
            equal = (real & (ordered(x) == least)).to(tl.int32)
            best = (real & (ordered(x) > least)) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
            chosen = chosen | (best & (budget > 0))
            room -= tl.sum(equal, 0)
        if RULE == ALL:
            chosen = chosen | inside
        if RULE == FLAGGED:
            flags = tl.load(flags_ptr + program.to(tl.int64) * width + j, mask=inside, other=0)
            chosen = chosen | (flags != 0)
        if DIAGONALS:
            diagonal = origin - j
            if MIRRORED:
                diagonal = tl.abs(diagonal)
            crossed = inside & (diagonal >= 0) & (diagonal < diagonals)
            flags = tl.load(diagonals_ptr + bh.to(tl.int64) * diagonals + diagonal, mask=crossed, other=0)
            chosen = chosen | (flags != 0)
        if EVERYWHERE:
            flags = tl.load(everywhere_ptr + bh.to(tl.int64) * width + j, mask=inside, other=0)
            chosen = chosen | (flags != 0)
        chosen = chosen & inside
        word = n * (TILE // 32) + tl.arange(0, TILE // 32)
        tl.store(bits_ptr + out * words + word, pack(chosen, TILE // 32), mask=word < words)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts_ptr + out, count)


@triton.jit(do_not_specialize=["words"])
def list_bits(bits_ptr, indptr_ptr, indices_ptr, words, TILE: tl.constexpr):
    """The set bits of one row, ascending, from ``indptr`` on. Grid: rows. TILE: words at a time."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + row)
    left = (tl.load(indptr_ptr + row + 1) - begin).to(tl.int32)
    done = 0
    first = 0
    while (done < left) & (first < words):
        word = first + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + row * words + word, mask=word < words, other=0)
        flags = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [TILE * 32])
        place = begin + done + tl.cumsum(flags, 0) - 1
        tl.store(indices_ptr + place, first * 32 + tl.arange(0, TILE * 32), mask=flags > 0)
        done += tl.sum(flags, 0)
        first += TILE
