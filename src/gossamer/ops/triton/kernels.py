"""The forward kernel: one tile of query rows against every key that its plan names, with one softmax state.

Coordinates are key slots: a query's is ``query_start + row + key_start``, so that the distance of query and key is
the difference of their coordinates. A pair that several parts select is computed by the first of bands, blocks and
columns that names it: bands are arithmetic, so blocks and columns test them for themselves; whether a column's key
block is selected is looked up in a bitmap.

A tile's keys fall into ranges. Pairs in the clean range (all rows of the tile may attend all keys, and no band holds
any) need no mask; since indices ascend, the clean blocks and columns of a row are consecutive and found by bisection.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["attend", "mark_blocks"]


@triton.jit
def lower_bound(values, low, high, value):
    """The first place in ``[low, high)`` whose value is at least ``value``."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def load_rows(base, slots, stride, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASKED: tl.constexpr):
    """Rows ``slots`` of a matrix; 0 where ``keep`` is False, so that dead slots are never read."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + slots.to(tl.int64)[:, None] * stride + column[None, :]
    if MASKED:
        rows = tl.load(pointers, mask=keep[:, None] & (column < DIM)[None, :], other=0.0)
    elif DIM != BLOCK_DIM:
        rows = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
    else:
        rows = tl.load(pointers)
    return rows


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32, with a rounded to b's dtype.

    WIDEN is for bf16 under the interpreter of Triton 3.9, which truncates to bf16 and multiplies its bit patterns.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def step(
    acc,
    total,
    top,
    q,
    k_base,
    v_base,
    k_stride,
    v_stride,
    slots,
    keep,
    pairs,
    scale_log2,
    softcap_log2,
    softcap_slope,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys. MASK: 0 none, 1 ``keep`` by key, 2 ``pairs`` by pair (``keep`` still guards the loads)."""
    k = load_rows(k_base, slots, k_stride, keep, DIM, BLOCK_D, MASK > 0)
    scores = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    scores = product(q, tl.trans(k), scores, WIDEN, PRECISION)
    if SOFTCAP:
        # softcap * tanh(x / softcap), with tanh(y) = 1 - 2 / (exp(2 y) + 1); 2 / infinity is 0.
        scores = softcap_log2 * (1.0 - 2.0 / (tl.exp2(scores * softcap_slope) + 1.0))
    if not SOFTCAP:
        scores = scores * scale_log2
    if MASK == 1:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    if MASK == 2:
        scores = tl.where(pairs, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1))
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    weights = tl.exp2(scores - base[:, None])
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    v = load_rows(v_base, slots, v_stride, keep, VALUE_DIM, BLOCK_DV, MASK > 0)
    acc = product(weights, v, acc, WIDEN, PRECISION)
    return acc, total, new_top


@triton.jit
def allowed_pairs(row_at, slots, keep, limit, CAUSAL: tl.constexpr, LIMITED: tl.constexpr):
    pairs = keep[None, :]
    if CAUSAL:
        pairs = pairs & (slots[None, :] <= row_at[:, None])
    if LIMITED:
        pairs = pairs & (tl.abs(row_at[:, None] - slots[None, :]) < limit)
    return pairs


@triton.jit
def banded_pairs(row_at, slots, sink_end, window):
    return (slots < sink_end)[None, :] | (tl.abs(row_at[:, None] - slots[None, :]) < window)


