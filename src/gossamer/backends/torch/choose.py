"""Chosen candidates as lists, in plain torch: the definition of how rules, forced ranges and diagonals make a plan."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.plan import SparsePlan
from gossamer.plan.count import count_pairs
from gossamer.rules import Candidates, Rule

__all__ = ["ListWriter", "count", "finish", "members"]


class ListWriter:
    """Collects the rows of a plan's lists, in parts that come in any order.

    One list for each of ``[B, heads, rows]``, of candidates below ``width``. Rows that no part names stay empty.
    """

    def __init__(self, batch: int, heads: int, rows: int, width: int, device: torch.device) -> None:
        self.shape = (batch, heads, rows)
        self.width = width
        self.device = device
        self._parts: dict[int, tuple[Tensor, Tensor]] = {}

    def choose(
        self, part: range, candidates: Candidates, scores: Tensor | None = None, rule: Rule | None = None
    ) -> None:
        """Lists of the rows ``part``: by a rule on scores, forced, on diagonals, everywhere; their union, of the seen.

        Args:
            candidates: for B batch rows and the rows of the part.
            scores: fp32 ``[B, heads, len(part), width]``, with a rule; without, all but what a rule chooses.
        """
        batch, heads, _ = self.shape
        seen, forced = members(candidates, batch, heads, self.width, self.device)
        chosen = forced
        if scores is not None and rule is not None:
            picked = rule.select(scores.masked_fill(~seen, rule.unseen), forced)
            if candidates.ruled_heads is not None:
                picked = picked & candidates.ruled_heads.to(self.device)[:, :, None, None]
            chosen = chosen | picked
        if candidates.diagonals is not None:
            chosen = chosen | _on_diagonals(candidates, self.width, self.device)
        if candidates.everywhere is not None:
            chosen = chosen | candidates.everywhere.to(self.device)[:, :, None]
        chosen = (chosen & seen).expand(batch, heads, len(part), self.width)
        self.take(part, chosen.sum(dim=-1), chosen.flatten(0, 2).nonzero()[:, 1].to(torch.int32))

    def take(self, part: range, counts: Tensor, indices: Tensor) -> None:
        """Lists of the rows ``part`` as they are: their lengths int64 ``[B, heads, len(part)]``, and their members.

        Raises:
            ValueError: another part has written one of these rows.
        """
        for start, (other, _) in self._parts.items():
            if part and start < part.stop and part.start < start + other.shape[2]:
                raise ValueError(
                    f"rows {part.start} to {part.stop - 1} overlap rows {start} to {start + other.shape[2] - 1}, which "
                    "are chosen already; choose each query block once"
                )
        if part:
            self._parts[part.start] = (counts, indices)

    def build(self) -> tuple[Tensor, Tensor]:
        """Row pointers int64 and ascending indices int32 of all rows."""
        counts = torch.zeros(self.shape, dtype=torch.int64, device=self.device)
        for start, (part, _) in self._parts.items():
            counts[:, :, start : start + part.shape[2]] = part
        indptr = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=self.device)
        torch.cumsum(counts.flatten(), 0, out=indptr[1:])
        if len(self._parts) == 1:
            return indptr, next(iter(self._parts.values()))[1]
        indices = torch.empty(int(indptr[-1]), dtype=torch.int32, device=self.device)
        starts = indptr[:-1].view(self.shape)
        for start, (part, members) in self._parts.items():
            lengths = part.flatten()
            row_start = starts[..., start : start + part.shape[2]].flatten()
            shift = torch.repeat_interleave(row_start - (lengths.cumsum(0) - lengths), lengths)
            indices[torch.arange(members.numel(), device=self.device) + shift] = members
        return indptr, indices


def members(candidates: Candidates, batch: int, heads: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What rows see, bool ``[B, 1, rows, width]``, and what is forced, ``[B, heads or 1, rows, width]``."""
    index = torch.arange(width, device=device)

    def inside(ranges: Tensor) -> Tensor:
        low, high = ranges.to(device)[..., None, :].unbind(-1)
        return ((index >= low) & (index < high))[:, None]

    seen = inside(candidates.seen)
    forced = inside(candidates.forced) | (index < candidates.first)
    if candidates.forced_heads is not None:
        forced = forced & candidates.forced_heads.to(device)[:, :, None, None]
    return seen, forced & seen


def _on_diagonals(candidates: Candidates, width: int, device: torch.device) -> Tensor:
    assert candidates.diagonals is not None
    assert candidates.origin is not None
    diagonals = candidates.diagonals.to(device)
    distance = candidates.origin.to(device)[..., None] - torch.arange(width, device=device)  # [B, rows, width]
    if candidates.mirrored:
        distance = distance.abs()
    inside = (distance >= 0) & (distance < diagonals.shape[-1])
    distance = distance.clamp(0, diagonals.shape[-1] - 1)[:, None].expand(-1, diagonals.shape[1], -1, -1)
    rows = diagonals[:, :, None].expand(-1, -1, distance.shape[2], -1)
    return rows.gather(3, distance) & inside[:, None]


def finish(blocks: ListWriter | None, columns: ListWriter | None, **fields: Any) -> SparsePlan:
    """The plan of what two writers collected, with its pairs counted. ``fields`` are the plan's others."""
    lists: dict[str, Tensor] = {}
    for name, writer in (("block", blocks), ("column", columns)):
        if writer is not None:
            lists[f"{name}_indptr"], lists[f"{name}_indices"] = writer.build()
            lists.setdefault("block_indices", lists[f"{name}_indices"][:0])  # a plan lies where its blocks lie
    plan = SparsePlan.unchecked(**lists, **fields)
    return SparsePlan.unchecked(**lists, **fields, pairs=count(plan))


def count(plan: SparsePlan) -> Tensor:
    """Pairs that the plan computes, int64 ``[B, heads]`` on the CPU. See `gossamer.plan.SparsePlan.count_pairs`."""
    return count_pairs(plan)
