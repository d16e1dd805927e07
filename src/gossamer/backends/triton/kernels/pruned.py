"""Key blocks that are not selected, by their means: one more key a block."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div, load_rows, product
from gossamer.backends.triton.kernels.softmax import Softmax, capped, weighed

__all__ = ["Means", "add_means", "wholly_seen"]


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
    BLOCK_DV: tl.constexpr = state.out.shape[1]
    for n in range(means.low // TILE_N, ceil_div(means.high, TILE_N)):
        block = n * TILE_N + tl.arange(0, TILE_N)
        keep = (block >= means.low) & (block < means.high)
        if means.SELECTED:
            bits = tl.load(means.selected + block // 32, mask=keep, other=0)
            keep = keep & (((bits >> (block % 32)) & 1) == 0)
        k = load_rows(means.k, block, means.DIM, keep, means.DIM, BLOCK_D)
        scores = tl.zeros([queries.q.shape[0], TILE_N], dtype=tl.float32)
        scores = capped(product(queries.q, tl.trans(k), scores), logits)
        if not logits.SOFTCAP:
            scores = scores * logits.scale
        first = block * means.BLOCK_K
        length = tl.maximum(tl.minimum(first + means.BLOCK_K, means.keys) - first, 1).to(tl.float32)
        scores = tl.where(keep[None, :], scores + tl.log2(length)[None, :], float("-inf"))
        weights, shrink, total, top = weighed(state, scores, 1.0, True)
        v = load_rows(means.v, block, means.VALUE_DIM, keep, means.VALUE_DIM, BLOCK_DV)
        out = product(weights, v, state.out * shrink[:, None])
        out_high = state.out_high
        if state.out_high.shape[1] > 1:
            v = load_rows(means.v + BLOCK_DV, block, means.VALUE_DIM, keep, means.VALUE_DIM - BLOCK_DV, BLOCK_DV)
            out_high = product(weights, v, state.out_high * shrink[:, None])
        state = Softmax(out, out_high, total, top)
    return state
