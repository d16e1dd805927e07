"""Which keys matter to a tile of query rows: arithmetic on what the model allows, and on the bands of the plan."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.extent import seen
from gossamer.backends.triton.kernels.matrices import ceil_div

__all__ = ["BandTiles", "Bands", "Ranges", "band_tiles", "banded", "key_ranges", "lower_bound"]


class Bands(NamedTuple):
    """Of one head of the plan, in tokens."""

    sink: Any
    window: Any


class Ranges(NamedTuple):
    """Half-open ranges of keys: that some row may attend; that every row may; of the first, those outside the bands of
    some row; of these, full ones: every row may attend them, and no band holds any."""

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
def key_ranges(queries, extent, bands):
    """All empty where no row is live: then the lowest position lies far above the highest."""
    low, high = seen(extent, queries.lowest, queries.highest)
    ahead, behind = tl.load(extent.reach), tl.load(extent.reach + 1)
    every_low = tl.maximum(queries.highest - behind + 1, 0)
    every_high = tl.minimum(queries.lowest + ahead, extent.keys)
    outer_low = tl.minimum(tl.maximum(low, bands.sink), high)
    outer_high = high
    if_causal = tl.minimum(high, queries.highest - bands.window + 1)  # keys after it are all in the window
    outer_high = tl.maximum(tl.where(ahead == 1, if_causal, high), outer_low)
    full_low = tl.maximum(every_low, bands.sink)
    full_high = tl.where(bands.window > 0, tl.minimum(every_high, queries.lowest - bands.window + 1), every_high)
    full_low = tl.minimum(tl.maximum(full_low, outer_low), outer_high)
    full_high = tl.minimum(tl.maximum(full_high, full_low), outer_high)
    return Ranges(low, high, every_low, every_high, outer_low, outer_high, full_low, full_high)


@triton.jit
def band_tiles(queries, bands, ranges, TILE_N: tl.constexpr):
    """Bands, as tiles of consecutive keys."""
    sink_high = tl.minimum(ranges.high, bands.sink)
    sink_first = ranges.low // TILE_N
    sink_past = tl.where(sink_high > ranges.low, ceil_div(sink_high, TILE_N), sink_first)
    low = tl.maximum(ranges.low, queries.lowest - bands.window + 1)
    high = tl.minimum(ranges.high, queries.highest + bands.window)
    some = (bands.window > 0) & (high > low)
    window_first = tl.where(some, tl.maximum(low // TILE_N, sink_past), 0)
    window_past = tl.where(some, tl.maximum(ceil_div(high, TILE_N), window_first), 0)
    full_low = tl.maximum(ranges.every_low, queries.highest - bands.window + 1)
    full_high = tl.maximum(tl.minimum(ranges.every_high, queries.lowest + bands.window), 0)
    full_first = tl.minimum(tl.maximum(ceil_div(full_low, TILE_N), window_first), window_past)
    full_past = tl.minimum(tl.maximum(full_high // TILE_N, full_first), window_past)
    partial = sink_past - sink_first + full_first - window_first + window_past - full_past
    return BandTiles(sink_first, sink_past, window_first, full_first, full_past, partial)


@triton.jit
def banded(bands, query, key):
    """Which pairs are in a band: ``[queries, keys]``."""
    return (key < bands.sink)[None, :] | (tl.abs(query[:, None] - key[None, :]) < bands.window)


@triton.jit
def lower_bound(values, low, high, value):
    """The first index in ``[low, high)`` whose value is at least ``value``."""
    while low < high:
        middle = (low + high) // 2
        below = tl.load(values + middle) < value
        low = tl.where(below, middle + 1, low)
        high = tl.where(below, high, middle)
    return low
