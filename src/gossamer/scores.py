"""Scores: functions from a call to what methods select by. A handful serves everything.

All heads and batch rows at once, GQA never expanded, everything in positions: how much padding a row has and who shares
its batch change nothing. Block scores stream: they come in parts, each with the plan rows that it is for. What a row
does not see has score 0. The definitions, with their formulas, are in `gossamer.backends.torch.scores`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div
from gossamer.rules import PerHead
from gossamer.summaries import PageBounds

__all__ = [
    "antidiagonal_means",
    "antidiagonal_peaks",
    "antidiagonal_scores",
    "block_attention",
    "block_mass",
    "block_sums",
    "count_top_p",
    "group_differences",
    "group_shares",
    "key_similarity",
    "last_query_probe",
    "last_query_products",
    "masked_softmax",
    "mean_row_maxima",
    "near_keys",
    "page_scores",
    "pool_before_rotary",
    "pool_key_bounds",
    "pool_keys",
    "pool_queries",
    "pooled_mass",
    "pooled_scores",
    "probed_blocks",
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


def page_scores(call: AttentionCall, size: int) -> Tensor:
    """The largest logit that each page of a call's store allows its query (Quest, 2406.10774, equation 2).

    Returns:
        fp32 ``[B, H, N]``; -inf for pages that a row does not have.
    """
    assert call.store is not None
    return backend_of(call, "page_scores").page_scores(call, call.store.summary(PageBounds(size)), size)


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


def count_top_p(call: AttentionCall, mass: Tensor, p: PerHead) -> Tensor:
    """How many of the best of each row's scores hold at most ``p`` of its sum; see `gossamer.rules.count_top_p`.

    Args:
        mass: ``[B, H, rows, N]``, not negative.

    Returns:
        int64 ``[B, H, rows]``.
    """
    return backend_of(call, "count_top_p").count_top_p(mass, p)


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


def pool_key_bounds(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor]:
    """Smallest and largest entry, by channel, of the live keys of each key block: fp32 ``[B, G, N, D]`` each."""
    return backend_of(call, "pool_key_bounds").pool_key_bounds(call, grid)


def pool_before_rotary(call: AttentionCall, grid: Grid) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pools of q and k as they were before their rotary embedding (`AttentionCall.before_rotary`).

    Returns:
        `pool_queries` of it; both of `pool_key_bounds`; and `pool_keys`.

    Raises:
        ValueError: the call does not say how they were turned.
    """
    return backend_of(call, "pool_before_rotary").pool_before_rotary(call, grid)


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
    queries = pool_queries(call, grid) if queries is None else queries
    keys = pool_keys(call, grid) if keys is None else keys
    if excluded is None:
        yield from block_attention(call, grid, queries, keys, call.scale)
        return
    backend = backend_of(call, "pooled_scores")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        seen = grid.sees(part, call.device)[:, None] & ~excluded[:, :, None]
        yield part, masked_softmax(backend.pooled_scores(call, grid, queries, keys, part).mul_(call.scale), seen)


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


def block_mass(call: AttentionCall, lse: Tensor, grid: Grid) -> Iterator[tuple[range, Tensor]]:
    """Attention mass of each block under a given LSE: ``exp(logit - lse)`` over its pairs (AdaSpa, 2502.21079).

    Args:
        lse: ``[B, H, S]``, of the call's dense attention, or of an earlier one; -inf where a row does not count.

    Yields:
        plan rows, and mass fp32 ``[B, H, rows, N]``.
    """
    backend = backend_of(call, "block_mass")
    for part in _parts(call, grid, call.heads, backend.PART_BYTES):
        yield part, backend.block_mass(call, lse, grid, part)


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


