"""What the model allows, in kernels: `gossamer.plan.Extent` of one batch row, and masks and ranges from it.

Everything is in positions, 0 being the batch row's first live key. A live query may attend a live key if
``key - query < ahead`` and ``query - key < behind``: causality is ``ahead`` 1, a window of the model's own both.
"""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

__all__ = ["Extent", "allowed", "load_extent", "seen"]


class Extent(NamedTuple):
    """Of one batch row: the position of query row 0; those of live queries, half-open; the slot of key position 0; the
    number of live keys; how far ahead of a query and behind it keys are allowed."""

    query_start: Any
    first: Any
    past: Any
    key_start: Any
    keys: Any
    ahead: Any
    behind: Any


@triton.jit
def load_extent(extent_ptr, batch, b):
    """From int32 ``[6, batch]``: query_start, query_count, key_start, key_count, ahead, behind."""
    query_start = tl.load(extent_ptr + b)
    first = tl.maximum(query_start, 0)
    past = first + tl.load(extent_ptr + batch + b)
    key_start = tl.load(extent_ptr + 2 * batch + b)
    keys = tl.load(extent_ptr + 3 * batch + b)
    ahead = tl.load(extent_ptr + 4 * batch + b)
    return Extent(query_start, first, past, key_start, keys, ahead, tl.load(extent_ptr + 5 * batch + b))


@triton.jit
def seen(extent, lowest, highest):
    """Keys that some query from ``lowest`` to ``highest`` may attend, half-open."""
    low = tl.maximum(lowest - extent.behind + 1, 0)
    return low, tl.maximum(tl.minimum(highest + extent.ahead, extent.keys), low)


@triton.jit
def allowed(extent, query, key):
    """Which pairs of live positions are allowed: ``[queries, keys]``."""
    distance = query[:, None] - key[None, :]
    return (distance > -extent.ahead) & (distance < extent.behind)
