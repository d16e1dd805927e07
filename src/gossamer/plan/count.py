"""Exact number of pairs in a plan, without the S x T mask: the definition beside which backends' counts are tested.

A tile (query block x key range) is counted whole where all its rows agree, and row by row only at the edges of
causality, bands and limits. Columns are tiles one key wide. Everything is in positions.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.plan.count_permuted import count_permuted
from gossamer.plan.integers import MOST
from gossamer.plan.plan import WHOLE, SparsePlan

_ROW_BUDGET = 1 << 22  # rows expanded at once
_MASK_BUDGET = 1 << 26  # entries of a permuted plan's mask


def count_pairs(plan: SparsePlan) -> Tensor:
    """Pairs computed by each head, int64 ``[B, heads]``, on the CPU."""
    if bool((torch.as_tensor(plan.window, device=plan.device) >= WHOLE).all()):
        return plan.extent.count_allowed()[:, None].expand(-1, plan.heads).contiguous()
    # What is built here is as large as the plan's numbers say, which may have been written since they were validated.
    plan.check()
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64, device="cpu")
    if plan.permuted and _has_blocks_alone(plan):
        return _count_ordered(plan)
    if plan.permuted and not _has_bands(plan):
        return count_permuted(plan)
    if plan.permuted:
        chunk = max(1, _MASK_BUDGET // max(1, plan.batch * plan.heads * plan.key_len))
        for start in range(0, plan.query_len, chunk):
            counts += (
                plan.rows_mask(torch.arange(start, min(start + chunk, plan.query_len), device="cpu"))
                .sum(dim=(2, 3))
                .cpu()
            )
        return counts
    if plan.num_query_blocks == 0 or plan.num_key_blocks == 0:
        return counts
    for batch_row in range(plan.batch):
        for head in range(plan.heads):
            counts[batch_row, head] = _Head.of(plan, batch_row, head).count()
    return counts


def _has_blocks_alone(plan: SparsePlan) -> bool:
    return plan.q_order is None and not plan.column_indices.numel() and not _has_bands(plan)


def _has_bands(plan: SparsePlan) -> bool:
    return any(bool(torch.as_tensor(x, device=plan.device).any()) for x in (plan.sink, plan.window))


def _count_ordered(plan: SparsePlan) -> Tensor:
    """Of a plan of blocks alone whose keys are ordered: tiles that all their rows see whole, and others by searching
    for each row's edges in the sorted positions of a block."""
    assert plan.k_order is not None
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64, device="cpu")
    if plan.num_query_blocks == 0 or plan.num_key_blocks == 0:
        return counts
    positions = plan.k_order.cpu().long()
    dead = positions >= plan.extent.key_count[:, None, None]
    width = min(plan.block_k, plan.key_len)
    positions = F.pad(positions.masked_fill(dead, MOST), (0, -plan.key_len % width), value=MOST)
    positions = positions.unflatten(-1, (-1, width)).sort(dim=-1).values
    for b, head in itertools.product(range(plan.batch), range(plan.heads)):
        row = b * plan.heads + head
        block_k, lengths = _csr_rows(plan.block_indptr, plan.block_indices, row, plan.num_query_blocks)
        queries = plan.grid.queries[b][torch.repeat_interleave(lengths)]
        counts[b, head] = _count_ordered_tiles(plan, queries, positions[b, head], block_k)
    return counts


