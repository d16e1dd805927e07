"""Scores in plain torch: the definitions of what methods estimate by. Everything streams and goes by positions.

No intermediate grows with S x T, and none exceeds `CHUNK_BYTES` by much, so a million keys fit. Logits of bf16 and fp16
inputs are kept in fp32. Scores of what a row does not see are 0.
Sinks and a soft-cap enter none: they change how much a row attends, and its order of keys not at all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div

__all__ = [
    "block_means",
    "diagonal_sums",
    "key_similarity",
    "last_query_probe",
    "last_query_products",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "query_similarity",
    "row_block_energy",
]

# Working set of a chunk: it should fit caches and memory that the allocator reuses; fresh pages cost more than the
# arithmetic.
CHUNK_BYTES = 16 << 20
# Scores of a part that is handed out at once.
PART_BYTES = NEAR_BYTES = 16 << 20


def last_query_probe(call: AttentionCall, last: int) -> tuple[Tensor, Tensor]:
    """Attention mass of each column and each diagonal under the last queries (MInference, 2407.02490, Alg. 2).

    The softmax rows of the last ``last`` live queries of each batch row are summed by key position and by distance
    ``|pos(i) - pos(j)|``. Two streaming passes over the keys: one for the row's log-sum-exp, one for the sums.

    Returns:
        columns, diagonals: fp32 ``[B, H, positions]`` for positions below `Extent.longest`. Both sum to the number of
        probing rows, less what lies at distances beyond the last one.
    """
    width, extent = call.extent.longest, call.extent
    columns = torch.zeros(call.batch, call.heads, width, device=call.device)
    diagonals = torch.zeros_like(columns)
    for b in range(call.batch):
        rows, keys = min(last, int(extent.query_count[b])), int(extent.key_count[b])
        if rows == 0 or keys == 0:
            continue
        end = int(extent.first_query[b] + extent.query_count[b])
        q = _wide(call.q[b, :, end - rows : end]).reshape(call.groups, call.share * rows, -1) * call.scale
        start = int(extent.key_start[b])
        k = call.k[b, :, start : start + keys]
        position = torch.arange(rows, device=call.device) + (int(extent.query_start[b]) + end - rows)
        _probe_row(call, q, k, position, columns[b], diagonals[b])
    return columns, diagonals


def _probe_row(call: AttentionCall, q: Tensor, k: Tensor, position: Tensor, columns: Tensor, diagonals: Tensor) -> None:
    """Of one batch row: scaled queries ``[G, share * rows, D]``, live keys; sums go to the two last arguments."""
    rows, keys = len(position), k.shape[1]

    def logits(start: int, stop: int) -> Tensor:
        scores = (q @ _wide(k[:, start:stop]).transpose(-1, -2)).float().view(call.heads, rows, stop - start)
        return scores.masked_fill_(~visible(call, position, torch.arange(start, stop, device=k.device)), float("-inf"))

    chunk = max(64, CHUNK_BYTES // (8 * call.heads * rows + 4 * call.groups * k.shape[2]))
    lse = torch.full((call.heads, rows), float("-inf"), device=k.device)
    for start in range(0, keys, chunk):
        lse = torch.logaddexp(lse, logits(start, min(start + chunk, keys)).logsumexp(-1))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]
    for start in range(0, keys, chunk):
        stop = min(start + chunk, keys)
        mass = logits(start, stop).sub_(lse).exp_()
        columns[:, start:stop] = mass.sum(dim=1)
        sums = diagonal_sums(mass)  # by key minus query, from that of the last row and the first key on
        distance = (torch.arange(sums.shape[-1], device=k.device) + (start - int(position[-1]))).abs()
        near = distance < diagonals.shape[-1]
        diagonals.index_add_(1, distance[near], sums[:, near])


def visible(call: AttentionCall, query: Tensor, key: Tensor) -> Tensor:
    """Which pairs of live positions the call allows, bool ``[query, key]``."""
    pairs = torch.ones(len(query), len(key), dtype=torch.bool, device=query.device)
    if call.extent.causal:
        pairs = key <= query[:, None]
    if call.extent.limit is not None:
        pairs = pairs & ((query[:, None] - key).abs() < call.extent.limit)
    return pairs


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider: the products of bf16 and fp16 are summed, and their sums kept, in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def diagonal_sums(mass: Tensor) -> Tensor:
    """Sums of ``mass[..., a, c]`` over equal ``c - a``: ``[..., rows + columns - 1]``, offset by rows - 1.

    Rows are skewed by one element each, by padding and re-striding, so that a column sum is a diagonal sum.
    """
    rows, columns = mass.shape[-2:]
    skewed = F.pad(mass.flip(-2), (0, rows)).flatten(-2)[..., : rows * (columns + rows - 1)]
    return skewed.view(*mass.shape[:-2], rows, columns + rows - 1).sum(dim=-2)


def last_query_products(call: AttentionCall) -> Tensor:
    """The last live query's products with each key, not scaled, summed over all heads (GemFilter, 2409.17422).

    Returns:
        fp32 ``[B, positions]`` for positions below `Extent.longest`; 0 where no key is live.
    """
    extent = call.extent
    sums = torch.zeros(call.batch, extent.longest, device=call.device)
    for b in range(call.batch):
        start, keys = int(extent.key_start[b]), int(extent.key_count[b])
        if int(extent.query_count[b]) == 0:
            continue
        last = int(extent.first_query[b] + extent.query_count[b]) - 1
        q = call.q[b, :, last].float().unflatten(0, (call.groups, call.share)).sum(dim=1)  # heads of a group share keys
        for g in range(call.groups):
            sums[b, :keys] += call.k[b, g, start : start + keys].float() @ q[g]
    return sums


def pool_keys(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean of the live keys of each key block: fp32 ``[B, G, N, D]``; 0 for a block without live keys."""
    return block_means(call.k, grid).float()


