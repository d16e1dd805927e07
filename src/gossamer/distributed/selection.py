"""What a plan over the whole sequence selects, asked for a few blocks at a time: no rank holds all of it."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.plan import SparsePlan, ceil_div
from gossamer.plan.plan import WHOLE

__all__ = ["Entries", "OfPlan", "Selection", "VerticalSlashes", "selection_of"]


class Entries(NamedTuple):
    """Numbers in lists: entry n stands in list ``row[n]``; ascending by list and number."""

    row: Tensor
    number: Tensor


@dataclass(frozen=True, eq=False)
class Selection(ABC):
    """A union of blocks, columns and bands over a causal sequence, blocks square and counted from position 0.

    Fields:
        heads: H, or G for a selection that the query heads of a group share.
        lengths: live tokens of each batch row, from position 0 on, int64 ``[B]``.
        block: tokens of a block.
        sink, window: int64 ``[heads]``, as `SparsePlan` has them.
        limit: the model's own window, or None.
    """

    heads: int
    lengths: Tensor
    block: int
    sink: Tensor
    window: Tensor
    limit: int | None

    @property
    def batch(self) -> int:
        return self.lengths.numel()

    @property
    @abstractmethod
    def column_group(self) -> int | None:
        """Consecutive blocks of queries that share a list of columns; None: all."""

    @abstractmethod
    def blocks(self, rows: Tensor, columns: Tensor) -> Tensor:
        """Whether blocks of keys are selected for blocks of queries, bool ``[B, heads, P, R, C]``.

        Args:
            rows: numbers ``[P, R]``; columns: ascending numbers ``[P, C]``, consecutive where P is not 1.
        """

    @abstractmethod
    def columns(self, groups: Tensor) -> Entries:
        """Positions in the column lists of ``groups`` ``[n]``; list ``(b * heads + h) * n + i`` is that of the i-th."""


@dataclass(frozen=True, eq=False)
class OfPlan(Selection):
    """That of a `SparsePlan` for the whole sequence; where its blocks are not square, in their common divisor."""

    plan: SparsePlan

    @property
    def column_group(self) -> int | None:
        if self.plan.column_group >= self.plan.num_query_blocks or not self.plan.column_indices.numel():
            return None
        return self.plan.column_group * (self.plan.block_q // self.block)

    def blocks(self, rows: Tensor, columns: Tensor) -> Tensor:
        plan = self.plan
        pairs, height, width = *rows.shape, columns.shape[1]
        found = torch.zeros(self.batch * self.heads, pairs * height, width, dtype=torch.bool, device="cpu")
        if not plan.block_indices.numel() or not found.numel():
            return found.view(self.batch, self.heads, pairs, height, width)
        finer_q, finer_k = plan.block_q // self.block, plan.block_k // self.block
        which = rows.flatten() // finer_q
        row, number = _listed(plan, plan.block_indptr, plan.block_indices, plan.num_query_blocks, which)
        number = (number[:, None] * finer_k + torch.arange(finer_k, device="cpu")).flatten()
        row = row.repeat_interleave(finer_k)
        if pairs == 1:
            places = torch.full((plan.num_key_blocks * finer_k,), -1, dtype=torch.int64, device="cpu")
            places[columns[0]] = torch.arange(width, device="cpu")
            place = places[number]
        else:
            place = number - columns[:, 0].repeat_interleave(height)[row % (pairs * height)]
        inside = (place >= 0) & (place < width)
        found.view(-1, width)[row[inside], place[inside]] = True
        return found.view(self.batch, self.heads, pairs, height, width)

    def columns(self, groups: Tensor) -> Entries:
        plan = self.plan
        return _listed(plan, plan.column_indptr, plan.column_indices, plan.num_column_groups, groups)


@dataclass(frozen=True, eq=False)
class VerticalSlashes(Selection):
    """Block diagonals and columns, the same for all queries; what `gossamer.distributed.plan_vertical_slash` finds.

    Fields:
        slashes: bool ``[B, heads, N]``: whether blocks at so many blocks before a query block's own are selected.
        verticals: int64 positions, ascending a head, one head behind the other; vertical_counts: int64 ``[B, heads]``.
    """

    slashes: Tensor
    verticals: Tensor
    vertical_counts: Tensor

    @property
    def column_group(self) -> int | None:
        return None

    def blocks(self, rows: Tensor, columns: Tensor) -> Tensor:
        before = rows[:, :, None] - columns[:, None, :]
        return self.slashes[:, :, before.clamp(min=0)] & (before >= 0)

    def columns(self, groups: Tensor) -> Entries:
        counts = self.vertical_counts.flatten()
        lists = counts.repeat_interleave(groups.numel())
        begin = (counts.cumsum(0) - counts).repeat_interleave(groups.numel())
        return _expanded(self.verticals, begin, lists)


def selection_of(plan: SparsePlan | Selection, unit: int) -> Selection:
    """A plan for the whole sequence, as a ring takes it, for a layout of such units.

    Raises:
        ValueError: the plan is not causal self-attention from position 0 on (right padding may follow), or has orders
            of tokens or attributes; its blocks do not divide the unit.
    """
    if isinstance(plan, SparsePlan):
        plan = _of_plan(plan, unit)
    if unit % plan.block:
        raise ValueError(f"blocks of {plan.block} tokens must divide the layout's unit, got {unit}; give unit=")
    return plan


def _of_plan(plan: SparsePlan, unit: int) -> Selection:
    extent = plan.extent
    if plan.permuted or plan.pruned_mean or plan.skip is not None:
        raise ValueError(
            "a ring takes plans of blocks, columns and bands, without q_order, k_order, pruned_mean and skip; "
            "plan by another method"
        )
    own = bool((extent.query_start == 0).all() and (extent.key_start == 0).all())
    if not (extent.causal and own and bool((extent.query_count == extent.key_count).all())):
        raise ValueError(
            "a ring takes plans of causal self-attention from the first token on, with right padding alone; got "
            f"query_start {extent.query_start.tolist()}, key_start {extent.key_start.tolist()}, query_count "
            f"{extent.query_count.tolist()}, key_count {extent.key_count.tolist()}, causal={extent.causal}"
        )
    plan = plan.to("cpu")
    sink, window = (torch.as_tensor(x, device="cpu").long() for x in (plan.sink, plan.window))
    block = math.gcd(plan.block_q, plan.block_k)
    if bool((window >= WHOLE).all()):  # every pair: nothing else of the plan matters
        plan, block, sink = SparsePlan.dense(plan.heads, plan.query_len, plan.key_len, extent), unit, 0 * sink
    return OfPlan(plan.heads, extent.key_count, block, sink, window, extent.limit, plan)


def _listed(plan: SparsePlan, indptr: Tensor, indices: Tensor, lists: int, which: Tensor) -> Entries:
    """Entries of the lists ``which`` ``[n]`` of each head, of so many lists a head."""
    first = torch.arange(plan.batch * plan.heads, device="cpu")[:, None] * lists
    number = (first + which.clamp(max=max(0, lists - 1))).flatten()
    if not lists:
        number = number[:0]
    return _expanded(indices.long(), indptr[:-1][number], indptr.diff()[number])


def _expanded(numbers: Tensor, begin: Tensor, length: Tensor) -> Entries:
    row = torch.repeat_interleave(length)
    place = torch.arange(row.numel(), device="cpu") + (begin - length.cumsum(0) + length)[row]
    return Entries(row, numbers[place])


def blocks_of(runs: list[tuple[int, int]], block: int) -> Tensor:
    """Numbers of the blocks of runs ``(start, tokens)``, one after the other, int64."""
    parts = [start // block + torch.arange(ceil_div(tokens, block), device="cpu") for start, tokens in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")
