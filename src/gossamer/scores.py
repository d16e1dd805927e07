"""Scores: functions from a call to what methods select by. A handful serves everything.

All heads and batch rows at once, GQA never expanded, everything in positions: how much padding a row has and who shares
its batch change nothing. Block scores stream: they come in parts, each with the plan rows that it is for. What a row
does not see has score 0. The definitions, with their formulas, are in `gossamer.backends.torch.scores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import Extent, Grid, ceil_div

__all__ = [
    "antidiagonal_scores",
    "block_sums",
    "group_differences",
    "last_query_probe",
    "masked_softmax",
    "mean_row_maxima",
    "order_in_segments",
    "pool_keys",
    "pool_queries",
    "pooled_mass",
    "pooled_scores",
    "probed_blocks",
    "reorder_keys",
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


def block_sums(mass: Tensor, block: int, before: Tensor | None = None) -> Tensor:
    """Sums of a mass ``[B, H, positions]`` over blocks of positions, or of distances: fp32 ``[B, H, N]``.

    Args:
        before: int64 ``[B]``, so many of the first block's numbers lie before 0; then there may be one block more.
    """
    if before is not None:
        width = mass.shape[-1]
        source = torch.arange(width + block, device=mass.device) - before.to(mass.device)[:, None]
        inside = ((source >= 0) & (source < width))[:, None]
        source = source.clamp(0, max(0, width - 1))[:, None].expand(-1, mass.shape[1], -1)
        mass = mass.gather(2, source) * inside if width else mass
    return F.pad(mass, (0, -mass.shape[-1] % block)).unflatten(-1, (-1, block)).sum(dim=-1)


def probed_blocks(call: AttentionCall, grid: Grid, columns: Tensor, last: int) -> tuple[Tensor, Tensor]:
    """How the last ``last`` live queries share out attention among key blocks: exactly, and by means alone.

    The second is the softmax over ``scale * mean of these queries . mean of a block's keys``; FlexPrefill trusts means
    where the two are close (2502.20766, 4.1).

    Args:
        columns: of `last_query_probe`.

    Returns:
        exact, by_means: fp32 ``[B, H, N]``; both sum to 1, or are 0 where nothing is attended.
    """
    extent = call.extent
    exact = block_sums(columns, grid.block_k)
    exact = exact / exact.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(exact.dtype).tiny)
    rows = extent.query_count.clamp(max=last)
    end = extent.first_position + extent.query_count
    low, high = torch.zeros_like(end), extent.key_count
    if extent.causal:
        high = high.minimum(end)
    if extent.limit is not None:
        low, high = (end - rows - extent.limit + 1).clamp(min=0), high.minimum(end - 1 + extent.limit)
    block = torch.arange(grid.key_blocks, device="cpu")
    seen = (block >= low[:, None] // grid.block_k) & (block * grid.block_k < high[:, None]) & (rows > 0)[:, None]
    queries = _mean_of_last(call, rows).unflatten(1, (call.groups, call.share))
    logits = (queries @ pool_keys(call, grid).transpose(-1, -2)).flatten(1, 2) * call.scale
    return exact, masked_softmax(logits, seen.to(call.device)[:, None])


def _mean_of_last(call: AttentionCall, rows: Tensor) -> Tensor:
    """Mean of the last ``rows`` ``[B]`` live queries, fp32 ``[B, H, D]``."""
    most = int(rows.max()) if rows.numel() else 0
    ordinal = torch.arange(most, device="cpu")
    index = (call.extent.first_query + call.extent.query_count - rows)[:, None] + ordinal
    index = index.clamp(max=max(0, call.query_len - 1)).to(call.device)[:, None, :, None]
    inside = (ordinal < rows[:, None]).to(call.device)[:, None, :, None]
    queries = call.q.gather(2, index.expand(-1, call.heads, -1, call.q.shape[-1])).float()
    total = torch.where(inside, queries, 0.0).sum(dim=2)
    return total / rows.clamp(min=1).to(call.device)[:, None, None]


def masked_softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Over the last dimension of what is seen; 0 elsewhere, and where nothing is seen."""
    share = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return share.masked_fill_(~seen, 0.0)