def block_means(x: Tensor, grid: Grid) -> Tensor:
    """Mean of the live rows of each key block of keys or values ``[B, G, T, D]``: ``[B, G, N, D]``, at least fp32."""
    extent = grid.extent
    return _pool(x, extent.key_start, extent.key_count, extent.key_count * 0, grid.block_k, grid.key_blocks)


def pool_queries(call: AttentionCall, grid: Grid) -> Tensor:
    """Mean of the live queries of each query block: fp32 ``[B, H, M, D]``; 0 in surplus rows."""
    extent = call.extent
    offset = extent.first_position - grid.first_block * grid.block_q
    return _pool(call.q, extent.first_query, extent.query_count, offset, grid.block_q, grid.query_blocks).float()


def key_similarity(call: AttentionCall, grid: Grid, centre: Tensor) -> Tensor:
    """How alike the live keys of each block are, less a centre ``[B, G, 1, D]``: fp32 ``[B, G, N]``.

    See `query_similarity`.
    """
    ranges = call.extent.key_start, call.extent.key_count, call.extent.key_count * 0
    return _pool(call.k, *ranges, grid.block_k, grid.key_blocks, _directions(centre)).square().sum(dim=-1)


def query_similarity(call: AttentionCall, grid: Grid) -> Tensor:
    """How alike the live queries of each block are: fp32 ``[B, H, M]``; 0 in surplus rows.

    SpargeAttn (2502.18137, 3.3): the mean cosine of all pairs of a block's tokens, each with itself among them. That is
    the squared length of the mean of their directions, so that no pair is formed. A token of length 0 has none.
    """
    extent = call.extent
    offset = extent.first_position - grid.first_block * grid.block_q
    ranges = extent.first_query, extent.query_count, offset
    nowhere = torch.zeros(call.batch, 1, 1, 1, device=call.device)
    return _pool(call.q, *ranges, grid.block_q, grid.query_blocks, _directions(nowhere)).square().sum(dim=-1)


def _directions(centre: Tensor) -> Callable[[int, Tensor], Tensor]:
    return lambda b, tokens: F.normalize(tokens.float() - centre[b], dim=-1)


