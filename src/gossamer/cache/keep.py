"""What a cache keeps of a prompt: from scores to positions, one pure function for each published rule.

All count in positions, so that neither padding nor companions in the batch change what a row keeps; a position is what
`gossamer.plan.Extent` says it is. What is kept is int64, ascending, ``-1`` (no token) in front where a row or head
keeps fewer tokens than others.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import scores
from gossamer.call import AttentionCall

__all__ = ["Pool", "Reduce", "best", "prefix_lengths", "pyramid_budgets", "sinks_and_recent", "window_votes"]

Pool = Literal["max", "mean"]
Reduce = Literal["mean", "max", "sum"]


def window_votes(
    call: AttentionCall, window: int, kernel: int = 7, pool: Pool = "max", reduce: Reduce = "mean"
) -> Tensor:
    """SnapKV's votes (2404.14469, section 4): what the last ``window`` live queries attend to before themselves.

    Column sums of their softmax, pooled over ``kernel`` neighbours with stride 1, then reduced over the query heads of
    each key/value head: a cache holds one copy for all of them.

    Returns:
        fp32 ``[B, G, positions]``, 0 from the window on.
    """
    columns, _ = scores.last_query_probe(call, window)
    before = torch.arange(columns.shape[-1], device=columns.device) < prefix_lengths(call, window).to(columns.device)
    columns = columns.masked_fill(~before[:, None], 0.0)
    if columns.shape[-1] and kernel > 1:
        padded = F.pad(columns, (kernel // 2, (kernel - 1) // 2))  # nothing is below 0: this is the padding of both
        columns = (F.max_pool1d if pool == "max" else F.avg_pool1d)(padded, kernel, stride=1)
    votes = columns.unflatten(1, (call.groups, call.share))
    votes = votes.amax(2) if reduce == "max" else votes.mean(2) if reduce == "mean" else votes.sum(2)
    return votes.masked_fill(~before[:, None], 0.0)


def prefix_lengths(call: AttentionCall, window: int) -> Tensor:
    """Tokens before the last ``window`` live queries of each row, int64 ``[B, 1]`` on the CPU."""
    extent = call.extent
    return (extent.first_position + extent.query_count - extent.query_count.clamp(max=window))[:, None]


def best(votes: Tensor, count: Tensor, budget: int | Tensor, window: Tensor) -> Tensor:
    """The last tokens of each row and those with the most votes before them; of equal votes the first.

    Args:
        votes: ``[B, G, positions]``, none below 0.
        count: int64 ``[B]``, the tokens of each row; one that has no more than its budget keeps all.
        budget: tokens that a row keeps of each head, its last ones included: one number, or int64 ``[B]``.
        window: int64 ``[B]``, its last tokens that it keeps in any case, at most its budget.

    Returns:
        ``[B, G, n]``; n is the largest number that a row keeps.
    """
    rows, positions = votes.shape[0], votes.shape[-1]
    device = votes.device
    budgets = torch.as_tensor(budget, device="cpu").expand(rows).minimum(count)
    place = torch.arange(positions, device=device)
    count, first = count.to(device)[:, None], (count - window).to(device)[:, None]
    ranked = votes.masked_fill((place >= first)[:, None], float("inf"))
    ranked = ranked.masked_fill((place >= count)[:, None], float("-inf"))
    most = int(budgets.max()) if rows else 0
    chosen = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    over = torch.arange(most, device=device) >= budgets.to(device)[:, None]
    return chosen.masked_fill(over[:, None], -1).sort(dim=-1).values


def sinks_and_recent(count: Tensor, sink: int, recent: int) -> Tensor:
    """The first ``sink`` and the last ``recent`` tokens of each row (StreamingLLM, 2309.17453): ``[B, n]``.

    Args:
        count: int64 ``[B]``, the tokens of each row.
    """
    kept = count.clamp(max=sink + recent)
    most = int(kept.max()) if count.numel() else 0
    ordinal = torch.arange(most, device=count.device) - (most - kept)[:, None]
    jump = torch.where(ordinal >= sink, (count - kept)[:, None], 0)
    return torch.where(ordinal < 0, -1, ordinal + jump)


def pyramid_budgets(layer: int, layers: int, count: Tensor, budget: int, window: int, beta: float = 20) -> Tensor:
    """Tokens that a layer keeps of each row, its window included (PyramidKV, 2406.02069): int64 ``[B]``.

    They fall evenly from the first layer to the last, ``(budget - window) / beta`` before its window, and their mean is
    ``budget``. Rows of fewer than ``budget`` tokens keep all; rows of fewer than ``2 (budget - window)`` have
    ``budget`` in every layer. As in the authors' code all divisions round down.

    Args:
        count: int64 ``[B]``, the tokens of each row.
    """
    flat = budget - window
    low = torch.full_like(count, int(flat // beta))
    high = 2 * flat - low
    fits = high < count - window
    high = torch.where(fits, high, count - window)
    low = torch.where(fits, low, 2 * flat - high)
    step = (high - low).div(max(layers - 1, 1), rounding_mode="floor")
    sloped = window + (high - layer * step if layers > 1 else torch.full_like(high, flat))
    return torch.where(count < budget, count, torch.where(count < 2 * flat, budget, sloped))
