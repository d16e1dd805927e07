"""What one query learns of a cache without its keys: scores of pages and of labels, collisions of hashes."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import load_rows

__all__ = ["hash_collisions", "label_products", "page_products"]


@triton.jit(do_not_specialize=["groups", "pages", "tiles", "size"])
def page_products(
    queries_ptr, bounds_ptr, live_ptr, scores_ptr, batch_stride, head_stride, stride, groups, pages, tiles, size,
    SHARE: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Scores of ``TILE`` pages of one key/value head for the ``SHARE`` query heads that it has; bounds are read once.

    ``queries`` fp32 ``[B, H, DIM]``, positive parts and then negative ones; ``bounds`` ``[B, G, N, DIM]``, largest
    values and then smallest; ``live`` int32 ``[B]``, a row's keys; ``scores`` fp32 ``[B, H, N]``, -inf for pages that
    begin behind them. Grid: ``B * G * tiles``.
    """
    program = tl.program_id(0)
    bg = program // tiles
    b = bg // groups
    page = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = page < pages
    present = page.to(tl.int64) * size < tl.load(live_ptr + b)
    base = bounds_ptr + b.to(tl.int64) * batch_stride + (bg % groups).to(tl.int64) * head_stride
    bounds = load_rows(base, page, stride, inside & present, DIM, BLOCK_D).to(tl.float32)
    dim = tl.arange(0, BLOCK_D)
    for member in tl.static_range(SHARE):
        head = bg.to(tl.int64) * SHARE + member
        q = tl.load(queries_ptr + head * DIM + dim, mask=dim < DIM, other=0.0)
        score = tl.sum(bounds * q[None, :], 1)
        tl.store(scores_ptr + head * pages + page, tl.where(present, score, float("-inf")), mask=inside)


@triton.jit(do_not_specialize=["lists", "tokens", "tiles", "channels"])
def label_products(
    queries_ptr, codes_ptr, low_ptr, step_ptr, live_ptr, scores_ptr,
    batch_stride, list_stride, stride, low_batch_stride, low_list_stride, step_batch_stride, step_list_stride,
    lists, tokens, tiles, channels,
    SHARE: tl.constexpr, HEADS: tl.constexpr, CODED: tl.constexpr, PACKED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Products of ``SHARE`` query heads with the labels of ``TILE`` tokens, which are read once, as they are.

    ``queries`` fp32 ``[B, H, channels]``; ``codes``, ``low`` and ``step`` as `gossamer.summaries.LabelSet` has them,
    the last two where it is ``CODED``, two channels a byte where it is ``PACKED``, whose channels are an even number;
    ``live`` int32 ``[B]``; ``scores`` fp32 ``[B, H, tokens]``, -inf for those that a row does not have. ``HEADS`` is
    ``SHARE``, up to a power of two. Grid: ``B * lists * tiles``.
    """
    program = tl.program_id(0)
    bl = (program // tiles).to(tl.int64)
    b = bl // lists
    token = (program % tiles) * TILE + tl.arange(0, TILE)
    inside = token < tokens
    present = token < tl.load(live_ptr + b)
    codes = codes_ptr + b * batch_stride + (bl % lists) * list_stride + token
    member = tl.arange(0, HEADS)
    own = member < SHARE
    queries = queries_ptr + (bl * SHARE + member) * channels
    low = tl.zeros([TILE], dtype=tl.float32)
    step = low + 1.0
    if CODED:
        lows = low_ptr + b * low_batch_stride + (bl % lists) * low_list_stride + token
        steps = step_ptr + b * step_batch_stride + (bl % lists) * step_list_stride + token
        low = tl.load(lows, mask=inside & present, other=0.0).to(tl.float32)
        step = tl.load(steps, mask=inside & present, other=0.0).to(tl.float32)
    total = tl.zeros([HEADS, TILE], dtype=tl.float32)
    for row in range(0, channels // 2 if PACKED else channels):
        code = tl.load(codes, mask=inside & present, other=0)
        codes += stride
        if PACKED:
            total += _products(queries, 2 * row, own, (code & 15).to(tl.float32) * step + low)
            total += _products(queries, 2 * row + 1, own, (code >> 4).to(tl.float32) * step + low)
        else:
            total += _products(queries, row, own, code.to(tl.float32) * step + low)
    out = scores_ptr + (bl * SHARE + member)[:, None] * tokens + token[None, :]
    tl.store(out, tl.where(present[None, :], total, float("-inf")), mask=own[:, None] & inside[None, :])


@triton.jit
def _products(queries, channel, own, values):
    """Of one channel: ``[heads, tokens]``."""
    return tl.load(queries + channel, mask=own, other=0.0)[:, None] * values[None, :]


@triton.jit(do_not_specialize=["groups", "tiles", "tables"])
def hash_collisions(
    queries_ptr, codes_ptr, counts_ptr, batch_stride, head_stride, groups, tiles, tables,
    SHARE: tl.constexpr, HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """In how many tables the ``TILE`` tokens of one tile have the code of each of ``SHARE`` query heads.

    ``queries`` int16 ``[B, H, tables]``, ``codes`` int16 ``[B, G, tiles, tables, TILE]``, ``counts`` int16
    ``[B, H, tiles * TILE]``. ``HEADS`` is ``SHARE``, up to a power of two. Grid: ``B * G * tiles``.
    """
    program = tl.program_id(0)
    bg = (program // tiles).to(tl.int64)
    tile = (program % tiles).to(tl.int64)
    token = tl.arange(0, TILE)
    member = tl.arange(0, HEADS)
    own = member < SHARE
    codes = codes_ptr + bg // groups * batch_stride + bg % groups * head_stride + tile * tables * TILE + token
    queries = queries_ptr + (bg * SHARE + member) * tables
    counts = tl.zeros([HEADS, TILE], dtype=tl.int32)
    for table in range(0, tables):
        asked = tl.load(queries + table, mask=own, other=0)
        counts += (tl.load(codes + table * TILE)[None, :] == asked[:, None]).to(tl.int32)
    out = counts_ptr + (bg * SHARE + member)[:, None] * (tiles * TILE) + tile * TILE + token[None, :]
    tl.store(out, counts.to(tl.int16), mask=own[:, None])
