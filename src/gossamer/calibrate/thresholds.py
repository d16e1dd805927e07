"""Thresholds of XAttention for each head, from captured calls: by coverage, and by the search that its paper describes.

    quality = sum(threshold_quality(call, method, levels) for call in captured)   # of one layer, [H, levels]
    steps = search_thresholds(torch.cat([quality of each layer]), adjustments)    # [layers * H]
    method = with_thresholds(method, levels[steps].view(layers, H))

The first rule is the one that the authors' code has; the search was never released.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor

from gossamer import backends, scores
from gossamer.call import AttentionCall
from gossamer.methods import PerHead, XAttention
from gossamer.oracle import block_mass, log_sum_exp
from gossamer.plan import Grid, SparsePlan
from gossamer.rules import TopP

__all__ = ["cover_thresholds", "search_thresholds", "threshold_levels", "threshold_quality", "with_thresholds"]


def cover_thresholds(calls: Iterable[AttentionCall], method: XAttention, coverage: float = 0.9) -> Tensor:
    """The share of XAttention's mass down to the least block that exact attention needs: fp64 ``[H]``.

    In each row the fewest blocks that hold ``coverage`` of the exact mass are found; the lowest of their scores is the
    row's bar. A head's threshold is the share of its scores, over all rows, that is not below the bars; over several
    prompts, and batch rows, the largest. This is the authors' profiler, with 0.9 (mit-han-lab/x-attention).

    Args:
        calls: of one layer.

    Raises:
        ValueError: no calls.
    """
    found = [_cover(call, method, coverage) for call in calls]
    if not found:
        raise ValueError("cover_thresholds needs at least one captured call, got none")
    return torch.cat(found).amax(dim=0)


def _cover(call: AttentionCall, method: XAttention, coverage: float) -> Tensor:
    """Of each batch row, ``[B, H]``."""
    grid = Grid(call.extent, method.block, method.block)
    exact = block_mass(call, log_sum_exp(call), grid)
    needed = TopP(coverage).select(exact, torch.zeros(1, dtype=torch.bool, device=call.device))
    above = torch.zeros(call.batch, call.heads, dtype=torch.float64, device=call.device)
    total = above.clone()
    for part, estimate in scores.antidiagonal_scores(call, grid, method.stride):
        bar = estimate.masked_fill(~needed[:, :, part.start : part.stop], float("inf")).amin(dim=-1, keepdim=True)
        above += estimate.masked_fill(estimate < bar, 0.0).double().sum(dim=(2, 3))
        total += estimate.double().sum(dim=(2, 3))
    return above / total.clamp(min=torch.finfo(torch.float64).tiny)


def threshold_levels(most: int, start: float = 0.9, factor: float = 0.9) -> Tensor:
    """Thresholds after 0 to ``most`` adjustments, fp64 ``[most + 1]``: each is ``factor`` times the one before."""
    return start * factor ** torch.arange(most + 1, dtype=torch.float64, device="cpu")


def threshold_quality(call: AttentionCall, method: XAttention, levels: Tensor) -> Tensor:
    """What each head's output loses at each threshold: minus its squared error, as a share of the dense output's.

    fp64 ``[H, levels]``. Heads of a layer do not see each other, so those of heads, layers and prompts may be added.

    Args:
        call: with values.
    """
    dense, _ = backends.attend(call, SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent))
    size = dense.double().square().sum(dim=(0, 2, 3)).clamp(min=torch.finfo(torch.float64).tiny)
    quality = []
    for threshold in levels.tolist():
        out, _ = backends.attend(call, replace(method, threshold=threshold).plan(call))
        quality.append(-(out - dense).double().square().sum(dim=(0, 2, 3)) / size)
    return torch.stack(quality, dim=1)


def search_thresholds(quality: Tensor, adjustments: int) -> Tensor:
    """How often to lower each head's threshold, ``adjustments`` times in all: int64 ``[heads]`` (2503.16428, 2.3).

    Dynamic programming over heads and numbers of adjustments: ``D[h][m]``, the best quality of the first h heads after
    exactly m of them, is the largest of ``D[h - 1][m - s] + quality[h][s]`` over what head h may take. Where that is
    s = 0 or 1 it is the paper's ``max(D[h - 1][m], P(h, m))``, with P relative to ``D[h - 1][m - 1]``, for a quality
    that is a sum over heads; the paper measures P by running the model each time. Of equal ones the fewest
    adjustments of the last heads win.

    Args:
        quality: ``[heads, s + 1]`` of all heads of the model, after 0 to s adjustments.

    Raises:
        ValueError: more adjustments than there are, or a negative number.
    """
    heads, levels = quality.shape
    if not 0 <= adjustments <= heads * (levels - 1):
        raise ValueError(
            f"{heads} heads with {levels - 1} adjustments each allow 0 to {heads * (levels - 1)} of them, "
            f"got {adjustments}"
        )
    best = torch.full((adjustments + 1,), float("-inf"), dtype=torch.float64, device="cpu")
    best[0] = 0.0
    taken = torch.zeros(heads, adjustments + 1, dtype=torch.int64, device="cpu")
    for h, row in enumerate(quality.double().cpu()):
        before, best = best, torch.full_like(best, float("-inf"))
        for s in range(min(levels - 1, adjustments) + 1):
            tried = before[: adjustments + 1 - s] + row[s]
            better = tried > best[s:]
            best[s:] = torch.where(better, tried, best[s:])
            taken[h, s:] = torch.where(better, s, taken[h, s:])
    steps = torch.zeros(heads, dtype=torch.int64, device="cpu")
    for h in reversed(range(heads)):
        steps[h] = taken[h, adjustments]
        adjustments -= int(steps[h])
    return steps


def with_thresholds(method: XAttention, thresholds: Tensor) -> PerHead:
    """The method with a threshold of its own for each layer and query head.

    Args:
        thresholds: ``[layers, H]``.
    """
    return PerHead(tuple(tuple(replace(method, threshold=t) for t in layer) for layer in thresholds.tolist()))
