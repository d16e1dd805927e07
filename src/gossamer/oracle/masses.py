"""The exact oracle: where the attention mass of q and k lies, streamed, with GQA never expanded.

The mass of a pair is its softmax weight, ``exp(logit - lse)``. All arithmetic is in fp32 (fp64 for fp64 input), also
for bf16 tensors, and nothing grows with S x T: a tile of rows by keys holds a few MiB.

A query row is *live* when its own key is: ``0 <= pos(i) < key_count``. Rows of padding have no mass. The mass of a
live row sums to 1 over the keys, less what a sink logit takes: it stands in the denominator and has no key.

Shapes: q ``[B, H, S, D]``, k ``[B, G, T, D]``; ``scale``, ``extent``, ``limit``, ``sinks`` and ``softcap`` as for
`gossamer.sparse_attention`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer import backends
from gossamer.estimators import _diagonal_sums
from gossamer.oracle.tiles import Tiles, spans, sum_blocks, sum_row_blocks, wide
from gossamer.plan import Extent, SparsePlan, ceil_div

__all__ = [
    "ExactMasses",
    "block_counts",
    "block_mass",
    "exact_masses",
    "live_rows",
    "log_sum_exp",
    "oracle_blocks",
    "oracle_recall",
    "plan_recall",
    "visible_pairs",
]


def live_rows(extent: Extent, query_len: int) -> Tensor:
    """Queries whose own key is live: bool ``[B, S]`` on the CPU."""
    position = extent.query_positions(query_len)
    return (position >= 0) & (position < extent.key_count[:, None])


def log_sum_exp(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    extent: Extent,
    causal: bool = True,
    limit: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Natural log of the softmax denominator of dense attention, sinks included: ``[B, H, S]``, fp32.

    -inf (or the sink's logit) for a row that attends nothing; fp64 for fp64 input.

    Raises:
        ValueError, TypeError: as `gossamer.backends.check_inputs`.
    """
    plan = SparsePlan.dense(k.shape[1], q.shape[2], k.shape[2], extent, causal=causal, limit=limit)
    return _plan_lse(q, k, plan, scale, sinks, softcap)


def _plan_lse(
    q: Tensor, k: Tensor, plan: SparsePlan, scale: float, sinks: Tensor | None, softcap: float | None
) -> Tensor:
    q, k = wide(q), wide(k)
    nothing = k.new_zeros(*k.shape[:-1], 1)
    return backends.execute(q, k, nothing, plan, scale=scale, sinks=sinks, softcap=softcap)[1]


