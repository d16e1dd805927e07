"""Scores: functions from a call to what methods select by. A handful serves everything.

All heads and batch rows at once, GQA never expanded, everything in positions: how much padding a row has and who shares
its batch change nothing. Block scores stream: they come in parts, each with the plan rows that it is for. What a row
does not see has score 0. The definitions, with their formulas, are in `gossamer.backends.torch.scores`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import Grid

__all__ = [
    "antidiagonal_scores",
    "block_attention",
    "last_query_probe",
    "pool_key_bounds",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]


def last_query_probe(call: AttentionCall, last: int = 64) -> tuple[Tensor, Tensor]:
    """Attention mass of each key position and each distance under the last ``last`` live queries (2407.02490, Alg. 2).

    Returns:
        columns, diagonals: fp32 ``[B, H, positions]``; 0 from a row's own number of keys on. Queries that lie beyond
        the keys, as in cross-attention, may have mass at larger distances: it is in the columns alone.
    """
    columns, diagonals = backend_of(call, "last_query_probe").last_query_probe(call, last)
    keys = call.extent.key_count
    if bool((keys != call.extent.longest).any()):
        beyond = torch.arange(call.extent.longest, device="cpu") >= keys[:, None]
        diagonals = diagonals.masked_fill(beyond[:, None].to(call.device, non_blocking=True), 0.0)
    return columns, diagonals


def pool_keys(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean of the live keys of each key block, fp32 ``[B, G, N, D]``."""
    return backend_of(call, "pool_keys").pool_keys(call, grid)


def pool_key_bounds(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, by channel, of the live keys of each key block: fp32 ``[B, G, N, D]`` each."""
    return backend_of(call, "pool_key_bounds").pool_key_bounds(call, grid)


def pool_queries(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean of the live queries of each query block, fp32 ``[B, H, M, D]``."""
    return backend_of(call, "pool_queries").pool_queries(call, grid)


def pooled_scores(call: AttentionCall, grid: Grid) -> Iterator[tuple[range, Tensor]]:
    """Mean query times mean key of each block pair (MInference block-sparse, 2407.02490, 3.2): logits, but for a scale.

    They are not scaled, which changes no order; under a negative scale their sign is turned.

    Yields:
        plan rows, and scores fp32 ``[B, H, rows, N]``.
    """
    backend = backend_of(call, "pooled_scores")
    queries, keys = pool_queries(call, grid), pool_keys(call, grid)
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        scores = backend.pooled_scores(call, grid, queries, keys, part)
        yield part, -scores if call.scale < 0 else scores


def block_attention(
    call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, scale: float
) -> Iterator[tuple[range, Tensor]]:
    """Softmax over the key blocks that a query block sees, of one vector for each block (SeerAttention, 2410.13276).

    Args:
        queries: fp32 ``[B, H, M, C]``; keys: fp32 ``[B, G or H, N, C]``.

    Yields:
        plan rows, and shares fp32 ``[B, H, rows, N]``; each row sums to 1, or is 0 where it sees nothing.
    """
    backend = backend_of(call, "block_attention")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, backend.block_attention(call, grid, queries, keys, scale, part)


def row_block_energy(call: AttentionCall, grid: Grid) -> Iterator[tuple[range, Tensor]]:
    """Every query row against mean-pooled keys, summed over a query block and a GQA group (2608.19758).

    Yields:
        plan rows, and energies fp32 ``[B, G, rows, N]``.
    """
    backend = backend_of(call, "row_block_energy")
    keys = pool_keys(call, grid).to(call.q.dtype)
    for part in _parts(call, grid, call.groups, backend.PART_BYTES):
        yield part, backend.row_block_energy(call, grid, keys, part)


def antidiagonal_scores(call: AttentionCall, grid: Grid, stride: int = 8) -> Iterator[tuple[range, Tensor]]:
    """Attention mass of each block pair, from one antidiagonal in each cell of ``stride`` tokens (2503.16428, 3.1).

    Yields:
        plan rows, and scores fp32 ``[B, H, rows, N]``.

    Raises:
        ValueError: ``stride`` does not divide the block sizes.
    """
    if stride < 1 or grid.block_q % stride or grid.block_k % stride:
        raise ValueError(
            f"stride must divide block_q and block_k, got {stride} for blocks {grid.block_q} and {grid.block_k}"
        )
    backend = backend_of(call, "antidiagonal_scores")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, backend.antidiagonal_scores(call, grid, stride, part)


def _parts(call: AttentionCall, grid: Grid, heads: int, budget: int) -> Iterator[range]:
    return grid.parts(4 * call.batch * heads * grid.key_blocks, budget)
