"""Selectors: pure functions from scores to chosen indices, as bool masks. Ties break by the lower index.

Published "top-p" means several different sets; each rule here is stated exactly and named after what it does.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["CsrBuilder", "local_blocks", "relative_to_max", "top_k"]


def top_k(scores: Tensor, k: Tensor | int) -> Tensor:
    """The k largest scores of each row, as a bool mask of the same shape.

    Entries of -inf are never chosen; of equal scores the lower index wins. ``k`` is one number, or an integer tensor
    that broadcasts to the leading dimensions (heads may have different budgets).
    """
    budget = torch.as_tensor(k, device=scores.device).clamp(max=scores.shape[-1])
    most = int(budget.max()) if budget.numel() else 0
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
        """Row pointers int64 and ascending column indices int32."""
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
