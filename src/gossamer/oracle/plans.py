"""The best plan of whole blocks at a given budget, from exact masses."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.plan import Grid, SparsePlan

__all__ = ["block_counts", "oracle_blocks", "oracle_recall", "visible_pairs"]


def visible_pairs(grid: Grid, query_blocks: range | None = None, *, limit: int | None = None) -> Tensor:
    """Pairs of each block that dense attention computes: int64 ``[B, M, N]`` on the CPU.

    Args:
        query_blocks: some of the M alone, as in `ExactMasses`.
        limit: a window below the extent's own.
    """
    extent, window = grid.extent, grid.extent.limit if limit is None else limit
    chosen = range(grid.query_blocks) if query_blocks is None else query_blocks
    low, high = grid.key_block_ends()
    pairs = torch.zeros(extent.batch, len(chosen), grid.key_blocks, dtype=torch.int64, device="cpu")
    for index, m in enumerate(chosen):
        for row in range(extent.batch):
            position = torch.arange(*grid.queries[row, m].tolist(), device="cpu")[:, None]
            first, last = low[row], high[row]
            if extent.causal:
                last = last.minimum(position + 1)
            if window is not None:
                first, last = first.maximum(position - window + 1), last.minimum(position + window)
            pairs[row, index] = (last - first).clamp(min=0).expand(len(position), -1).sum(dim=0)
    return pairs


def block_counts(plan: SparsePlan) -> Tensor:
    """Whole blocks that a plan is worth, for `oracle_blocks`: int64 ``[B, heads]`` on the CPU.

    For a plan of blocks alone, in the original order, the visible ones among them. For any other, the diagonal blocks
    and as many full ones as its further pairs would fill, rounded down.
    """
    pairs = visible_pairs(plan.grid)
    bands = int(torch.as_tensor(plan.sink, device=plan.device).sum()) + int(
        torch.as_tensor(plan.window, device=plan.device).sum()
    )
    if not plan.column_indices.numel() and not bands and not plan.permuted:
        return (plan.block_mask().cpu() & (pairs > 0)[:, None]).sum(dim=(2, 3))
    own = visible_pairs(plan.grid, limit=1) > 0
    rest = plan.count_pairs() - (pairs * own).sum(dim=(1, 2))[:, None]
    return own.sum(dim=(1, 2))[:, None] + rest.clamp(min=0) // (plan.block_q * plan.block_k)


def oracle_blocks(mass: Tensor, counts: Tensor, grid: Grid) -> Tensor:
    """The best plan of whole blocks with a number of blocks a head, spread over its query blocks as pays best.

    Args:
        mass: ``[B, H, M, N]`` from `block_mass` on the same grid.
        counts: int64 ``[B, heads]``, blocks of each head, from `block_counts`. With ``heads = G`` the mass of a group
            of query heads is summed first, and they share the plan.

    Returns:
        bool ``[B, heads, M, N]``: the diagonal blocks, always, and the visible ones with the most mass; between equal
        ones the first in the order of rows.

    Raises:
        ValueError: the counts do not fit the mass, or the mass the grid.
    """
    batch, heads = mass.shape[:2]
    if counts.ndim != 2 or counts.shape[0] != batch or not counts.shape[1] or heads % counts.shape[1]:
        raise ValueError(
            f"counts must be [batch, heads] with batch {batch} and heads a divisor of {heads}, got "
            f"{tuple(counts.shape)}; make them with gossamer.oracle.block_counts"
        )
    pairs = visible_pairs(grid)
    if pairs.shape[1:] != mass.shape[2:]:
        raise ValueError(
            f"mass has {tuple(mass.shape[2:])} blocks, but the grid has {tuple(pairs.shape[1:])}; make it with "
            "gossamer.oracle.block_mass and the same grid"
        )
    own = (visible_pairs(grid, limit=1) > 0).to(mass.device)[:, None]
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
        rows: ``[B]``, the number of live queries: ``call.extent.query_count`` or `ExactMasses.rows`.
    """
    outside = mass.unflatten(1, (mask.shape[1], -1)).masked_fill(mask[:, :, None], 0.0)
    return 1 - outside.sum(dim=(3, 4)).flatten(1) / rows.to(mass.device).clamp(min=1)[:, None]
