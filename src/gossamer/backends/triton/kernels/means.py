"""Block pairs by means: means of blocks, products of means, energies of query rows against means of keys."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import load_extent, seen
from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product

__all__ = ["block_means", "mean_products", "merge_energies", "row_energies"]


@triton.jit(do_not_specialize=["heads", "blocks", "block"])
def block_means(
    x_ptr, tokens_ptr, out_ptr, batch_stride, head_stride, stride, heads, blocks, block,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Mean of the live tokens of one block of one head, fp32. Grid: ``B * heads * blocks``.

    ``tokens`` is int32 ``[B, 3]``: row of the first live token, number of live tokens, and how many tokens before the
    first the blocks begin.
    """
    program = tl.program_id(0)
    bh = program // blocks
    b = bh // heads
    first = tl.load(tokens_ptr + 3 * b)
    begin = (program % blocks) * block - tl.load(tokens_ptr + 3 * b + 2)
    low = tl.maximum(begin, 0)
    high = tl.minimum(begin + block, tl.load(tokens_ptr + 3 * b + 1))
    base = x_ptr + b.to(tl.int64) * batch_stride + (bh % heads).to(tl.int64) * head_stride
    sums = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    for token in range(low, high, TILE):
        tokens = token + tl.arange(0, TILE)
        sums += load_rows(base, first + tokens, stride, tokens < high, DIM, BLOCK_D).to(tl.float32)
    mean = tl.sum(sums, 0) / tl.maximum(high - low, 1).to(tl.float32)
    dim = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + program.to(tl.int64) * DIM + dim, mean, mask=dim < DIM)