def _pool(
    x: Tensor,
    first: Tensor,
    count: Tensor,
    offset: Tensor,
    block: int,
    blocks: int,
    each: Callable[[int, Tensor], Tensor] = lambda b, tokens: tokens,
) -> Tensor:
    """Means over the tokens ``first .. first + count - 1`` of each batch row, in blocks that begin ``offset`` tokens
    before ``first``, in fp32 or wider; of what ``each(b, tokens)`` makes of them."""
    batch, heads, _, dim = x.shape
    means = torch.zeros(batch, heads, blocks, dim, dtype=_wide(x[:0]).dtype, device=x.device)
    step = max(1, CHUNK_BYTES // max(1, 4 * heads * block * dim))
    for b in range(batch):
        skip, total = int(offset[b]), int(count[b])
        tokens = x[b, :, int(first[b]) : int(first[b]) + total]
        for m in range(0, ceil_div(skip + total, block), step):
            low, high = max(m * block, skip), min((m + step) * block, skip + total)
            part = each(b, tokens[:, low - skip : high - skip])
            part = F.pad(part, (0, 0, low - m * block, -high % block)).unflatten(1, (-1, block))
            means[b, :, m : m + part.shape[1]] = part.sum(dim=2, dtype=means.dtype)
        begin = torch.arange(blocks, device="cpu") * block
        live = ((begin + block).clamp(max=skip + total) - begin.clamp(min=skip)).clamp(min=1)
        means[b] /= live.to(x.device)[:, None]
    return means


def pooled_scores(call: AttentionCall, grid: Grid, queries: Tensor, keys: Tensor, part: range) -> Tensor:
    """Mean query times mean key of each block pair (MInference block-sparse, 3.2): unscaled logits.

    Args:
        queries: of `pool_queries`; keys: of `pool_keys`; part: rows of the plan.

    Returns:
        fp32 ``[B, H, len(part), N]``.
    """
    rows = queries[:, :, part.start : part.stop].unflatten(1, (call.groups, call.share))
    scores = rows @ keys[:, :, None].transpose(-1, -2)
    return scores.flatten(1, 2).masked_fill_(~grid.sees(part, call.device)[:, None], 0.0)


def row_block_energy(
    call: AttentionCall, grid: Grid, keys: Tensor, part: range, *, per_head: bool = False, ended: bool = False
) -> Tensor:
    """Every query row against mean-pooled keys, summed over a query block and a GQA group.

    FlashPrefill V2 (2608.19758): with ``x[r, j] = scale * q_r . kbar_j`` where row r may attend some key of block j,
    ``E[j] = sum_r exp(x[r, j] - R)`` with one maximum R for the whole tile (all rows of the query block in all heads
    that share the key/value head). In causal attention only blocks wholly at or before the tile's last position are
    scored.

    Args:
        keys: of `pool_keys`, in q's dtype; part: rows of the plan.
        per_head: a tile is the query block in one head (FlashPrefill V1, 2603.06199).
        ended: in causal attention a row takes part for the blocks alone that end, if they are full, at or before it.

    Returns:
        fp32 ``[B, G, len(part), N]``, or ``[B, H, len(part), N]`` per head; at most the number of rows; 0 where a block
        is not scored.
    """
    heads = call.heads if per_head else call.groups
    energy = torch.zeros(call.batch, heads, len(part), grid.key_blocks, device=call.device)
    block = torch.arange(grid.key_blocks, device=call.device)
    low, high = (ends.to(call.device) for ends in grid.key_block_ends())  # [B, N]
    for b in range(call.batch):
        keys_t = _wide(keys[b]).transpose(-1, -2)
        for m in part:
            first, last = (int(n) for n in grid.queries[b, m])
            if first == last or grid.key_blocks == 0:
                continue
            row = int(call.extent.first_query[b] - call.extent.first_position[b])  # of position 0
            q = _wide(call.q[b, :, row + first : row + last]).reshape(call.groups, -1, call.q.shape[-1])
            position = torch.arange(first, last, device=call.device)[:, None]
            sees = (high[b] > low[b]).expand(last - first, -1)
            scored = high[b] > low[b]
            if call.extent.causal:
                sees = sees & ((block * grid.block_k + (grid.block_k - 1 if ended else 0)) <= position)
                scored = (block + 1) * grid.block_k <= last
            if call.extent.limit is not None:
                sees = sees & (position - (high[b] - 1) < call.extent.limit) & (low[b] - position < call.extent.limit)
            x = (q @ keys_t).float().mul_(call.scale).unflatten(1, (call.share, last - first))
            x = x.masked_fill_(~(sees & scored), float("-inf")).view(heads, -1, last - first, grid.key_blocks)
            top = x.amax(dim=(1, 2, 3), keepdim=True)
            top = top.masked_fill_(top == float("-inf"), 0.0)
            energy[b, :, m - part.start] = x.sub_(top).exp_().sum(dim=(1, 2))
    return energy
