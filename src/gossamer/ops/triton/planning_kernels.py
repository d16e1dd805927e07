"""Planning kernels: scores of columns, diagonals and blocks; choices as bitmaps; bitmaps as lists; pairs in a plan.

Coordinates are key slots, as in `gossamer.ops.triton.kernels`. No kernel adds floats atomically, and how the work is
split depends on shapes alone: results repeat bit for bit. Bitmaps are int32 words, candidate ``32 w + i`` in bit ``i``
of word ``w``.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.ops.triton.kernels import load_rows, product

__all__ = [
    "antidiagonal_mass",
    "choose_rows",
    "count_columns",
    "count_tiles",
    "list_bits",
    "merge_diagonals",
    "merge_energies",
    "pack_mask",
    "pool_blocks",
    "probe_mass",
    "probe_sums",
    "row_energies",
]


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
    q = load_rows(q_rows, row, q_stride, index < rows, DIM, BLOCK_D, True)
    return q, tl.where(index < rows, row_at, -1), live_begin, live_end


@triton.jit
def probe_logits(
    q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    keep = (slots >= live_begin) & (slots < live_end)
    k = load_rows(k_base, slots, k_stride, keep, DIM, BLOCK_D, True)
    scores = tl.zeros([q.shape[0], k.shape[0]], dtype=tl.float32)
    scores = product(q, tl.trans(k), scores, WIDEN, PRECISION) * scale_log2
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
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
        scores, _ = probe_logits(
            q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2, DIM, BLOCK_D, WIDEN, PRECISION
        )
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
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
                q, k_base, k_stride, slots, row_at, live_begin, live_end, scale_log2, DIM, BLOCK_D, WIDEN, PRECISION
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
        sums += load_rows(base, slots, stride, slots < high, DIM, BLOCK_D, True).to(tl.float32)
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
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
        keys = load_rows(k_base, block, k_stride, scored, DIM, BLOCK_D, True)
        x = tl.zeros([TILE_M, TILE_N], dtype=tl.float32)
        x = product(q, tl.trans(keys), x, WIDEN, PRECISION) * scale_log2
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
    slope, STRIDE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Base-2 logits of cells: products on antidiagonals. ``exists``: which of ``cell`` are there."""
    x = tl.zeros([cell.shape[0], column.shape[0]], dtype=tl.float32)
    for t in range(STRIDE):
        row = cell * STRIDE + STRIDE - 1 - t
        keep = exists & (row >= query_begin) & (row < query_len)
        slots = column * STRIDE + t
        live = (slots >= live_begin) & (slots < live_end)
        q = load_rows(q_rows, row, q_stride, keep, DIM, BLOCK_D, True)
        k = load_rows(k_base, slots, k_stride, live, DIM, BLOCK_D, True)
        x = product(q, tl.trans(k), x, WIDEN, PRECISION)
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
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
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
            last_at, slope, STRIDE, DIM, BLOCK_D, WIDEN, PRECISION,
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
            last_at, slope, STRIDE, DIM, BLOCK_D, WIDEN, PRECISION,
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


@triton.jit
def ordered(x):
    """int32 in the order of the floats; NaN counts as the largest."""
    bits = x.to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    key = tl.where(x == 0.0, 0, key)
    return tl.where(x != x, 0x7FFFFFFF, key)


@triton.jit
def pack(flags, WORDS: tl.constexpr):
    """``32 * WORDS`` flags as bits of int32 words."""
    bits = tl.reshape(flags.to(tl.int32), [WORDS, 32])
    return tl.sum(bits << tl.arange(0, 32)[None, :], 1)


@triton.jit
def at_least(row_scores, key, low, high, first, past, middle, ONE: tl.constexpr, TILE: tl.constexpr):
    """How many of the scores in ``[low, high)`` are ``middle`` or more, in the order of `ordered`."""
    lane = tl.arange(0, TILE)
    if ONE:
        count = tl.sum(((key >= middle) & (lane >= low) & (lane < high)).to(tl.int32), 0)
    else:
        count = 0
        for n in range(first, past):
            j = n * TILE + lane
            inside = (j >= low) & (j < high)
            tile = ordered(tl.load(row_scores + j, mask=inside, other=0.0))
            count += tl.sum(((tile >= middle) & inside).to(tl.int32), 0)
    return count


