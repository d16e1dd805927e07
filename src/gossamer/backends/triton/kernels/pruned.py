"""Key blocks that are not selected, by their means: one more key a block."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product
from gossamer.backends.triton.kernels.softmax import BY_KEY, FORWARD, Softmax, add_slopes, capped, weighed

__all__ = ["Means", "add_means", "is_selected", "log_lengths", "wholly_seen"]


class Means(NamedTuple):
    """Means of the key blocks of one key/value head, in q's dtype: pointers to those of the first block; the row's
    selected blocks as bits; half-open, the blocks that the query block sees whole; the number of live keys."""

    k: Any
    v: Any
    selected: Any
    low: Any
    high: Any
    keys: Any
    DIM: Any
    VALUE_DIM: Any
    BLOCK_K: Any
    TILE_N: Any
    SELECTED: Any


@triton.jit
def wholly_seen(extent, block, BLOCK_Q: tl.constexpr, BLOCK_K: tl.constexpr):
    """Key blocks of which every live query of a block may attend every live key, half-open."""
    begin = (extent.first // BLOCK_Q + block) * BLOCK_Q
    first = tl.maximum(begin, extent.first)
    past = tl.minimum(begin + BLOCK_Q, extent.past)
    low = ceil_div(tl.maximum(past - tl.load(extent.reach + 1), 0), BLOCK_K)
    high = tl.minimum(first + tl.load(extent.reach), extent.keys)
    high = tl.where(high == extent.keys, ceil_div(extent.keys, BLOCK_K), high // BLOCK_K)  # the last ends early
    return low, tl.where(past > first, high, low)


@triton.jit
def add_means(state, queries, logits, means):
    """The state with the means of all blocks that are seen whole and not selected."""
    TILE_N: tl.constexpr = means.TILE_N
    BLOCK_D: tl.constexpr = queries.q.shape[1]
    for n in range(means.low // TILE_N, ceil_div(means.high, TILE_N)):
        block = n * TILE_N + tl.arange(0, TILE_N)
        keep = (block >= means.low) & (block < means.high)
        if means.SELECTED:
            keep = keep & ~is_selected(means.selected, block, keep)
        k = load_rows(means.k, block, means.DIM, keep, means.DIM, BLOCK_D)
        scores = tl.zeros([queries.q.shape[0], TILE_N], dtype=tl.float32)
        scores = capped(product(queries.q, tl.trans(k), scores), logits)
        added = log_lengths(block, means.keys, means.BLOCK_K)[None, :]
        if logits.PASS == FORWARD:
            state = weigh_means(state, scores, added, block, keep, logits, means)
        else:
            v = load_rows(means.v, block, means.VALUE_DIM, keep, means.VALUE_DIM, queries.reaching.shape[1])
            state = add_slopes(state, queries, k, v, scores, added, logits, keep, keep, BY_KEY)
    return state


@triton.jit
def weigh_means(state, scores, added, block, keep, logits, means):
    """The softmax after a tile of means."""
    BLOCK_DV: tl.constexpr = state.out.shape[1]
    if not logits.SOFTCAP:
        scores = scores * logits.scale
    scores = tl.where(keep[None, :], scores + added, float("-inf"))
    weights, shrink, total, top = weighed(state, scores, 1.0, True)
    v = load_rows(means.v, block, means.VALUE_DIM, keep, means.VALUE_DIM, BLOCK_DV)
    out = product(weights, v, state.out * shrink[:, None])
    out_high = state.out_high
    if state.out_high.shape[1] > 1:
        v = load_rows(means.v + BLOCK_DV, block, means.VALUE_DIM, keep, means.VALUE_DIM - BLOCK_DV, BLOCK_DV)
        out_high = product(weights, v, state.out_high * shrink[:, None])
    return Softmax(out, out_high, total, top)


@triton.jit
def is_selected(bits, block, keep):
    """Whether the row of bits has each of some key blocks; False where ``keep`` is."""
    words = tl.load(bits + block // 32, mask=keep, other=0)
    return ((words >> (block % 32)) & 1) != 0


@triton.jit
def log_lengths(block, keys, BLOCK_K: tl.constexpr):
    """Log2 of the number of live keys of some key blocks."""
    first = block * BLOCK_K
    return tl.log2(tl.maximum(tl.minimum(first + BLOCK_K, keys) - first, 1).to(tl.float32))