def row_block_energy(
    call: AttentionCall, grid: Grid, *, per: Literal["head", "kv_head"] = "kv_head", ended: bool = False
) -> Iterator[tuple[range, Tensor]]:
    """Every query row against mean-pooled keys, summed over a query block and a GQA group (2608.19758).

    Args:
        per: ``"head"`` sums over the query block alone (2603.06199).
        ended: in causal attention a row sees the blocks that end at or before it, not all that begin there.

    Yields:
        plan rows, and energies fp32 ``[B, G, rows, N]``; ``[B, H, rows, N]`` per head.
    """
    backend = backend_of(call, "row_block_energy")
    keys = pool_keys(call, grid).to(call.q.dtype)
    for part in _parts(call, grid, call.groups if per == "kv_head" else call.heads, backend.PART_BYTES):
        yield part, backend.row_block_energy(call, grid, keys, part, per_head=per == "head", ended=ended)


def mean_row_maxima(call: AttentionCall, grid: Grid, regions: Tensor) -> Tensor:
    """Mean over a query block's rows of the largest logit in some regions (2505.23520): fp32 ``[B, H, M]``.

    -inf for a block of which no row sees a key there.

    Args:
        regions: int64 ``[B, M, R, 2]``, half-open ranges of positions.
    """
    backend = backend_of(call, "mean_row_maxima")
    return backend.mean_row_maxima(call, grid, regions, range(grid.query_blocks))


def group_differences(
    call: AttentionCall, grid: Grid, anchors: Tensor | None, group: int
) -> Iterator[tuple[range, Tensor]]:
    """How far each key's logit rises above the anchor in the best block of a group of query blocks (2505.23520).

    Logits are of mean queries, ``scale * mean query . key``.

    Args:
        anchors: ``[B, H, M]``, as `mean_row_maxima` has them; None: the largest logit of the same mean query.
        group: consecutive plan rows.

    Yields:
        groups, and differences fp32 ``[B, H, groups, positions]``; -inf where no block of a group sees a key.
    """
    backend = backend_of(call, "group_differences")
    queries = pool_queries(call, grid).to(call.q.dtype)
    for part in _group_parts(call, grid, group, backend.PART_BYTES):
        yield part, backend.group_differences(call, grid, queries, anchors, group, part)


def near_keys(
    call: AttentionCall, grid: Grid, anchors: Tensor | None, group: int, bar: PerHead, left_out: Tensor
) -> Iterator[tuple[range, Tensor, Tensor]]:
    """The keys whose `group_differences` are at least a bar; no scores are kept, of which there are very many.

    Args:
        left_out: int64 ``[B, groups, R, 2]``, half-open ranges of positions that are not taken.

    Yields:
        groups; counts int64 ``[B, H, groups]``; and ascending positions int32 of all lists.
    """
    backend = backend_of(call, "near_keys")
    queries = pool_queries(call, grid).to(call.q.dtype)
    for part in _group_parts(call, grid, group, backend.NEAR_BYTES):
        yield part, *backend.near_keys(call, grid, queries, anchors, group, part, bar, left_out)


def group_shares(call: AttentionCall, grid: Grid, group: int) -> Iterator[tuple[range, Tensor]]:
    """The largest share that each key has in the attention of a mean query of a group of query blocks.

    Args:
        group: consecutive plan rows.

    Yields:
        groups, and shares fp32 ``[B, H, groups, positions]``; 0 where no block of a group sees a key.
    """
    backend = backend_of(call, "group_shares")
    queries = pool_queries(call, grid).to(call.q.dtype)
    for part in _group_parts(call, grid, group, backend.PART_BYTES):
        yield part, backend.group_shares(call, grid, queries, group, part)


def _group_parts(call: AttentionCall, grid: Grid, group: int, budget: int) -> Iterator[range]:
    """Of groups of plan rows whose scores are of single keys."""
    groups = ceil_div(grid.query_blocks, group)
    step = max(1, budget // max(1, 4 * call.batch * call.heads * call.extent.longest))
    for first in range(0, groups, step):
        yield range(first, min(first + step, groups))


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
