"""Pairs in a plan, from the bits of its blocks and columns.

A key block in which all pairs are allowed, and all or none are in the bands, is arithmetic; the others, at the edges of
causality, bands and live keys, are counted pair by pair as the plan is defined.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import allowed, load_extent, seen
from gossamer.backends.triton.kernels.matrices import ceil_div
from gossamer.backends.triton.kernels.ranges import Bands, banded

__all__ = ["count_columns", "count_pairs"]


class Selected(NamedTuple):
    """What one query block of a head lists: bits of blocks and of columns, and numbers of columns by key block."""

    blocks: Any
    columns: Any
    columns_in_block: Any
    HAS_BLOCKS: Any
    HAS_COLUMNS: Any


@triton.jit(do_not_specialize=["words", "blocks", "pieces"])
def count_columns(bits_ptr, out_ptr, words, blocks, pieces, BLOCK_K: tl.constexpr, TILE: tl.constexpr):
    """Columns in each key block: int32 ``[lists, blocks]`` from bits ``[lists, words]``. Grid: ``lists * pieces``."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    block = (program % pieces) * TILE + tl.arange(0, TILE)
    count = tl.zeros([TILE], dtype=tl.int32)
    for i in range(BLOCK_K):
        key = block * BLOCK_K + i
        bits = tl.load(bits_ptr + row * words + key // 32, mask=key // 32 < words, other=0)
        count += (bits >> (key % 32)) & 1
    tl.store(out_ptr + row * blocks + block, count, mask=block < blocks)


@triton.jit(do_not_specialize=["blocks", "key_blocks", "words", "column_words", "lists", "column_group"])
def count_pairs(
    bits_ptr, column_bits_ptr, column_count_ptr, sink_ptr, window_ptr, extent_ptr, pairs_ptr,
    heads, blocks, key_blocks, words, column_words, lists, column_group,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, HAS_BLOCKS: tl.constexpr, HAS_COLUMNS: tl.constexpr,
    TILE: tl.constexpr, EDGE_M: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Pairs that one query block of one head computes: int64 ``[B * heads * blocks]``."""
    program = tl.program_id(0)
    bh = program // blocks
    column_list = bh.to(tl.int64) * lists + program % blocks // column_group
    extent = load_extent(extent_ptr, bh // heads)
    begin = (extent.first // BLOCK_Q + program % blocks) * BLOCK_Q
    total = block_row_pairs(
        tl.maximum(begin, extent.first),
        tl.minimum(begin + BLOCK_Q, extent.past),
        key_blocks,
        extent,
        Bands(tl.load(sink_ptr + bh % heads), tl.load(window_ptr + bh % heads)),
        Selected(
            bits_ptr + program.to(tl.int64) * words, column_bits_ptr + column_list * column_words,
            column_count_ptr + column_list * key_blocks, HAS_BLOCKS, HAS_COLUMNS,
        ),
        BLOCK_Q, BLOCK_K, TILE, EDGE_M, EDGE_N,
    )  # fmt: skip
    tl.store(pairs_ptr + program, total)


@triton.jit
def block_row_pairs(
    first, past, key_blocks, extent, bands, selected,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE: tl.constexpr, EDGE_M: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Of queries ``first .. past - 1``."""
    low, high = seen(extent, first, past - 1)
    past_block = tl.where(past > first, tl.minimum(ceil_div(high, BLOCK_K), key_blocks), 0)
    total = tl.zeros([], dtype=tl.int64)
    for n in range(low // BLOCK_K // TILE, ceil_div(past_block, TILE)):
        block = n * TILE + tl.arange(0, TILE)
        whole, edge, taken = tile_pairs(block, past_block, first, past, extent, bands, selected, BLOCK_K)
        total += tl.sum(whole.to(tl.int64), 0)
        rank = tl.cumsum(edge.to(tl.int32), 0)
        for i in range(tl.sum(edge.to(tl.int32), 0)):
            here = edge & (rank == i + 1)
            number = tl.sum(tl.where(here, block, 0), 0)
            every = tl.sum((here & taken).to(tl.int32), 0) > 0
            total += edge_pairs(
                number * BLOCK_K, every, first, past, extent, bands, selected, BLOCK_Q, BLOCK_K, EDGE_M, EDGE_N
            )
    return total


@triton.jit
def tile_pairs(block, past_block, first, past, extent, bands, selected, BLOCK_K: tl.constexpr):
    """Of key blocks ``block``: pairs in those that are arithmetic, which ones are not, and which are selected."""
    last = past - 1
    low = block * BLOCK_K
    high = tl.minimum(low + BLOCK_K, extent.keys)
    some = (high > low) & (block < past_block)
    ahead, behind = tl.load(extent.reach), tl.load(extent.reach + 1)
    some = some & (low - last < ahead) & (first - (high - 1) < behind)
    every = some & (high - 1 - first < ahead) & (last - low < behind)
    near = tl.maximum(tl.maximum(first - (high - 1), low - last), 0)
    far = tl.maximum(last - low, high - 1 - first)
    in_bands = (high <= bands.sink) | (far < bands.window)
    outside = (low >= bands.sink) & (near >= bands.window)
    taken = block < 0
    if selected.HAS_BLOCKS:
        word = tl.load(selected.blocks + block // 32, mask=some, other=0)
        taken = ((word >> (block % 32)) & 1) != 0
    keys = tl.where(in_bands | taken, high - low, 0)
    nothing = outside & (~taken)
    if selected.HAS_COLUMNS:
        listed = tl.load(selected.columns_in_block + block, mask=some, other=0)
        keys = tl.where(in_bands | taken, keys, listed)
        # A list may name dead keys.
        every = every & ((high - low == BLOCK_K) | in_bands | taken | (listed == 0))
        nothing = nothing & (listed == 0)
    whole = every & (in_bands | outside)
    return tl.where(whole, keys * (past - first), 0), some & (~whole) & (~nothing), taken


@triton.jit
def edge_pairs(
    begin, taken, first, past, extent, bands, selected,
    BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, EDGE_M: tl.constexpr, EDGE_N: tl.constexpr,
):  # fmt: skip
    """Of the key block at ``begin``, pair by pair; ``taken`` says that the plan selects it."""
    total = tl.zeros([], dtype=tl.int64)
    for sub_m in range((BLOCK_Q + EDGE_M - 1) // EDGE_M):
        query = first + sub_m * EDGE_M + tl.arange(0, EDGE_M)
        for sub_n in range((BLOCK_K + EDGE_N - 1) // EDGE_N):
            offset = sub_n * EDGE_N + tl.arange(0, EDGE_N)
            key = begin + offset
            live = (offset < BLOCK_K) & (key < extent.keys)
            pairs = live[None, :] & (query < past)[:, None] & allowed(extent, query, key)
            computed = banded(bands, query, key) | taken
            if selected.HAS_COLUMNS:
                word = tl.load(selected.columns + key // 32, mask=live, other=0)
                computed = computed | (((word >> (key % 32)) & 1) != 0)[None, :]
            total += tl.sum(tl.sum((pairs & computed).to(tl.int32), 1), 0).to(tl.int64)
    return total
