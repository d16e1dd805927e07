"""What the forward kernel does with one tile of keys: load it, decide its pairs, and fold it into the softmax state."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["allowed_pairs", "banded_pairs", "step"]

_CONSECUTIVE = tl.constexpr(0)
_BY_KEY = tl.constexpr(1)


@triton.jit
def load_rows(
    base,
    descriptor,
    b,
    group,
    slots,
    stride,
    keep,
    BEGIN: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
):
    """``TILE_N`` rows of a head of K or V from dimension ``BEGIN`` on, zero beyond ``DIM``; for MASK see `step`."""
    if MASK == _CONSECUTIVE and DESCRIPTORS:
        rows = descriptor.load([b, group, slots, BEGIN]).reshape([TILE_N, BLOCK_DIM])
    else:
        column = BEGIN + tl.arange(0, BLOCK_DIM)
        if MASK == _CONSECUTIVE:
            # One 64-bit product for the tile; the rest does not change from tile to tile.
            first = base + slots.to(tl.int64) * stride
            pointers = first + (tl.arange(0, TILE_N).to(tl.int64)[:, None] * stride + column[None, :])
        else:
            pointers = base + slots.to(tl.int64)[:, None] * stride + column[None, :]
        if MASK > _BY_KEY:
            rows = tl.load(pointers, mask=keep[:, None] & (column < DIM)[None, :], other=0.0)
        elif DIM < BEGIN + BLOCK_DIM:
            rows = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
        else:
            rows = tl.load(pointers)
    return rows


@triton.jit
def product(a, b, acc, WIDEN: tl.constexpr, PRECISION: tl.constexpr):
    """``a @ b + acc`` in fp32, with a rounded to b's dtype.

    WIDEN is for bf16 under the interpreter of Triton 3.9, which truncates to bf16 and multiplies its bit patterns.
    """
    if WIDEN:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def step(
    acc,
    acc_high,
    total,
    top,
    q,
    k_base,
    v_base,
    k_descriptor,
    v_descriptor,
    b,
    group,
    k_stride,
    v_stride,
    slots,
    keep,
    pairs,
    scale_log2,
    softcap_log2,
    softcap_slope,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    HALVES: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    WIDEN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One tile of keys.

    MASK: 0 for consecutive keys from slot ``slots`` on, all of which every row attends; 1 for keys ``slots``, of
    which those in ``keep`` count and all may be loaded; 2 for the ``pairs`` of keys ``slots``, of which only those in
    ``keep`` may be loaded, since dead slots may hold NaN. The softmax state is in units of log2; scale_log2 > 0.
    ``acc`` has the first ``BLOCK_DV`` dimensions of the output, ``acc_high`` the next if there are two HALVES.
    """
    k = load_rows(k_base, k_descriptor, b, group, slots, k_stride, keep, 0, DIM, BLOCK_D, TILE_N, MASK, DESCRIPTORS)
    scores = tl.zeros([q.shape[0], TILE_N], dtype=tl.float32)
    scores = product(q, tl.trans(k), scores, WIDEN, PRECISION)
    if SOFTCAP:
        # softcap * tanh(x / softcap), with tanh(y) = 1 - 2 / (exp(2 y) + 1); 2 / infinity is 0.
        scores = softcap_log2 * (1.0 - 2.0 / (tl.exp2(scores * softcap_slope) + 1.0))
    if MASK == 1:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    if MASK == 2:
        scores = tl.where(pairs, scores, float("-inf"))
    highest = tl.max(scores, 1)
    if not SOFTCAP:
        highest = highest * scale_log2
    new_top = tl.maximum(top, highest)
    base = tl.where(new_top == float("-inf"), 0.0, new_top)
    exponents = scores - base[:, None]
    if not SOFTCAP:
        exponents = tl.fma(scores, scale_log2, -base[:, None])
    weights = tl.exp2(exponents)
    shrink = tl.exp2(top - base)
    total = total * shrink + tl.sum(weights, 1)
    acc = acc * shrink[:, None]
    v = load_rows(
        v_base, v_descriptor, b, group, slots, v_stride, keep, 0, VALUE_DIM, BLOCK_DV, TILE_N, MASK, DESCRIPTORS
    )
    acc = product(weights, v, acc, WIDEN, PRECISION)
    if HALVES == 2:
        acc_high = acc_high * shrink[:, None]
        v = load_rows(
            v_base, v_descriptor, b, group, slots, v_stride, keep, BLOCK_DV, VALUE_DIM, BLOCK_DV, TILE_N, MASK,
            DESCRIPTORS,
        )  # fmt: skip
        acc_high = product(weights, v, acc_high, WIDEN, PRECISION)
    return acc, acc_high, total, new_top


@triton.jit
def allowed_pairs(row_at, slots, keep, limit, CAUSAL: tl.constexpr, LIMITED: tl.constexpr):
    pairs = keep[None, :]
    if CAUSAL:
        pairs = pairs & (slots[None, :] <= row_at[:, None])
    if LIMITED:
        pairs = pairs & (tl.abs(row_at[:, None] - slots[None, :]) < limit)
    return pairs


@triton.jit
def banded_pairs(row_at, slots, sink_end, window):
    return (slots < sink_end)[None, :] | (tl.abs(row_at[:, None] - slots[None, :]) < window)
