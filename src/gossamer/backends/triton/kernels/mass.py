"""Attention mass of blocks under an LSE that is given."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import allowed, load_extent, seen
from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product

__all__ = ["block_mass"]


@triton.jit(do_not_specialize=["query_len", "key_blocks", "start", "rows"])
def block_mass(
    q_ptr, k_ptr, lse_ptr, mass_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    extent_ptr, heads, query_len, key_blocks, start, rows, scale_log2,
    SHARE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row of blocks: ``mass`` ``[B, heads, rows, key_blocks]``, 0 before, of ``lse`` ``[B, heads, query_len]`` in
    powers of two. Rows whose LSE is -inf do not count. Programs: ``B * heads * rows``.
    """
    program = tl.program_id(0)
    m = rows - 1 - program % rows  # the longest rows first
    b = program // rows // heads
    head = program // rows % heads
    extent = load_extent(extent_ptr, b)
    begin = (extent.first // BLOCK_Q + start + m) * BLOCK_Q
    first = tl.maximum(begin, extent.first)
    past = tl.minimum(begin + BLOCK_Q, extent.past)
    low, high = seen(extent, first, past - 1)
    past_block = tl.where(past > first, ceil_div(high, BLOCK_K), 0)

    row = (b * heads + head).to(tl.int64)
    q_base = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + (head // SHARE).to(tl.int64) * k_head_stride
    out = mass_ptr + (row * rows + m) * key_blocks
    for n in range(low // BLOCK_K, past_block):
        total = 0.0
        for tile in range(0, BLOCK_Q, TILE_M):
            position = begin + tile + tl.arange(0, TILE_M)
            exists = (position >= first) & (position < past)
            number = position - extent.query_start
            q = load_rows(q_base, number, q_stride, exists, DIM, BLOCK_D)
            lse = tl.load(lse_ptr + row * query_len + number, mask=exists, other=float("-inf"))
            exists = exists & (lse > float("-inf"))
            lse = tl.where(exists, lse, 0.0)
            for piece in range(0, BLOCK_K, TILE_N):
                inside = piece + tl.arange(0, TILE_N)
                key = n * BLOCK_K + inside
                keep = (inside < BLOCK_K) & (key < extent.keys)
                k = load_rows(k_base, extent.key_start + key, k_stride, keep, DIM, BLOCK_D)
                x = product(q, tl.trans(k), tl.zeros([TILE_M, TILE_N], dtype=tl.float32)) * scale_log2
                pairs = exists[:, None] & keep[None, :] & allowed(extent, position, key)
                x = tl.where(pairs, x - lse[:, None], float("-inf"))
                total += tl.sum(tl.sum(tl.exp2(x), 1), 0)
        tl.store(out + n, total)
