"""Which keys matter to a tile of query rows: arithmetic on causality, live keys, the model's own window and bands."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.matrices import ceil_div

__all__ = ["BandTiles", "Pairs", "Ranges", "allowed", "band_tiles", "banded", "key_ranges", "lower_bound"]


class Pairs(NamedTuple):
    """What the model allows, and the bands of one head of the plan: slots, and tokens."""

    live_begin: Any
    live_end: Any
    sink_end: Any
    window: Any
    limit: Any
    CAUSAL: Any
    LIMITED: Any


class Ranges(NamedTuple):
    """Half-open ranges of key slots: that some row may attend; that every row may; of the first, those outside the
    bands of some row; of these, full ones: every row may attend them, and no band holds any."""

    low: Any
    high: Any
    every_low: Any
    every_high: Any
    outer_low: Any
    outer_high: Any
    full_low: Any
    full_high: Any


class BandTiles(NamedTuple):
    """Tiles of the bands: those of the sink, then those of the window that are not among them. Half-open ranges of tile
    numbers; ``full`` ones, of the window, hold only pairs that count. ``partial`` is the number of the others."""

    sink_first: Any
    sink_past: Any
    window_first: Any
    full_first: Any
    full_past: Any
    partial: Any


@triton.jit
def key_ranges(queries, pairs):
    low = pairs.live_begin
    high = pairs.live_end
    every_low = low
    every_high = high
    if pairs.CAUSAL:
        high = tl.minimum(high, queries.highest + 1)
        every_high = tl.minimum(every_high, queries.lowest + 1)
    if pairs.LIMITED:
        low = tl.maximum(low, queries.lowest - pairs.limit + 1)
        high = tl.minimum(high, queries.highest + pairs.limit)
        every_low = tl.maximum(every_low, queries.highest - pairs.limit + 1)
        every_high = tl.minimum(every_high, queries.lowest + pairs.limit)
    high = tl.maximum(high, low)
    outer_low = tl.minimum(tl.maximum(low, pairs.sink_end), high)
    outer_high = high
    if pairs.CAUSAL:
        outer_high = tl.minimum(outer_high, queries.highest - pairs.window + 1)
    outer_high = tl.maximum(outer_high, outer_low)
    full_low = tl.maximum(every_low, pairs.sink_end)
    full_high = tl.where(pairs.window > 0, tl.minimum(every_high, queries.lowest - pairs.window + 1), every_high)
    full_low = tl.minimum(tl.maximum(full_low, outer_low), outer_high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), outer_high)
    return Ranges(low, high, every_low, every_high, outer_low, outer_high, full_low, full_high)


@triton.jit
def band_tiles(queries, pairs, ranges, TILE_N: tl.constexpr):
    """Bands, as tiles of consecutive slots."""
    sink_high = tl.minimum(ranges.high, pairs.sink_end)
    sink_first = ranges.low // TILE_N
    sink_past = tl.where(sink_high > ranges.low, ceil_div(sink_high, TILE_N), sink_first)
    window = pairs.window
    low = tl.maximum(ranges.low, queries.lowest - window + 1)
    high = tl.minimum(ranges.high, queries.highest + window)
    some = (window > 0) & (high > low)
    window_first = tl.where(some, tl.maximum(low // TILE_N, sink_past), 0)
    window_past = tl.where(some, tl.maximum(ceil_div(high, TILE_N), window_first), 0)
    full_low = tl.maximum(tl.maximum(ranges.every_low, queries.highest - window + 1), 0)
    full_high = tl.maximum(tl.minimum(ranges.every_high, queries.lowest + window), 0)
    full_first = tl.minimum(tl.maximum(ceil_div(full_low, TILE_N), window_first), window_past)
    full_past = tl.minimum(tl.maximum(full_high // TILE_N, full_first), window_past)
    partial = sink_past - sink_first + full_first - window_first + window_past - full_past
    return BandTiles(sink_first, sink_past, window_first, full_first, full_past, partial)


@triton.jit
def allowed(queries, slots, keep, pairs):
    """Which pairs the model allows, of the keys ``keep``: ``[TILE_M, TILE_N]``, or ``[1, TILE_N]`` where rows agree."""
    mask = keep[None, :]
    if pairs.CAUSAL:
        mask = mask & (slots[None, :] <= queries.slots[:, None])
    if pairs.LIMITED:
        mask = mask & (tl.abs(queries.slots[:, None] - slots[None, :]) < pairs.limit)
    return mask


@triton.jit
def banded(queries, slots, pairs):
    """Which pairs are in a band."""
    return (slots < pairs.sink_end)[None, :] | (tl.abs(queries.slots[:, None] - slots[None, :]) < pairs.window)


@triton.jit
def lower_bound(values, low, high, value):
    """The first index in ``[low, high)`` whose value is at least ``value``."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low
