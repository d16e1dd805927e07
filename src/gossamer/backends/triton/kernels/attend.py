"""The forward kernel: one tile of query rows against every key that its plan names, with one softmax state.

Everything is in positions, 0 being the batch row's first live key. A pair that several parts select is computed by the
first of bands, blocks and columns that names it: bands are arithmetic, so blocks and columns test them for themselves;
whether a column's key block is selected is looked up in a bitmap.

There are four loops: full tiles of blocks and bands, partial ones, full columns, and partial ones; one of full tiles of
permuted blocks; and one of means of blocks. What is full needs no mask by pair: every row may attend all of it, and no
other part names it. Where rows leave tiles out, tiles come in ascending order.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.blocks import (
    Blocks,
    block_tiles,
    full_tiles,
    partial_tiles,
    permuted_tiles,
)
from gossamer.backends.triton.kernels.coded import PLAIN, Coded
from gossamer.backends.triton.kernels.columns import Columns, column_runs, full_columns, partial_columns
from gossamer.backends.triton.kernels.extent import load_extent
from gossamer.backends.triton.kernels.pruned import Means, add_means, wholly_seen
from gossamer.backends.triton.kernels.ranges import Bands, band_tiles, key_ranges
from gossamer.backends.triton.kernels.rows import load_queries, tile_rows, with_steps
from gossamer.backends.triton.kernels.softmax import FORWARD, Keys, Logits, fresh, with_sinks

__all__ = ["attend", "attend_keys"]

_LOG2_E = tl.constexpr(1.4426950408889634)
_LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit(
    do_not_specialize=[
        "query_len", "key_len", "first_row", "together", "blocks", "words", "column_lists", "column_group",
        "key_blocks", "k_coded", "v_coded",
    ]
)  # fmt: skip
def attend(
    q_ptr, k_ptr, v_ptr, k_descriptor, v_descriptor, out_ptr, lse_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride,
    k_codes, k_scales, k_zeros, v_codes, v_scales, v_zeros,
    k_codes_batch_stride, k_codes_head_stride, k_codes_stride, k_scales_batch_stride, k_scales_head_stride,
    k_scales_stride, v_codes_batch_stride, v_codes_head_stride, v_codes_stride, v_scales_batch_stride,
    v_scales_head_stride, v_scales_stride, k_coded, v_coded, bias_ptr,
    q_steps, q_shifts, k_steps, block_indptr, block_indices, column_indptr, column_indices, sink_ptr, window_ptr,
    q_order, k_order, k_rank, selected_bits, k_means, v_means, extent_ptr, sinks_ptr,
    plan_heads, groups, first_row, together, query_len, key_len, blocks, key_blocks, column_lists, column_group, words,
    scale_log2, softcap_log2, softcap_slope, skip_log2,
    SHARE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    HALVES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, HAS_COLUMNS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, DESCRIPTORS: tl.constexpr, MEANS: tl.constexpr, SKIP: tl.constexpr,
    BIASED: tl.constexpr, K_CODING: tl.constexpr, K_BITS: tl.constexpr, K_GROUP: tl.constexpr, V_CODING: tl.constexpr,
    V_BITS: tl.constexpr, V_GROUP: tl.constexpr,
):  # fmt: skip
    """One tile of one query block of one head of the plan: ``TILE_M`` rows, tokens times the query heads that share it.

    The grid has one dimension: the plan's rows (batch times head) from ``first_row`` on, ``together`` of them at a
    time, times ``blocks``, times those heads, times a block's tiles. Heads that read the same keys run at the same
    time, for the sake of the L2 cache, and late query blocks come first: causal ones have the most keys.
    ``selected_bits`` begins with ``first_row``; ``bias`` fp32 ``[B, groups, key_len]`` is in units of log2. The output
    has HALVES times ``BLOCK_DV`` dimensions at most. Queries and keys in int8 have steps fp32 ``[B, H, S]`` and
    ``[B, groups, key_len]``, and queries shifts ``[B, H, S]``.
    """
    TILES: tl.constexpr = (BLOCK_Q * SHARE + TILE_M - 1) // TILE_M
    program = tl.program_id(0)
    block = blocks - 1 - (program // (TILES * together)) % blocks
    plan_row = first_row + program // (TILES * together * blocks) * together + (program // TILES) % together
    b = plan_row // plan_heads
    plan_head = plan_row % plan_heads
    group = plan_head // (plan_heads // groups)
    wide_row = plan_row.to(tl.int64)
    extent = load_extent(extent_ptr, b)
    order = q_order + wide_row * query_len
    rows = tile_rows(extent, block, program % TILES, plan_head, query_len, order, SHARE, BLOCK_Q, TILE_M, Q_ORDER)
    q_ptr += b.to(tl.int64) * q_batch_stride
    k_ptr += b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    v_ptr += b.to(tl.int64) * v_batch_stride + group.to(tl.int64) * v_head_stride
    wide_b, wide_group = b.to(tl.int64), group.to(tl.int64)
    k_scales_head = wide_b * k_scales_batch_stride + wide_group * k_scales_head_stride
    v_scales_head = wide_b * v_scales_batch_stride + wide_group * v_scales_head_stride
    queries = load_queries(q_ptr, q_head_stride, q_stride, extent, rows, DIM, BLOCK_D)
    out_row = (b * plan_heads * SHARE + rows.head).to(tl.int64) * query_len + rows.row
    if q_ptr.dtype.element_ty == tl.int8:
        queries = with_steps(queries, q_steps + out_row, q_shifts + out_row, rows.exists)
    selected = selected_bits + ((plan_row - first_row).to(tl.int64) * blocks + block) * words
    state = attend_keys(
        fresh(TILE_M, BLOCK_DV, HALVES),
        queries,
        Keys(
            from_first(k_ptr, k_stride, extent, K_CODING), from_first(v_ptr, v_stride, extent, V_CODING),
            k_stride, v_stride, k_descriptor, v_descriptor,
            Coded(
                k_codes + wide_b * k_codes_batch_stride + wide_group * k_codes_head_stride, k_scales + k_scales_head,
                k_zeros + k_scales_head, k_codes_stride, k_scales_stride, k_coded, K_CODING, K_BITS, K_GROUP,
            ),
            Coded(
                v_codes + wide_b * v_codes_batch_stride + wide_group * v_codes_head_stride, v_scales + v_scales_head,
                v_zeros + v_scales_head, v_codes_stride, v_scales_stride, v_coded, V_CODING, V_BITS, V_GROUP,
            ),
            bias_ptr + (b * groups + group).to(tl.int64) * key_len + extent.key_start,
            k_steps + (b * groups + group).to(tl.int64) * key_len + extent.key_start,
            b, group, extent.key_start, DIM, VALUE_DIM, TILE_N, DESCRIPTORS,
        ),
        Logits(scale_log2, softcap_log2, softcap_slope, skip_log2, SOFTCAP, BIASED, SKIP, FORWARD),
        extent,
        Bands(tl.load(sink_ptr + plan_head), tl.load(window_ptr + plan_head)),
        Blocks(
            block_indptr + wide_row * blocks + block, block_indices, k_order + wide_row * key_len, key_len, BLOCK_K,
            HAS_BLOCKS, K_ORDER,
        ),
        Columns(
            column_indptr + wide_row * column_lists + block // column_group, column_indices,
            selected, k_rank + wide_row * key_len, HAS_COLUMNS,
        ),
    )  # fmt: skip
    if MEANS:
        low, high = wholly_seen(extent, block, BLOCK_Q, BLOCK_K)
        first_mean = (b * groups + group).to(tl.int64) * key_blocks
        state = add_means(
            state,
            queries,
            Logits(scale_log2, softcap_log2, softcap_slope, skip_log2, SOFTCAP, False, SKIP, FORWARD),
            Means(
                k_means + first_mean * DIM, v_means + first_mean * VALUE_DIM, selected, low, high, extent.keys, DIM,
                VALUE_DIM, BLOCK_K, TILE_N, HAS_BLOCKS,
            ),
        )  # fmt: skip
    if SINKS:
        state = with_sinks(state, tl.load(sinks_ptr + rows.head, mask=rows.exists, other=float("-inf")) * _LOG2_E)
    store(state, rows.exists, out_ptr + out_row[:, None] * VALUE_DIM, lse_ptr + out_row, VALUE_DIM)


@triton.jit
def from_first(base, stride, extent, CODING: tl.constexpr):
    """A pointer to position 0; of encoded tokens as it is, to the first that is not."""
    if CODING == PLAIN:
        base += extent.key_start.to(tl.int64) * stride
    return base


@triton.jit
def attend_keys(state, queries, keys, logits, extent, bands, blocks, columns):
    """The state after all keys that bands, blocks and columns name: of the softmax, or of slopes."""
    ranges = key_ranges(queries, extent, bands)
    in_bands = band_tiles(queries, bands, ranges, keys.TILE_N)
    listed = block_tiles(blocks, ranges, extent, keys.TILE_N)
    before = 0
    if logits.SKIP:  # in order
        before = listed.before * (blocks.BLOCK_K // keys.TILE_N)
        state = partial_tiles(state, queries, keys, logits, extent, bands, blocks, listed, in_bands, 0, before)
    state = full_tiles(state, queries, keys, logits, blocks, listed, in_bands)
    if blocks.LISTED and blocks.PERMUTED:
        state = permuted_tiles(state, queries, keys, logits, extent, blocks, listed)
    past = listed.partial_tiles + in_bands.partial
    state = partial_tiles(state, queries, keys, logits, extent, bands, blocks, listed, in_bands, before, past)
    if columns.LISTED:
        runs = column_runs(columns, ranges)
        state = full_columns(state, queries, keys, logits, blocks, columns, runs)
        state = partial_columns(state, queries, keys, logits, extent, bands, blocks, columns, runs)
    return state


@triton.jit
def store(state, exists, out_rows, lse_rows, VALUE_DIM: tl.constexpr):
    """Rows that attend nothing get out = 0 and lse = -inf."""
    BLOCK_DV: tl.constexpr = state.out.shape[1]
    empty = state.total == 0.0
    divisor = tl.where(empty, 1.0, state.total)
    value = tl.arange(0, BLOCK_DV)
    out = (state.out / divisor[:, None]).to(out_rows.dtype.element_ty)
    tl.store(out_rows + value[None, :], out, mask=exists[:, None] & (value < VALUE_DIM)[None, :])
    if state.out_high.shape[1] > 1:
        out = (state.out_high / divisor[:, None]).to(out_rows.dtype.element_ty)
        mask = exists[:, None] & (value < VALUE_DIM - BLOCK_DV)[None, :]
        tl.store(out_rows + BLOCK_DV + value[None, :], out, mask=mask)
    lse = tl.where(empty, float("-inf"), (state.top + tl.log2(divisor)) * _LN_2)
    tl.store(lse_rows, lse, mask=exists)
