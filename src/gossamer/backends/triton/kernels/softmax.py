"""The softmax state of a tile of query rows, and what one tile of keys adds to it."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.coded import PLAIN, load_coded
from gossamer.backends.triton.kernels.matrices import product

__all__ = [
    "ATTENDED",
    "BY_KEY",
    "BY_PAIR",
    "FORWARD",
    "SLOPES",
    "UNMASKED",
    "Keys",
    "Logits",
    "Queries",
    "Slopes",
    "Softmax",
    "add_slopes",
    "capped",
    "fold",
    "fresh",
    "no_slopes",
    "weighed",
    "with_sinks",
]

# What masks a tile of keys. UNMASKED: nothing; its keys are consecutive, and every row attends all of them. BY_KEY:
# some keys are left out for all rows, but all may be loaded. BY_PAIR: pairs are, and keys that may not be loaded.
UNMASKED = tl.constexpr(0)
BY_KEY = tl.constexpr(1)
BY_PAIR = tl.constexpr(2)
# What a pass over the keys finds: the softmax; which rows attend anything; that, and the gradients of the queries.
FORWARD = tl.constexpr(0)
ATTENDED = tl.constexpr(1)
SLOPES = tl.constexpr(2)


class Queries(NamedTuple):
    """Query rows of one tile: tokens times the query heads that share them.

    Fields: q ``[TILE_M, BLOCK_D]``; positions ``[TILE_M]``; the lowest and highest of those that are live. In the
    backward pass alone: the gradient that reaches the outputs ``[TILE_M, BLOCK_DV]``; the LSE in units of log2, and
    what a slope is measured from, ``[TILE_M]``. Of int8 alone: steps, and what the keys' mean gives a row's products,
    ``[TILE_M]``.
    """

    q: Any
    positions: Any
    lowest: Any
    highest: Any
    reaching: Any
    base: Any
    level: Any
    step: Any
    shift: Any


class Keys(NamedTuple):
    """Keys and values of one key/value head: pointers to position 0, row strides, descriptors with its coordinates
    there, constants.

    Of encoded ones the pointers are to the first token that is not, see `gossamer.backends.triton.kernels.coded`.
    ``bias`` is what position 0 adds to its logits, where they are BIASED; ``steps`` its step, of int8.
    """

    k: Any
    v: Any
    k_stride: Any
    v_stride: Any
    k_descriptor: Any
    v_descriptor: Any
    k_coded: Any
    v_coded: Any
    bias: Any
    steps: Any
    batch_row: Any
    group: Any
    start: Any
    DIM: Any
    VALUE_DIM: Any
    TILE_N: Any
    DESCRIPTORS: Any


class Logits(NamedTuple):
    """From products to logits in units of log2: ``scale`` is above 0, ``slope`` is 2 scale / softcap. ``skip`` is how
    far below a row's largest logit it leaves a tile out; where they are ``BIASED`` each key adds a number, which no
    soft-cap bounds. ``PASS`` is one of FORWARD, ATTENDED and SLOPES."""

    scale: Any
    softcap: Any
    slope: Any
    skip: Any
    SOFTCAP: Any
    BIASED: Any
    SKIP: Any
    PASS: Any


class Softmax(NamedTuple):
    """State: outputs ``[TILE_M, BLOCK_DV]``, of the next BLOCK_DV dimensions where these are only half of them, sums of
    weights, and the largest logits, in units of log2."""

    out: Any
    out_high: Any
    total: Any
    top: Any


class Slopes(NamedTuple):
    """State of the backward pass: sums of slopes times keys ``[TILE_M, BLOCK_D]``; 1 for rows that attend something."""

    q: Any
    some: Any


@triton.jit
def no_slopes(TILE_M: tl.constexpr, BLOCK_D: tl.constexpr):
    return Slopes(tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32), tl.zeros([TILE_M], dtype=tl.int32))


@triton.jit
def fresh(TILE_M: tl.constexpr, BLOCK_DV: tl.constexpr, HALVES: tl.constexpr):
    return Softmax(
        tl.zeros([TILE_M, BLOCK_DV], dtype=tl.float32),
        tl.zeros([TILE_M, BLOCK_DV if HALVES == 2 else 1], dtype=tl.float32),
        tl.zeros([TILE_M], dtype=tl.float32),
        tl.full([TILE_M], float("-inf"), dtype=tl.float32),
    )


@triton.jit
def fold(state, queries, keys, logits, positions, keep, pairs, MASK: tl.constexpr):
    """The state after one tile of keys: those from ``positions`` on if it is UNMASKED, else the keys ``positions``.

    ``keep`` ``[TILE_N]`` says which keys count, ``pairs`` ``[TILE_M, TILE_N]`` which pairs do, if masked BY_PAIR.
    """
    BLOCK_D: tl.constexpr = queries.q.shape[1]
    k = load_tile(
        keys.k, keys.k_descriptor, keys.k_stride, keys.k_coded, keys, positions, keep, 0, keys.DIM, BLOCK_D, MASK
    )
    if queries.q.dtype == tl.int8:
        scores = of_integers(queries, k, keys, positions, keep, MASK)
    else:
        scores = tl.zeros([queries.q.shape[0], keys.TILE_N], dtype=tl.float32)
        scores = product(queries.q, tl.trans(k), scores)
    scores = capped(scores, logits)
    if logits.BIASED:
        scores = biased(scores, keys, logits, positions, keep, MASK)
    if logits.PASS == FORWARD:
        state = add_weights(state, queries, scores, keys, logits, positions, keep, pairs, MASK)
    else:
        BLOCK_DV: tl.constexpr = queries.reaching.shape[1]
        v = load_tile(
            keys.v, keys.v_descriptor, keys.v_stride, keys.v_coded, keys, positions, keep, 0, keys.VALUE_DIM, BLOCK_DV,
            MASK,
        )  # fmt: skip
        state = add_slopes(state, queries, k, v, scores, 0.0, logits, keep, pairs, MASK)
    return state


@triton.jit
def of_integers(queries, k, keys, positions, keep, MASK: tl.constexpr):
    """Products with a tile of keys in int8, as numbers."""
    at = positions
    if MASK == UNMASKED:
        at = positions + tl.arange(0, keys.TILE_N)
    steps = tl.load(keys.steps + at, mask=keep, other=0.0)
    sums = tl.dot(queries.q, tl.trans(k), out_dtype=tl.int32)
    return sums.to(tl.float32) * (queries.step[:, None] * steps[None, :]) + queries.shift[:, None]


@triton.jit
def add_weights(state, queries, scores, keys, logits, positions, keep, pairs, MASK: tl.constexpr):
    """The softmax after a tile of keys, of its logits."""
    if MASK == BY_KEY:
        scores = tl.where(keep[None, :], scores, float("-inf"))
    if MASK == BY_PAIR:
        scores = tl.where(pairs, scores, float("-inf"))
    if logits.SKIP:
        highest = tl.max(scores, 1)
        if not (logits.SOFTCAP or logits.BIASED):
            highest = highest * logits.scale
        left_out = highest + logits.skip < state.top
        left_out = left_out | (queries.positions < queries.lowest) | (queries.positions > queries.highest)  # no rows
        if tl.min(left_out.to(tl.int32), 0) == 0:  # some row takes it
            scores = tl.where(left_out[:, None], float("-inf"), scores)
            state = add_values(state, scores, keys, logits, positions, keep, MASK)
    else:
        state = add_values(state, scores, keys, logits, positions, keep, MASK)
    return state


@triton.jit
def capped(products, logits):
    """Products under the soft-cap, in units of log2; as they are where there is none, to be scaled by `weighed`."""
    if logits.SOFTCAP:
        # softcap * tanh(x / softcap), with tanh(y) = 1 - 2 / (exp(2 y) + 1); 2 / infinity is 0.
        products = logits.softcap * (1.0 - 2.0 / (tl.exp2(products * logits.slope) + 1.0))
    return products


@triton.jit
def biased(scores, keys, logits, positions, keep, MASK: tl.constexpr):
    """A tile's logits, in units of log2, with what each key adds."""
    at = positions
    if MASK == UNMASKED:
        at = positions + tl.arange(0, keys.TILE_N)
    added = tl.load(keys.bias + at, mask=keep, other=0.0)
    if not logits.SOFTCAP:
        scores = scores * logits.scale
    return scores + added[None, :]


