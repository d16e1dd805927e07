"""The last-query probe: sums of the last rows, then mass by key and by distance."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import allowed, load_extent, seen
from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product

__all__ = ["merge_diagonals", "merge_sums", "probe_mass", "probe_sums"]


class Probe(NamedTuple):
    """Probing queries of a tile: values, positions, which of them exist, and log-sum-exps where they are known."""

    q: Any
    positions: Any
    exists: Any
    lse: Any


@triton.jit
def first_probing(extent, last):
    """Position of the first of the last ``last`` live queries."""
    return tl.maximum(extent.past - last, extent.first)


@triton.jit
def load_probe(q_rows, stride, lse, extent, last, tile, ROWS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    position = first_probing(extent, last) + tile * ROWS + tl.arange(0, ROWS)
    exists = position < extent.past
    q = load_rows(q_rows, position - extent.query_start, stride, exists, DIM, BLOCK_D)
    return Probe(q, position, exists, lse)


@triton.jit
def probe_logits(probe, k_base, k_stride, key, extent, scale_log2, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Base-2 logits of a tile, and which of its pairs are allowed."""
    keep = key < extent.keys
    k = load_rows(k_base, extent.key_start + key, k_stride, keep, DIM, BLOCK_D)
    scores = tl.zeros([probe.q.shape[0], key.shape[0]], dtype=tl.float32)
    scores = product(probe.q, tl.trans(k), scores) * scale_log2
    pairs = probe.exists[:, None] & keep[None, :] & allowed(extent, probe.positions, key)
    return tl.where(pairs, scores, float("-inf")), pairs


