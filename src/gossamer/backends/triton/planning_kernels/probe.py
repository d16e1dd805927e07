"""The last-query probe: sums of the last rows, then mass by column and by diagonal."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import load_rows, product

__all__ = ["merge_diagonals", "probe_mass", "probe_sums"]


@triton.jit
def probing_rows(extent_ptr, batch, b, query_len, rows, index):
    """Query rows of the probe: those up to the last one whose own slot is live. Also live slots, and own slots."""
    query_start = tl.load(extent_ptr + b)
    live_begin = tl.load(extent_ptr + batch + b)
    count = tl.load(extent_ptr + 2 * batch + b)
    end = tl.minimum(tl.maximum(count - query_start, rows), query_len)
    row = end - rows + index
    return row, query_start + row + live_begin, live_begin, live_begin + count


@triton.jit
def load_probe(
    q_rows,
    q_stride,
    extent_ptr,
    batch,
    b,
    query_len,
    rows,
    index,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Probing rows ``index``: their values and coordinates, -1 for those that do not exist. Also live slots."""
    row, row_at, live_begin, live_end = probing_rows(extent_ptr, batch, b, query_len, rows, index)
    q = load_rows(q_rows, row, q_stride, index < rows, DIM, BLOCK_D)
    return q, tl.where(index < rows, row_at, -1), live_begin, live_end


