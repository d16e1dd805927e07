"""Selectors: pure functions from scores to chosen indices, as bool masks. Ties break by the lower index.

Published "top-p" means several different sets; each rule here is stated exactly and named after what it does.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "CsrBuilder",
    "local_blocks",
    "relative_to_max",
    "top_k",
    "top_p",
    "top_p_below",
    "top_p_count",
    "top_p_of_all_rows",
    "top_p_reaching",
]


def top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """The k largest scores of each row, as a bool mask of the same shape.

    Entries of -inf are never chosen; of equal scores the lower index wins. ``k`` is one number, or an integer tensor
    that broadcasts to the leading dimensions (heads may have different budgets). Budgets on the CPU spare scores on a
    device a wait.
    """
    budget = torch.as_tensor(k).clamp(max=scores.shape[-1])
    most = int(budget.max()) if budget.numel() else 0
    budget = budget.to(scores.device, non_blocking=True)
    if most <= 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    # topk promises no order among equals, so only the threshold is taken from it.
    largest = scores.topk(most, dim=-1).values
    last = (budget - 1).clamp(min=0).expand(scores.shape[:-1])[..., None]
    threshold = largest.gather(-1, last)
    above = scores > threshold
    equal = scores == threshold
    room = budget[..., None] - above.sum(dim=-1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(dim=-1) <= room))
    return chosen & (scores > float("-inf")) & (budget[..., None] > 0)


def relative_to_max(energy: Tensor, alpha: float) -> Tensor:
    """Entries of at least ``alpha`` times the row's largest (FlashPrefill, 2603.06199): no sort, one pass.

    Energies are non-negative; an entry of 0 is chosen only by ``alpha == 0``.
    """
    if alpha == 0:
        return torch.ones_like(energy, dtype=torch.bool)
    return (energy >= alpha * energy.amax(dim=-1, keepdim=True)) & (energy > 0)


def top_p(scores: Tensor, p: Tensor | float, forced: Tensor | None = None) -> Tensor:
    """The fewest best entries of each row that hold the share ``p`` of its sum: the entry that crosses p is in.

    An entry is chosen when the entries before it hold less than ``p`` of the row's sum. ``forced`` entries (bool, as
    the scores) come first and are always chosen (XAttention, 2503.16428). Entries after the whole sum are never
    chosen. Scores are non-negative; sums are in fp64, from the best entry down. ``p`` is one number, or a tensor that
    broadcasts to the leading dimensions (heads may have different shares).

    Raises:
        ValueError: ``p`` lies outside [0, 1].
    """
    p = _share(p, scores)
    order = _best_first(scores, forced)
    up_to = _running_sum(scores, order)
    before = F.pad(up_to[..., :-1], (1, 0))
    chosen = _unsort(before < p * up_to[..., -1:], order)
    return chosen if forced is None else chosen | forced


def top_p_reaching(scores: Tensor, p: Tensor | float) -> Tensor:
    """The best entries of each row up to the first whose running sum is at least ``p``; none where none reaches it.

    ``p`` is compared with the sum itself, for rows that sum to 1 (PBS-Attn); a row that holds nothing reaches no
    ``p``, not even 0. Scores, sums and errors as in `top_p`.
    """
    p = _share(p, scores)
    order = _best_first(scores)
    up_to = _running_sum(scores, order)
    reached = (up_to >= p) & (up_to > 0)
    first = reached.int().argmax(dim=-1, keepdim=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    return _unsort((rank <= first) & reached.any(dim=-1, keepdim=True), order)


def top_p_below(scores: Tensor, p: Tensor | float) -> Tensor:
    """The best entries of each row whose running sum is at most ``p`` of the row's; at least the best one.

    The entry that crosses p is out (SpargeAttn, 2502.18137). Scores, sums and errors as in `top_p`.
    """
    p = _share(p, scores)
    order = _best_first(scores)
    up_to = _running_sum(scores, order)
    chosen = up_to <= p * up_to[..., -1:]
    chosen[..., :1] = True
    return _unsort(chosen, order)


def top_p_of_all_rows(scores: Tensor, p: Tensor | float) -> Tensor:
    """As `top_p_below`, over the two last dimensions at once and without a least entry: a row may stay empty.

    One budget for all query blocks of a head (FlexPrefill's query-aware pattern, 2502.20766).
    """
    flat = scores.flatten(-2)
    p = _share(p, flat)
    order = _best_first(flat)
    up_to = _running_sum(flat, order)
    return _unsort(up_to <= p * up_to[..., -1:], order).view(scores.shape)


def top_p_count(scores: Tensor, p: Tensor | float) -> Tensor:
    """How many of the best entries of each row hold at most ``p`` of its sum: int64, without the last dimension.

    A budget that is then spent on other scores (FlexPrefill's vertical-slash pattern, 2502.20766).
    """
    p = _share(p, scores)
    up_to = _running_sum(scores, _best_first(scores))
    return (up_to <= p * up_to[..., -1:]).sum(dim=-1)


def _share(p: Tensor | float, scores: Tensor) -> Tensor:
    share = torch.as_tensor(p, dtype=torch.float64, device=scores.device)
    outside = ~((share >= 0) & (share <= 1))
    if bool(outside.any()):
        raise ValueError(f"p must lie in [0, 1], got {share[outside].tolist()[0]}")
    if scores.shape[-1] == 0:
        raise ValueError(f"top-p needs at least one entry a row, got shape {tuple(scores.shape)}")
    return share[..., None]


def _best_first(scores: Tensor, forced: Tensor | None = None) -> Tensor:
    first = scores if forced is None else scores.masked_fill(forced, float("inf"))
    return first.argsort(dim=-1, descending=True, stable=True)


def _running_sum(scores: Tensor, order: Tensor) -> Tensor:
    return scores.gather(-1, order).double().cumsum(dim=-1)


def _unsort(chosen: Tensor, order: Tensor) -> Tensor:
    return torch.zeros_like(chosen).scatter_(-1, order, chosen)


def local_blocks(first: Tensor, last: Tensor, window: int, blocks: int) -> Tensor:
    """Blocks ``first - window + 1 .. last`` of each row: bool ``[..., blocks]``."""
    block = torch.arange(blocks, device=first.device)
    return (block > first[..., None] - window) & (block <= last[..., None])


class CsrBuilder:
    """Collects bool masks of query-block chunks into one CSR over ``[B, heads, M]`` rows; never holds M x N."""

    def __init__(self) -> None:
        self._counts: list[Tensor] = []
        self._indices: list[Tensor] = []

    def add(self, mask: Tensor) -> None:
        """The next query blocks: bool ``[B, heads, m, N]``."""
        self.add_lists(mask.sum(dim=-1), mask.flatten(0, 2).nonzero()[:, 1].to(torch.int32))

    def add_lists(self, counts: Tensor, indices: Tensor) -> None:
        """The next query blocks as lists: their lengths int64 ``[B, heads, m]``, and the int32 members in order."""
        self._counts.append(counts)
        self._indices.append(indices)

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers int64 and ascending column indices int32; of no rows where nothing was added."""
        if not self._counts:
            return torch.zeros(1, dtype=torch.int64), torch.empty(0, dtype=torch.int32)
        counts = torch.cat(self._counts, dim=2)
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
        torch.cumsum(counts.flatten(), 0, out=indptr[1:])
        if len(self._indices) == 1:
            return indptr, self._indices[0]
        indices = torch.empty(int(indptr[-1]), dtype=torch.int32, device=counts.device)
        starts = indptr[:-1].view(counts.shape)
        at = 0
        for part, chunk in zip(self._counts, self._indices, strict=True):
            lengths = part.flatten()
            row_start = starts[..., at : at + part.shape[2]].flatten()
            local_start = lengths.cumsum(0) - lengths
            shift = torch.repeat_interleave(row_start - local_start, lengths)
            indices[torch.arange(chunk.numel(), device=chunk.device) + shift] = chunk
            at += part.shape[2]
        return indptr, indices
