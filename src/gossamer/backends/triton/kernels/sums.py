"""The state of a tile of keys in the backward pass, and what one tile of query rows adds to it."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product
from gossamer.backends.triton.kernels.rows import Rows, tile_rows
from gossamer.backends.triton.kernels.softmax import capped

__all__ = [
    "KeyTile",
    "Reaching",
    "Sums",
    "add_bands",
    "add_blocks",
    "add_rows",
    "load_keys",
    "no_sums",
    "outside_bands",
    "query_blocks",
    "seeing",
    "store_sums",
]


class KeyTile(NamedTuple):
    """Keys ``[TILE_N, BLOCK_D]`` and values ``[TILE_N, BLOCK_DV]`` of a tile, their positions, which of them there are,
    and the lowest and highest position of these."""

    k: Any
    v: Any
    positions: Any
    keep: Any
    lowest: Any
    highest: Any


class Reaching(NamedTuple):
    """What a tile of query rows is loaded from: pointers to the batch row's queries and to the gradient that reaches
    its outputs; `level` and `base` of all rows; strides; the batch row's first query head; constants."""

    q: Any
    out: Any
    level: Any
    base: Any
    q_head_stride: Any
    q_stride: Any
    out_head_stride: Any
    out_stride: Any
    first_head: Any
    query_len: Any
    DIM: Any
    VALUE_DIM: Any
    OF_KEYS: Any
    OF_VALUES: Any


class Sums(NamedTuple):
    """State: gradients of the keys, before the scale, and of the values of a tile."""

    k: Any
    v: Any


@triton.jit
def no_sums(TILE_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr):
    return Sums(tl.zeros([TILE_N, BLOCK_D], dtype=tl.float32), tl.zeros([TILE_N, BLOCK_DV], dtype=tl.float32))


@triton.jit
def load_keys(
    k_base, v_base, k_stride, v_stride, start, positions, keep,
    DIM: tl.constexpr, VALUE_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
):  # fmt: skip
    """Of positions that count from slot ``start``."""
    k = load_rows(k_base, start + positions, k_stride, keep, DIM, BLOCK_D)
    v = load_rows(v_base, start + positions, v_stride, keep, VALUE_DIM, BLOCK_DV)
    lowest = tl.min(tl.where(keep, positions, 1 << 29), 0)
    highest = tl.max(tl.where(keep, positions, -(1 << 29)), 0)
    return KeyTile(k, v, positions, keep, lowest, highest)


@triton.jit
def seeing(extent, lowest, highest):
    """Positions of the live queries that may attend some key from ``lowest`` to ``highest``, half-open."""
    low = tl.maximum(extent.first, lowest - tl.load(extent.reach) + 1)
    return low, tl.maximum(tl.minimum(extent.past, highest + tl.load(extent.reach + 1)), low)


@triton.jit
def query_blocks(extent, low, high, BLOCK_Q: tl.constexpr):
    """Rows of the plan that hold the live positions from ``low`` to ``high - 1``, half-open; empty for none."""
    origin = extent.first // BLOCK_Q
    return low // BLOCK_Q - origin, tl.where(high > low, ceil_div(high, BLOCK_Q), low // BLOCK_Q) - origin


@triton.jit
def position_rows(extent, low, count, tile, plan_head, SHARE: tl.constexpr, TILE_M: tl.constexpr):
    """Tile number ``tile`` of the ``count`` rows from the position ``low`` on, whatever blocks they are in."""
    packed = tile * TILE_M + tl.arange(0, TILE_M)
    position = low + packed // SHARE
    return Rows(position - extent.query_start, plan_head * SHARE + packed % SHARE, packed < count)


@triton.jit
def within_bands(extent, bands, keys, rows):
    """Pairs that are allowed and in a band: ``[keys, rows]``."""
    distance, pairs = _met(extent, keys, rows)
    return pairs & ((keys.positions < bands.sink)[:, None] | (tl.abs(distance) < bands.window))


@triton.jit
def outside_bands(extent, bands, keys, rows):
    """Pairs that are allowed and in no band: ``[keys, rows]``."""
    distance, pairs = _met(extent, keys, rows)
    return pairs & (keys.positions >= bands.sink)[:, None] & (tl.abs(distance) >= bands.window)


@triton.jit
def _met(extent, keys, rows):
    distance = (rows.row + extent.query_start)[None, :] - keys.positions[:, None]
    pairs = (distance > -tl.load(extent.reach)) & (distance < tl.load(extent.reach + 1))
    return distance, pairs & keys.keep[:, None] & rows.exists[None, :]


