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
    "antidiagonal_means",
    "antidiagonal_peaks",
    "antidiagonal_scores",
    "key_similarity",
    "last_query_probe",
    "last_query_products",
    "pool_keys",
    "pool_queries",
    "pooled_mass",
    "pooled_scores",
    "query_similarity",
    "row_block_energy",
    "value_bonus",
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


def last_query_products(call: AttentionCall) -> Tensor:
    """Products of the last live query with each key, not scaled, summed over heads (GemFilter, 2409.17422).

    Under a negative scale their sign is turned: the order is that of logits.

    Returns:
        fp32 ``[B, positions]``; 0 from a row's own number of keys on.
    """
    products = backend_of(call, "last_query_products").last_query_products(call)
    return -products if call.scale < 0 else products


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


def pooled_mass(
    call: AttentionCall,
    grid: Grid,
    queries: Tensor | None = None,
    keys: Tensor | None = None,
    excluded: Tensor | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """Share of each key block in the softmax over ``scale * mean query . mean key`` of what a query block sees.

    Args:
        queries, keys: in place of `pool_queries` and `pool_keys`: what was made of them.
        excluded: bool ``[B, H, N]``, key blocks that take no part; their share is 0.

    Yields:
        plan rows, and shares fp32 ``[B, H, rows, N]``; each row sums to 1, or is 0 where it sees nothing.
    """
    backend = backend_of(call, "pooled_scores")
    queries = pool_queries(call, grid) if queries is None else queries
    keys = pool_keys(call, grid) if keys is None else keys
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        seen = grid.sees(part, call.device)[:, None]
        seen = seen if excluded is None else seen & ~excluded[:, :, None]
        yield part, _softmax(backend.pooled_scores(call, grid, queries, keys, part).mul_(call.scale), seen)


def _softmax(logits: Tensor, seen: Tensor) -> Tensor:
    """Over the last dimension of what is seen; 0 elsewhere, and where nothing is seen."""
    share = logits.masked_fill(~seen, float("-inf")).softmax(dim=-1)
    return share.masked_fill_(~seen, 0.0)


def query_similarity(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean cosine of all pairs of live queries in each query block (SpargeAttn, 2502.18137, 3.3): fp32 ``[B, H, M]``.

    It lies in [0, 1]: each token is paired with itself, too.
    """
    return backend_of(call, "query_similarity").query_similarity(call, grid)


def key_similarity(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean cosine of all pairs of live keys in each key block, less the mean of all of the row: fp32 ``[B, G, N]``.

    Taking the mean off changes no attention, and what is left tells keys apart (SageAttention, 2410.02367, 4.2).
    """
    low, high = grid.key_block_ends()
    weights = ((high - low) / call.extent.key_count.clamp(min=1)[:, None]).to(call.device, torch.float32)
    centre = (pool_keys(call, grid) * weights[:, None, :, None]).sum(dim=2, keepdim=True)
    return backend_of(call, "key_similarity").key_similarity(call, grid, centre)


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
    _check_stride(stride, grid)
    backend = backend_of(call, "antidiagonal_scores")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, backend.antidiagonal_scores(call, grid, stride, part)


def antidiagonal_means(
    call: AttentionCall, grid: Grid, stride: int = 8, bonus: Tensor | None = None
) -> Iterator[tuple[range, Tensor]]:
    """Mean logit of the cells of each block pair, the cells being those of `antidiagonal_scores`.

    Args:
        bonus: fp32 ``[B, G, cells]``, added to the logits of all cells of these keys; see `value_bonus`.

    Yields:
        plan rows, and logits fp32 ``[B, H, rows, N]``.

    Raises:
        ValueError: ``stride`` does not divide the block sizes.
    """
    _check_stride(stride, grid)
    backend = backend_of(call, "antidiagonal_means")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, backend.antidiagonal_means(call, grid, stride, part, bonus)


def antidiagonal_peaks(
    call: AttentionCall, grid: Grid, stride: int = 8, near: float = 0.999
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """Largest cell of each block pair beside the largest of its row, the cells being those of `antidiagonal_scores`.

    With ``x`` the logits of a row of cells, ``E[j] = exp(max x in block j - max x)``, summed over the rows of a query
    block (CoSA, 2607.25291).

    Yields:
        plan rows, scores fp32 ``[B, H, rows, N]``, and bool whether some row of cells has ``E[j] >= near``.

    Raises:
        ValueError: ``stride`` does not divide the block sizes.
    """
    _check_stride(stride, grid)
    backend = backend_of(call, "antidiagonal_peaks")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, *backend.antidiagonal_peaks(call, grid, stride, part, near)


def value_bonus(call: AttentionCall, stride: int = 8) -> Tensor:
    """How far values stand out: ``relu(z)``, with z the standard score of ``log(largest |v| of stride keys + 1e-6)``.

    Of each run of ``stride`` keys among all of the row's (Stem, in AngelSlim). Fewer than two runs do not stand out.

    Returns:
        fp32 ``[B, G, cells]``, 0 where no key is live.
    """
    logs = torch.log(backend_of(call, "value_norms").value_norms(call, stride) + 1e-6)
    count = -(-call.extent.key_count // stride)
    live = (torch.arange(logs.shape[-1], device="cpu") < count[:, None]).to(call.device)[:, None]
    count = count.to(call.device, torch.float32)[:, None, None]
    mean = logs.masked_fill(~live, 0.0).sum(dim=-1, keepdim=True) / count.clamp(min=1)
    apart = (logs - mean).masked_fill(~live, 0.0)
    deviation = (apart.square().sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)).sqrt()
    return (apart / (deviation + 1e-6)).relu()


def _check_stride(stride: int, grid: Grid) -> None:
    if stride < 1 or grid.block_q % stride or grid.block_k % stride:
        raise ValueError(
            f"stride must divide block_q and block_k, got {stride} for blocks {grid.block_q} and {grid.block_k}"
        )


def _parts(call: AttentionCall, grid: Grid, heads: int, budget: int) -> Iterator[range]:
    return grid.parts(4 * call.batch * heads * grid.key_blocks, budget)