@triton.jit(do_not_specialize=["query_len", "key_len", "blocks", "words", "column_lists", "column_group", "limit"])
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    lse_ptr,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    v_batch_stride,
    v_head_stride,
    v_stride,
    block_indptr,
    block_indices,
    column_indptr,
    column_indices,
    sink_ptr,
    window_ptr,
    q_order,
    k_order,
    k_rank,
    selected_bits,
    extent_ptr,
    sinks_ptr,
    batch,
    plan_heads,
    groups,
    query_len,
    key_len,
    blocks,
    column_lists,
    column_group,
    words,
    limit,
    scale_log2,
    softcap_log2,
    softcap_slope,
    SHARE: tl.constexpr,
    TILES: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    Q_ORDER: tl.constexpr,
    K_ORDER: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one query block of one head of the plan: ``TILE_M`` rows, tokens times the query heads that share it.

    The grid has one dimension, ``batch * plan_heads * blocks * TILES``. Late query blocks come first: causal ones
    have the most keys.
    """
    program = tl.program_id(0)
    tile = program % TILES
    block = blocks - 1 - (program // TILES) % blocks
    plan_row = program // (TILES * blocks)
    b = plan_row // plan_heads
    plan_head = plan_row % plan_heads
    group = plan_head // (plan_heads // groups)

    packed = tile * TILE_M + tl.arange(0, TILE_M)
    rank = block * BLOCK_Q + packed // SHARE
    head = plan_head * SHARE + packed % SHARE
    row_exists = (packed < BLOCK_Q * SHARE) & (rank < query_len)
    row = rank
    if Q_ORDER:
        row = tl.load(q_order + plan_row.to(tl.int64) * query_len + rank, mask=row_exists, other=0)

    query_start = tl.load(extent_ptr + b)
    live_begin = tl.load(extent_ptr + batch + b)
    live_end = live_begin + tl.load(extent_ptr + 2 * batch + b)
    sink_end = live_begin + tl.load(sink_ptr + plan_head)
    window = tl.load(window_ptr + plan_head)
    row_at = query_start + row + live_begin
    lowest = tl.min(tl.where(row_exists, row_at, 1 << 30), 0)
    highest = tl.max(tl.where(row_exists, row_at, -(1 << 30)), 0)

    # Slots that some row may attend; slots that every row may attend; slots of the second kind outside the bands.
    low = live_begin
    high = live_end
    every_low = live_begin
    every_high = live_end
    if CAUSAL:
        high = tl.minimum(high, highest + 1)
        every_high = tl.minimum(every_high, lowest + 1)
    if LIMITED:
        low = tl.maximum(low, lowest - limit + 1)
        high = tl.minimum(high, highest + limit)
        every_low = tl.maximum(every_low, highest - limit + 1)
        every_high = tl.minimum(every_high, lowest + limit)
    high = tl.maximum(high, low)
    outer_low = tl.minimum(tl.maximum(low, sink_end), high)
    outer_high = high
    if CAUSAL:
        outer_high = tl.minimum(outer_high, highest - window + 1)
    outer_high = tl.maximum(outer_high, outer_low)
    clean_low = tl.maximum(every_low, sink_end)
    clean_high = tl.where(window > 0, tl.minimum(every_high, lowest - window + 1), every_high)
    clean_low = tl.minimum(tl.maximum(clean_low, outer_low), outer_high)
    clean_high = tl.minimum(tl.maximum(clean_high, clean_low), outer_high)

    q_base = q_ptr + b.to(tl.int64) * q_batch_stride
    q_rows = q_base + head.to(tl.int64) * q_head_stride + row.to(tl.int64) * q_stride
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(q_rows[:, None] + dim[None, :], mask=row_exists[:, None] & (dim < DIM)[None, :], other=0.0)
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    v_base = v_ptr + b.to(tl.int64) * v_batch_stride + group.to(tl.int64) * v_head_stride

    acc = tl.zeros([TILE_M, BLOCK_DV], dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    top = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    key = tl.arange(0, TILE_N)
    every = tl.full([TILE_N], 1, dtype=tl.int1)
    csr_row = plan_row.to(tl.int64) * blocks + block

    if HAS_BLOCKS:
        PIECES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
        first = tl.load(block_indptr + csr_row)
        past = tl.load(block_indptr + csr_row + 1)
        clean_first = past
        clean_past = past
        if not K_ORDER:
            past = lower_bound(block_indices, first, past, ceil_div(outer_high, BLOCK_K))
            first = lower_bound(block_indices, first, past, outer_low // BLOCK_K)
            clean_first = past
            clean_past = past
            if BLOCK_K % TILE_N == 0:
                clean_first = lower_bound(block_indices, first, past, ceil_div(clean_low, BLOCK_K))
                clean_past = lower_bound(block_indices, clean_first, past, clean_high // BLOCK_K)
                for n in range(0, ((clean_past - clean_first) * PIECES).to(tl.int32)):
                    entry = tl.load(block_indices + clean_first + n // PIECES)
                    slots = entry * BLOCK_K + (n % PIECES) * TILE_N + key
                    acc, total, top = step(
                        acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, every, every, scale_log2,
                        softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 0, SOFTCAP, WIDEN, PRECISION,
                    )  # fmt: skip
        before = (clean_first - first).to(tl.int32)
        entries = before + (past - clean_past).to(tl.int32)
        for n in range(0, entries * PIECES):
            at = n // PIECES
            entry = tl.load(block_indices + tl.where(at < before, first + at, clean_past + (at - before)))
            within = (n % PIECES) * TILE_N + key
            slots = entry * BLOCK_K + within
            keep = (within < BLOCK_K) & (slots < key_len)
            if K_ORDER:
                slots = tl.load(k_order + plan_row.to(tl.int64) * key_len + slots, mask=keep, other=0)
            keep = keep & (slots >= live_begin) & (slots < live_end)
            pairs = allowed_pairs(row_at, slots, keep, limit, CAUSAL, LIMITED)
            pairs = pairs & ~banded_pairs(row_at, slots, sink_end, window)
            acc, total, top = step(
                acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, keep, pairs, scale_log2,
                softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 2, SOFTCAP, WIDEN, PRECISION,
            )  # fmt: skip

    # Bands, in tiles of consecutive slots: those of the sink, then those of the window that are not among them.
    sink_high = tl.minimum(high, sink_end)
    sink_first = low // TILE_N
    sink_past = tl.where(sink_high > low, ceil_div(sink_high, TILE_N), sink_first)
    window_low = tl.maximum(low, lowest - window + 1)
    window_high = tl.minimum(high, highest + window)
    some_window = (window > 0) & (window_high > window_low)
    window_first = tl.where(some_window, tl.maximum(window_low // TILE_N, sink_past), 0)
    window_past = tl.where(some_window, tl.maximum(ceil_div(window_high, TILE_N), window_first), 0)
    full_low = tl.maximum(tl.maximum(every_low, highest - window + 1), 0)
    full_high = tl.maximum(tl.minimum(every_high, lowest + window), 0)
    full_first = tl.minimum(tl.maximum(ceil_div(full_low, TILE_N), window_first), window_past)
    full_past = tl.minimum(tl.maximum(full_high // TILE_N, full_first), window_past)
    for n in range(full_first, full_past):
        slots = n * TILE_N + key
        acc, total, top = step(
            acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, every, every, scale_log2,
            softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 0, SOFTCAP, WIDEN, PRECISION,
        )  # fmt: skip
    sink_tiles = sink_past - sink_first
    before_full = sink_tiles + full_first - window_first
    for n in range(0, before_full + window_past - full_past):
        tile_n = tl.where(n < sink_tiles, sink_first + n, window_first + n - sink_tiles)
        tile_n = tl.where(n < before_full, tile_n, full_past + n - before_full)
        slots = tile_n * TILE_N + key
        keep = (slots >= live_begin) & (slots < live_end)
        pairs = allowed_pairs(row_at, slots, keep, limit, CAUSAL, LIMITED)
        pairs = pairs & banded_pairs(row_at, slots, sink_end, window)
        acc, total, top = step(
            acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, keep, pairs, scale_log2,
            softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 2, SOFTCAP, WIDEN, PRECISION,
        )  # fmt: skip

    if HAS_COLUMNS:
        column_list = plan_row.to(tl.int64) * column_lists + block // column_group
        list_begin = tl.load(column_indptr + column_list)
        list_end = tl.load(column_indptr + column_list + 1)
        column_first = lower_bound(column_indices, list_begin, list_end, outer_low)
        column_past = lower_bound(column_indices, column_first, list_end, outer_high)
        clean_column = lower_bound(column_indices, column_first, column_past, clean_low)
        past_clean_column = lower_bound(column_indices, clean_column, column_past, clean_high)
        # Clean columns need a mask by key alone.
        count = (past_clean_column - clean_column).to(tl.int32)
        for n in range(0, ceil_div(count, TILE_N)):
            at = n * TILE_N + key
            keep = at < count
            slots = tl.load(column_indices + clean_column + at, mask=keep, other=0)
            if HAS_BLOCKS:
                place = slots
                if K_ORDER:
                    place = tl.load(k_rank + plan_row.to(tl.int64) * key_len + slots, mask=keep, other=0)
                place = place // BLOCK_K
                bits = tl.load(selected_bits + csr_row * words + place // 32, mask=keep, other=0)
                keep = keep & (((bits >> (place % 32)) & 1) == 0)
            acc, total, top = step(
                acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, keep, keep, scale_log2,
                softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 1, SOFTCAP, WIDEN, PRECISION,
            )  # fmt: skip
        before_clean = (clean_column - column_first).to(tl.int32)
        edges = before_clean + (column_past - past_clean_column).to(tl.int32)
        for n in range(0, ceil_div(edges, TILE_N)):
            at = n * TILE_N + key
            keep = at < edges
            at_edge = tl.where(at < before_clean, column_first + at, past_clean_column + (at - before_clean))
            slots = tl.load(column_indices + at_edge, mask=keep, other=0)
            if HAS_BLOCKS:
                place = slots
                if K_ORDER:
                    place = tl.load(k_rank + plan_row.to(tl.int64) * key_len + slots, mask=keep, other=0)
                place = place // BLOCK_K
                bits = tl.load(selected_bits + csr_row * words + place // 32, mask=keep, other=0)
                keep = keep & (((bits >> (place % 32)) & 1) == 0)
            pairs = allowed_pairs(row_at, slots, keep, limit, CAUSAL, LIMITED)
            pairs = pairs & ~banded_pairs(row_at, slots, sink_end, window)
            acc, total, top = step(
                acc, total, top, q, k_base, v_base, k_stride, v_stride, slots, keep, pairs, scale_log2,
                softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, 2, SOFTCAP, WIDEN, PRECISION,
            )  # fmt: skip

    if SINKS:
        sink_logit = tl.load(sinks_ptr + head, mask=row_exists, other=float("-inf")) * 1.4426950408889634
        new_top = tl.maximum(top, sink_logit)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.exp2(sink_logit - base)
        acc = acc * shrink[:, None]
        top = new_top
    empty = total == 0.0
    acc = acc / tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_row = (b * plan_heads * SHARE + head).to(tl.int64) * query_len + row
    value = tl.arange(0, BLOCK_DV)
    tl.store(
        out_ptr + out_row[:, None] * VALUE_DIM + value[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=row_exists[:, None] & (value < VALUE_DIM)[None, :],
    )
    tl.store(lse_ptr + out_row, lse, mask=row_exists)


@triton.jit(do_not_specialize=["words"])
def mark_blocks(block_indptr, block_indices, selected_bits, words, TILE: tl.constexpr):
    """One bit for each selected key block: ``selected_bits`` int32 ``[rows, words]``, zero before."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(block_indptr + row)
    count = (tl.load(block_indptr + row + 1) - begin).to(tl.int32)
    for n in range(0, (count + TILE - 1) // TILE):
        at = n * TILE + tl.arange(0, TILE)
        index = tl.load(block_indices + begin + at, mask=at < count, other=0)
        bit = tl.full([TILE], 1, dtype=tl.int32) << (index % 32)
        tl.atomic_or(selected_bits + row * words + index // 32, bit, mask=at < count)
