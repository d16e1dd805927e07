"""Estimators: pure functions from q and k to scores. All heads and batch rows in one call, GQA never expanded.

Shapes: q ``[B, H, S, D]``, k ``[B, G, T, D]``. Everything streams: no intermediate grows with S x T, and none
exceeds `CHUNK_BYTES` by much, so a million keys fit.

The probe, the means, the energies and the antidiagonals come from C++ on the CPU (`gossamer.backends.cpu.planning`) and from
Triton on CUDA devices (`gossamer.backends.triton.planning`); the torch versions are their oracles and serve the rest. All
keep the logits of bf16 and fp16 inputs in fp32: scores differ by the order of sums and the rounding of exponentials.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.planners import planner_for
from gossamer.plan import Extent, ceil_div

__all__ = [
    "antidiagonal_scores",
    "last_query_probe",
    "pool_keys",
    "pool_queries",
    "pooled_scores",
    "row_block_energy",
]

# Working set of a chunk: it should fit caches and memory that the allocator reuses; fresh pages cost more than the
# arithmetic.
CHUNK_BYTES = 16 << 20
# Energies yielded at once by the planners in C++ and Triton, which have no other working set that grows.
ENERGY_BYTES = 64 << 20
# Pooled scores yielded at once on a device, where a chunk costs launches.
DEVICE_CHUNK_BYTES = 256 << 20


def last_query_probe(q: Tensor, k: Tensor, *, scale: float, extent: Extent, last: int = 64) -> tuple[Tensor, Tensor]:
    """Attention mass of each column and each diagonal under the last queries (MInference, 2407.02490, Alg. 2).

    The softmax rows of the last ``last`` live queries of this call are summed by key slot and by distance
    ``pos(i) - pos(j)``. Two streaming passes over the keys: one for the row's log-sum-exp, one for the sums.

    Returns:
        columns, diagonals: fp32 ``[B, H, T]``; ``columns[..., j]`` is slot j's mass, ``diagonals[..., d]`` that of
        distance d. Dead slots have mass 0. Both sum to the number of probing rows.
    """
    planner = planner_for(q, k)
    if planner is not None:
        return planner.last_query_probe(q, k, scale=scale, extent=extent, last=last)
    return _probe_in_torch(q, k, scale, extent, last)


def _probe_in_torch(q: Tensor, k: Tensor, scale: float, extent: Extent, last: int) -> tuple[Tensor, Tensor]:
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    share = heads // groups
    rows = min(last, query_len)
    if 0 in (batch, rows, key_len):
        return torch.zeros(batch, heads, key_len, device=q.device), torch.zeros(batch, heads, key_len, device=q.device)
    # The rows end at the last query whose own slot is live (right padding comes after it).
    end = (extent.key_count - extent.query_start).clamp(rows, query_len)
    row = (end[:, None] - rows + torch.arange(rows)).to(q.device)  # [B, rows]
    probe = q.gather(2, row[:, None, :, None].expand(batch, heads, rows, dim))
    probe = _wide(probe).reshape(batch, groups, share * rows, dim) * scale
    position = row + extent.query_start.to(q.device)[:, None]
    key_position = extent.key_positions(key_len).to(q.device)
    key_count = extent.key_count.to(q.device)

    def logits(start: int, stop: int) -> Tensor:
        kpos = key_position[:, start:stop]
        visible = (kpos >= 0) & (kpos < key_count[:, None])
        visible = visible[:, None, :] & (kpos[:, None, :] <= position[:, :, None])
        scores = (probe @ _wide(k[:, :, start:stop]).transpose(-1, -2)).float()
        scores = scores.view(batch, groups, share, rows, stop - start)
        return scores.masked_fill_(~visible[:, None, None], float("-inf"))

    chunk = max(64, CHUNK_BYTES // (8 * batch * heads * rows + 4 * batch * groups * dim))
    lse = torch.full((batch, groups, share, rows), float("-inf"), device=q.device)
    for start in range(0, key_len, chunk):
        lse = torch.logaddexp(lse, logits(start, min(start + chunk, key_len)).logsumexp(-1))
    lse = lse.masked_fill(lse == float("-inf"), 0.0)[..., None]

    columns = torch.zeros(batch, heads, key_len, device=q.device)
    diagonals = torch.zeros(batch, heads, key_len, device=q.device)
    for start in range(0, key_len, chunk):
        stop = min(start + chunk, key_len)
        mass = logits(start, stop).sub_(lse).exp_().view(batch, heads, rows, stop - start)
        columns[..., start:stop] = mass.sum(dim=2)
        sums = _diagonal_sums(mass)  # index u: key offset - row offset + rows - 1
        for b in range(batch):
            # distance = first - u, descending in u
            first = int(position[b, 0]) - int(key_position[b, start]) + rows - 1
            low, high = max(0, first - key_len + 1), min(sums.shape[-1], first + 1)
            if high > low:
                diagonals[b, :, first - high + 1 : first - low + 1] += sums[b, :, low:high].flip(-1)
    return columns, diagonals


def _wide(x: Tensor) -> Tensor:
    """In fp32 or wider: the products of bf16 and fp16 are summed, and their sums kept, in fp32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _diagonal_sums(mass: Tensor) -> Tensor:
    """Sums of ``mass[..., a, c]`` over equal ``c - a``: ``[..., rows + columns - 1]``, offset by rows - 1.

    Rows are skewed by one element each, by padding and re-striding, so that a column sum is a diagonal sum.
    """
    rows, columns = mass.shape[-2:]
    skewed = F.pad(mass.flip(-2), (0, rows)).flatten(-2)[..., : rows * (columns + rows - 1)]
    return skewed.view(*mass.shape[:-2], rows, columns + rows - 1).sum(dim=-2)


