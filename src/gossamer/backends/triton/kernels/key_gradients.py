"""The kernels of the keys' and values' gradients: one tile of keys against every query row that names one of them.

Each tile of keys has one owner in a launch, which adds up what all query heads of its key/value head have, in a fixed
order: bands first, by position, then the query blocks of a transposed plan. Where keys are gathered (columns, blocks of
an order) launches follow one another, and each adds to what is there. What a row of queries needs of the forward pass
is in ``level`` and ``base``, from the kernel of the queries' gradients.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import load_extent
from gossamer.backends.triton.kernels.matrices import ceil_div
from gossamer.backends.triton.kernels.pruned import is_selected, log_lengths, wholly_seen
from gossamer.backends.triton.kernels.ranges import Bands, lower_bound
from gossamer.backends.triton.kernels.rows import tile_rows
from gossamer.backends.triton.kernels.softmax import Logits
from gossamer.backends.triton.kernels.sums import (
    Reaching,
    add_bands,
    add_blocks,
    add_rows,
    load_keys,
    no_sums,
    outside_bands,
    query_blocks,
    seeing,
    store_sums,
)

__all__ = ["column_gradients", "key_gradients", "mean_gradients"]


@triton.jit(do_not_specialize=["query_len", "key_len", "blocks", "key_blocks", "first", "tiles"])
def key_gradients(
    q_ptr, k_ptr, v_ptr, reaching_ptr, level_ptr, base_ptr, k_grad_ptr, v_grad_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, reaching_batch_stride, reaching_head_stride, reaching_stride,
    row_indptr, row_indices, sink_ptr, window_ptr, q_order, k_order, extent_ptr,
    plan_heads, groups, query_len, key_len, blocks, key_blocks, first, tiles,
    scale, scale_log2, softcap_log2, softcap_slope,
    SHARE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TOGETHER: tl.constexpr,
    BANDS: tl.constexpr, HAS_BLOCKS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr, ADD: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """One tile of one key block of a key/value head, for bands and blocks. Grid: ``B * groups * tiles``.

    Of the plan's heads of the key/value head those from ``first`` on, TOGETHER of them. ``row_indptr`` and
    ``row_indices`` list, for each key block of each head of the plan, the query blocks that name it, ascending.
    """
    PIECES: tl.constexpr = (BLOCK_K + TILE_N - 1) // TILE_N
    program = tl.program_id(0)
    tile = program % tiles
    group = program // tiles % groups
    b = program // (tiles * groups)
    extent = load_extent(extent_ptr, b)
    per_group = plan_heads // groups
    number = tile // PIECES
    offset = (tile % PIECES) * TILE_N + tl.arange(0, TILE_N)
    positions = number * BLOCK_K + offset
    keep = offset < BLOCK_K
    if K_ORDER:
        keep = keep & (positions < key_len)
        order = k_order + (b * plan_heads + group * per_group + first).to(tl.int64) * key_len
        positions = tl.load(order + positions, mask=keep, other=0)
    keep = keep & (positions < extent.keys)
    keys = load_keys(
        k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride,
        v_ptr + b.to(tl.int64) * v_batch_stride + group.to(tl.int64) * v_head_stride,
        k_stride, v_stride, extent.key_start, positions, keep, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    low, high = seeing(extent, keys.lowest, keys.highest)
    sums = no_sums(TILE_N, BLOCK_D, BLOCK_DV)
    for h in range(first, first + TOGETHER):
        plan_head = group * per_group + h
        plan_row = (b * plan_heads + plan_head).to(tl.int64)
        bands = Bands(tl.load(sink_ptr + plan_head), tl.load(window_ptr + plan_head))
        if BANDS:
            sums = add_bands(
                sums, keys, extent, bands, low, high, plan_head,
                Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, 0),
                Reaching(
                    q_ptr + b.to(tl.int64) * q_batch_stride, reaching_ptr + b.to(tl.int64) * reaching_batch_stride,
                    level_ptr, base_ptr, q_head_stride, q_stride, reaching_head_stride, reaching_stride,
                    b * plan_heads * SHARE, query_len, DIM, VALUE_DIM, OF_KEYS, OF_VALUES,
                ),
                SHARE, TILE_M,
            )  # fmt: skip
        if HAS_BLOCKS:
            at = row_indptr + plan_row * key_blocks + number
            begin, end = tl.load(at), tl.load(at + 1)
            if not Q_ORDER:
                first_block, past_block = query_blocks(extent, low, high, BLOCK_Q)
                end = lower_bound(row_indices, begin, end, past_block)
                begin = lower_bound(row_indices, begin, end, first_block)
            sums = add_blocks(
                sums, keys, extent, bands, row_indices + begin, (end - begin).to(tl.int32), plan_head,
                q_order + plan_row * query_len,
                Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, 0),
                Reaching(
                    q_ptr + b.to(tl.int64) * q_batch_stride, reaching_ptr + b.to(tl.int64) * reaching_batch_stride,
                    level_ptr, base_ptr, q_head_stride, q_stride, reaching_head_stride, reaching_stride,
                    b * plan_heads * SHARE, query_len, DIM, VALUE_DIM, OF_KEYS, OF_VALUES,
                ),
                SHARE, BLOCK_Q, TILE_M, Q_ORDER,
            )  # fmt: skip
    slots = (b * groups + group).to(tl.int64) * key_len + extent.key_start + positions
    store_sums(sums, k_grad_ptr, v_grad_ptr, slots, keep, scale, DIM, VALUE_DIM, ADD, OF_KEYS, OF_VALUES)


@triton.jit(
    do_not_specialize=[
        "query_len", "key_len", "blocks", "first_group", "tiles", "words", "column_lists", "column_group",
    ]
)  # fmt: skip
def column_gradients(
    q_ptr, k_ptr, v_ptr, reaching_ptr, level_ptr, base_ptr, k_grad_ptr, v_grad_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    v_batch_stride, v_head_stride, v_stride, reaching_batch_stride, reaching_head_stride, reaching_stride,
    gathered, gathered_indptr, list_indptr, lists, members, sink_ptr, window_ptr, q_order, k_rank, selected_bits,
    extent_ptr, plan_heads, groups, query_len, key_len, blocks, first_group, tiles, words, column_lists, column_group,
    scale, scale_log2, softcap_log2, softcap_slope,
    SHARE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, Q_ORDER: tl.constexpr, K_ORDER: tl.constexpr,
    SOFTCAP: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """``TILE_N`` of the keys that are columns of some list of a key/value head; adds to what is there.

    See `gossamer.backends.triton.transpose.Columns`, for the key/value heads from ``first_group`` on. Grid: their
    number times ``tiles``, of which the last may have no keys.
    """
    TILES: tl.constexpr = (BLOCK_Q * SHARE + TILE_M - 1) // TILE_M
    program = tl.program_id(0)
    part, tile = program // tiles, program % tiles
    group = (first_group + part) % groups
    b = (first_group + part) // groups
    extent = load_extent(extent_ptr, b)
    begin = tl.load(gathered_indptr + part)
    count = (tl.load(gathered_indptr + part + 1) - begin).to(tl.int32)
    index = tl.arange(0, TILE_N)
    place = tile * TILE_N + index
    keep = place < count
    positions = tl.load(gathered + begin + place, mask=keep, other=0)
    keep = keep & (positions < extent.keys)
    keys = load_keys(
        k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride,
        v_ptr + b.to(tl.int64) * v_batch_stride + group.to(tl.int64) * v_head_stride,
        k_stride, v_stride, extent.key_start, positions, keep, DIM, VALUE_DIM, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    low, high = seeing(extent, keys.lowest, keys.highest)
    sums = no_sums(TILE_N, BLOCK_D, BLOCK_DV)
    for entry in range(tl.load(list_indptr + program), tl.load(list_indptr + program + 1)):
        number = tl.load(lists + entry)
        plan_head = group * (plan_heads // groups) + number // column_lists
        first_block = number % column_lists * column_group
        past_block = tl.minimum(first_block + column_group, blocks)
        if not Q_ORDER:
            first_seeing, past_seeing = query_blocks(extent, low, high, BLOCK_Q)
            first_block = tl.maximum(first_block, first_seeing)
            past_block = tl.minimum(past_block, past_seeing)
        words_of_entry = tl.load(members + entry * 2 + index // 32)
        listed = keep & (((words_of_entry >> (index % 32)) & 1) != 0)
        plan_row = (b * plan_heads + plan_head).to(tl.int64)
        ranks = positions
        if K_ORDER:
            ranks = tl.load(k_rank + plan_row * key_len + positions, mask=keep, other=0)
        for n in range(0, tl.maximum(past_block - first_block, 0) * TILES):
            block = first_block + n // TILES
            order = q_order + plan_row * query_len
            those = tile_rows(extent, block, n % TILES, plan_head, query_len, order, SHARE, BLOCK_Q, TILE_M, Q_ORDER)
            bands = Bands(tl.load(sink_ptr + plan_head), tl.load(window_ptr + plan_head))
            mine = listed
            if HAS_BLOCKS:
                mine = mine & ~is_selected(selected_bits + (plan_row * blocks + block) * words, ranks // BLOCK_K, keep)
            sums = add_rows(
                sums, keys, those, outside_bands(extent, bands, keys, those) & mine[:, None], 0.0,
                Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, 0),
                Reaching(
                    q_ptr + b.to(tl.int64) * q_batch_stride, reaching_ptr + b.to(tl.int64) * reaching_batch_stride,
                    level_ptr, base_ptr, q_head_stride, q_stride, reaching_head_stride, reaching_stride,
                    b * plan_heads * SHARE, query_len, DIM, VALUE_DIM, OF_KEYS, OF_VALUES,
                ),
            )  # fmt: skip
    slots = (b * groups + group).to(tl.int64) * key_len + extent.key_start + positions
    store_sums(sums, k_grad_ptr, v_grad_ptr, slots, keep, scale, DIM, VALUE_DIM, True, OF_KEYS, OF_VALUES)


@triton.jit(do_not_specialize=["query_len", "blocks", "key_blocks", "tiles", "words"])
def mean_gradients(
    q_ptr, k_ptr, v_ptr, reaching_ptr, level_ptr, base_ptr, k_grad_ptr, v_grad_ptr,
    q_batch_stride, q_head_stride, q_stride, reaching_batch_stride, reaching_head_stride, reaching_stride,
    selected_bits, extent_ptr, plan_heads, groups, query_len, blocks, key_blocks, tiles, words,
    scale, scale_log2, softcap_log2, softcap_slope,
    SHARE: tl.constexpr, DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, TOGETHER: tl.constexpr,
    HAS_BLOCKS: tl.constexpr, SOFTCAP: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    """``TILE_N`` means of key blocks of a key/value head, ``[B, groups, key_blocks]``. Grid: ``B * groups * tiles``."""
    TILES: tl.constexpr = (BLOCK_Q * SHARE + TILE_M - 1) // TILE_M
    program = tl.program_id(0)
    group = program // tiles % groups
    b = program // (tiles * groups)
    extent = load_extent(extent_ptr, b)
    number = program % tiles * TILE_N + tl.arange(0, TILE_N)
    keep = number < ceil_div(extent.keys, BLOCK_K)
    first_mean = (b * groups + group).to(tl.int64) * key_blocks
    keys = load_keys(
        k_ptr + first_mean * DIM, v_ptr + first_mean * VALUE_DIM, DIM, VALUE_DIM, 0, number, keep, DIM,
        VALUE_DIM, BLOCK_D, BLOCK_DV,
    )  # fmt: skip
    lowest, highest = tl.minimum(keys.lowest, key_blocks), tl.maximum(keys.highest, -1)  # where there are none
    low, high = seeing(extent, lowest * BLOCK_K, highest * BLOCK_K + BLOCK_K - 1)
    first_block, past_block = query_blocks(extent, low, high, BLOCK_Q)
    sums = no_sums(TILE_N, BLOCK_D, BLOCK_DV)
    for h in range(0, TOGETHER):
        plan_head = group * TOGETHER + h
        for n in range(0, tl.maximum(past_block - first_block, 0) * TILES):
            block = first_block + n // TILES
            those = tile_rows(extent, block, n % TILES, plan_head, query_len, q_ptr, SHARE, BLOCK_Q, TILE_M, False)
            whole_low, whole_high = wholly_seen(extent, block, BLOCK_Q, BLOCK_K)
            mine = keep & (number >= whole_low) & (number < whole_high)
            if HAS_BLOCKS:
                bits = selected_bits + ((b * plan_heads + plan_head).to(tl.int64) * blocks + block) * words
                mine = mine & ~is_selected(bits, number, keep)
            sums = add_rows(
                sums, keys, those, mine[:, None] & those.exists[None, :],
                log_lengths(number, extent.keys, BLOCK_K)[:, None],
                Logits(scale_log2, softcap_log2, softcap_slope, 0.0, SOFTCAP, False, False, 0),
                Reaching(
                    q_ptr + b.to(tl.int64) * q_batch_stride, reaching_ptr + b.to(tl.int64) * reaching_batch_stride,
                    level_ptr, base_ptr, q_head_stride, q_stride, reaching_head_stride, reaching_stride,
                    b * plan_heads * SHARE, query_len, DIM, VALUE_DIM, OF_KEYS, OF_VALUES,
                ),
            )  # fmt: skip
    store_sums(sums, k_grad_ptr, v_grad_ptr, first_mean + number, keep, scale, DIM, VALUE_DIM, False, OF_KEYS,
               OF_VALUES)  # fmt: skip
