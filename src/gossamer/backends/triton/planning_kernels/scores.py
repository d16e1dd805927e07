"""Scores of block pairs: means of blocks, energies of rows against them, antidiagonals."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import load_rows, product

__all__ = ["antidiagonal_mass", "merge_energies", "pool_blocks", "row_energies"]


@triton.jit(do_not_specialize=["heads", "tokens", "blocks", "block"])
def pool_blocks(
    x_ptr,
    live_ptr,
    out_ptr,
    batch_stride,
    head_stride,
    stride,
    heads,
    tokens,
    blocks,
    block,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean of the live tokens of one block of one head, fp32. Grid: ``B * heads * blocks``."""
    program = tl.program_id(0)
    at = program % blocks
    bh = program // blocks
    b = bh // heads
    base = x_ptr + b.to(tl.int64) * batch_stride + (bh % heads).to(tl.int64) * head_stride
    low = tl.maximum(at * block, tl.load(live_ptr + 2 * b))
    high = tl.minimum(tl.minimum((at + 1) * block, tl.load(live_ptr + 2 * b + 1)), tokens)
    sums = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    for token in range(low, high, TILE):
        slots = token + tl.arange(0, TILE)
        sums += load_rows(base, slots, stride, slots < high, DIM, BLOCK_D).to(tl.float32)
    mean = tl.sum(sums, 0) / tl.maximum(high - low, 1).to(tl.float32)
    dim = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + program.to(tl.int64) * DIM + dim, mean, mask=dim < DIM)