@triton.jit
def weighed(state, scores, scale, SCALED: tl.constexpr):
    """Weights of a tile's logits; by what the state's outputs shrink; its sums and largest logits with the tile."""
    highest = tl.max(scores, 1)
    if not SCALED:
        highest = highest * scale
    top = tl.maximum(state.top, highest)
    base = tl.where(top == float("-inf"), 0.0, top)
    exponents = scores - base[:, None]
    if not SCALED:
        exponents = tl.fma(scores, scale, -base[:, None])
    weights = tl.exp2(exponents)
    shrink = tl.exp2(state.top - base)
    return weights, shrink, state.total * shrink + tl.sum(weights, 1), top


@triton.jit
def add_values(state, scores, keys, logits, positions, keep, MASK: tl.constexpr):
    BLOCK_DV: tl.constexpr = state.out.shape[1]
    SCALED: tl.constexpr = logits.SOFTCAP or logits.BIASED
    weights, shrink, total, top = weighed(state, scores, logits.scale, SCALED)
    v = load_tile(
        keys.v, keys.v_descriptor, keys.v_stride, keys.v_coded, keys, positions, keep, 0, keys.VALUE_DIM, BLOCK_DV, MASK
    )
    out = product(weights, v, state.out * shrink[:, None])
    out_high = state.out_high
    if state.out_high.shape[1] > 1:
        v = load_tile(
            keys.v, keys.v_descriptor, keys.v_stride, keys.v_coded, keys, positions, keep, BLOCK_DV, keys.VALUE_DIM,
            BLOCK_DV, MASK,
        )  # fmt: skip
        out_high = product(weights, v, state.out_high * shrink[:, None])
    return Softmax(out, out_high, total, top)


