"""The bitmap of selected key blocks, by which a column that lies in one of them is not computed twice."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["mark_blocks", "unpacked", "unselected"]


@triton.jit(do_not_specialize=["first_row", "words"])
def mark_blocks(block_indptr, block_indices, selected_bits, first_row, words, TILE: tl.constexpr):
    """One bit for each key block selected by the CSR rows from ``first_row`` on.

    ``selected_bits`` is int32 ``[rows, words]``, zero before.
    """
    row = tl.program_id(0).to(tl.int64)
    block_indptr += first_row
    begin = tl.load(block_indptr + row)
    count = (tl.load(block_indptr + row + 1) - begin).to(tl.int32)
    for n in range(0, (count + TILE - 1) // TILE):
        at = n * TILE + tl.arange(0, TILE)
        index = tl.load(block_indices + begin + at, mask=at < count, other=0)
        bit = tl.full([TILE], 1, dtype=tl.int32) << (index % 32)
        tl.atomic_or(selected_bits + row * words + index // 32, bit, mask=at < count)


@triton.jit
def unselected(
    slots,
    keep,
    k_rank,
    rank_row,
    bits_row,
    TILE_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    K_ORDER: tl.constexpr,
):
    """Which of the columns ``slots`` are kept and do not lie in a selected block: bits of two 64-bit words.

    Each thread of a matrix product needs many keys' masks; as scalars, they are looked up once for all threads.
    """
    if HAS_BLOCKS:
        place = slots
        if K_ORDER:
            place = tl.load(k_rank + rank_row + slots, mask=keep, other=0)
        place = place // BLOCK_K
        bits = tl.load(bits_row + place // 32, mask=keep, other=0)
        keep = keep & (((bits >> (place % 32)) & 1) == 0)
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