def block_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    scale: float,
    extent: Extent,
    block_q: int,
    block_k: int,
    causal: bool = True,
    limit: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Attention mass of each block: summed over the live rows of a query block and the keys of a key block.

    Args:
        lse: of dense attention, ``[B, H, S]``, from `log_sum_exp`; it brings the sinks in.

    Returns:
        fp32 ``[B, H, M, N]``. A row of blocks sums to the number of live rows in the query block, less the sinks'.

    Raises:
        ValueError: a shape that does not fit.
    """
    tiles = Tiles(q, k, lse, scale, extent, causal, limit, softcap)
    rows, keys = range(ceil_div(tiles.query_len, block_q)), range(ceil_div(tiles.key_len, block_k))
    blocks = torch.zeros(tiles.batch, tiles.heads, len(rows), len(keys), device=q.device)
    for m, row in spans(rows, tiles.query_len, block_q, tiles.row_cap):
        for n, key in spans(keys, tiles.key_len, block_k, tiles.key_cap):
            mass = tiles.mass(row, key)
            if mass is not None:
                part = sum_blocks(sum_row_blocks(mass, block_q), block_k)
                blocks[:, :, m : m + part.shape[2], n : n + part.shape[3]] += part
    return blocks


@dataclass(frozen=True, slots=True, eq=False)
class ExactMasses:
    """Attention mass by key, by distance and by block, summed over the counted rows.

    Fields:
        columns: fp32 ``[B, H, T]``, by key slot. diagonals: fp32 ``[B, H, T]``, by distance ``pos(i) - pos(j)``.
        blocks: fp32 ``[B, H, m, N]``, of the query blocks that were counted.
        query_blocks: which these are; ``range(M)`` unless they were sampled.
        rows: int64 ``[B]``, the number of live rows that were counted. Each of the three sums to it, less the sinks'.
    """

    columns: Tensor
    diagonals: Tensor
    blocks: Tensor
    query_blocks: range
    rows: Tensor


def exact_masses(
    q: Tensor,
    k: Tensor,
    *,
    scale: float,
    extent: Extent,
    lse: Tensor | None = None,
    block_q: int = 64,
    block_k: int = 64,
    limit: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    step: int = 1,
    offset: int | None = None,
) -> ExactMasses:
    """Mass of every column, diagonal and block of causal attention, in one streaming pass.

    Args:
        lse: of dense attention, ``[B, H, S]``, if it is there already.
        step: count every ``step``-th query block only, which costs that much less. The sums of all offsets add up to
            those of ``step=1``, so the share of a column, diagonal or block row is unbiased over a random offset.
        offset: the first query block counted, below ``step``; the middle one unless given.

    Raises:
        ValueError: ``step`` or ``offset`` out of range, or a shape that does not fit.
    """
    query_len, key_len = q.shape[2], k.shape[2]
    count = ceil_div(query_len, block_q)
    if step < 1 or (offset is not None and not 0 <= offset < step):
        raise ValueError(f"exact_masses needs step >= 1 and 0 <= offset < step, got step={step}, offset={offset}")
    chosen = range(min(step // 2, max(0, count - 1)) if offset is None else offset, count, step)
    if lse is None:
        lse = torch.full(q.shape[:3], float("-inf"), dtype=wide(q[:0]).dtype, device=q.device)
        for _, row in spans(chosen, query_len, block_q, query_len):
            here = Extent(extent.query_start + row.start, extent.key_start, extent.key_count)
            lse[:, :, row] = log_sum_exp(
                q[:, :, row], k, scale=scale, extent=here, limit=limit, sinks=sinks, softcap=softcap
            )
    tiles = Tiles(q, k, lse, scale, extent, True, limit, softcap)
    batch, heads = tiles.batch, tiles.heads
    columns = torch.zeros(batch, heads, key_len, device=q.device)
    diagonals = torch.zeros(batch, heads, key_len, device=q.device)
    keys = range(ceil_div(key_len, block_k))
    blocks = torch.zeros(batch, heads, len(chosen), len(keys), device=q.device)
    live = live_rows(extent, query_len)
    rows = torch.zeros(batch, dtype=torch.int64)
    for m, row in spans(chosen, query_len, block_q, tiles.row_cap):
        rows += live[:, row].sum(dim=1)
        for n, key in spans(keys, key_len, block_k, tiles.key_cap):
            mass = tiles.mass(row, key)
            if mass is None:
                continue
            by_row_block = sum_row_blocks(mass, block_q)
            columns[:, :, key] += by_row_block.sum(dim=2)
            part = sum_blocks(by_row_block, block_k)
            blocks[:, :, m : m + part.shape[2], n : n + part.shape[3]] += part
            _add_diagonals(diagonals, mass, row.start, key.start, extent)
    return ExactMasses(columns, diagonals, blocks, chosen, rows)


def _add_diagonals(diagonals: Tensor, mass: Tensor, row: int, key: int, extent: Extent) -> None:
    """Add a tile's sums by distance, in place; the tile begins at query ``row`` and key slot ``key``."""
    sums = _diagonal_sums(mass).flip(-1)  # by rising distance, from that of the first row and the last key
    nearest = extent.query_start + extent.key_start + (row - key - mass.shape[-1] + 1)
    for b, distance in enumerate(nearest.tolist()):
        low, high = max(0, distance), min(diagonals.shape[-1], distance + sums.shape[-1])
        if low < high:
            diagonals[b, :, low:high] += sums[b, :, low - distance : high - distance]