@triton.jit
def add_bands(
    sums, keys, extent, bands, low, high, plan_head, logits, reaching, SHARE: tl.constexpr, TILE_M: tl.constexpr
):  # fmt: skip
    """The state after the query rows of one head of the plan in whose bands some of the keys are; those from ``low`` to
    ``high - 1`` may attend them."""
    near, past = low, low
    if bands.window > 0:
        near = tl.maximum(low, keys.lowest - bands.window + 1)
        past = tl.minimum(high, keys.highest + bands.window)
    in_sink = keys.lowest < bands.sink
    near, past = tl.where(in_sink, low, near), tl.where(in_sink, high, past)
    count = tl.maximum(past - near, 0) * SHARE
    for n in range(0, ceil_div(count, TILE_M)):
        rows = position_rows(extent, near, count, n, plan_head, SHARE, TILE_M)
        sums = add_rows(sums, keys, rows, within_bands(extent, bands, keys, rows), 0.0, logits, reaching)
    return sums


@triton.jit
def add_blocks(
    sums, keys, extent, bands, blocks, count, plan_head, order, logits, reaching,
    SHARE: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_M: tl.constexpr, Q_ORDER: tl.constexpr,
):  # fmt: skip
    """The state after ``count`` query blocks of one head of the plan, without what is in its bands."""
    TILES: tl.constexpr = (BLOCK_Q * SHARE + TILE_M - 1) // TILE_M
    for n in range(0, count * TILES):
        block = tl.load(blocks + n // TILES)
        query_len = reaching.query_len
        rows = tile_rows(extent, block, n % TILES, plan_head, query_len, order, SHARE, BLOCK_Q, TILE_M, Q_ORDER)
        sums = add_rows(sums, keys, rows, outside_bands(extent, bands, keys, rows), 0.0, logits, reaching)
    return sums


@triton.jit
def add_rows(sums, keys, rows, pairs, added, logits, reaching):
    """The state after one tile of query rows, of which ``pairs`` ``[TILE_N, TILE_M]`` count; ``added`` goes to the
    logits. Rows that attend nothing are not read: what reaches them may be anything."""
    BLOCK_D: tl.constexpr = sums.k.shape[1]
    BLOCK_DV: tl.constexpr = sums.v.shape[1]
    own = (reaching.first_head + rows.head).to(tl.int64) * reaching.query_len + rows.row
    base = tl.load(reaching.base + own, mask=rows.exists, other=float("inf"))
    level = tl.load(reaching.level + own, mask=rows.exists, other=0.0)
    some = rows.exists & (base != float("inf"))
    dim, value = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV)
    q_rows = reaching.q + rows.head.to(tl.int64) * reaching.q_head_stride + rows.row.to(tl.int64) * reaching.q_stride
    q = tl.load(q_rows[:, None] + dim[None, :], mask=some[:, None] & (dim < reaching.DIM)[None, :], other=0.0)
    out_rows = reaching.out + rows.head.to(tl.int64) * reaching.out_head_stride
    out_rows += rows.row.to(tl.int64) * reaching.out_stride
    mask = some[:, None] & (value < reaching.VALUE_DIM)[None, :]
    out = tl.load(out_rows[:, None] + value[None, :], mask=mask, other=0.0)

    scores = tl.zeros(pairs.shape, dtype=tl.float32)
    scores = capped(product(keys.k, tl.trans(q), scores), logits)
    exponents = scores
    if not logits.SOFTCAP:
        exponents = scores * logits.scale
    weights = tl.where(pairs, tl.exp2(exponents + added - base[None, :]), 0.0)
    k_sums, v_sums = sums.k, sums.v
    if reaching.OF_VALUES:
        v_sums = product(weights, out, v_sums)
    if reaching.OF_KEYS:
        slopes = product(keys.v, tl.trans(out), tl.zeros(pairs.shape, dtype=tl.float32))
        slopes = weights * (slopes - level[None, :])
        if logits.SOFTCAP:
            tangent = scores / logits.softcap
            slopes = slopes * (1.0 - tangent * tangent)
        k_sums = product(tl.where(pairs, slopes, 0.0), q, k_sums)
    return Sums(k_sums, v_sums)


@triton.jit
def store_sums(
    sums, k_grad_ptr, v_grad_ptr, slots, keep, scale, DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    ADD: tl.constexpr, OF_KEYS: tl.constexpr, OF_VALUES: tl.constexpr,
):  # fmt: skip
    if OF_KEYS:
        _store_rows(sums.k * scale, k_grad_ptr, slots, keep, DIM, ADD)
    if OF_VALUES:
        _store_rows(sums.v, v_grad_ptr, slots, keep, VALUE_DIM, ADD)


@triton.jit
def _store_rows(rows, base, slots, keep, DIM: tl.constexpr, ADD: tl.constexpr):
    BLOCK_DIM: tl.constexpr = rows.shape[1]
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + slots.to(tl.int64)[:, None] * DIM + column[None, :]
    mask = keep[:, None] & (column < DIM)[None, :]
    if ADD:
        rows += tl.load(pointers, mask=mask, other=0.0)
    tl.store(pointers, rows.to(base.dtype.element_ty), mask=mask)