@triton.jit
def add_slopes(state, queries, k, v, scores, added, logits, keep, pairs, MASK: tl.constexpr):
    """The state of the backward pass after one tile of keys, masked as in `fold`; ``added`` goes to their logits."""
    exponents = scores
    if not logits.SOFTCAP:
        exponents = scores * logits.scale
    weights = tl.exp2(exponents + added - queries.base[:, None])
    reaching = product(queries.reaching, tl.trans(v), tl.zeros(scores.shape, dtype=tl.float32))
    slopes = weights * (reaching - queries.level[:, None])
    if logits.SOFTCAP:
        tangent = scores / logits.softcap
        slopes = slopes * (1.0 - tangent * tangent)
    some = tl.full([scores.shape[0]], 1, dtype=tl.int32)
    if MASK == BY_KEY:
        slopes = tl.where(keep[None, :], slopes, 0.0)
        some = some * tl.max(keep.to(tl.int32), 0)
    if MASK == BY_PAIR:
        slopes = tl.where(pairs, slopes, 0.0)
        some = tl.max(pairs.to(tl.int32), 1)
    sums = state.q
    if logits.PASS == SLOPES:
        sums = product(slopes, k, sums)
    return Slopes(sums, tl.maximum(state.some, some))


@triton.jit
def load_tile(
    base, descriptor, stride, coded, keys, positions, keep,
    BEGIN: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, MASK: tl.constexpr,
):  # fmt: skip
    """A tile of K or V from dimension ``BEGIN`` on, zero beyond ``DIM``."""
    if coded.CODING != PLAIN:
        slots = keys.start + positions
        if MASK == UNMASKED:
            slots += tl.arange(0, keys.TILE_N)
        rows = load_coded(coded, base, stride, slots, keep, BEGIN, DIM, BLOCK_DIM)
    elif MASK == UNMASKED and keys.DESCRIPTORS:
        rows = descriptor.load([keys.batch_row, keys.group, keys.start + positions, BEGIN])
        rows = rows.reshape([keys.TILE_N, BLOCK_DIM])
    else:
        column = BEGIN + tl.arange(0, BLOCK_DIM)
        if MASK == UNMASKED:
            # One 64-bit product for the tile; the rest does not change from tile to tile.
            first = base + positions.to(tl.int64) * stride
            pointers = first + (tl.arange(0, keys.TILE_N).to(tl.int64)[:, None] * stride + column[None, :])
        else:
            pointers = base + positions.to(tl.int64)[:, None] * stride + column[None, :]
        if MASK == BY_PAIR:
            rows = tl.load(pointers, mask=keep[:, None] & (column < DIM)[None, :], other=0.0)
        elif DIM < BEGIN + BLOCK_DIM:
            rows = tl.load(pointers, mask=(column < DIM)[None, :], other=0.0)
        else:
            rows = tl.load(pointers)
    return rows


@triton.jit
def with_sinks(state, sinks):
    """The state with one more logit a row, in units of log2, that has no value."""
    top = tl.maximum(state.top, sinks)
    base = tl.where(top == float("-inf"), 0.0, top)
    shrink = tl.exp2(state.top - base)
    own = tl.where(sinks == base, 1.0, tl.exp2(sinks - base))  # a sink of infinity takes all
    total = state.total * shrink + own
    return Softmax(state.out * shrink[:, None], state.out_high * shrink[:, None], total, top)
