"""Attention mass of blocks, from logits and a given LSE: the definition beside which the kernels are tested."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.torch.tiles import Piece, RowMass, key_pieces, query_pieces
from gossamer.call import AttentionCall
from gossamer.plan import Grid

__all__ = ["add_blocks", "block_mass", "check_lse"]


def block_mass(call: AttentionCall, lse: Tensor, grid: Grid, part: range) -> Tensor:
    """Sums of ``exp(logit - lse)`` over the allowed pairs of each block (AdaSpa, 2502.21079).

    Args:
        lse: fp32 ``[B, H, S]`` (fp64 beside fp64 tensors), of these logits or of others, as of an earlier step; sinks
            are in it or not. Rows for which it is -inf attend nothing.
        part: plan rows.

    Returns:
        fp32 ``[B, H, len(part), N]``; 0 in rows that a batch row lacks.

    Raises:
        ValueError: a shape that does not fit.
    """
    check_lse(call, lse)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    blocks = torch.zeros(call.batch, call.heads, len(part), grid.key_blocks, device=call.device)
    for row in range(call.batch):
        tiles = RowMass(call, lse, row)
        for queries in query_pieces(grid, row, part, tiles.most_queries):
            for keys in key_pieces(grid, row, tiles.most_keys):
                mass = tiles.mass(queries.tokens, keys.tokens)
                if mass is not None:
                    add_blocks(blocks[row], queries, keys, queries.sums(mass, -2))
    return blocks


def add_blocks(blocks: Tensor, queries: Piece, keys: Piece, by_query_block: Tensor) -> None:
    """Add sums by query block ``[H, m, keys]`` to the blocks ``[H, M, N]`` that they are of."""
    part = keys.sums(by_query_block, -1)
    m, n = queries.first_block, keys.first_block
    blocks[:, m : m + part.shape[1], n : n + part.shape[2]] += part


def check_lse(call: AttentionCall, lse: Tensor) -> None:
    """Raise for an LSE that is not one number a query row.

    Raises:
        ValueError: it is of another shape.
    """
    if lse.shape != call.q.shape[:3]:
        raise ValueError(
            f"lse must be [batch, heads, queries] = {tuple(call.q.shape[:3])}, got {tuple(lse.shape)}; "
            "make it with gossamer.oracle.log_sum_exp"
        )