@triton.jit
def probe_logits(
    q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    keep = (slots >= live_begin) & (slots < live_end)
    k = load_rows(k_base, slots, k_stride, keep, DIM, BLOCK_D)
    scores = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    scores = product(q, tl.trans(k), scores) * scale_log2
    visible = keep[None, :] & (slots[None, :] <= row_at[:, None])
    return tl.where(visible, scores, float("-inf")), visible


@triton.jit(do_not_specialize=["batch", "query_len", "rows", "splits"])
def probe_sums(
    q_ptr,
    k_ptr,
    top_ptr,
    total_ptr,
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
    rows,
    splits,
    scale_log2,
    SHARE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Largest logit and sum of exponentials of each probing row over one split of ``STEPS * KEYS`` slots, base 2.

    Grid: ``batch * groups * splits * ROW_TILES * SHARE``; heads that share keys run side by side.
    ``top`` and ``total`` are ``[B, H, splits, ROW_TILES * ROWS]``.
    """
    program = tl.program_id(0)
    within = program % SHARE
    row_tile = (program // SHARE) % ROW_TILES
    split = (program // (SHARE * ROW_TILES)) % splits
    bg = program // (SHARE * ROW_TILES * splits)
    b = bg // groups
    group = bg % groups
    head = group * SHARE + within

    index = row_tile * ROWS + tl.arange(0, ROWS)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    q, row_at, live_begin, live_end = load_probe(
        q_rows, q_stride, extent_ptr, batch, b, query_len, rows, index, DIM, BLOCK_D
    )
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride

    begin = split * STEPS
    end = tl.minimum(live_end, tl.max(row_at, 0) + 1)
    first = tl.maximum(begin, live_begin // KEYS)
    past = tl.minimum(begin + STEPS, (tl.maximum(end, 0) + KEYS - 1) // KEYS)
    top = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for n in range(first, past):
        slots = n * KEYS + tl.arange(0, KEYS)
        scores, _ = probe_logits(q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2, DIM, BLOCK_D)
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - base) + tl.sum(tl.exp2(scores - base[:, None]), 1)
        top = new_top
    out = ((bg * SHARE + within).to(tl.int64) * splits + split) * (ROW_TILES * ROWS) + index
    tl.store(top_ptr + out, top)
    tl.store(total_ptr + out, total)


@triton.jit(do_not_specialize=["batch", "query_len", "key_len", "rows", "tiles", "spans"])
def probe_mass(
    q_ptr,
    k_ptr,
    lse_ptr,
    columns_ptr,
    partial_ptr,
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
    key_len,
    rows,
    tiles,
    spans,
    scale_log2,
    SHARE: tl.constexpr,
    ROW_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    STEPS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Mass of ``STEPS`` tiles of keys: its column sums, and its diagonal sums in each tile's own coordinates.

    A row tile's diagonal ``u = r - c + KEYS - 1`` (row r, column c) is entry u of ``partial``
    ``[B, H, ROW_TILES, tiles, KEYS + ROWS]``: a gather rotates the rows, so that a diagonal is a column.
    ``lse`` is fp32 ``[B, H, ROW_TILES * ROWS]`` in base 2. Grid: ``batch * groups * spans * SHARE``.
    """
    program = tl.program_id(0)
    within = program % SHARE
    span = (program // SHARE) % spans
    bg = program // (SHARE * spans)
    b = bg // groups
    group = bg % groups
    head = group * SHARE + within
    out_head = (bg * SHARE + within).to(tl.int64)
    q_rows = q_ptr + b.to(tl.int64) * q_batch_stride + head.to(tl.int64) * q_head_stride
    k_base = k_ptr + b.to(tl.int64) * k_batch_stride + group.to(tl.int64) * k_head_stride

    # Each row rotated by its number: column u holds diagonal u, and in the rows below, diagonal KEYS + u.
    u = tl.arange(0, KEYS)
    column = tl.arange(0, ROWS)[:, None] + (KEYS - 1 - u)[None, :]
    first_turn = column < KEYS
    column = column % KEYS
    index = tl.arange(0, ROWS)
    q, row_at, live_begin, live_end = load_probe(
        q_rows, q_stride, extent_ptr, batch, b, query_len, rows, index, DIM, BLOCK_D
    )
    lse = tl.load(lse_ptr + out_head * (ROW_TILES * ROWS) + index)
    for n in range(span * STEPS, tl.minimum((span + 1) * STEPS, tiles)):
        slots = n * KEYS + tl.arange(0, KEYS)
        sums = tl.zeros([KEYS], dtype=tl.float32)
        for row_tile in range(ROW_TILES):
            if ROW_TILES > 1:
                index = row_tile * ROWS + tl.arange(0, ROWS)
                q, row_at, live_begin, live_end = load_probe(
                    q_rows, q_stride, extent_ptr, batch, b, query_len, rows, index, DIM, BLOCK_D
                )
                lse = tl.load(lse_ptr + out_head * (ROW_TILES * ROWS) + index)
            scores, visible = probe_logits(
                q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2, DIM, BLOCK_D
            )
            mass = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
            sums += tl.sum(mass, 0)
            rotated = tl.gather(mass, column, 1)
            out = partial_ptr + ((out_head * ROW_TILES + row_tile) * tiles + n) * (KEYS + ROWS)
            tl.store(out + u, tl.sum(tl.where(first_turn, rotated, 0.0), 0))
            tl.store(out + KEYS + u, tl.sum(tl.where(first_turn, 0.0, rotated), 0), mask=u < ROWS)
        tl.store(columns_ptr + out_head * key_len + slots, sums, mask=slots < key_len)


@triton.jit(do_not_specialize=["batch", "heads", "query_len", "key_len", "rows", "tiles", "pieces"])
def merge_diagonals(
    partial_ptr,
    diagonals_ptr,
    extent_ptr,
    batch,
    heads,
    query_len,
    key_len,
    rows,
    tiles,
    pieces,
    ROW_TILES: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TILE: tl.constexpr,
):
    """From the tiles' diagonal sums of `probe_mass` to sums by distance, ``[B, H, T]``. Grid: ``B * H * pieces``.

    A row tile's diagonal crosses one tile of keys, or two neighbours.
    """
    program = tl.program_id(0)
    head = (program // pieces).to(tl.int64)
    b = program // pieces // heads
    distance = (program % pieces) * TILE + tl.arange(0, TILE)
    _, first_at, _, _ = probing_rows(extent_ptr, batch, b, query_len, rows, 0)
    sums = tl.zeros([TILE], dtype=tl.float32)
    for row_tile in range(ROW_TILES):
        # The slot that the tile's first row meets; it may lie before the first slot. Division is of non-negatives.
        slot = first_at + row_tile * ROWS - distance
        met = slot >= -KEYS
        tile = tl.where(met, slot + KEYS, 0) // KEYS - 1
        u = tile * KEYS - slot + KEYS - 1
        base = partial_ptr + (head * ROW_TILES + row_tile) * tiles * (KEYS + ROWS)
        here = met & (tile >= 0) & (tile < tiles)
        sums += tl.load(base + tile.to(tl.int64) * (KEYS + ROWS) + u, mask=here, other=0.0)
        after = met & (tile + 1 < tiles) & (u < ROWS)
        sums += tl.load(base + (tile + 1).to(tl.int64) * (KEYS + ROWS) + u + KEYS, mask=after, other=0.0)
    tl.store(diagonals_ptr + head * key_len + distance, sums, mask=distance < key_len)
