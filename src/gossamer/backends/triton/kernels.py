"""The forward kernel: one tile of query rows against every key that its plan names, with one softmax state.

Coordinates are key slots: a query's is ``query_start + row + key_start``, so that the distance of query and key is
the difference of their coordinates. A pair that several parts select is computed by the first of bands, blocks and
columns that names it: bands are arithmetic, so blocks and columns test them for themselves; whether a column's key
block is selected is looked up in a bitmap.

A tile's keys fall into ranges. Pairs in the clean range (all rows of the tile may attend all keys, and no band holds
any) need no mask; since indices ascend, the clean blocks and columns of a row are consecutive and found by bisection.
So there are four loops: clean tiles (of blocks, and of bands that hold all their pairs), the other tiles of blocks
and bands, clean columns, and the other columns. Long ones are software-pipelined, so each of their passes reads the
index that the next one needs: an address that waits for its index would stall the pipeline.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false
# pyright: reportAssignmentType=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.bitmap import unpacked, unselected
from gossamer.backends.triton.tiles import allowed_pairs, banded_pairs, step

__all__ = ["attend"]


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


@triton.jit(
    do_not_specialize=[
        "query_len",
        "key_len",
        "first_row",
        "together",
        "blocks",
        "words",
        "column_lists",
        "column_group",
        "limit",
    ]
)
def attend(
    q_ptr,
    k_ptr,
    v_ptr,
    k_descriptor,
    v_descriptor,
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
    first_row,
    together,
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
    HALVES: tl.constexpr,
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
    DESCRIPTORS: tl.constexpr,
    WARP_SPECIALIZE: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of one query block of one head of the plan: ``TILE_M`` rows, tokens times the query heads that share it.

    The grid has one dimension: the plan's rows (batch times head) from ``first_row`` on, ``together`` of them at a
    time, times ``blocks``, times those heads, times ``TILES``. Heads that read the same keys run at the same time,
    for the sake of the L2 cache, and late query blocks come first: causal ones have the most keys.
    ``selected_bits`` begins with ``first_row``. The output has HALVES times ``BLOCK_DV`` dimensions at most.
    """
    program = tl.program_id(0)
    tile = program % TILES
    head_at = (program // TILES) % together
    block = blocks - 1 - (program // (TILES * together)) % blocks
    plan_row = first_row + program // (TILES * together * blocks) * together + head_at
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
    acc_high = tl.zeros([TILE_M, BLOCK_DV if HALVES == 2 else 1], dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    top = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    key = tl.arange(0, TILE_N)
    every = key >= 0

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
    sink_tiles = sink_past - sink_first
    tiles_before_full = sink_tiles + full_first - window_first
    band_edges = tiles_before_full + window_past - full_past

    PIECES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    ALL_EDGES: tl.constexpr = K_ORDER or BLOCK_K % TILE_N != 0
    EDGE_STAGES: tl.constexpr = None if HAS_BLOCKS and ALL_EDGES else 1  # few passes, unless all are
    first = plan_row.to(tl.int64) * blocks + block
    clean_blocks = block_indices
    clean_tiles = 0
    before = 0
    block_edges = 0
    clean_past = first
    if HAS_BLOCKS:
        past = tl.load(block_indptr + first + 1)
        first = tl.load(block_indptr + first)
        if not K_ORDER:
            past = lower_bound(block_indices, first, past, ceil_div(outer_high, BLOCK_K))
            first = lower_bound(block_indices, first, past, outer_low // BLOCK_K)
        clean_first = past
        clean_past = past
        if not ALL_EDGES:
            clean_first = lower_bound(block_indices, first, past, ceil_div(clean_low, BLOCK_K))
            clean_past = lower_bound(block_indices, clean_first, past, clean_high // BLOCK_K)
        clean_blocks += clean_first
        clean_tiles = (clean_past - clean_first).to(tl.int32) * PIECES
        before = (clean_first - first).to(tl.int32)
        block_edges = (before + (past - clean_past).to(tl.int32)) * PIECES

    entry = 0
    if HAS_BLOCKS and not ALL_EDGES:
        entry = tl.load(clean_blocks, mask=clean_tiles > 0, other=0)
    clean = clean_tiles + full_past - full_first
    if WARP_SPECIALIZE:  # a keyword of Triton 3.4
        for n in tl.range(0, clean, warp_specialize=True):
            start = (full_first + n - clean_tiles) * TILE_N
            if HAS_BLOCKS and not ALL_EDGES:
                start = tl.where(n < clean_tiles, entry * BLOCK_K + (n % PIECES) * TILE_N, start)
                entry = tl.load(clean_blocks + (n + 1) // PIECES, mask=n + 1 < clean_tiles, other=0)
            acc, acc_high, total, top = step(
                acc, acc_high, total, top, q, k_base, v_base, k_descriptor, v_descriptor, b, group, k_stride, v_stride,
                start, every, every, scale_log2, softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                HALVES, TILE_N, 0, SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
            )  # fmt: skip
    else:
        for n in range(0, clean):
            start = (full_first + n - clean_tiles) * TILE_N
            if HAS_BLOCKS and not ALL_EDGES:
                start = tl.where(n < clean_tiles, entry * BLOCK_K + (n % PIECES) * TILE_N, start)
                entry = tl.load(clean_blocks + (n + 1) // PIECES, mask=n + 1 < clean_tiles, other=0)
            acc, acc_high, total, top = step(
                acc, acc_high, total, top, q, k_base, v_base, k_descriptor, v_descriptor, b, group, k_stride, v_stride,
                start, every, every, scale_log2, softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
                HALVES, TILE_N, 0, SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
            )  # fmt: skip

    for n in tl.range(0, block_edges + band_edges, num_stages=EDGE_STAGES):
        band = n - block_edges
        tile_n = tl.where(band < sink_tiles, sink_first + band, window_first + band - sink_tiles)
        tile_n = tl.where(band < tiles_before_full, tile_n, full_past + band - tiles_before_full)
        slots = tile_n * TILE_N + key
        keep = every
        if HAS_BLOCKS:
            in_blocks = n < block_edges
            at = n // PIECES
            at_entry = tl.where(at < before, first + at, clean_past + (at - before))
            edge_entry = tl.load(block_indices + at_entry, mask=in_blocks, other=0)
            within = (n % PIECES) * TILE_N + key
            slots = tl.where(in_blocks, edge_entry * BLOCK_K + within, slots)
            keep = within < tl.where(in_blocks, BLOCK_K, PIECES * TILE_N)
            if K_ORDER:
                ranked = keep & (slots < tl.where(in_blocks, key_len, 0))
                slots = tl.load(k_order + plan_row.to(tl.int64) * key_len + slots, mask=ranked, other=slots)
        keep = keep & (slots >= live_begin) & (slots < live_end)
        pairs = banded_pairs(row_at, slots, sink_end, window)
        if HAS_BLOCKS:
            pairs = tl.where(in_blocks, ~pairs, pairs)
        pairs = pairs & allowed_pairs(row_at, slots, keep, limit, CAUSAL, LIMITED)
        acc, acc_high, total, top = step(
            acc, acc_high, total, top, q, k_base, v_base, k_descriptor, v_descriptor, b, group, k_stride, v_stride,
            slots, keep, pairs, scale_log2, softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, HALVES,
            TILE_N, 2, SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
        )  # fmt: skip

    if HAS_COLUMNS:
        rank_row = plan_row.to(tl.int64) * key_len
        bits_row = selected_bits + ((plan_row - first_row).to(tl.int64) * blocks + block) * words
        column_list = plan_row.to(tl.int64) * column_lists + block // column_group
        list_begin = tl.load(column_indptr + column_list)
        list_end = tl.load(column_indptr + column_list + 1)
        column_first = lower_bound(column_indices, list_begin, list_end, outer_low)
        column_past = lower_bound(column_indices, column_first, list_end, outer_high)
        clean_column = lower_bound(column_indices, column_first, column_past, clean_low)
        past_clean_column = lower_bound(column_indices, clean_column, column_past, clean_high)
        # Clean columns need a mask by key alone; places beyond the last one repeat it, so that every load is of a
        # live slot.
        count = (past_clean_column - clean_column).to(tl.int32)
        clean_columns = column_indices + clean_column
        slots = tl.load(clean_columns + tl.minimum(key, count - 1), mask=key < tl.minimum(count, 1) * TILE_N, other=0)
        low_bits, high_bits = unselected(
            slots, key < count, k_rank, rank_row, bits_row, TILE_N, BLOCK_K, HAS_BLOCKS, K_ORDER
        )
        for n in range(0, ceil_div(count, TILE_N)):
            at = (n + 1) * TILE_N + key
            next_slots = tl.load(clean_columns + tl.minimum(at, count - 1))
            keep = unpacked(low_bits, high_bits, TILE_N)
            low_bits, high_bits = unselected(
                next_slots, at < count, k_rank, rank_row, bits_row, TILE_N, BLOCK_K, HAS_BLOCKS, K_ORDER
            )
            acc, acc_high, total, top = step(
                acc, acc_high, total, top, q, k_base, v_base, k_descriptor, v_descriptor, b, group, k_stride, v_stride,
                slots, keep, keep, scale_log2, softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, HALVES,
                TILE_N, 1, SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
            )  # fmt: skip
            slots = next_slots
        before_clean = (clean_column - column_first).to(tl.int32)
        edges = before_clean + (column_past - past_clean_column).to(tl.int32)
        for n in tl.range(0, ceil_div(edges, TILE_N), num_stages=1):
            at = n * TILE_N + key
            keep = at < edges
            at_edge = tl.where(at < before_clean, column_first + at, past_clean_column + (at - before_clean))
            slots = tl.load(column_indices + at_edge, mask=keep, other=0)
            low_bits, high_bits = unselected(
                slots, keep, k_rank, rank_row, bits_row, TILE_N, BLOCK_K, HAS_BLOCKS, K_ORDER
            )
            keep = unpacked(low_bits, high_bits, TILE_N)
            pairs = allowed_pairs(row_at, slots, keep, limit, CAUSAL, LIMITED)
            pairs = pairs & ~banded_pairs(row_at, slots, sink_end, window)
            acc, acc_high, total, top = step(
                acc, acc_high, total, top, q, k_base, v_base, k_descriptor, v_descriptor, b, group, k_stride, v_stride,
                slots, keep, pairs, scale_log2, softcap_log2, softcap_slope, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV, HALVES,
                TILE_N, 2, SOFTCAP, DESCRIPTORS, WIDEN, PRECISION,
            )  # fmt: skip

    if SINKS:
        sink_logit = tl.load(sinks_ptr + head, mask=row_exists, other=float("-inf")) * 1.4426950408889634
        new_top = tl.maximum(top, sink_logit)
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - base)
        total = total * shrink + tl.exp2(sink_logit - base)
        acc = acc * shrink[:, None]
        acc_high = acc_high * shrink[:, None]
        top = new_top
    empty = total == 0.0
    divisor = tl.where(empty, 1.0, total)[:, None]
    lse = tl.where(empty, float("-inf"), (top + tl.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453)
    out_row = (b * plan_heads * SHARE + head).to(tl.int64) * query_len + row
    value = tl.arange(0, BLOCK_DV)
    out_rows = out_ptr + out_row[:, None] * VALUE_DIM
    tl.store(
        out_rows + value[None, :],
        (acc / divisor).to(out_ptr.dtype.element_ty),
        mask=row_exists[:, None] & (value < VALUE_DIM)[None, :],
    )
    if HALVES == 2:
        tl.store(
            out_rows + BLOCK_DV + value[None, :],
            (acc_high / divisor).to(out_ptr.dtype.element_ty),
            mask=row_exists[:, None] & (value < VALUE_DIM - BLOCK_DV)[None, :],
        )
    tl.store(lse_ptr + out_row, lse, mask=row_exists)
