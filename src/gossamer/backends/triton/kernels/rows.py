"""Rows of a tile of queries: tokens of one query block times the query heads that share its plan."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl

from gossamer.backends.triton.kernels.softmax import Queries

__all__ = ["Rows", "load_queries", "tile_rows", "with_steps"]


class Rows(NamedTuple):
    """Rows of a tile, ``[TILE_M]`` each: query rows, query heads, and which of them exist."""

    row: Any
    head: Any
    exists: Any


@triton.jit
def tile_rows(
    extent, block, tile, plan_head, query_len, order,
    SHARE: tl.constexpr, BLOCK_Q: tl.constexpr, TILE_M: tl.constexpr, PERMUTED: tl.constexpr,
):  # fmt: skip
    packed = tile * TILE_M + tl.arange(0, TILE_M)
    inside = packed < BLOCK_Q * SHARE
    token = block * BLOCK_Q + packed // SHARE
    if PERMUTED:  # blocks of ranks
        inside = inside & (token < query_len)
        position = extent.first + tl.load(order + token, mask=inside, other=0)
    else:  # blocks of positions, from the one that holds the first live query
        position = extent.first // BLOCK_Q * BLOCK_Q + token
    exists = inside & (position >= extent.first) & (position < extent.past)
    return Rows(position - extent.query_start, plan_head * SHARE + packed % SHARE, exists)


@triton.jit
def load_queries(base, head_stride, stride, extent, rows, DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    pointers = base + rows.head.to(tl.int64) * head_stride + rows.row.to(tl.int64) * stride
    dim = tl.arange(0, BLOCK_D)
    q = tl.load(pointers[:, None] + dim[None, :], mask=rows.exists[:, None] & (dim < DIM)[None, :], other=0.0)
    positions = rows.row + extent.query_start
    lowest = tl.min(tl.where(rows.exists, positions, 1 << 30), 0)
    highest = tl.max(tl.where(rows.exists, positions, -(1 << 30)), 0)
    return Queries(q, positions, lowest, highest, 0.0, 0.0, 0.0, 0.0, 0.0)


@triton.jit
def with_steps(queries, steps, shifts, exists):
    """Queries in int8 with their steps and shifts, at pointers ``[TILE_M]``."""
    step = tl.load(steps, mask=exists, other=0.0)
    shift = tl.load(shifts, mask=exists, other=0.0)
    return Queries(queries.q, queries.positions, queries.lowest, queries.highest, 0.0, 0.0, 0.0, step, shift)