def pool_keys(k: Tensor, extent: Extent, block: int) -> Tensor:
    """Mean of the live keys of each block of slots: fp32 ``[B, G, N, D]``; 0 for a block without live keys."""
    return _pool(k, torch.stack([extent.key_start, extent.key_start + extent.key_count], dim=1), block)


def pool_queries(q: Tensor, extent: Extent, block: int) -> Tensor:
    """Mean of the queries of each block: fp32 ``[B, H, M, D]``; left-padding rows do not count."""
    first = (-extent.query_start).clamp(min=0)
    return _pool(q, torch.stack([first, torch.full_like(first, q.shape[2])], dim=1), block)


def _pool(x: Tensor, live: Tensor, block: int) -> Tensor:
    """Means in fp32 over the live ones of each ``block`` tokens, those in the ranges ``live`` ``[B, 2]``."""
    planner = planner_for(x)
    if planner is not None:
        return planner.pool(x, live, block)
    token = torch.arange(x.shape[2])
    return _pool_in_torch(x, ((token >= live[:, :1]) & (token < live[:, 1:])).to(x.device), block)


def _pool_in_torch(x: Tensor, live: Tensor, block: int) -> Tensor:
    batch, heads, tokens, dim = x.shape
    blocks = ceil_div(tokens, block)
    sums = torch.empty(batch, heads, blocks, dim, dtype=torch.float32, device=x.device)
    padded = not bool(live.all())
    step = max(1, CHUNK_BYTES // max(1, 4 * batch * heads * block * dim))
    for at in range(0, blocks, step):
        part = slice(at * block, min((at + step) * block, tokens))
        # A dead slot may hold anything, NaN too: select, do not multiply.
        values = torch.where(live[:, None, part, None], x[:, :, part], 0.0) if padded else x[:, :, part]
        values = F.pad(values, (0, 0, 0, -values.shape[2] % block)).unflatten(2, (-1, block))
        sums[:, :, at : at + step] = values.sum(dim=3, dtype=torch.float32)
    counts = F.pad(live.float(), (0, -tokens % block)).unflatten(-1, (-1, block)).sum(-1)
    return sums / counts.clamp(min=1.0)[:, None, :, None]


def pooled_scores(q: Tensor, k: Tensor, *, extent: Extent, block_q: int, block_k: int) -> Iterator[tuple[int, Tensor]]:
    """Mean query times mean key of each block pair (MInference block-sparse, 3.2), streamed over query blocks.

    Yields:
        first query block of the chunk, and scores ``[B, H, m, N]`` in fp32: unscaled logits, -inf for block pairs
        with no visible pair.
    """
    batch, heads = q.shape[:2]
    groups = k.shape[1]
    queries = pool_queries(q, extent, block_q)
    keys = pool_keys(k, extent, block_k)
    blocks, key_blocks = queries.shape[2], keys.shape[2]
    queries = queries.view(batch, groups, heads // groups, blocks, q.shape[3])
    visible = BlockVisibility(extent, q.shape[2], k.shape[2], block_q, block_k, q.device)
    chunk = CHUNK_BYTES if q.device.type == "cpu" else DEVICE_CHUNK_BYTES
    step = max(1, chunk // max(1, 8 * batch * heads * key_blocks))
    for at in range(0, blocks, step):
        stop = min(at + step, blocks)
        scores = queries[:, :, :, at:stop] @ keys[:, :, None].transpose(-1, -2)
        scores = scores.view(batch, heads, stop - at, key_blocks)
        yield at, scores.masked_fill_(~visible.any_pair(at, stop)[:, None], float("-inf"))


def row_block_energy(
    q: Tensor, k: Tensor, *, scale: float, extent: Extent, block_q: int, block_k: int
) -> Iterator[tuple[int, Tensor]]:
    """Every query row against mean-pooled keys, summed over a query block and a GQA group.

    FlashPrefill V2 (2608.19758): with ``x[r, j] = scale * q_r . kbar_j`` where row r sees the first key of block j,
    ``E[j] = sum_r exp(x[r, j] - R)`` with one maximum R for the whole tile (all rows of the query block in all heads
    that share the key/value head). Only blocks wholly at or before the tile's last position are scored.

    Yields:
        first query block of the chunk, and energies ``[B, G, m, N]`` in fp32, at most the number of rows; 0 where a
        block is not scored.
    """
    pooled = pool_keys(k, extent, block_k).to(q.dtype)
    key_len = k.shape[2]
    planner = planner_for(q, k)
    if planner is None:
        yield from _energy_in_torch(q, pooled, key_len, scale, extent, block_q, block_k)
        return
    blocks = ceil_div(q.shape[2], block_q)
    step = max(1, ENERGY_BYTES // max(1, 4 * pooled.shape[0] * pooled.shape[1] * pooled.shape[2]))
    for at in range(0, blocks, step):
        stop = min(at + step, blocks)
        yield (
            at,
            planner.row_block_energy(
                q, pooled, key_len, scale=scale, extent=extent, block_q=block_q, block_k=block_k, at=at, stop=stop
            ),
        )


def _energy_in_torch(
    q: Tensor, pooled: Tensor, key_len: int, scale: float, extent: Extent, block_q: int, block_k: int
) -> Iterator[tuple[int, Tensor]]:
    batch, heads, query_len, dim = q.shape
    groups = pooled.shape[1]
    share = heads // groups
    pooled_t = _wide(pooled).transpose(-1, -2)
    blocks, key_blocks = ceil_div(query_len, block_q), pooled.shape[2]
    visible = BlockVisibility(extent, query_len, key_len, block_q, block_k, q.device)
    step = max(1, CHUNK_BYTES // max(1, batch * heads * block_q * (12 * key_blocks + 4 * dim)))
    for at in range(0, blocks, step):
        stop = min(at + step, blocks)
        first, last = at * block_q, min(stop * block_q, query_len)
        if key_blocks == 0:
            yield at, torch.zeros(batch, groups, stop - at, 0, device=q.device)
            continue
        rows = _wide(q[:, :, first:last]).reshape(batch, groups, share * (last - first), dim)
        x = (rows @ pooled_t).float().mul_(scale).view(batch, groups, share, last - first, key_blocks)
        x.masked_fill_(~visible.row_sees_first_key(first, last)[:, None, None], float("-inf"))
        missing = (stop - at) * block_q - (last - first)
        if missing:
            x = F.pad(x, (0, 0, 0, missing), value=float("-inf"))
        x = x.view(batch, groups, share, stop - at, block_q, key_blocks)
        scored = visible.wholly_before_last_row(at, stop)[:, None]
        tile_max = x.amax(dim=4).amax(dim=2).masked_fill_(~scored, float("-inf")).amax(dim=-1)
        tile_max = tile_max.masked_fill_(tile_max == float("-inf"), 0.0)
        energy = x.sub_(tile_max[:, :, None, :, None, None]).exp_().sum(dim=4).sum(dim=2)
        yield at, energy.masked_fill_(~scored, 0.0)


def antidiagonal_scores(
    q: Tensor, k: Tensor, *, scale: float, extent: Extent, block_q: int, block_k: int, stride: int = 8
) -> Iterator[tuple[int, Tensor]]:
    """Attention mass of each block pair, from one antidiagonal in each cell (XAttention, 2503.16428, 3.1).

    A cell pairs ``stride`` consecutive queries with ``stride`` consecutive key slots; its logit is the mean of the
    scaled products on its antidiagonal, so that every query and every key counts once. The softmax over a row of
    cells, summed by block, is the score. A cell counts if its last query sees its first live key: on the diagonal a
    few later keys take part, as in the paper. Dead slots and padding queries count as zeros.

    Yields:
        first query block of the chunk, and scores ``[B, H, m, N]`` in fp32; the scores of a query block sum to the
        number of its cells that see any key.

    Raises:
        ValueError: ``stride`` does not divide the block sizes.
    """
    if stride < 1 or block_q % stride or block_k % stride:
        raise ValueError(f"stride must divide block_q and block_k, got {stride} for blocks {block_q} and {block_k}")
    sizes = {"block_q": block_q, "block_k": block_k, "stride": stride}
    planner = planner_for(q, k)
    if planner is None or not planner.has_antidiagonal(**sizes):
        yield from _antidiagonals_in_torch(q, k, scale, extent, **sizes)
        return
    blocks = ceil_div(q.shape[2], block_q)
    step = max(1, ENERGY_BYTES // max(1, 4 * q.shape[0] * q.shape[1] * ceil_div(k.shape[2], block_k)))
    for at in range(0, blocks, step):
        stop = min(at + step, blocks)
        yield at, planner.antidiagonal_scores(q, k, scale=scale, extent=extent, **sizes, at=at, stop=stop)


def _antidiagonals_in_torch(
    q: Tensor, k: Tensor, scale: float, extent: Extent, block_q: int, block_k: int, stride: int
) -> Iterator[tuple[int, Tensor]]:
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    visible = BlockVisibility(extent, query_len, key_len, stride, stride, q.device)
    position = extent.key_positions(key_len).to(k.device)
    dead = (position < 0) | (position >= extent.key_count.to(k.device)[:, None])
    keys = F.pad(k.masked_fill(dead[:, None, :, None], 0.0), (0, 0, 0, -key_len % stride))
    keys = keys.reshape(batch, groups, ceil_div(key_len, stride), stride * dim).transpose(-1, -2)
    padding = extent.query_positions(query_len).to(q.device) < 0
    blocks, cells = ceil_div(query_len, block_q), keys.shape[-1]
    step = max(1, CHUNK_BYTES // max(1, batch * heads * (block_q // stride) * (8 * cells + 4 * stride * dim)))
    part = max(64, CHUNK_BYTES // max(1, 4 * batch * groups * stride * dim))  # cells that are widened at once
    for at in range(0, blocks, step):
        first, last = at * block_q, min((at + step) * block_q, query_len)
        rows = q[:, :, first:last].masked_fill(padding[:, None, first:last, None], 0.0)
        rows = _wide(F.pad(rows, (0, 0, 0, -rows.shape[2] % stride))).unflatten(2, (-1, stride)).flip(3)
        row_cells = rows.shape[2]
        # Of all heads of a group, so that keys are not expanded.
        rows = rows.reshape(batch, groups, heads // groups * row_cells, stride * dim)
        logits = torch.cat([(rows @ _wide(some)).float() for some in keys.split(part, dim=-1)], dim=-1)
        logits = logits.mul_(scale / stride).view(batch, heads, row_cells, cells)
        seen = visible.any_pair(first // stride, ceil_div(last, stride))
        mass = logits.masked_fill_(~seen[:, None], float("-inf")).softmax(dim=-1)
        mass = mass.masked_fill_(~seen.any(dim=-1)[:, None, :, None], 0.0)
        mass = F.pad(mass, (0, -cells % (block_k // stride), 0, -mass.shape[2] % (block_q // stride)))
        mass = mass.unflatten(3, (-1, block_k // stride)).sum(-1)
        yield at, mass.unflatten(2, (-1, block_q // stride)).sum(3)


class BlockVisibility:
    """Which block pairs hold visible pairs, by position: causality, padding and dead slots."""

    def __init__(
        self, extent: Extent, query_len: int, key_len: int, block_q: int, block_k: int, device: torch.device
    ) -> None:
        blocks_q, blocks_k = ceil_div(query_len, block_q), ceil_div(key_len, block_k)
        self.device = device
        self._block_k = block_k
        starts = torch.stack([extent.query_start, extent.key_start, extent.key_count]).to(device, non_blocking=True)
        self._query_start, self._key_start, self._key_count = starts[..., None].unbind(0)
        low = torch.arange(blocks_k, device=device) * block_k - self._key_start
        self.block_end = low + block_k  # [B, N] one past the block's last slot, live or not
        self.first_key = low.clamp(min=0)  # [B, N] position of each block's first live key
        self.past_key = torch.minimum(self.block_end, self._key_count)  # [B, N] one past the last live key
        self.has_keys = self.past_key > self.first_key
        last = (torch.arange(blocks_q, device=device) + 1) * block_q
        self.first_query = torch.arange(blocks_q, device=device) * block_q + self._query_start
        self.last_query = last.clamp(max=query_len) - 1 + self._query_start

    def seen_blocks(self, at: int, stop: int) -> Tensor:
        """The key blocks of `any_pair` as a range: int64 ``[B, m, 2]``, empty where there are none."""
        last = self.last_query[:, at:stop]
        low = (self._key_start // self._block_k).expand_as(last)
        end = self._key_start + self._key_count
        high = torch.minimum(-(-end // self._block_k), (last + self._key_start) // self._block_k + 1)
        return torch.stack([low, torch.where((last >= 0) & (self._key_count > 0), high, low)], dim=-1)

    def any_pair(self, at: int, stop: int) -> Tensor:
        """bool ``[B, m, N]``: some row of the query block sees some live key of the key block."""
        return self.has_keys[:, None] & (self.first_key[:, None] <= self.last_query[:, at:stop, None])

    def row_sees_first_key(self, first: int, last: int) -> Tensor:
        """bool ``[B, rows, N]``: query row sees the first live key of the block."""
        position = torch.arange(first, last, device=self.first_key.device) + self._query_start
        return self.has_keys[:, None] & (self.first_key[:, None] <= position[..., None])

    def wholly_before_last_row(self, at: int, stop: int) -> Tensor:
        """bool ``[B, m, N]``: the whole key block lies at or before the query block's last position."""
        return self.has_keys[:, None] & (self.block_end[:, None] <= self.last_query[:, at:stop, None] + 1)

    def own_key_blocks(self, at: int, stop: int) -> tuple[Tensor, Tensor]:
        """Key blocks that hold the first and the last row's own slot: int64 ``[B, m]`` each."""
        first = self.first_query[:, at:stop] + self._key_start
        last = self.last_query[:, at:stop] + self._key_start
        return first // self._block_k, last // self._block_k

    def leading_blocks(self, count: int) -> Tensor:
        """The first ``count`` blocks that hold live keys, as a range: int64 ``[B, 2]``; it may reach beyond them."""
        first = self._key_start // self._block_k
        return torch.cat([first, first + count], dim=1)