@triton.jit(do_not_specialize=["heads", "rows", "width", "at", "all_rows", "band_count", "words"])
def choose_rows(
    scores_ptr,
    seen_ptr,
    forced_ptr,
    leading_ptr,
    forcing_ptr,
    budgets_ptr,
    bands_ptr,
    origin_ptr,
    bits_ptr,
    counts_ptr,
    heads,
    rows,
    width,
    at,
    all_rows,
    band_count,
    words,
    alpha,
    RULE: tl.constexpr,
    BANDS: tl.constexpr,
    ONE: tl.constexpr,
    TILE: tl.constexpr,
):
    """The choice of one row as bits, and how many they are. Grid: ``B * heads * rows``.

    RULE: 0 none, 1 relative to the maximum, 2 the best ``budgets``, 3 everything seen. ONE: a tile holds the row.
    Rows go to ``at ..`` of ``bits`` ``[B * heads, all_rows, words]`` and ``counts`` ``[B * heads, all_rows]``.
    """
    program = tl.program_id(0)
    row = program % rows
    bh = program // rows
    b = bh // heads
    place = b * rows + row
    low = tl.maximum(tl.load(seen_ptr + 2 * place), 0)
    high = tl.maximum(tl.minimum(tl.load(seen_ptr + 2 * place + 1), width), low)
    lane = tl.arange(0, TILE)
    row_scores = scores_ptr + program.to(tl.int64) * width
    first = low // TILE
    past = (high + TILE - 1) // TILE

    threshold = 0.0
    least = -2147483648
    room = 0
    budget = 0
    if RULE == 1:
        best = float("-inf")
        for n in range(0, (width + TILE - 1) // TILE):
            j = n * TILE + lane
            x = tl.load(row_scores + j, mask=j < width, other=float("-inf"))
            best = tl.maximum(best, tl.max(tl.where(x == x, x, float("-inf")), 0))
        threshold = alpha * best
    if RULE == 2:
        budget = tl.load(budgets_ptr + bh % heads)
        key = tl.zeros([TILE], dtype=tl.int32)
        if ONE:
            key = ordered(tl.load(row_scores + lane, mask=(lane >= low) & (lane < high), other=0.0))
        if (budget > 0) & (budget < high - low):
            # The largest value that at least `budget` scores reach: a bisection of all 2^32 of them.
            lower = tl.full([], -2147483648, dtype=tl.int64)
            upper = tl.full([], 2147483647, dtype=tl.int64)
            for _ in range(32):
                middle = (lower + upper + 1) >> 1
                reach = at_least(row_scores, key, low, high, first, past, middle.to(tl.int32), ONE, TILE)
                lower = tl.where(reach >= budget, middle, lower)
                upper = tl.where(reach >= budget, upper, middle - 1)
            least = lower.to(tl.int32)
        above = 0
        for n in range(first, past):
            j = n * TILE + lane
            inside = (j >= low) & (j < high)
            x = tl.load(row_scores + j, mask=inside, other=0.0)
            above += tl.sum((inside & (ordered(x) > least) & (x == x)).to(tl.int32), 0)
        room = budget - above

    forcing = tl.load(forcing_ptr + bh) != 0
    forced_low = tl.load(forced_ptr + 2 * place)
    forced_high = tl.load(forced_ptr + 2 * place + 1)
    leading_low = tl.load(leading_ptr + 2 * b)
    leading_high = tl.load(leading_ptr + 2 * b + 1)
    count = 0
    out = bh.to(tl.int64) * all_rows + at + row
    for n in range(0, (words * 32 + TILE - 1) // TILE):
        j = n * TILE + lane
        inside = (j >= low) & (j < high)
        chosen = ((j >= forced_low) & (j < forced_high)) | ((j >= leading_low) & (j < leading_high))
        chosen = chosen & forcing
        if RULE == 1:
            x = tl.load(row_scores + j, mask=inside, other=0.0)
            chosen = chosen | ((x >= threshold) & (x > 0.0))
        if RULE == 2:
            x = tl.load(row_scores + j, mask=inside, other=float("-inf"))
            key = ordered(x)
            real = inside & (x == x) & (x > float("-inf"))
            equal = (real & (key == least)).to(tl.int32)
            best_ones = (real & (key > least)) | ((equal > 0) & (tl.cumsum(equal, 0) <= room))
            chosen = chosen | (best_ones & (budget > 0))
            room -= tl.sum(equal, 0)
        if RULE == 3:
            chosen = chosen | inside
        if BANDS:
            band = tl.load(origin_ptr + place) - j
            banded = inside & (band >= 0) & (band < band_count)
            chosen = chosen | (tl.load(bands_ptr + bh.to(tl.int64) * band_count + band, mask=banded, other=0) != 0)
        chosen = chosen & inside
        word = n * (TILE // 32) + tl.arange(0, TILE // 32)
        tl.store(bits_ptr + out * words + word, pack(chosen, TILE // 32), mask=word < words)
        count += tl.sum(chosen.to(tl.int32), 0)
    tl.store(counts_ptr + out, count)


@triton.jit(do_not_specialize=["width", "words", "pieces"])
def pack_mask(mask_ptr, bits_ptr, width, words, pieces, TILE: tl.constexpr):
    """Flags uint8 ``[rows, width]`` as bits ``[rows, words]``. Grid: ``rows * pieces``."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    piece = program % pieces
    j = piece * TILE + tl.arange(0, TILE)
    flags = tl.load(mask_ptr + row * width + j, mask=j < width, other=0) != 0
    word = piece * (TILE // 32) + tl.arange(0, TILE // 32)
    tl.store(bits_ptr + row * words + word, pack(flags, TILE // 32), mask=word < words)


@triton.jit(do_not_specialize=["words"])
def list_bits(bits_ptr, indptr_ptr, indices_ptr, words, TILE: tl.constexpr):
    """The set bits of one row, ascending, from ``indptr`` on. Grid: rows. TILE: words at a time."""
    row = tl.program_id(0).to(tl.int64)
    begin = tl.load(indptr_ptr + row)
    left = (tl.load(indptr_ptr + row + 1) - begin).to(tl.int32)
    done = 0
    at = 0
    while (done < left) & (at < words):
        word = at + tl.arange(0, TILE)
        bits = tl.load(bits_ptr + row * words + word, mask=word < words, other=0)
        flags = tl.reshape((bits[:, None] >> tl.arange(0, 32)[None, :]) & 1, [TILE * 32])
        rank = tl.cumsum(flags, 0)
        place = begin + done + rank - 1
        tl.store(indices_ptr + place, at * 32 + tl.arange(0, TILE * 32), mask=flags > 0)
        done += tl.sum(flags, 0)
        at += TILE


@triton.jit(do_not_specialize=["words", "blocks", "pieces"])
def count_columns(
    bits_ptr, out_ptr, words, blocks, pieces, BLOCK_K: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Columns in each key block: int32 ``[lists, blocks]`` from bits ``[lists, words]``. Grid: ``lists * pieces``."""
    program = tl.program_id(0)
    row = (program // pieces).to(tl.int64)
    block = (program % pieces) * TILE + tl.arange(0, TILE)
    count = tl.zeros([TILE], dtype=tl.int32)
    for i in range(BLOCK_K):
        slot = block * BLOCK_K + i
        bits = tl.load(bits_ptr + row * words + slot // 32, mask=slot // 32 < words, other=0)
        count += (bits >> (slot % 32)) & 1
    tl.store(out_ptr + row * blocks + block, count, mask=block < blocks)


@triton.jit(do_not_specialize=["batch", "query_len", "blocks", "key_blocks", "words", "column_words", "lists",
                               "column_group", "limit"])  # fmt: skip
def count_tiles(
    bits_ptr,
    column_bits_ptr,
    column_count_ptr,
    sink_ptr,
    window_ptr,
    extent_ptr,
    pairs_ptr,
    batch,
    heads,
    query_len,
    blocks,
    key_blocks,
    words,
    column_words,
    lists,
    column_group,
    limit,
    BLOCK_Q: tl.constexpr,
    BLOCK_K: tl.constexpr,
    HAS_BLOCKS: tl.constexpr,
    HAS_COLUMNS: tl.constexpr,
    CAUSAL: tl.constexpr,
    LIMITED: tl.constexpr,
    TILE: tl.constexpr,
    EDGE_M: tl.constexpr,
    EDGE_N: tl.constexpr,
):
    """Pairs that one query block of one head computes: int64 ``[B * heads * blocks]``.

    A key block in which all pairs are allowed, and all or none are in the bands, is arithmetic; the others, at the
    edges of causality, bands and live keys, are counted pair by pair as the plan is defined.
    """
    program = tl.program_id(0)
    m = program % blocks
    bh = program // blocks
    b = bh // heads
    live_begin = tl.load(extent_ptr + batch + b)
    live_end = live_begin + tl.load(extent_ptr + 2 * batch + b)
    sink_end = live_begin + tl.load(sink_ptr + bh % heads)
    window = tl.load(window_ptr + bh % heads)
    rows = tl.minimum(BLOCK_Q, query_len - m * BLOCK_Q)
    first_at = tl.load(extent_ptr + b) + m * BLOCK_Q + live_begin
    last_at = first_at + rows - 1
    bits_row = bits_ptr + program.to(tl.int64) * words
    column_list = bh.to(tl.int64) * lists + m // column_group

    low_slot = live_begin
    high_slot = live_end
    if CAUSAL:
        high_slot = tl.minimum(high_slot, tl.maximum(last_at + 1, 0))
    if LIMITED:
        low_slot = tl.maximum(low_slot, first_at - limit + 1)
        high_slot = tl.minimum(high_slot, tl.maximum(last_at + limit, 0))
    total = tl.zeros([], dtype=tl.int64)
    past = tl.minimum((tl.maximum(high_slot, low_slot) + BLOCK_K - 1) // BLOCK_K, key_blocks)
    for n in range(low_slot // BLOCK_K // TILE, (past + TILE - 1) // TILE):
        block = n * TILE + tl.arange(0, TILE)
        low = tl.maximum(block * BLOCK_K, live_begin)
        high = tl.minimum((block + 1) * BLOCK_K, live_end)
        some = (high > low) & (block < past)
        every = some
        # Smallest and largest distance between a row and a key.
        near = tl.maximum(tl.maximum(first_at - (high - 1), low - last_at), 0)
        far = tl.maximum(last_at - low, high - 1 - first_at)
        if CAUSAL:
            some = some & (low <= last_at)
            every = every & (high - 1 <= first_at)
        if LIMITED:
            some = some & (near < limit)
            every = every & (far < limit)
        banded = (high <= sink_end) | (far < window)
        free = (low >= sink_end) & (near >= window)
        selected = tl.zeros([TILE], dtype=tl.int1)
        if HAS_BLOCKS:
            word = tl.load(bits_row + block // 32, mask=block // 32 < words, other=0)
            selected = ((word >> (block % 32)) & 1) != 0
        keys = tl.where(banded | selected, high - low, 0)
        if HAS_COLUMNS:
            listed = tl.load(column_count_ptr + column_list * key_blocks + block, mask=block < key_blocks, other=0)
            keys = tl.where(banded | selected, keys, listed)
            # A list may name dead slots.
            every = every & ((high - low == BLOCK_K) | banded | selected | (listed == 0))
            empty = free & (~selected) & (listed == 0)
        else:
            empty = free & (~selected)
        whole = every & (banded | free)
        total += tl.sum(tl.where(whole, keys * rows, 0), 0).to(tl.int64)
        edge = some & (~whole) & (~empty)
        rank = tl.cumsum(edge.to(tl.int32), 0)
        for i in range(tl.sum(edge.to(tl.int32), 0)):
            here = edge & (rank == i + 1)
            at = tl.sum(tl.where(here, block, 0), 0)
            taken = tl.sum((here & selected).to(tl.int32), 0) > 0
            for sub_m in range((BLOCK_Q + EDGE_M - 1) // EDGE_M):
                row = sub_m * EDGE_M + tl.arange(0, EDGE_M)
                row_at = (first_at + row)[:, None]
                for sub_n in range((BLOCK_K + EDGE_N - 1) // EDGE_N):
                    offset = sub_n * EDGE_N + tl.arange(0, EDGE_N)
                    slot = at * BLOCK_K + offset
                    live = (offset < BLOCK_K) & (slot >= live_begin) & (slot < live_end)
                    allowed = live[None, :] & (row < rows)[:, None]
                    distance = tl.abs(row_at - slot[None, :])
                    if CAUSAL:
                        allowed = allowed & (slot[None, :] <= row_at)
                    if LIMITED:
                        allowed = allowed & (distance < limit)
                    computed = (slot < sink_end)[None, :] | (distance < window) | taken
                    if HAS_COLUMNS:
                        column_word = tl.load(
                            column_bits_ptr + column_list * column_words + slot // 32,
                            mask=live & (slot // 32 < column_words),
                            other=0,
                        )
                        computed = computed | (((column_word >> (slot % 32)) & 1) != 0)[None, :]
                    total += tl.sum(tl.sum((allowed & computed).to(tl.int32), 1), 0).to(tl.int64)
    tl.store(pairs_ptr + program, total)
