"""Exact number of pairs in a plan, without the S x T mask.

A tile (query block x key range) is counted whole where all its rows agree, and row by row only at the edges of
causality, bands and limits. Columns are tiles one key wide.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.plan import Extent, SparsePlan

_ROW_BUDGET = 1 << 22  # rows expanded at once


def count_pairs(plan: SparsePlan) -> Tensor:
    """Pairs computed by each head, int64 ``[B, heads]``, on the CPU. In C++ or Triton where it can be."""
    from gossamer.backends import planners  # imports plan

    permuted = plan.q_order is not None or plan.k_order is not None
    native = planners.cpu_planner(plan.device)
    if native is not None and not permuted:
        return native.count_pairs(plan)
    device = planners.device_planner(plan.device)
    if device is not None and device.counts_pairs_of(plan):
        return device.count_pairs(plan)
    return _count_in_torch(plan)


def dense_pairs(extent: Extent, query_len: int, *, causal: bool, limit: int | None) -> int:
    """Pairs that dense attention computes in one head, over the batch: those live, causal and within the limit."""
    total = 0
    for start, count in zip(extent.query_start.tolist(), extent.key_count.tolist(), strict=True):
        # A query at p attends the live keys below min(p + ahead, count) that are not below p - behind.
        if causal or limit is not None:
            ahead = 1 if causal else limit
            total += _clamped_sum(start + ahead, query_len, count)
        else:
            total += query_len * count
        if limit is not None:
            total -= _clamped_sum(start + 1 - limit, query_len, count)
    return total


def _clamped_sum(first: int, terms: int, most: int) -> int:
    """The sum of ``first, first + 1, ..`` (that many terms), each clamped to 0 .. most."""

    def up_to(last: int) -> int:
        rising = max(0, min(last, most))
        return rising * (rising + 1) // 2 + max(0, last - most) * most

    return up_to(first + terms - 1) - up_to(first - 1)


def _count_in_torch(plan: SparsePlan) -> Tensor:
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64)
    if plan.q_order is not None or plan.k_order is not None:
        chunk = max(1, (1 << 26) // max(1, plan.batch * plan.heads * plan.key_len))
        for start in range(0, plan.query_len, chunk):
            counts += plan.rows_mask(torch.arange(start, min(start + chunk, plan.query_len))).sum(dim=(2, 3)).cpu()
        return counts
    if plan.num_query_blocks == 0 or plan.num_key_blocks == 0:
        return counts
    for batch_row in range(plan.batch):
        for head in range(plan.heads):
            counts[batch_row, head] = _Head.of(plan, batch_row, head).count()
    return counts


@dataclass(slots=True)
class _Head:
    """One batch row and head of a plan, in positions."""

    plan: SparsePlan
    selected: Tensor  # bool [M, N]
    columns: Tensor  # int64 [nc], key slots
    column_group: Tensor  # int64 [nc]
    key_start: int
    key_count: int
    query_start: int
    sink: int
    window: int

    @classmethod
    def of(cls, plan: SparsePlan, batch_row: int, head: int) -> _Head:
        row = batch_row * plan.heads + head
        blocks, block_lengths = _csr_rows(plan.block_indptr, plan.block_indices, row, plan.num_query_blocks)
        columns, column_lengths = _csr_rows(plan.column_indptr, plan.column_indices, row, plan.num_column_groups)
        selected = torch.zeros(plan.num_query_blocks, plan.num_key_blocks, dtype=torch.bool)
        selected[torch.repeat_interleave(block_lengths), blocks] = True
        extent = plan.extent
        return cls(
            plan,
            selected,
            columns,
            torch.repeat_interleave(column_lengths),
            int(extent.key_start[batch_row]),
            int(extent.key_count[batch_row]),
            int(extent.query_start[batch_row]),
            int(torch.as_tensor(plan.sink)[head]),
            int(torch.as_tensor(plan.window)[head]),
        )

    def count(self) -> int:
        plan = self.plan
        first = torch.arange(plan.num_query_blocks) * plan.block_q
        last = (first + plan.block_q).clamp(max=plan.query_len) - 1
        low = torch.arange(plan.num_key_blocks) * plan.block_k
        high = (low + plan.block_k).clamp(max=plan.key_len)
        queries = (first + self.query_start, last + self.query_start)
        keys = (self._live(low), self._live(high))

        total = 0
        for selected, kind in ((self.selected, "selected"), (~self.selected, "band")):
            if kind == "band" and self.sink == 0 and self.window == 0:
                continue
            block_q, block_k = selected.nonzero(as_tuple=True)
            total += self._count_tiles(
                queries[0][block_q], queries[1][block_q], keys[0][block_k], keys[1][block_k], kind
            )
        if self.columns.numel():
            total += self._count_columns(queries)
        return total

    def _count_columns(self, queries: tuple[Tensor, Tensor]) -> int:
        plan = self.plan
        offsets = torch.arange(plan.column_group)
        total = 0
        step = max(1, _ROW_BUDGET // plan.column_group)
        for at in range(0, self.columns.numel(), step):
            columns = self.columns[at : at + step]
            block_q = self.column_group[at : at + step, None] * plan.column_group + offsets
            inside = block_q < plan.num_query_blocks
            columns = columns[:, None].expand_as(block_q)[inside]
            block_q = block_q[inside]
            free = ~self.selected[block_q, columns // plan.block_k]
            columns, block_q = columns[free], block_q[free]
            total += self._count_tiles(
                queries[0][block_q], queries[1][block_q], self._live(columns), self._live(columns + 1), "column"
            )
        return total

    def _live(self, slots: Tensor) -> Tensor:
        return (slots - self.key_start).clamp(0, self.key_count)

    def _count_tiles(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, kind: str) -> int:
        """Pairs in tiles of query positions ``first..last`` (inclusive) and key positions ``low..high - 1``."""
        width = high - low
        dead = (width <= 0) | (last < first)
        if self.plan.causal:
            dead |= low > last
        if self.plan.limit is not None:
            dead |= self._distance(first, last, low, high) >= self.plan.limit
        if kind == "band":
            dead |= (low >= self.sink) & (self._distance(first, last, low, high) >= self.window)
        keep = ~dead
        first, last, low, high, width = first[keep], last[keep], low[keep], high[keep], width[keep]
        whole = (self._count_rows(first, low, high, kind) == width) & (self._count_rows(last, low, high, kind) == width)
        if kind == "column":  # a narrow window may pass between the first and the last row
            whole &= self._distance(first, last, low, high) >= self.window
        total = int(((last - first + 1) * width)[whole].sum())
        first, last, low, high = (t[~whole] for t in (first, last, low, high))
        offsets = torch.arange(self.plan.block_q)
        step = max(1, _ROW_BUDGET // self.plan.block_q)
        for at in range(0, first.numel(), step):
            part = slice(at, at + step)
            rows = first[part, None] + offsets
            counts = self._count_rows(rows, low[part, None], high[part, None], kind)
            total += int(counts[rows <= last[part, None]].sum())
        return total

    @staticmethod
    def _distance(first: Tensor, last: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """Smallest distance between a query and a key of the tile."""
        return torch.maximum(first - (high - 1), low - last)

    def _count_rows(self, position: Tensor, low: Tensor, high: Tensor, kind: str) -> Tensor:
        if self.plan.causal:
            high = torch.minimum(high, position + 1)
        if self.plan.limit is not None:
            low = torch.maximum(low, position - self.plan.limit + 1)
            high = torch.minimum(high, position + self.plan.limit)
        pairs = (high - low).clamp(min=0)
        if kind == "selected":
            return pairs
        window_low = torch.maximum(low, position - self.window + 1)
        window_high = torch.minimum(high, position + self.window)
        sink_high = high.clamp(max=self.sink)
        band = (
            (sink_high - low).clamp(min=0)
            + (window_high - window_low).clamp(min=0)
            - (torch.minimum(sink_high, window_high) - window_low).clamp(min=0)
        )
        return band if kind == "band" else pairs - band


def _csr_rows(indptr: Tensor, indices: Tensor, row: int, length: int) -> tuple[Tensor, Tensor]:
    """The indices of ``length`` consecutive CSR rows that belong to head ``row``, and each row's count."""
    pointers = indptr[row * length : (row + 1) * length + 1].cpu()
    return indices[int(pointers[0]) : int(pointers[-1])].cpu().long(), pointers.diff()
