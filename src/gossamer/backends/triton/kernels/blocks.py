"""Selected blocks and bands: full tiles, all of whose pairs count, and partial ones.

Of the blocks that a row of the plan lists, in ascending order, the full ones are consecutive, and found by bisection.
Of permuted ones all are full or none is, since which positions a block of ranks holds is not known: they are where
every row may attend every key, as in bidirectional attention, and there is no band. Not yet run on a GPU.
Loops over many tiles are software-pipelined, so each pass reads the index that the next one needs: an address that
waits for its index would stall the pipeline.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false, reportAssignmentType=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import allowed
from gossamer.backends.triton.kernels.matrices import ceil_div
from gossamer.backends.triton.kernels.ranges import banded, lower_bound
from gossamer.backends.triton.kernels.softmax import BY_KEY, BY_PAIR, UNMASKED, fold

__all__ = ["BlockTiles", "Blocks", "block_tiles", "full_tiles", "partial_tiles", "permuted_tiles"]


class Blocks(NamedTuple):
    """One row of the plan's block lists: a pointer to its row pointer, the indices, and the head's key order."""

    indptr: Any
    indices: Any
    order: Any
    key_len: Any
    BLOCK_K: Any
    LISTED: Any
    PERMUTED: Any


class BlockTiles(NamedTuple):
    """The entries of a row that matter: from ``first`` on, ``before`` partial blocks, full ones from ``full`` to
    ``full_past``, then partial ones again; how many tiles the full and the partial blocks have."""

    first: Any
    before: Any
    full: Any
    full_past: Any
    full_tiles: Any
    partial_tiles: Any


@triton.jit
def block_tiles(blocks, ranges, extent, TILE_N: tl.constexpr):
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    ALL_PARTIAL: tl.constexpr = blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0
    first = tl.zeros([], dtype=tl.int64)
    full = first
    full_past = first
    past = first
    if blocks.LISTED:
        past = tl.load(blocks.indptr + 1)
        first = tl.load(blocks.indptr)
        if blocks.PERMUTED:
            past = tl.where(ranges.high > ranges.low, past, first)
        else:
            past = lower_bound(blocks.indices, first, past, ceil_div(ranges.outer_high, blocks.BLOCK_K))
            first = lower_bound(blocks.indices, first, past, ranges.outer_low // blocks.BLOCK_K)
        full = past
        full_past = past
        if blocks.PERMUTED:
            full = tl.where((ranges.full_low <= 0) & (ranges.full_high >= extent.keys), first, past)
        elif not ALL_PARTIAL:
            full = lower_bound(blocks.indices, first, past, ceil_div(ranges.full_low, blocks.BLOCK_K))
            full_past = lower_bound(blocks.indices, full, past, ranges.full_high // blocks.BLOCK_K)
    before = (full - first).to(tl.int32)
    after = (past - full_past).to(tl.int32)
    return BlockTiles(
        first, before, full, full_past, (full_past - full).to(tl.int32) * PIECES, (before + after) * PIECES
    )


@triton.jit
def full_tiles(state, queries, keys, logits, blocks, listed, in_bands):
    """Full blocks that are not permuted, then full tiles of the window: nothing is masked."""
    TILE_N: tl.constexpr = keys.TILE_N
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    SOME: tl.constexpr = blocks.LISTED and not (blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0)
    every = tl.arange(0, TILE_N) >= 0
    indices = blocks.indices + listed.full
    of_blocks = listed.full_tiles if SOME else 0
    block = 0
    if SOME:
        block = tl.load(indices, mask=listed.full_tiles > 0, other=0)
    for n in range(0, of_blocks + in_bands.full_past - in_bands.full_first):
        start = (in_bands.full_first + n - of_blocks) * TILE_N
        if SOME:
            start = tl.where(n < listed.full_tiles, block * blocks.BLOCK_K + (n % PIECES) * TILE_N, start)
            block = tl.load(indices + (n + 1) // PIECES, mask=n + 1 < listed.full_tiles, other=0)
        state = fold(state, queries, keys, logits, start, every, every, UNMASKED)
    return state


@triton.jit
def permuted_tiles(state, queries, keys, logits, extent, blocks, listed):
    """Full blocks of ranks: dead keys, and what lies beyond the block or the last rank, are left out for all rows.

    Each pass finds the keys of the next.
    """
    positions, keep = ranked_keys(extent, blocks, listed, 0, keys.TILE_N)
    for n in range(0, listed.full_tiles):
        following, follow = ranked_keys(extent, blocks, listed, n + 1, keys.TILE_N)
        state = fold(state, queries, keys, logits, positions, keep, keep, BY_KEY)
        positions = following
        keep = follow
    return state


@triton.jit
def ranked_keys(extent, blocks, listed, n, TILE_N: tl.constexpr):
    """Positions of the n-th tile of full blocks, and which of them are live keys; 0 where not, which may be loaded."""
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    some = listed.full_tiles > n
    block = tl.load(blocks.indices + listed.full + n // PIECES, mask=some, other=0)
    offset = (n % PIECES) * TILE_N + tl.arange(0, TILE_N)
    rank = block * blocks.BLOCK_K + offset
    keep = (offset < blocks.BLOCK_K) & (rank < tl.where(some, blocks.key_len, 0))
    positions = tl.load(blocks.order + rank, mask=keep, other=0)
    keep = keep & (positions < extent.keys)
    return tl.where(keep, positions, 0), keep


@triton.jit
def partial_tiles(state, queries, keys, logits, extent, bands, blocks, listed, in_bands, begin, past):
    """The other blocks, without what is in the bands, and the other tiles of the bands: of all these, the tiles from
    ``begin`` to ``past - 1``."""
    TILE_N: tl.constexpr = keys.TILE_N
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    ALL_PARTIAL: tl.constexpr = blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0
    STAGES: tl.constexpr = None if blocks.LISTED and ALL_PARTIAL else 1  # few passes, unless all blocks are partial
    key = tl.arange(0, TILE_N)
    sink_tiles = in_bands.sink_past - in_bands.sink_first
    before_full = sink_tiles + in_bands.full_first - in_bands.window_first
    for n in tl.range(begin, past, num_stages=STAGES):
        band = n - listed.partial_tiles
        tile = tl.where(band < sink_tiles, in_bands.sink_first + band, in_bands.window_first + band - sink_tiles)
        tile = tl.where(band < before_full, tile, in_bands.full_past + band - before_full)
        positions = tile * TILE_N + key
        keep = key >= 0
        if blocks.LISTED:
            is_block = n < listed.partial_tiles
            number = n // PIECES
            entry = tl.where(number < listed.before, listed.first + number, listed.full_past + (number - listed.before))
            block = tl.load(blocks.indices + entry, mask=is_block, other=0)
            offset = (n % PIECES) * TILE_N + key
            positions = tl.where(is_block, block * blocks.BLOCK_K + offset, positions)
            keep = offset < tl.where(is_block, blocks.BLOCK_K, PIECES * TILE_N)
            if blocks.PERMUTED:
                ranked = keep & (positions < tl.where(is_block, blocks.key_len, 0))
                positions = tl.load(blocks.order + positions, mask=ranked, other=positions)
        keep = keep & (positions < extent.keys)
        mask = banded(bands, queries.positions, positions)
        if blocks.LISTED:
            mask = tl.where(is_block, ~mask, mask)
        mask = mask & keep[None, :] & allowed(extent, queries.positions, positions)
        state = fold(state, queries, keys, logits, positions, keep, mask, BY_PAIR)
    return state