@triton.jit(do_not_specialize=["batch", "query_len", "key_blocks", "at", "blocks", "tiles"])
def row_energies(
    q_ptr,
    pooled_ptr,
    energy_ptr,
    reference_ptr,
    top_ptr,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    extent_ptr,
    batch,
    groups,
    query_len,
    key_blocks,
    at,
    blocks,
    tiles,
    scale_log2,
    SHARE: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TILE_M: tl.constexpr,
    PARTS: tl.constexpr,
    TILE_N: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Energies of ``TILE_M`` rows of one query block of one key/value head, in one pass over the pooled keys.

    The maximum is not known before the pass ends: each tile of key blocks refers to the largest logit so far, which
    goes to ``reference`` ``[rows, PARTS, tiles]`` (-inf before), and the last one to ``top`` ``[rows, PARTS]``;
    `merge_energies` then refers all to the largest. ``energy`` ``[rows, PARTS, key_blocks]`` is 0 before.
    Grid: ``B * groups * blocks * PARTS``.
    """
    program = tl.program_id(0)
    part = program % PARTS
    m = blocks - 1 - (program // PARTS) % blocks
    bg = program // (PARTS * blocks)
    b = bg // groups
    group = bg % groups
    out_row = (bg * blocks + m).to(tl.int64) * PARTS + part
    first_row = (at + m) * BLOCK_Q
    query_start = tl.load(extent_ptr + b)
    live_begin = tl.load(extent_ptr + batch + b)
    live_end = live_begin + tl.load(extent_ptr + 2 * batch + b)
    last_at = query_start + tl.minimum(first_row + BLOCK_Q, query_len) - 1 + live_begin

    packed = part * TILE_M + tl.arange(0, TILE_M)
    row = first_row + packed // SHARE
    exists = (packed < BLOCK_Q * SHARE) & (row < query_len)
    head = group * SHARE + packed % SHARE
    row_at = tl.where(exists, query_start + row + live_begin, -1)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride + row.to(tl.int64) * q_stride
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(q_rows[:, None] + dim[None, :], mask=exists[:, None] & (dim < DIM)[None, :], other=0.0)
    k_base = pooled_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    past = tl.minimum(tl.maximum(last_at + 1, 0) // BLOCK_K, key_blocks)
    top = float("-inf")
    for n in range(live_begin // BLOCK_K // TILE_N, (past + TILE_N - 1) // TILE_N):
        block = n * TILE_N + tl.arange(0, TILE_N)
        first_key = tl.maximum(block * BLOCK_K, live_begin)
        scored = (tl.minimum((block + 1) * BLOCK_K, live_end) > first_key) & (block < past)
        keys = load_rows(k_base, block, k_stride, scored, DIM, BLOCK_D)
        x = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        x = product(q, tl.trans(keys), x) * scale_log2
        x = tl.where(scored[None, :] & (first_key[None, :] <= row_at[:, None]), x, float("-inf"))
        top = tl.maximum(top, tl.max(tl.max(x, 1), 0))
        energy = tl.sum(tl.exp2(x - tl.where(top == float("-inf"), 0.0, top)), 0)
        tl.store(energy_ptr + out_row * key_blocks + block, energy, mask=scored)
        tl.store(reference_ptr + out_row * tiles + n, top)
    tl.store(top_ptr + out_row, top)


@triton.jit(do_not_specialize=["width", "tiles", "pieces"])
def merge_energies(
    energy_ptr,
    reference_ptr,
    top_ptr,
    out_ptr,
    width,
    tiles,
    pieces,
    PARTS: tl.constexpr,
    TILE_N: tl.constexpr,
    TILE: tl.constexpr,
):
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


@triton.jit
def cell_logits(
    q_rows, k_base, q_stride, k_stride, cell, exists, column, query_begin, query_len, live_begin, live_end, last_at,
    slope, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of cells: products on antidiagonals. ``exists``: which of ``cell`` are there."""
    x = tl.zeros([cell.shape[0], column.shape[0]], dtype=tl.float32)
    for t in range(STRIDE):
        row = cell * STRIDE + STRIDE - 1 - t
        keep = exists & (row >= query_begin) & (row < query_len)
        slots = column * STRIDE + t
        live = (slots >= live_begin) & (slots < live_end)
        q = load_rows(q_rows, row, q_stride, keep, DIM, BLOCK_D)
        k = load_rows(k_base, slots, k_stride, live, DIM, BLOCK_D)
        x = product(q, tl.trans(k), x)
    first_key = tl.maximum(column * STRIDE, live_begin)
    some = tl.minimum((column + 1) * STRIDE, live_end) > first_key
    seen = some[None, :] & (first_key[None, :] <= last_at[:, None])
    return tl.where(seen, x * slope, float("-inf"))


@triton.jit(do_not_specialize=["batch", "query_len", "key_blocks", "at", "stop", "blocks", "row_groups"])
def antidiagonal_mass(
    q_ptr,
    k_ptr,
    out_ptr,
    q_batch_stride,
    q_head_stride,
    q_stride,
    k_batch_stride,
    k_head_stride,
    k_stride,
    extent_ptr,
    batch,
    heads,
    query_len,
    key_blocks,
    at,
    stop,
    row_groups,
    slope,
    SHARE: tl.constexpr,
    STRIDE: tl.constexpr,
    ROW_CELLS: tl.constexpr,
    ROW_BLOCKS: tl.constexpr,
    ROW_LANES: tl.constexpr,
    KEY_CELLS: tl.constexpr,
    KEY_BLOCKS: tl.constexpr,
    KEY_LANES: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mass of ``ROW_BLOCKS`` query blocks: one pass over the keys for the rows' log-sum-exp, one for the sums.

    A block has ``ROW_CELLS`` rows of cells, in ``ROW_LANES`` lanes (a power of two), and likewise for keys.
    ``out`` is ``[B, H, stop - at, key_blocks]``, 0 before. Grid: ``B * H * row_groups``.
    """
    program = tl.program_id(0)
    row_group = row_groups - 1 - program % row_groups
    bh = program // row_groups
    b = bh // heads
    head = bh % heads
    query_start = tl.load(extent_ptr + b)
    live_begin = tl.load(extent_ptr + batch + b)
    live_end = live_begin + tl.load(extent_ptr + 2 * batch + b)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + (head // SHARE).to(tl.int64) * k_head_stride

    lane = tl.arange(0, ROW_BLOCKS * ROW_LANES)
    block = at + row_group * ROW_BLOCKS + lane // ROW_LANES
    cell = block * ROW_CELLS + lane % ROW_LANES
    exists = (block < stop) & (lane % ROW_LANES < ROW_CELLS) & (cell * STRIDE < query_len)
    last_at = query_start + tl.minimum((cell + 1) * STRIDE, query_len) - 1 + live_begin
    last_at = tl.where(exists, last_at, -1)
    end = tl.minimum(tl.maximum(tl.max(last_at, 0) + 1, 0), live_end)
    SLOTS: tl.constexpr = KEY_CELLS * STRIDE * KEY_BLOCKS
    key_lane = tl.arange(0, KEY_BLOCKS * KEY_LANES)
    key_exists = key_lane % KEY_LANES < KEY_CELLS

    top = tl.full([ROW_BLOCKS * ROW_LANES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROW_BLOCKS * ROW_LANES], dtype=tl.float32)
    for n in range(live_begin // SLOTS, (end + SLOTS - 1) // SLOTS):
        column = (n * KEY_BLOCKS + key_lane // KEY_LANES) * KEY_CELLS + key_lane % KEY_LANES
        x = cell_logits(
            q_rows, k_base, q_stride, k_stride, cell, exists, column, -query_start, query_len, live_begin, live_end,
            last_at, slope, STRIDE, DIM, BLOCK_D,
        )  # fmt: skip
        x = tl.where(key_exists[None, :], x, float("-inf"))
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
        top = new_top
    base = tl.where(top == float("-inf"), 0.0, top)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    out_block = at + row_group * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS)
    out_row = bh.to(tl.int64) * (stop - at) + out_block - at
    for n in range(live_begin // SLOTS, (end + SLOTS - 1) // SLOTS):
        column = (n * KEY_BLOCKS + key_lane // KEY_LANES) * KEY_CELLS + key_lane % KEY_LANES
        x = cell_logits(
            q_rows, k_base, q_stride, k_stride, cell, exists, column, -query_start, query_len, live_begin, live_end,
            last_at, slope, STRIDE, DIM, BLOCK_D,
        )  # fmt: skip
        x = tl.where(key_exists[None, :], x, float("-inf"))
        mass = tl.exp2(x - base[:, None]) * share[:, None]
        mass = tl.reshape(mass, [ROW_BLOCKS, ROW_LANES, KEY_BLOCKS, KEY_LANES])
        mass = tl.sum(tl.sum(mass, 3), 1)
        key_block = n * KEY_BLOCKS + tl.arange(0, KEY_BLOCKS)
        tl.store(
            out_ptr + out_row[:, None] * key_blocks + key_block[None, :],
            mass,
            mask=(out_block < stop)[:, None] & (key_block < key_blocks)[None, :],
        )
