"""Choices as bitmaps, bitmaps as lists, and the pairs that they name."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["choose_rows", "count_columns", "count_tiles", "list_bits", "pack_mask"]


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
def at_least(row_scores, key, low, high, first, past, middle, ONE: tl.constexpr, TILE: tl.constexpr):
    """How many of the scores in ``[low, high)`` are ``middle`` or more, in the order of `ordered`."""
    lane = tl.arange(0, TILE)
    if ONE:
        count = tl.sum(((key >= middle) & (lane >= low) & (lane < high)).to(tl.int32), 0)
    else:
        count = 0
        for n in range(first, past):
            j = n * TILE + lane
            inside = (j >= low) & (j < high)
            tile = ordered(tl.load(row_scores + j, mask=inside, other=0.0))
            count += tl.sum(((tile >= middle) & inside).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["heads", "rows", "width", "at", "all_rows", "band_count", "words"])
def choose_rows(
    scores_ptr,
    seen_ptr,
    forced_ptr,
    leading_ptr,
    forcing_ptr,
    budgets_ptr,
    bands_ptr,
    origin_ptr,
    bits_ptr,
    counts_ptr,
    heads,
    rows,
    width,
    at,
    all_rows,
    band_count,
    words,
    alpha,
    RULE: tl.constexpr,
    BANDS: tl.constexpr,
    ONE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The choice of one row as bits, and how many they are. Grid: ``B * heads * rows``.

    RULE: 0 none, 1 relative to the maximum, 2 the best ``budgets``, 3 everything seen. ONE: a tile holds the row.
    Rows go to ``at ..`` of ``bits`` ``[B * heads, all_rows, words]`` and ``counts`` ``[B * heads, all_rows]``.
    """
    program = tl.program_id(0)
    row = program % rows
    bh = program // rows
    b = bh // heads
    place = b * rows + row
    low = tl.maximum(tl.load(seen_ptr + 2 * place), 0)
    high = tl.maximum(tl.minimum(tl.load(seen_ptr + 2 * place + 1), width), low)
    lane = tl.arange(0, TILE)
    row_scores = scores_ptr + program.to(tl.int64) * width
    first = low // TILE
    past = (high + TILE - 1) // TILE

    threshold = 0.0
    least = -2147483648
    room = 0
    budget = 0
    if RULE == 1:
        best = float("-inf")
        for n in range(0, (width + TILE - 1) // TILE):
            j = n * TILE + lane
            x = tl.load(row_scores + j, mask=j < width, other=float("-inf"))
            best = tl.maximum(best, tl.max(tl.where(x == x, x, float("-inf")), 0))
        threshold = alpha * best
    if RULE == 2:
        budget = tl.load(budgets_ptr + bh % heads)
        key = tl.zeros([TILE], dtype=tl.int32)
        if ONE:
            key = ordered(tl.load(row_scores + lane, mask=(lane >= low) & (lane < high), other=0.0))
        if (budget > 0) & (budget < high - low):
            # The largest value that at least `budget` scores reach: a bisection of all 2^32 of them.
            lower = tl.full([], -2147483648, dtype=tl.int64)
            upper = tl.full([], 2147483647, dtype=tl.int64)
            for _ in range(32):
                middle = (lower + upper + 1) >> 1
                reach = at_least(row_scores, key, low, high, first, past, middle.to(tl.int32), ONE, TILE)
                lower = tl.where(reach >= budget, middle, lower)
                upper = tl.where(reach >= budget, upper, middle - 1)
            least = lower.to(tl.int32)
        above = 0
        for n in range(first, past):
            j = n * TILE + lane
            inside = (j >= low) & (j < high)
            x = tl.load(row_scores + j, mask=inside, other=0.0)
            above += tl.sum((inside & (ordered(x) > least) & (x == x)).to(tl.int32), 0)
        room = budget - above

    forcing = tl.load(forcing_ptr + bh) != 0
    forced_low = tl.load(forced_ptr + 2 * place)
    forced_high = tl.load(forced_ptr + 2 * place + 1)
    leading_low = tl.load(leading_ptr + 2 * b)
    leading_high = tl.load(leading_ptr + 2 * b + 1)
    count = 0
    out = bh.to(tl.int64) * all_rows + at + row
    for n in range(0, (words * 32 + TILE - 1) // TILE):
        j = n * TILE + lane
        inside = (j >= low) & (j < high)
        chosen = ((j >= forced_low) & (j < forced_high)) | ((j >= leading_low) & (j < leading_high))
        chosen = chosen & forcing
        if RULE == 1:
            x = tl.load(row_scores + j, mask=inside, other=0.0)
            chosen = chosen | ((x >= threshold) & (x > 0.0))
        if RULE == 2:
            x = tl.load(row_scores + j, mask=inside, other=float("-inf"))
            key = ordered(x)
            real = inside & (x == x) & (x > float("-inf"))
            equal = (real & (key == least)).to(tl.int32)
            best_ones = (real & (key > least)) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
            chosen = chosen | (best_ones & (budget > 0))
            room -= tl.sum(equal, 0)
        if RULE == 3:
            chosen = chosen | inside
        if BANDS:
            band = tl.load(origin_ptr + place) - j
            banded = inside & (band >= 0) & (band < band_count)
            chosen = chosen | (tl.load(bands_ptr + bh.to(tl.int64) * band_count + band, mask=banded, other=0) != 0)
        chosen = chosen & inside
        word = n * (TILE // 32) + tl.arange(0, TILE // 32)
        tl.store(bits_ptr + out * words + word, pack(chosen, TILE // 32), mask=word < words)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts_ptr + out, count)


@triton.jit(do_not_specialize=["width", "words", "pieces"])
def pack_mask(mask_ptr, bits_ptr, width, words, pieces, TILE: tl.constexpr):
    """Flags uint8 ``[rows, width]`` as bits ``[rows, words]``. Grid: ``rows * pieces``."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    piece = program % pieces
    j = piece * TILE + tl.arange(0, TILE)
    flags = tl.load(mask_ptr + row * width + j, mask=j < width, other=0) != 0
    word = piece * (TILE // 32) + tl.arange(0, TILE // 32)
    tl.store(bits_ptr + row * words + word, pack(flags, TILE // 32), mask=word < words)


@triton.jit(do_not_specialize=["words"])
def list_bits(bits_ptr, indptr_ptr, indices_ptr, words, TILE: tl.constexpr):
    """The set bits of one row, ascending, from ``indptr`` on. Grid: rows. TILE: words at a time."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + row)
    left = (tl.load(indptr_ptr + row + 1) - begin).to(tl.int32)
    done = 0
    at = 0
    while (done < left) & (at < words):
        word = at + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + row * words + word, mask=word < words, other=0)
        flags = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [TILE * 32])
        rank = tl.cumsum(flags, 0)
        place = begin + done + rank - 1
        tl.store(indices_ptr + place, at * 32 + tl.arange(0, TILE * 32), mask=flags > 0)
        done += tl.sum(flags, 0)
        at += TILE


@triton.jit(do_not_specialize=["words", "blocks", "pieces"])
def count_columns(
    bits_ptr, out_ptr, words, blocks, pieces, BLOCK_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Columns in each key block: int32 ``[lists, blocks]`` from bits ``[lists, words]``. Grid: ``lists * pieces``."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    block = (program % pieces) * TILE + tl.arange(0, TILE)
    count = tl.zeros([TILE], dtype=tl.int32)
    for i in range(BLOCK_K):
        slot = block * BLOCK_K + i
        bits = tl.load(bits_ptr + row * words + slot // 32, mask=slot // 32 < words, other=0)
        count += (bits >> (slot % 32)) & 1
    tl.store(out_ptr + row * blocks + block, count, mask=block < blocks)


@triton.jit(do_not_specialize=["batch", "query_len", "blocks", "key_blocks", "words", "column_words", "lists",
                               "column_group", "limit"])  # fmt: skip
def count_tiles(
    bits_ptr,
    column_bits_ptr,
    column_count_ptr,
    sink_ptr,
    window_ptr,
    extent_ptr,
    pairs_ptr,
    batch,
    heads,
    query_len,
    blocks,
    key_blocks,
    words,
    column_words,
    lists,
    column_group,
    limit,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    TILE: tl.constexpr,
    EDGE_M: tl.constexpr,
    EDGE_N: tl.constexpr,
):
    """Pairs that one query block of one head computes: int64 ``[B * heads * blocks]``.

    A key block in which all pairs are allowed, and all or none are in the bands, is arithmetic; the others, at the
    edges of causality, bands and live keys, are counted pair by pair as the plan is defined.
    """
    program = tl.program_id(0)
    m = program % blocks
    bh = program // blocks
    b = bh // heads
    live_begin = tl.load(extent_ptr + batch + b)
    live_end = live_begin + tl.load(extent_ptr + 2 * batch + b)
    sink_end = live_begin + tl.load(sink_ptr + bh % heads)
    window = tl.load(window_ptr + bh % heads)
    rows = tl.minimum(BLOCK_Q, query_len - m * BLOCK_Q)
    first_at = tl.load(extent_ptr + b) + m * BLOCK_Q + live_begin
    last_at = first_at + rows - 1
    bits_row = bits_ptr + program.to(tl.int64) * words
    column_list = bh.to(tl.int64) * lists + m // column_group

    low_slot = live_begin
    high_slot = live_end
    if CAUSAL:
        high_slot = tl.minimum(high_slot, tl.maximum(last_at + 1, 0))
    if LIMITED:
        low_slot = tl.maximum(low_slot, first_at - limit + 1)
        high_slot = tl.minimum(high_slot, tl.maximum(last_at + limit, 0))
    total = tl.zeros([], dtype=tl.int64)
    past = tl.minimum((tl.maximum(high_slot, low_slot) + BLOCK_K - 1) // BLOCK_K, key_blocks)
    for n in range(low_slot // BLOCK_K // TILE, (past + TILE - 1) // TILE):
        block = n * TILE + tl.arange(0, TILE)
        low = tl.maximum(block * BLOCK_K, live_begin)
        high = tl.minimum((block + 1) * BLOCK_K, live_end)
        some = (high > low) & (block < past)
        every = some
        # Smallest and largest distance between a row and a key.
        near = tl.maximum(tl.maximum(first_at - (high - 1), low - last_at), 0)
        far = tl.maximum(last_at - low, high - 1 - first_at)
        if CAUSAL:
            some = some & (low <= last_at)
            every = every & (high - 1 <= first_at)
        if LIMITED:
            some = some & (near < limit)
            every = every & (far < limit)
        banded = (high <= sink_end) | (far < window)
        free = (low >= sink_end) & (near >= window)
        selected = tl.zeros([TILE], dtype=tl.int1)
        if HAS_BLOCKS:
            word = tl.load(bits_row + block // 32, mask=block // 32 < words, other=0)
            selected = ((word >> (block % 32)) & 1) != 0
        keys = tl.where(banded | selected, high - low, 0)
        if HAS_COLUMNS:
            listed = tl.load(column_count_ptr + column_list * key_blocks + block, mask=block < key_blocks, other=0)
            keys = tl.where(banded | selected, keys, listed)
            # A list may name dead slots.
            every = every & ((high - low == BLOCK_K) | banded | selected | (listed == 0))
            empty = free & (~selected) & (listed == 0)
        else:
            empty = free & (~selected)
        whole = every & (banded | free)
        total += tl.sum(tl.where(whole, keys * rows, 0), 0).to(tl.int64)
        edge = some & (~whole) & (~empty)
        rank = tl.cumsum(edge.to(tl.int32), 0)
        for i in range(tl.sum(edge.to(tl.int32), 0)):
            here = edge & (rank == i + 1)
            at = tl.sum(tl.where(here, block, 0), 0)
            taken = tl.sum((here & selected).to(tl.int32), 0) > 0
            for sub_m in range((BLOCK_Q + EDGE_M - 1) // EDGE_M):
                row = sub_m * EDGE_M + tl.arange(0, EDGE_M)
                row_at = (first_at + row)[:, None]
                for sub_n in range((BLOCK_K + EDGE_N - 1) // EDGE_N):
                    offset = sub_n * EDGE_N + tl.arange(0, EDGE_N)
                    slot = at * BLOCK_K + offset
                    live = (offset < BLOCK_K) & (slot >= live_begin) & (slot < live_end)
                    allowed = live[None, :] & (row < rows)[:, None]
                    distance = tl.abs(row_at - slot[None, :])
                    if CAUSAL:
                        allowed = allowed & (slot[None, :] <= row_at)
                    if LIMITED:
                        allowed = allowed & (distance < limit)
                    computed = (slot < sink_end)[None, :] | (distance < window) | taken
                    if HAS_COLUMNS:
                        column_word = tl.load(
                            column_bits_ptr + column_list * column_words + slot // 32,
                            mask=live & (slot // 32 < column_words),
                            other=0,
                        )
                        computed = computed | (((column_word >> (slot % 32)) & 1) != 0)[None, :]
                    total += tl.sum(tl.sum((allowed & computed).to(tl.int32), 1), 0).to(tl.int64)
    tl.store(pairs_ptr + program, total)
