"""The index of a ring: which columns and diagonals the last queries attend, over all ranks (MTraining, 2510.18830)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.attend import wide
from gossamer.call import AttentionCall
from gossamer.distributed.layout import Layout
from gossamer.distributed.selection import VerticalSlashes
from gossamer.methods.mtraining import best_below
from gossamer.methods.vertical_slash import BLOCK, FORCED_BANDS, FORCED_COLUMNS, VerticalSlash, at_least
from gossamer.plan import ceil_div
from gossamer.plan.integers import integer
from gossamer.rules import top_k

__all__ = ["TopP", "plan_vertical_slash"]

Group = Any
_KEYS = 4096  # whose logits are held at once


@dataclass(frozen=True)
class TopP:
    """Budgets of MTraining: of columns, and of diagonals, the best that together hold less than ``p`` of the mass.

    Of each head by itself, and at most ``most`` tokens of either. Every query block also keeps its own key block, which
    the authors' kernel assumes to be selected. ``p = 1`` takes all, up to ``most``.

    Fields:
        p: share of the attention of the last queries.
        most: columns, and tokens of diagonals, at most.
        last: queries that are asked.

    Raises:
        ValueError, TypeError: a number out of range.
    """

    p: float = 0.95
    most: int = 4096
    last: int = 64

    def __post_init__(self) -> None:
        if not isinstance(self.p, int | float) or isinstance(self.p, bool) or not 0 < self.p <= 1:
            raise ValueError(f"TopP.p must lie in (0, 1], got {self.p!r}")
        integer(self.most, "TopP.most", least=1)
        integer(self.last, "TopP.last", least=1)


def plan_vertical_slash(
    q: Tensor,
    k: Tensor,
    layout: Layout,
    *,
    budget: TopP | VerticalSlash | None = None,
    group: Group | None = None,
    scale: float | None = None,
    lengths: Tensor | None = None,
) -> VerticalSlashes:
    """Columns and block diagonals for a sequence that the ranks of a group share; all of them call it.

    Every rank has the last queries, and takes their softmax over its own keys; the largest logits and the sums are
    made common. Diagonals are bands of 64, to which a pair adds as `gossamer.methods.VerticalSlash` says, and their
    masses are summed over the ranks; of columns each rank proposes its best, and all choose among these. Nobody holds a
    number for each position, and all ranks find the same.

    Args:
        q: ``[B, H, S, D]``, this rank's tokens; k: ``[B, G, S, D]``. A selection is a constant: they get no gradient.
        layout: of the sequence; 64 divides its unit.
        budget: `TopP` (default), or the method `gossamer.methods.VerticalSlash` for its fixed budgets: then it is that
            method's plan of the whole sequence.
        lengths: live tokens of each batch row, int64 ``[B]`` on the CPU; default: all.

    Raises:
        ValueError: tensors of another length than the rank has; a budget that is ``exact``.
        RuntimeError: a rank has ended, or did not answer within the group's time-out.
    """
    budget = TopP() if budget is None else budget
    if isinstance(budget, VerticalSlash) and budget.exact:
        raise ValueError("a ring takes vertical_slash with exact=False, whose diagonals are whole blocks")
    rank = dist.get_rank(group)
    if q.shape[2] != layout.tokens(rank) or k.shape[2] != layout.tokens(rank):
        raise ValueError(
            f"rank {rank} owns {layout.tokens(rank)} tokens, got q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    whole = torch.full((q.shape[0],), layout.length, dtype=torch.int64, device="cpu")
    probe = _Probe(AttentionCall.of(q, k, scale=scale), layout, rank, group, whole if lengths is None else lengths)
    with torch.no_grad():
        columns, bands = probe.masses(budget.last)
        return _choose(probe, budget, columns, bands)


class _Probe:
    """The attention of the last queries to the keys of one rank."""

    def __init__(self, call: AttentionCall, layout: Layout, rank: int, group: Group, lengths: Tensor) -> None:
        self.call, self.layout, self.rank, self.group, self.lengths = call, layout, rank, group, lengths
        self.positions = layout.positions(rank)

    def sum(self, x: Tensor) -> Tensor:
        dist.all_reduce(x, group=self.group)
        return x

    def masses(self, last: int) -> tuple[Tensor, Tensor]:
        """Of this rank's keys, ``[B, H, S]``, and of the bands of all ranks, ``[B, H, bands]``; fp32."""
        call, device = self.call, self.call.device
        asked = self.lengths[:, None] - last + torch.arange(last, device="cpu")  # positions [B, last]
        queries = self._queries(asked).unflatten(1, (call.groups, -1)).flatten(2, 3)
        place = asked.to(device)[:, None, None, :, None]  # of [B, G, share, last, keys]
        largest = torch.full(queries.shape[:3], float("-inf"), device=device)
        for _, logits in self._logits(queries, place):
            largest = torch.maximum(largest, logits.amax(dim=-1).flatten(2, 3))
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        level = largest.masked_fill(largest == float("-inf"), 0.0).unflatten(2, (call.share, -1))[..., None]
        total = torch.zeros_like(level)
        for _, logits in self._logits(queries, place):
            total += torch.exp(logits - level).sum(dim=-1, keepdim=True)
        total = self.sum(total.contiguous()).clamp(min=torch.finfo(torch.float32).tiny)
        columns = torch.zeros(call.batch, call.heads, call.key_len, device=device)
        bands = torch.zeros(call.batch, call.heads, ceil_div(self.layout.length, BLOCK) + 1, device=device)
        for keys, logits in self._logits(queries, place):
            weights = (torch.exp(logits - level) / total).flatten(1, 2)  # [B, H, last, keys]
            columns[:, :, keys] = weights.sum(dim=2)
            before = (place[:, 0] - self.positions[keys].to(device)).clamp(min=0).expand_as(weights)
            band, beyond = before // BLOCK, before % BLOCK / BLOCK
            bands.scatter_add_(2, band.flatten(2), (weights * (1 - beyond)).flatten(2))
            bands.scatter_add_(2, (band + 1).flatten(2), (weights * beyond).flatten(2))
        return columns, self.sum(bands)

    def _queries(self, asked: Tensor) -> Tensor:
        """The last queries of all ranks, fp32 ``[B, H, last, D]``; zeros before the first token."""
        slots = self.layout.slots(self.rank)
        own = torch.where(asked >= 0, slots[asked.clamp(0, max(0, self.layout.length - 1))], -1)
        if not self.call.query_len:
            queries = torch.zeros(*self.call.q.shape[:2], asked.shape[1], self.call.q.shape[3], device=self.call.device)
            return self.sum(queries)
        index = own.clamp(min=0).to(self.call.device)[:, None, :, None]
        queries = self.call.q.take_along_dim(index, dim=2).float()
        return self.sum(queries.masked_fill((own < 0).to(self.call.device)[:, None, :, None], 0.0).contiguous())

    def _logits(self, queries: Tensor, place: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Of some keys after the others, fp32 ``[B, G, share, last, keys]``; -inf for pairs that are not allowed."""
        call = self.call
        for first in range(0, call.key_len, _KEYS):
            keys = slice(first, min(first + _KEYS, call.key_len))
            logits = (queries @ wide(call.k[:, :, keys]).float().transpose(-1, -2)) * call.scale
            logits = logits.unflatten(2, (call.share, -1))
            position = self.positions[keys].to(call.device)
            yield keys, logits.masked_fill((position > place) | (place < 0), float("-inf"))

    def gather(self, x: Tensor) -> Tensor:
        """Of all ranks, side by side in the last dimension."""
        parts = [torch.empty_like(x) for _ in range(self.layout.ranks)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts, dim=-1)


def _choose(probe: _Probe, budget: TopP | VerticalSlash, columns: Tensor, bands: Tensor) -> VerticalSlashes:
    lengths, device = probe.lengths, columns.device
    live = probe.positions < lengths[:, None]
    columns = columns.masked_fill(~live.to(device)[:, None], float("-inf"))
    if isinstance(budget, VerticalSlash):
        columns = columns.masked_fill((live & (probe.positions < FORCED_COLUMNS)).to(device)[:, None], float("inf"))
        verticals = at_least(budget.vertical_size, FORCED_COLUMNS)
        positions, masses = _candidates(probe, columns, int(verticals.max()))
        chosen = top_k(masses, verticals)
        bands[..., :FORCED_BANDS] = float("inf")
        slashes = top_k(bands, at_least(budget.slash_size, FORCED_BANDS * BLOCK, BLOCK))
    else:
        positions, masses = _candidates(probe, columns, budget.most)
        asked = lengths.clamp(max=budget.last).to(device, torch.float32)[:, None]
        chosen = best_below(masses, budget.p, asked, budget.most)
        slashes = best_below(bands, budget.p, asked, ceil_div(budget.most, BLOCK))
        slashes[..., 0] = True
    return VerticalSlashes(
        heads=probe.call.heads,
        lengths=lengths,
        block=BLOCK,
        sink=torch.zeros(probe.call.heads, dtype=torch.int64, device="cpu"),
        window=torch.zeros(probe.call.heads, dtype=torch.int64, device="cpu"),
        limit=None,
        slashes=slashes[..., : ceil_div(probe.layout.length, BLOCK)].cpu(),
        verticals=positions[chosen].cpu(),
        vertical_counts=chosen.sum(dim=-1).cpu(),
    )


def _candidates(probe: _Probe, columns: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """The best columns of each rank: positions, ascending, and their mass, ``[B, H, n]`` of all ranks."""
    own = top_k(columns, most)
    order = torch.where(own, 0, 1).sort(dim=-1, stable=True).indices[..., :most]  # the chosen ones first, ascending
    masses = torch.where(own, columns, float("-inf")).gather(-1, order)
    positions = probe.positions.to(columns.device)[order] if columns.shape[-1] else order
    missing = most - order.shape[-1]
    masses, positions = F.pad(masses, (0, missing), value=float("-inf")), F.pad(positions, (0, missing))
    masses, positions = probe.gather(masses), probe.gather(positions)
    order = positions.masked_fill(masses == float("-inf"), probe.layout.length).sort(dim=-1, stable=True).indices
    return positions.gather(-1, order), masses.gather(-1, order)