def order_in_segments(call: AttentionCall, mass: Tensor, segment: int) -> Tensor:
    """Key positions by rank: inside each segment the largest mass first, of equal ones the lower position.

    Segments that are not full of live keys stay in order (PBS-Attn, 2510.21270).

    Args:
        mass: ``[B, heads, positions]``; segment: positions.

    Returns:
        int64 ``[B, heads, T]``, as `SparsePlan.k_order` has them.
    """
    number = ceil_div(call.key_len, segment)
    rows = F.pad(mass, (0, number * segment - mass.shape[-1])).unflatten(-1, (number, segment))
    ranks = rows.argsort(dim=-1, descending=True, stable=True)
    full = torch.arange(number, device="cpu") < (call.extent.key_count // segment)[:, None]
    place = torch.arange(segment, device=call.device)
    ranks = torch.where(full.to(call.device)[:, None, :, None], ranks, place)
    return (ranks + torch.arange(number, device=call.device)[:, None] * segment).flatten(-2)[..., : call.key_len]


def reorder_keys(call: AttentionCall, order: Tensor, segment: int) -> AttentionCall:
    """The call with each head's keys by rank, for scores of their blocks; it has as many key heads as the order.

    Its window reaches a segment further, so that it sees all blocks of the segments that are seen. Holds a copy of the
    keys: where the query heads of a group have orders of their own, one for each.

    Args:
        order: ``[B, heads, T]`` of `order_in_segments`, with G or H heads.
    """
    extent, length = call.extent, call.key_len
    slots = torch.arange(length, device=call.device)
    start, count = (x.to(call.device)[:, None] for x in (extent.key_start, extent.key_count))
    rank = slots - start
    source = order.gather(2, rank.clamp(0, max(0, length - 1))[:, None].expand_as(order)) + start[:, None]
    source = torch.where(((rank >= 0) & (rank < count))[:, None], source, slots)
    source = source.unflatten(1, (call.groups, order.shape[1] // call.groups))
    keys = call.k[:, :, None].take_along_dim(source[..., None], dim=3).flatten(1, 2)
    given = (extent.query_start, extent.query_count, extent.key_start, extent.key_count)
    limit = None if extent.limit is None else extent.limit + segment - 1
    return replace(call, k=keys, v=None, extent=Extent(*given, causal=extent.causal, limit=limit))


def pool_keys(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean of the live keys of each key block, fp32 ``[B, G, N, D]``."""
    return backend_of(call, "pool_keys").pool_keys(call, grid)


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


def pooled_mass(call: AttentionCall, grid: Grid) -> Iterator[tuple[range, Tensor]]:
    """Share of each key block in the softmax over ``scale * mean query . mean key`` of what a query block sees.

    Yields:
        plan rows, and shares fp32 ``[B, H, rows, N]``; each row sums to 1, or is 0 where it sees nothing.
    """
    for part, products in pooled_scores(call, grid):
        yield part, masked_softmax(products * abs(call.scale), grid.sees(part, call.device)[:, None])


def row_block_energy(call: AttentionCall, grid: Grid) -> Iterator[tuple[range, Tensor]]:
    """Every query row against mean-pooled keys, summed over a query block and a GQA group (2608.19758).

    Yields:
        plan rows, and energies fp32 ``[B, G, rows, N]``.
    """
    backend = backend_of(call, "row_block_energy")
    keys = pool_keys(call, grid).to(call.q.dtype)
    for part in _parts(call, grid, call.groups, backend.PART_BYTES):
        yield part, backend.row_block_energy(call, grid, keys, part)


def mean_row_maxima(call: AttentionCall, grid: Grid, regions: Tensor) -> Tensor:
    """Mean over a query block's rows of the largest logit in some regions (2505.23520): fp32 ``[B, H, M]``.

    -inf for a block of which no row sees a key there.

    Args:
        regions: int64 ``[B, M, R, 2]``, half-open ranges of positions.
    """
    backend = backend_of(call, "mean_row_maxima")
    return backend.mean_row_maxima(call, grid, regions, range(grid.query_blocks))


def group_differences(call: AttentionCall, grid: Grid, anchors: Tensor, group: int) -> Iterator[tuple[range, Tensor]]:
    """How far each key's logit rises above the anchor in the best block of a group of query blocks (2505.23520).

    Logits are of mean queries, ``scale * mean query . key``.

    Args:
        anchors: ``[B, H, M]``, as `mean_row_maxima` has them.
        group: consecutive plan rows.

    Yields:
        groups, and differences fp32 ``[B, H, groups, positions]``; -inf where no block of a group sees a key.
    """
    backend = backend_of(call, "group_differences")
    queries, groups = pool_queries(call, grid), ceil_div(grid.query_blocks, group)
    step = max(1, backend.PART_BYTES // max(1, 4 * call.batch * call.heads * call.extent.longest))
    for first in range(0, groups, step):
        part = range(first, min(first + step, groups))
        yield part, backend.group_differences(call, grid, queries, anchors, group, part)


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