def _count_ordered_tiles(plan: SparsePlan, queries: Tensor, positions: Tensor, block_k: Tensor) -> int:
    """Pairs of tiles: of query positions ``[tiles, 2]`` with the sorted positions of key blocks ``[tiles]``."""

    def seen(keys: Tensor, rows: Tensor) -> Tensor:
        extent = plan.extent
        reach = 0 if extent.causal else MOST if extent.limit is None else extent.limit - 1
        last = (rows + reach).clamp(max=MOST - 1)
        edges = torch.searchsorted(keys, last, right=True)
        return edges if extent.limit is None else edges - torch.searchsorted(keys, rows - extent.limit, right=True)

    live = (positions < MOST).sum(dim=-1)[block_k]
    total, step = 0, max(1, _ROW_BUDGET // min(max(plan.block_q, plan.block_k), max(plan.query_len, plan.key_len)))
    for start in range(0, block_k.numel(), step):
        part = slice(start, start + step)
        rows, keys, width = queries[part], positions[block_k[part]], live[part]
        height = rows[:, 1] - rows[:, 0]
        ends = seen(keys, torch.stack([rows[:, 0], rows[:, 1] - 1], dim=-1))
        whole = (ends == width[:, None]).all(dim=-1)
        total += int((height * width)[whole].sum())
        rows, keys = rows[~whole], keys[~whole]
        every = rows[:, :1] + torch.arange(min(plan.block_q, plan.query_len), device="cpu")
        total += int(seen(keys, every)[every < rows[:, 1:]].sum())
    return total


@dataclass(slots=True)
class _Head:
    """One batch row and head of a plan."""

    plan: SparsePlan
    selected: Tensor  # bool [M, N]
    columns: Tensor  # int64 [nc], key positions
    column_group: Tensor  # int64 [nc]
    queries: Tensor  # int64 [M, 2], half-open
    key_count: int
    sink: int
    window: int

    @classmethod
    def of(cls, plan: SparsePlan, batch_row: int, head: int) -> _Head:
        row = batch_row * plan.heads + head
        blocks, block_lengths = _csr_rows(plan.block_indptr, plan.block_indices, row, plan.num_query_blocks)
        columns, column_lengths = _csr_rows(plan.column_indptr, plan.column_indices, row, plan.num_column_groups)
        selected = torch.zeros(plan.num_query_blocks, plan.num_key_blocks, dtype=torch.bool, device="cpu")
        selected[torch.repeat_interleave(block_lengths), blocks] = True
        return cls(
            plan,
            selected,
            columns,
            torch.repeat_interleave(column_lengths),
            plan.grid.queries[batch_row],
            int(plan.extent.key_count[batch_row]),
            int(torch.as_tensor(plan.sink, device=plan.device)[head]),
            int(torch.as_tensor(plan.window, device=plan.device)[head]),
        )

    def count(self) -> int:
        plan = self.plan
        first, last = self.queries[:, 0], self.queries[:, 1] - 1
        low = torch.arange(plan.num_key_blocks, device="cpu") * plan.block_k
        low, high = self._live(low), self._live(low + plan.block_k)
        total = 0
        for selected, kind in ((self.selected, "selected"), (~self.selected, "band")):
            if kind == "band" and self.sink == 0 and self.window == 0:
                continue
            block_q, block_k = selected.nonzero(as_tuple=True)
            total += self._count_tiles(first[block_q], last[block_q], low[block_k], high[block_k], kind)
        if self.columns.numel():
            total += self._count_columns(first, last)
        return total

    def _count_columns(self, first: Tensor, last: Tensor) -> int:
        plan = self.plan
        offsets = torch.arange(min(plan.column_group, plan.num_query_blocks), device="cpu")
        total = 0
        step = max(1, _ROW_BUDGET // len(offsets))
        for start in range(0, self.columns.numel(), step):
            columns = self.columns[start : start + step]
            block_q = self.column_group[start : start + step, None] * plan.column_group + offsets
            inside = block_q < plan.num_query_blocks
            columns = columns[:, None].expand_as(block_q)[inside]
            block_q = block_q[inside]
            free = ~self.selected[block_q, columns // plan.block_k]
            columns, block_q = columns[free], block_q[free]
            low, high = self._live(columns), self._live(columns + 1)
            total += self._count_tiles(first[block_q], last[block_q], low, high, "column")
        return total

    def _live(self, positions: Tensor) -> Tensor:
        return positions.clamp(max=self.key_count)

    def _count_tiles(self, first: Tensor, last: Tensor, low: Tensor, high: Tensor, kind: str) -> int:
        """Pairs in tiles of query positions ``first..last`` (inclusive) and key positions ``low..high - 1``."""
        width = high - low
        extent = self.plan.extent
        dead = (width <= 0) | (last < first)
        if extent.causal:
            dead |= low > last
        if extent.limit is not None:
            dead |= _nearest(first, last, low, high) >= extent.limit
        if kind == "band":
            dead |= (low >= self.sink) & (_nearest(first, last, low, high) >= self.window)
        keep = ~dead
        first, last, low, high, width = first[keep], last[keep], low[keep], high[keep], width[keep]
        whole = (self._count_rows(first, low, high, kind) == width) & (self._count_rows(last, low, high, kind) == width)
        if kind == "column":  # a narrow window may pass between the first and the last row
            whole &= _nearest(first, last, low, high) >= self.window
        total = int(((last - first + 1) * width)[whole].sum())
        first, last, low, high = (t[~whole] for t in (first, last, low, high))
        offsets = torch.arange(min(self.plan.block_q, self.plan.query_len), device="cpu")
        step = max(1, _ROW_BUDGET // max(1, offsets.numel()))
        for start in range(0, first.numel(), step):
            part = slice(start, start + step)
            rows = first[part, None] + offsets
            counts = self._count_rows(rows, low[part, None], high[part, None], kind)
            total += int(counts[rows <= last[part, None]].sum())
        return total

    def _count_rows(self, position: Tensor, low: Tensor, high: Tensor, kind: str) -> Tensor:
        extent = self.plan.extent
        if extent.causal:
            high = torch.minimum(high, position + 1)
        if extent.limit is not None:
            low = torch.maximum(low, position - extent.limit + 1)
            high = torch.minimum(high, position + extent.limit)
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


def _nearest(first: Tensor, last: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Smallest distance between a query and a key of the tile; negative where they overlap."""
    return torch.maximum(first - (high - 1), low - last)


def _csr_rows(indptr: Tensor, indices: Tensor, row: int, length: int) -> tuple[Tensor, Tensor]:
    """The indices of ``length`` consecutive CSR rows that belong to head ``row``, and each row's count."""
    pointers = indptr[row * length : (row + 1) * length + 1].cpu()
    return indices[int(pointers[0]) : int(pointers[-1])].cpu().long(), pointers.diff()
