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
    number of live keys; a pointer to ``ahead`` and ``behind``, which are loaded where they are used, since registers
    are scarce in between."""

    query_start: Any
    first: Any
    past: Any
    key_start: Any
    keys: Any
    reach: Any


@triton.jit
def load_extent(extent_ptr, b):
    """From int32 ``[batch, 6]``: query_start, query_count, key_start, key_count, ahead, behind."""
    row = extent_ptr + 6 * b
    query_start = tl.load(row)
    first = tl.maximum(query_start, 0)
    return Extent(query_start, first, first + tl.load(row + 1), tl.load(row + 2), tl.load(row + 3), row + 4)


@triton.jit
def seen(extent, lowest, highest):
    """Keys that some query from ``lowest`` to ``highest`` may attend, half-open."""
    low = tl.maximum(lowest - tl.load(extent.reach + 1) + 1, 0)
    return low, tl.maximum(tl.minimum(highest + tl.load(extent.reach), extent.keys), low)


@triton.jit
def allowed(extent, query, key):
    """Which pairs of live positions are allowed: ``[queries, keys]``."""
    distance = query[:, None] - key[None, :]
    return (distance > -tl.load(extent.reach)) & (distance < tl.load(extent.reach + 1))