@triton.jit(do_not_specialize=["heads", "query_blocks", "key_blocks", "start", "rows", "pieces"])
def mean_products(
    queries_ptr, keys_ptr, seen_ptr, out_ptr, heads, query_blocks, key_blocks, start, rows, pieces,
    SHARE: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Products of means of query blocks ``start .. start + rows - 1`` and of key blocks; 0 where these are not seen.

    ``queries`` fp32 ``[B, H, M, D]``, ``keys`` fp32 ``[B, G, N, D]``, ``seen`` int32 ``[B, rows, 2]``, ``out`` fp32
    ``[B, H, rows, N]``. Grid: ``B * H * row tiles * pieces``, a piece being ``TILE_N`` key blocks.
    """
    program = tl.program_id(0)
    row_tiles = ceil_div(rows, TILE_M)
    bh = (program // (row_tiles * pieces)).to(tl.int64)
    row = ((program // pieces) % row_tiles) * TILE_M + tl.arange(0, TILE_M)
    block = (program % pieces) * TILE_N + tl.arange(0, TILE_N)
    exists, inside = row < rows, block < key_blocks
    q = load_rows(queries_ptr + (bh * query_blocks + start) * DIM, row, DIM, exists, DIM, BLOCK_D)
    k = load_rows(keys_ptr + (bh // SHARE) * key_blocks * DIM, block, DIM, inside, DIM, BLOCK_D)
    scores = product(q, tl.trans(k), tl.zeros([TILE_M, TILE_N], dtype=tl.float32))
    ranges = seen_ptr + 2 * ((bh // heads) * rows + row)
    low = tl.load(ranges, mask=exists, other=0)
    high = tl.load(ranges + 1, mask=exists, other=0)
    scores = tl.where((block[None, :] >= low[:, None]) & (block[None, :] < high[:, None]), scores, 0.0)
    out = out_ptr + (bh * rows + row)[:, None] * key_blocks + block[None, :]
    tl.store(out, scores, mask=exists[:, None] & inside[None, :])


@triton.jit(do_not_specialize=["key_blocks", "start", "rows", "tiles"])
def row_energies(
    q_ptr, keys_ptr, energy_ptr, reference_ptr, top_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    extent_ptr, groups, key_blocks, start, rows, tiles, scale_log2,
    SHARE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr, TILE_M: tl.constexpr, PARTS: tl.constexpr,
    TILE_N: tl.constexpr, CAUSAL: tl.constexpr, ENDED: tl.constexpr, LISTS: tl.constexpr, DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Energies of ``TILE_M`` rows of one query block of ``SHARE`` heads, in one pass over the means of keys.

    The maximum is not known before the pass ends: each tile of key blocks refers to the largest logit so far, which
    goes to ``reference`` ``[rows, PARTS, tiles]`` (-inf before), and the last one to ``top`` ``[rows, PARTS]``;
    `merge_energies` then refers all to the largest. ``energy`` ``[rows, PARTS, key_blocks]`` is 0 before. A key/value
    head has ``LISTS`` such tiles of heads: one of all that share it, or one for each. ``ENDED`` rows take part for
    blocks that end at or before them. Grid: ``B * groups * LISTS * rows * PARTS``.
    """
    program = tl.program_id(0)
    part = program % PARTS
    m = rows - 1 - (program // PARTS) % rows
    tiles_of_heads = program // (PARTS * rows)
    b = tiles_of_heads // (groups * LISTS)
    group = tiles_of_heads % (groups * LISTS) // LISTS
    out_row = (tiles_of_heads * rows + m).to(tl.int64) * PARTS + part

    extent = load_extent(extent_ptr, b)
    ahead, behind = tl.load(extent.reach), tl.load(extent.reach + 1)
    begin = (extent.first // BLOCK_Q + start + m) * BLOCK_Q
    first = tl.maximum(begin, extent.first)
    past = tl.minimum(begin + BLOCK_Q, extent.past)
    packed = part * TILE_M + tl.arange(0, TILE_M)
    position = begin + packed // SHARE
    exists = (packed < BLOCK_Q * SHARE) & (position >= first) & (position < past)
    head = tiles_of_heads % (groups * LISTS) * SHARE + packed % SHARE
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    q_rows += (position - extent.query_start).to(tl.int64) * q_stride
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(q_rows[:, None] + dim[None, :], mask=exists[:, None] & (dim < DIM)[None, :], other=0.0)
    k_base = keys_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    low, high = seen(extent, first, past - 1)
    past_block = ceil_div(high, BLOCK_K)
    if CAUSAL:  # blocks wholly at or before the last position
        past_block = tl.minimum(past_block, tl.maximum(past, 0) // BLOCK_K)
    past_block = tl.where(past > first, past_block, 0)
    top = float("-inf")
    for n in range(low // BLOCK_K // TILE_N, ceil_div(past_block, TILE_N)):
        block = n * TILE_N + tl.arange(0, TILE_N)
        key_low = block * BLOCK_K
        key_high = tl.minimum(key_low + BLOCK_K, extent.keys)
        scored = (block < past_block) & (key_high > key_low)
        means = load_rows(k_base, block, k_stride, scored, DIM, BLOCK_D)
        x = product(q, tl.trans(means), tl.zeros([TILE_M, TILE_N], dtype=tl.float32)) * scale_log2
        begins = key_low + (BLOCK_K - 1 if CAUSAL and ENDED else 0)
        sees = exists[:, None] & scored[None, :] & (begins[None, :] - position[:, None] < ahead)
        sees = sees & (position[:, None] - (key_high - 1)[None, :] < behind)
        x = tl.where(sees, x, float("-inf"))
        top = tl.maximum(top, tl.max(tl.max(x, 1), 0))
        energy = tl.sum(tl.exp2(x - tl.where(top == float("-inf"), 0.0, top)), 0)
        tl.store(energy_ptr + out_row * key_blocks + block, energy, mask=scored)
        tl.store(reference_ptr + out_row * tiles + n, top)
    tl.store(top_ptr + out_row, top)


@triton.jit(do_not_specialize=["width", "tiles", "pieces"])
def merge_energies(
    energy_ptr, reference_ptr, top_ptr, out_ptr, width, tiles, pieces,
    PARTS: tl.constexpr, TILE_N: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """The energies of `row_energies` referred to each row's largest logit, summed over its parts: ``[rows, width]``.

    With one part ``out`` may be ``energy``. Grid: ``rows * pieces``.
    """
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    j = (program % pieces) * TILE + tl.arange(0, TILE)
    inside = j < width
    top = tl.load(top_ptr + row * PARTS)
    for part in tl.static_range(1, PARTS):
        top = tl.maximum(top, tl.load(top_ptr + row * PARTS + part))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([TILE], dtype=tl.float32)
    for part in tl.static_range(PARTS):
        place = row * PARTS + part
        reference = tl.load(reference_ptr + place * tiles + j // TILE_N, mask=inside, other=float("-inf"))
        total += tl.load(energy_ptr + place * width + j, mask=inside, other=0.0) * tl.exp2(reference - top)
    tl.store(out_ptr + row * width + j, total, mask=inside)