@triton.jit(do_not_specialize=["batch", "last", "splits"])
def probe_sums(
    q_ptr, k_ptr, top_ptr, total_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    extent_ptr, batch, groups, last, splits, scale_log2,
    SHARE: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Largest logit and sum of exponentials of each probing row over one split of ``STEPS * KEYS`` keys, base 2.

    Grid: ``batch * groups * splits * ROW_TILES * SHARE``; heads that share keys run side by side.
    ``top`` and ``total`` are ``[B, H, splits, ROW_TILES * ROWS]``.
    """
    program = tl.program_id(0)
    row_tile = (program // SHARE) % ROW_TILES
    split = (program // (SHARE * ROW_TILES)) % splits
    bg = program // (SHARE * ROW_TILES * splits)
    b = bg // groups
    group = bg % groups
    head = group * SHARE + program % SHARE

    extent = load_extent(extent_ptr, batch, b)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    probe = load_probe(q_rows, q_stride, 0.0, extent, last, row_tile, ROWS, DIM, BLOCK_D)
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    first = first_probing(extent, last) + row_tile * ROWS
    low, high = seen(extent, first, tl.minimum(first + ROWS, extent.past) - 1)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for n in range(tl.maximum(split * STEPS, low // KEYS), tl.minimum((split + 1) * STEPS, ceil_div(high, KEYS))):
        key = n * KEYS + tl.arange(0, KEYS)
        scores, _ = probe_logits(probe, k_base, k_stride, key, extent, scale_log2, DIM, BLOCK_D)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = new_top
    out = ((b * groups * SHARE + head).to(tl.int64) * splits + split) * (ROW_TILES * ROWS) + row_tile * ROWS
    tl.store(top_ptr + out + tl.arange(0, ROWS), top)
    tl.store(total_ptr + out + tl.arange(0, ROWS), total)


@triton.jit(do_not_specialize=["splits", "rows"])
def merge_sums(top_ptr, total_ptr, lse_ptr, splits, rows, TILE: tl.constexpr):
    """Base-2 log-sum-exp of each row over its splits; 0 for rows that see nothing. Grid: ``B * H``."""
    head = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, TILE)
    inside = row < rows
    top = tl.full([TILE], float("-inf"), dtype=tl.float32)
    for split in range(splits):
        part = tl.load(top_ptr + (head * splits + split) * rows + row, mask=inside, other=float("-inf"))
        top = tl.maximum(top, part)
    top = tl.where(top == float("-inf"), 0.0, top)
    total = tl.zeros([TILE], dtype=tl.float32)
    for split in range(splits):
        place = (head * splits + split) * rows + row
        part = tl.load(top_ptr + place, mask=inside, other=float("-inf"))
        total += tl.load(total_ptr + place, mask=inside, other=0.0) * tl.exp2(part - top)
    lse = tl.where(total == 0.0, 0.0, top + tl.log2(tl.where(total == 0.0, 1.0, total)))
    tl.store(lse_ptr + head * rows + row, lse, mask=inside)


@triton.jit(do_not_specialize=["batch", "width", "last", "tiles", "spans"])
def probe_mass(
    q_ptr, k_ptr, lse_ptr, columns_ptr, partial_ptr,
    q_batch_stride, q_head_stride, q_stride, k_batch_stride, k_head_stride, k_stride,
    extent_ptr, batch, groups, width, last, tiles, spans, scale_log2,
    SHARE: tl.constexpr, ROW_TILES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, STEPS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Mass of each key over the probing rows, and of each diagonal within each tile of ``KEYS`` keys by ``ROWS`` rows.

    Grid: ``batch * groups * spans * SHARE``; a span is ``STEPS`` tiles. ``columns`` is ``[B, H, width]`` and 0 before,
    ``partial`` ``[B, H, ROW_TILES, tiles, KEYS + ROWS]`` likewise; the diagonal of row r and key c of a tile is
    ``KEYS - 1 - c + r``. ROWS is at most KEYS.
    """
    program = tl.program_id(0)
    span = (program // SHARE) % spans
    bg = program // (SHARE * spans)
    b = bg // groups
    group = bg % groups
    head = group * SHARE + program % SHARE

    extent = load_extent(extent_ptr, batch, b)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride
    out_head = (b * groups * SHARE + head).to(tl.int64)
    lse = lse_ptr + out_head * (ROW_TILES * ROWS) + tl.arange(0, ROWS)
    # Each row rotated by its number: column u holds diagonal u, and in the rows below, diagonal KEYS + u.
    u = tl.arange(0, KEYS)
    turned = tl.arange(0, ROWS)[:, None] + (KEYS - 1 - u)[None, :]
    first_turn = turned < KEYS
    turned = turned % KEYS
    probe = load_probe(q_rows, q_stride, tl.load(lse), extent, last, 0, ROWS, DIM, BLOCK_D)
    low, high = seen(extent, first_probing(extent, last), extent.past - 1)
    for n in range(tl.maximum(span * STEPS, low // KEYS), tl.minimum((span + 1) * STEPS, ceil_div(high, KEYS))):
        key = n * KEYS + tl.arange(0, KEYS)
        sums = tl.zeros([KEYS], dtype=tl.float32)
        for row_tile in range(ROW_TILES):
            if ROW_TILES > 1:
                tile_lse = tl.load(lse + row_tile * ROWS)
                probe = load_probe(q_rows, q_stride, tile_lse, extent, last, row_tile, ROWS, DIM, BLOCK_D)
            scores, pairs = probe_logits(probe, k_base, k_stride, key, extent, scale_log2, DIM, BLOCK_D)
            mass = tl.where(pairs, tl.exp2(scores - probe.lse[:, None]), 0.0)
            sums += tl.sum(mass, 0)
            rotated = tl.gather(mass, turned, 1)
            out = partial_ptr + ((out_head * ROW_TILES + row_tile) * tiles + n) * (KEYS + ROWS)
            tl.store(out + u, tl.sum(tl.where(first_turn, rotated, 0.0), 0))
            tl.store(out + KEYS + u, tl.sum(tl.where(first_turn, 0.0, rotated), 0), mask=u < ROWS)
        tl.store(columns_ptr + out_head * width + key, sums, mask=key < width)


@triton.jit(do_not_specialize=["batch", "heads", "width", "last", "tiles", "pieces"])
def merge_diagonals(
    partial_ptr, diagonals_ptr, extent_ptr, batch, heads, width, last, tiles, pieces,
    ROW_TILES: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """From the diagonal sums of `probe_mass` to sums by distance, ``[B, H, width]``. Grid: ``B * H * pieces``."""
    program = tl.program_id(0)
    head = (program // pieces).to(tl.int64)
    extent = load_extent(extent_ptr, batch, program // pieces // heads)
    distance = (program % pieces) * TILE + tl.arange(0, TILE)
    after = tl.where(extent.ahead > 1, distance, 0) > 0  # keys that follow their query
    sums = tl.zeros([TILE], dtype=tl.float32)
    for row_tile in range(ROW_TILES):
        first = first_probing(extent, last) + row_tile * ROWS
        base = partial_ptr + (head * ROW_TILES + row_tile) * tiles * (KEYS + ROWS)
        sums += diagonal(base, first - distance, distance >= 0, tiles, ROWS, KEYS)
        sums += diagonal(base, first + distance, after, tiles, ROWS, KEYS)
    tl.store(diagonals_ptr + head * width + distance, sums, mask=distance < width)


@triton.jit
def diagonal(base, key, keep, tiles, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Of a row tile, the sums of the diagonals on which its first row meets ``key``, which may lie before the first.

    A diagonal crosses one tile of keys, or two neighbours.
    """
    keep = keep & (key >= -KEYS)
    tile = tl.where(keep, key + KEYS, 0) // KEYS - 1  # division is of non-negatives
    u = tile * KEYS - key + KEYS - 1
    here = keep & (tile >= 0) & (tile < tiles)
    following = keep & (tile + 1 < tiles) & (u < ROWS)
    sums = tl.load(base + tile.to(tl.int64) * (KEYS + ROWS) + u, mask=here, other=0.0)
    return sums + tl.load(base + (tile + 1).to(tl.int64) * (KEYS + ROWS) + u + KEYS, mask=following, other=0.0)
