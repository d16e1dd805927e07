"""Mass of block pairs from antidiagonals of cells: XAttention's estimate."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import load_extent, seen
from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product

__all__ = ["antidiagonal_mass"]


class RowCells(NamedTuple):
    """Cells of queries, by their number, and the cells of keys that each sees, half-open; nothing if it does not
    exist."""

    cell: Any
    low: Any
    high: Any


class Lanes(NamedTuple):
    """Cells of a tile of key blocks: a block's take ``LANES`` lanes, a power of two, of which ``CELLS`` are there."""

    CELLS: Any
    BLOCKS: Any
    LANES: Any


@triton.jit
def row_cells(extent, cell, exists, STRIDE: tl.constexpr):
    first = tl.maximum(cell * STRIDE, extent.first)
    past = tl.minimum((cell + 1) * STRIDE, extent.past)
    low, high = seen(extent, first, past - 1)
    some = exists & (past > first) & (high > low)
    return RowCells(cell, tl.where(some, low // STRIDE, 0), tl.where(some, ceil_div(high, STRIDE), 0))


@triton.jit
def cell_logits(
    q_rows, k_base, q_stride, k_stride, rows, n, extent, keys, slope,
    STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of the n-th tile of key cells: products on antidiagonals; -inf for cells that are not seen."""
    lane = tl.arange(0, keys.BLOCKS * keys.LANES)
    column = (n * keys.BLOCKS + lane // keys.LANES) * keys.CELLS + lane % keys.LANES
    x = tl.zeros([rows.cell.shape[0], keys.BLOCKS * keys.LANES], dtype=tl.float32)
    for t in range(STRIDE):
        query = rows.cell * STRIDE + STRIDE - 1 - t
        live = (rows.high > rows.low) & (query >= extent.first) & (query < extent.past)
        q = load_rows(q_rows, query - extent.query_start, q_stride, live, DIM, BLOCK_D)
        key = column * STRIDE + t
        k = load_rows(k_base, extent.key_start + key, k_stride, key < extent.keys, DIM, BLOCK_D)
        x = product(q, tl.trans(k), x)
    sees = (column[None, :] >= rows.low[:, None]) & (column[None, :] < rows.high[:, None])
    return tl.where(sees & (lane % keys.LANES < keys.CELLS)[None, :], x * slope, float("-inf"))


@triton.jit(do_not_specialize=["heads", "key_blocks", "start", "rows", "row_groups"])
def antidiagonal_mass(
    q_ptr, k_ptr, out_ptr, q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    extent_ptr, heads, key_blocks, start, rows, row_groups, slope,
    SHARE: tl.constexpr, STRIDE: tl.constexpr, ROW_CELLS: tl.constexpr, ROW_BLOCKS: tl.constexpr,
    ROW_LANES: tl.constexpr, KEY_CELLS: tl.constexpr, KEY_BLOCKS: tl.constexpr, KEY_LANES: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mass of ``ROW_BLOCKS`` query blocks: one pass over the keys for the rows' log-sum-exp, one for the sums.

    A block has ``ROW_CELLS`` rows of cells, in ``ROW_LANES`` lanes (a power of two), and likewise for keys.
    ``out`` is ``[B, H, rows, key_blocks]``, 0 before, for the plan's rows from ``start`` on.
    Grid: ``B * H * row_groups``.
    """
    program = tl.program_id(0)
    group = row_groups - 1 - program % row_groups
    bh = program // row_groups
    b = bh // heads
    head = bh % heads
    extent = load_extent(extent_ptr, b)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + (head // SHARE).to(tl.int64) * k_head_stride

    lane = tl.arange(0, ROW_BLOCKS * ROW_LANES)
    row = group * ROW_BLOCKS + lane // ROW_LANES
    cell = (extent.first // (ROW_CELLS * STRIDE) + start + row) * ROW_CELLS + lane % ROW_LANES
    cells = row_cells(extent, cell, (row < rows) & (lane % ROW_LANES < ROW_CELLS), STRIDE)
    lowest = tl.min(tl.where(cells.high > cells.low, cells.low, 1 << 30), 0)
    highest = tl.max(cells.high, 0)
    first = tl.minimum(lowest, highest) // (KEY_CELLS * KEY_BLOCKS)
    past = ceil_div(highest, KEY_CELLS * KEY_BLOCKS)
    top = tl.full([ROW_BLOCKS * ROW_LANES], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROW_BLOCKS * ROW_LANES], dtype=tl.float32)
    for n in range(first, past):
        x = cell_logits(
            q_rows, k_base, q_stride, k_stride, cells, n, extent, Lanes(KEY_CELLS, KEY_BLOCKS, KEY_LANES), slope,
            STRIDE, DIM, BLOCK_D,
        )  # fmt: skip
        new_top = tl.maximum(top, tl.max(x, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(x - base[:, None]), 1)
        top = new_top
    base = tl.where(top == float("-inf"), 0.0, top)
    share = 1.0 / tl.where(total == 0.0, 1.0, total)
    out_row = group * ROW_BLOCKS + tl.arange(0, ROW_BLOCKS)
    out = out_ptr + (bh.to(tl.int64) * rows + out_row)[:, None] * key_blocks
    for n in range(first, past):
        x = cell_logits(
            q_rows, k_base, q_stride, k_stride, cells, n, extent, Lanes(KEY_CELLS, KEY_BLOCKS, KEY_LANES), slope,
            STRIDE, DIM, BLOCK_D,
        )  # fmt: skip
        mass = tl.exp2(x - base[:, None]) * share[:, None]
        mass = tl.reshape(mass, [ROW_BLOCKS, ROW_LANES, KEY_BLOCKS, KEY_LANES])
        block = n * KEY_BLOCKS + tl.arange(0, KEY_BLOCKS)
        inside = (out_row < rows)[:, None] & (block < key_blocks)[None, :]
        tl.store(out + block[None, :], tl.sum(tl.sum(mass, 3), 1), mask=inside)