def plan_recall(
    q: Tensor,
    k: Tensor,
    plan: SparsePlan,
    lse: Tensor,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Mean over the live rows of the attention mass inside the plan: fp32 ``[B, H]``, ``exp(lse of plan - lse)``.

    A sink's mass counts as inside, since every plan keeps it: the dense plan has recall 1. So has a batch row
    without live queries.

    Args:
        plan: with the model's own window in it (`SparsePlan.with_limit`).
        lse: of dense attention with the same sinks, ``[B, H, S]``, from `log_sum_exp`.
    """
    lost = 1 - (_plan_lse(q, k, plan, scale, sinks, softcap) - lse).exp()
    live = live_rows(plan.extent, plan.query_len).to(q.device)[:, None]
    return 1 - (lost.masked_fill_(~live, 0.0).sum(dim=-1) / live.sum(dim=-1).clamp(min=1)).float()


def visible_pairs(
    extent: Extent,
    query_len: int,
    key_len: int,
    *,
    block_q: int,
    block_k: int,
    causal: bool = True,
    limit: int | None = None,
    query_blocks: range | None = None,
) -> Tensor:
    """Pairs of each block that dense attention computes for live rows: int64 ``[B, M, N]`` on the CPU.

    ``query_blocks`` chooses among the M, as in `ExactMasses`.
    """
    chosen = range(ceil_div(query_len, block_q)) if query_blocks is None else query_blocks
    key_blocks = ceil_div(key_len, block_k)
    count = extent.key_count[:, None]
    edge = (torch.arange(key_blocks + 1) * block_k).clamp(max=key_len) - extent.key_start[:, None]
    edge = edge.clamp(min=0).minimum(count)
    low, high = edge[:, None, :-1], edge[:, None, 1:]  # positions of the live keys of each block
    live = live_rows(extent, query_len)
    pairs = torch.zeros(extent.batch, len(chosen), key_blocks, dtype=torch.int64)
    for m, row in spans(chosen, query_len, block_q, max(block_q, (1 << 20) // max(1, key_blocks))):
        position = extent.query_positions(query_len)[:, row, None]
        first, last = torch.zeros_like(position), count[:, None] - 1
        if causal:
            last = last.minimum(position)
        if limit is not None:
            first, last = position - limit + 1, last.minimum(position + limit - 1)
        seen = (high.minimum(last + 1) - low.maximum(first)).clamp(min=0)
        part = sum_row_blocks(seen * live[:, row, None], block_q)
        pairs[:, m : m + part.shape[1]] += part
    return pairs


def _diagonal_blocks(extent: Extent, query_len: int, key_len: int, block_q: int, block_k: int) -> Tensor:
    """Blocks that hold the own key of one of their live rows: bool ``[B, M, N]`` on the CPU."""
    return visible_pairs(extent, query_len, key_len, block_q=block_q, block_k=block_k, limit=1) > 0


def block_counts(plan: SparsePlan) -> Tensor:
    """Whole blocks that a plan is worth, for `oracle_blocks`: int64 ``[B, heads]`` on the CPU.

    For a plan of blocks alone, in the original order, the visible ones among them. For any other, the diagonal blocks
    and as many full ones as its further pairs would fill, rounded down.
    """
    where, size = (plan.extent, plan.query_len, plan.key_len), (plan.block_q, plan.block_k)
    pairs = visible_pairs(*where, block_q=size[0], block_k=size[1], causal=plan.causal, limit=plan.limit)
    bands = int(torch.as_tensor(plan.sink).sum()) + int(torch.as_tensor(plan.window).sum())
    if not plan.column_indices.numel() and not bands and plan.q_order is None and plan.k_order is None:
        return (plan.block_mask().cpu() & (pairs > 0)[:, None]).sum(dim=(2, 3))
    own = _diagonal_blocks(*where, *size)
    rest = plan.count_pairs().cpu() - (pairs * own).sum(dim=(1, 2))[:, None]
    return own.sum(dim=(1, 2))[:, None] + rest.clamp(min=0) // (plan.block_q * plan.block_k)


def oracle_blocks(
    mass: Tensor,
    counts: Tensor,
    *,
    extent: Extent,
    query_len: int,
    key_len: int,
    block_q: int,
    block_k: int,
    causal: bool = True,
    limit: int | None = None,
) -> Tensor:
    """The best plan of whole blocks with a number of blocks a head, spread over its query blocks as pays best.

    Args:
        mass: ``[B, H, M, N]`` from `block_mass`.
        counts: int64 ``[B, heads]``, blocks of each head, from `block_counts`. With ``heads = G`` the mass of a group
            of query heads is summed first, and they share the plan.

    Returns:
        bool ``[B, heads, M, N]``: the diagonal blocks, always, and the visible ones with the most mass; between equal
        ones the first in the order of rows.

    Raises:
        ValueError: the counts do not fit the mass.
    """
    batch, heads = mass.shape[:2]
    if counts.ndim != 2 or counts.shape[0] != batch or not counts.shape[1] or heads % counts.shape[1]:
        raise ValueError(
            f"counts must be [batch, heads] with batch {batch} and heads a divisor of {heads}, got "
            f"{tuple(counts.shape)}; make them with gossamer.oracle.block_counts"
        )
    pairs = visible_pairs(extent, query_len, key_len, block_q=block_q, block_k=block_k, causal=causal, limit=limit)
    if pairs.shape[1:] != mass.shape[2:]:
        raise ValueError(
            f"mass has {tuple(mass.shape[2:])} blocks, but lengths {query_len}, {key_len} and blocks {block_q}, "
            f"{block_k} give {tuple(pairs.shape[1:])}; make it with gossamer.oracle.block_mass and the same sizes"
        )
    own = _diagonal_blocks(extent, query_len, key_len, block_q, block_k).to(mass.device)[:, None]
    worth = mass.unflatten(1, (counts.shape[1], -1)).sum(dim=2)
    worth = worth.masked_fill_((pairs == 0)[:, None].to(mass.device), -1.0).masked_fill_(own, float("inf")).flatten(2)
    chosen = torch.zeros_like(worth, dtype=torch.bool)
    least, most = own.sum(dim=(1, 2, 3)).tolist(), (pairs > 0).sum(dim=(1, 2)).tolist()
    for b, row in enumerate(counts.tolist()):
        for head, count in enumerate(row):
            order = worth[b, head].argsort(descending=True, stable=True)
            chosen[b, head, order[: min(max(count, least[b]), most[b])]] = True
    return chosen.unflatten(-1, mass.shape[2:])


def oracle_recall(mass: Tensor, mask: Tensor, rows: Tensor) -> Tensor:
    """Recall of a plan of whole blocks from the mass of all blocks: fp32 ``[B, H]``, comparable with `plan_recall`.

    Args:
        mass: ``[B, H, M, N]`` from `block_mass`; mask: bool ``[B, heads, M, N]`` from `oracle_blocks`.
        rows: ``[B]``, the number of live rows: ``live_rows(...).sum(1)`` or `ExactMasses.rows`.
    """
    outside = mass.unflatten(1, (mask.shape[1], -1)).masked_fill(mask[:, :, None], 0.0)
    return 1 - outside.sum(dim=(3, 4)).flatten(1) / rows.to(mass.device).clamp(min=1)[:, None]
