"""The exact oracle: where the attention mass of a call lies, streamed, with GQA never expanded.

The mass of a pair is its softmax weight, ``exp(logit - lse)``. All arithmetic is in fp32 (fp64 for fp64 input), also
for bf16 tensors, and nothing grows with S x T: a tile of queries by keys holds a few MiB. Everything is in positions;
blocks are those of a `gossamer.plan.Grid`.

Dead queries have no mass. The mass of a live one sums to 1 over the keys, less what a sink logit takes: it stands in
the denominator and has no key.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossamer import backends
from gossamer.backends.torch.attend import wide
from gossamer.backends.torch.mass import add_blocks, check_lse
from gossamer.backends.torch.scores import diagonal_sums
from gossamer.backends.torch.tiles import Piece, RowMass, key_pieces, query_pieces
from gossamer.call import AttentionCall
from gossamer.plan import Grid, SparsePlan

__all__ = ["ExactMasses", "block_mass", "block_peaks", "exact_masses", "log_sum_exp", "plan_recall"]


def log_sum_exp(call: AttentionCall) -> Tensor:
    """Natural log of the softmax denominator of dense attention, sinks included: ``[B, H, S]``, fp32.

    -inf (or the sink's logit) for a row that attends nothing; fp64 for fp64 input.
    """
    return _plan_lse(call, SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent))


def _plan_lse(call: AttentionCall, plan: SparsePlan) -> Tensor:
    q, k = wide(call.q), wide(call.k)
    return backends.attend(replace(call, q=q, k=k, v=k.new_zeros(*k.shape[:-1], 1)), plan)[1]


def block_mass(call: AttentionCall, lse: Tensor, grid: Grid) -> Tensor:
    """Attention mass of each block: summed over the live queries of a query block and the keys of a key block.

    Args:
        lse: of dense attention, ``[B, H, S]``, from `log_sum_exp`; it brings the sinks in.

    Returns:
        fp32 ``[B, H, M, N]``. A row of blocks sums to the number of live rows in the query block, less the sinks'.

    Raises:
        ValueError: a shape that does not fit.
    """
    check_lse(call, lse)
    exact = replace(call, q=wide(call.q), k=wide(call.k), v=None)
    backend = backends.backend_of(exact, "block_mass")
    return backend.block_mass(exact, lse, grid, range(grid.query_blocks))


def block_peaks(call: AttentionCall, lse: Tensor, grid: Grid) -> Tensor:
    """Largest attention mass of a pair in each block, of live queries and keys (SeerAttention's teacher, 2410.13276).

    Args, Raises: see `block_mass`.

    Returns:
        fp32 ``[B, H, M, N]``; 0 where no pair is allowed.
    """
    blocks = torch.zeros(call.batch, call.heads, grid.query_blocks, grid.key_blocks, device=call.device)
    for row, queries, keys, mass in _tiles(call, lse, grid):
        peaks = keys.peaks(queries.peaks(mass, -2), -1)
        m, n = queries.first_block, keys.first_block
        part = blocks[row, :, m : m + peaks.shape[1], n : n + peaks.shape[2]]
        torch.maximum(part, peaks, out=part)
    return blocks


def _tiles(call: AttentionCall, lse: Tensor, grid: Grid) -> Iterator[tuple[int, Piece, Piece, Tensor]]:
    """The softmax mass of all pairs, in tiles: batch row, queries, keys, ``[H, queries, keys]``."""
    check_lse(call, lse)
    for row in range(call.batch):
        tiles = RowMass(call, lse, row)
        for queries in query_pieces(grid, row, range(grid.query_blocks), tiles.most_queries):
            for keys in key_pieces(grid, row, tiles.most_keys):
                mass = tiles.mass(queries.tokens, keys.tokens)
                if mass is not None:
                    yield row, queries, keys, mass


@dataclass(frozen=True, slots=True, eq=False)
class ExactMasses:
    """Attention mass by key, by distance and by block, summed over the counted queries.

    Fields:
        columns: fp32 ``[B, H, positions]``, by key position. diagonals: the same by distance ``|pos(i) - pos(j)|``.
        blocks: fp32 ``[B, H, m, N]``, of the query blocks that were counted.
        query_blocks: which these are; ``range(M)`` unless they were sampled.
        rows: int64 ``[B]``, the number of live queries that were counted. Each of the three sums to it, less the
            sinks', and diagonals less what lies at distances beyond the last position.
    """

    columns: Tensor
    diagonals: Tensor
    blocks: Tensor
    query_blocks: range
    rows: Tensor


def exact_masses(
    call: AttentionCall,
    *,
    lse: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    step: int = 1,
    offset: int | None = None,
) -> ExactMasses:
    """Mass of every column, diagonal and block of dense attention, in one streaming pass.

    Args:
        lse: of dense attention, ``[B, H, S]``, if it is there already.
        step: count every ``step``-th query block only, which costs that much less. The sums of all offsets add up to
            those of ``step=1``, so the share of a column, diagonal or block row is unbiased over a random offset.
        offset: the first query block counted, below ``step``; the middle one unless given.

    Raises:
        ValueError: ``step`` or ``offset`` out of range, or a shape that does not fit.
    """
    grid = Grid(call.extent, block_q, block_k)
    if step < 1 or (offset is not None and not 0 <= offset < step):
        raise ValueError(f"exact_masses needs step >= 1 and 0 <= offset < step, got step={step}, offset={offset}")
    first = min(step // 2, max(0, grid.query_blocks - 1)) if offset is None else offset
    chosen = range(first, grid.query_blocks, step)
    lse = _lse_of(call, grid, chosen) if lse is None else lse
    check_lse(call, lse)
    columns = torch.zeros(call.batch, call.heads, call.extent.longest, device=call.device)
    diagonals = torch.zeros_like(columns)
    blocks = torch.zeros(call.batch, call.heads, len(chosen), grid.key_blocks, device=call.device)
    rows = torch.zeros(call.batch, dtype=torch.int64, device="cpu")
    for row in range(call.batch):
        tiles = RowMass(call, lse, row)
        for queries in query_pieces(grid, row, chosen, tiles.most_queries):
            rows[row] += len(queries.tokens)
            for keys in key_pieces(grid, row, tiles.most_keys):
                mass = tiles.mass(queries.tokens, keys.tokens)
                if mass is None:
                    continue
                by_query_block = queries.sums(mass, -2)
                columns[row, :, keys.tokens.start : keys.tokens.stop] += by_query_block.sum(dim=1)
                add_blocks(blocks[row], queries, keys, by_query_block)
                _add_diagonals(diagonals[row], mass, queries.tokens, keys.tokens)
    return ExactMasses(columns, diagonals, blocks, chosen, rows)


def _lse_of(call: AttentionCall, grid: Grid, chosen: range) -> Tensor:
    """`log_sum_exp` of the query blocks that count, -inf elsewhere."""
    if chosen == range(grid.query_blocks):
        return log_sum_exp(call)
    lse = torch.full(call.q.shape[:3], float("-inf"), dtype=wide(call.q[:0]).dtype, device=call.device)
    for row in range(call.batch):
        one = slice(row, row + 1)
        extent = call.extent.of_rows(one)
        for m in chosen:
            first, stop = (int(n) - int(extent.query_start) for n in grid.queries[row, m])
            if first < stop:
                q, k = call.q[one, :, first:stop], call.k[one]
                own = extent.of_queries(first, stop)
                part = replace(call, q=q, k=k, v=None, extent=own, layout=None, state=None)
                lse[one, :, first:stop] = log_sum_exp(part)
    return lse


def _add_diagonals(diagonals: Tensor, mass: Tensor, queries: range, keys: range) -> None:
    """Add a tile's sums by distance, in place."""
    sums = diagonal_sums(mass)  # by key minus query, from that of the last query and the first key on
    distance = (torch.arange(sums.shape[-1], device=mass.device) + (keys.start - (queries.stop - 1))).abs()
    near = distance < diagonals.shape[-1]
    diagonals.index_add_(1, distance[near], sums[:, near])


def plan_recall(call: AttentionCall, plan: SparsePlan, lse: Tensor) -> Tensor:
    """Mean over the queries of the attention mass inside the plan: fp32 ``[B, H]``, ``exp(lse of plan - lse)``.

    Queries that attend nothing do not count. A sink's mass counts as inside, since every plan keeps it: the dense plan
    has recall 1. So has a batch row without queries that count.

    Args:
        lse: of dense attention with the same sinks, ``[B, H, S]``, from `log_sum_exp`.
    """
    lost = 1 - (_plan_lse(call, plan) - lse).exp()
    live = (
        call.extent.allowed(torch.arange(call.query_len, device="cpu"), call.key_len).any(-1).to(call.device)[:, None]
    )
    return 1 - (lost.masked_fill_(~live, 0.0).sum(dim=-1) / live.sum(dim=-1).clamp(min=1)).float()
