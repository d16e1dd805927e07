"""Selected blocks and bands: full tiles, all of whose pairs count, and partial ones.

Of the blocks that a row of the plan lists, in ascending order, the full ones are consecutive, and found by bisection.
Loops over many tiles are software-pipelined, so each pass reads the index that the next one needs: an address that
waits for its index would stall the pipeline.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div
from gossamer.backends.triton.kernels.ranges import allowed, banded, lower_bound
from gossamer.backends.triton.kernels.softmax import BY_PAIR, UNMASKED, fold

__all__ = ["BlockTiles", "Blocks", "block_tiles", "full_tiles", "partial_tiles"]


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
def block_tiles(blocks, ranges, TILE_N: tl.constexpr):
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    ALL_PARTIAL: tl.constexpr = blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0
    first = tl.zeros([], dtype=tl.int64)
    full = first
    full_past = first
    past = first
    if blocks.LISTED:
        past = tl.load(blocks.indptr + 1)
        first = tl.load(blocks.indptr)
        if not blocks.PERMUTED:
            past = lower_bound(blocks.indices, first, past, ceil_div(ranges.outer_high, blocks.BLOCK_K))
            first = lower_bound(blocks.indices, first, past, ranges.outer_low // blocks.BLOCK_K)
        full = past
        full_past = past
        if not ALL_PARTIAL:
            full = lower_bound(blocks.indices, first, past, ceil_div(ranges.full_low, blocks.BLOCK_K))
            full_past = lower_bound(blocks.indices, full, past, ranges.full_high // blocks.BLOCK_K)
    before = (full - first).to(tl.int32)
    after = (past - full_past).to(tl.int32)
    return BlockTiles(
        first, before, full, full_past, (full_past - full).to(tl.int32) * PIECES, (before + after) * PIECES
    )


@triton.jit
def full_tiles(state, queries, keys, logits, blocks, listed, bands):
    """Full blocks, then full tiles of the window: nothing is masked."""
    TILE_N: tl.constexpr = keys.TILE_N
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    SOME: tl.constexpr = blocks.LISTED and not (blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0)
    every = tl.arange(0, TILE_N) >= 0
    indices = blocks.indices + listed.full
    block = 0
    if SOME:
        block = tl.load(indices, mask=listed.full_tiles > 0, other=0)
    for n in range(0, listed.full_tiles + bands.full_past - bands.full_first):
        slot = (bands.full_first + n - listed.full_tiles) * TILE_N
        if SOME:
            slot = tl.where(n < listed.full_tiles, block * blocks.BLOCK_K + (n % PIECES) * TILE_N, slot)
            block = tl.load(indices + (n + 1) // PIECES, mask=n + 1 < listed.full_tiles, other=0)
        state = fold(state, queries, keys, logits, slot, every, every, UNMASKED)
    return state


@triton.jit
def partial_tiles(state, queries, keys, logits, pairs, blocks, listed, bands):
    """The other blocks, without what is in the bands, and the other tiles of the bands."""
    TILE_N: tl.constexpr = keys.TILE_N
    PIECES: tl.constexpr = (blocks.BLOCK_K + TILE_N - 1) // TILE_N
    ALL_PARTIAL: tl.constexpr = blocks.PERMUTED or blocks.BLOCK_K % TILE_N != 0
    STAGES: tl.constexpr = None if blocks.LISTED and ALL_PARTIAL else 1  # few passes, unless all blocks are partial
    key = tl.arange(0, TILE_N)
    sink_tiles = bands.sink_past - bands.sink_first
    before_full = sink_tiles + bands.full_first - bands.window_first
    for n in tl.range(0, listed.partial_tiles + bands.partial, num_stages=STAGES):
        band = n - listed.partial_tiles
        tile = tl.where(band < sink_tiles, bands.sink_first + band, bands.window_first + band - sink_tiles)
        tile = tl.where(band < before_full, tile, bands.full_past + band - before_full)
        slots = tile * TILE_N + key
        keep = key >= 0
        if blocks.LISTED:
            is_block = n < listed.partial_tiles
            number = n // PIECES
            entry = tl.where(number < listed.before, listed.first + number, listed.full_past + (number - listed.before))
            block = tl.load(blocks.indices + entry, mask=is_block, other=0)
            offset = (n % PIECES) * TILE_N + key
            slots = tl.where(is_block, block * blocks.BLOCK_K + offset, slots)
            keep = offset < tl.where(is_block, blocks.BLOCK_K, PIECES * TILE_N)
            if blocks.PERMUTED:
                ranked = keep & (slots < tl.where(is_block, blocks.key_len, 0))
                slots = tl.load(blocks.order + slots, mask=ranked, other=slots)
        keep = keep & (slots >= pairs.live_begin) & (slots < pairs.live_end)
        mask = banded(queries, slots, pairs)
        if blocks.LISTED:
            mask = tl.where(is_block, ~mask, mask)
        mask = mask & allowed(queries, slots, keep, pairs)
        state = fold(state, queries, keys, logits, slots, keep, mask, BY_PAIR)
    return state
