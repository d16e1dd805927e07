"""Exact number of pairs of a plan of blocks and columns whose queries are ordered, without the S x T mask."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.plan.integers import MOST
from gossamer.plan.plan import SparsePlan

__all__ = ["count_permuted"]

_BUDGET = 1 << 22  # pairs of a key and a query block, or of two blocks, that are looked at at once


def count_permuted(plan: SparsePlan) -> Tensor:
    """Pairs computed by each head, int64 ``[B, heads]``, on the CPU, for a plan without bands.

    A tile of which every query may attend every key, or none any, is counted whole; else each of its keys is looked up
    among the sorted positions of the tile's queries.
    """
    counts = torch.zeros(plan.batch, plan.heads, dtype=torch.int64, device="cpu")
    for b, head in itertools.product(range(plan.batch), range(plan.heads)):
        queries = _by_block(_positions(plan, b, head, "q_order"), plan.block_q, plan.num_query_blocks)
        keys = _by_block(_positions(plan, b, head, "k_order"), plan.block_k, plan.num_key_blocks)
        if queries.numel() and keys.numel():
            row = b * plan.heads + head
            blocks = _lists_of(plan.block_indptr, plan.block_indices, row, len(queries))
            columns = _lists_of(plan.column_indptr, plan.column_indices, row, plan.num_column_groups)
            counts[b, head] = _in_blocks(plan, queries, keys, blocks) + _in_columns(
                plan, queries, keys, blocks, columns
            )
    return counts


def _lists_of(indptr: Tensor, indices: Tensor, row: int, many: int) -> list[Tensor]:
    """The ``many`` lists of head ``row``, int64 on the CPU each."""
    pointers = indptr[row * many : (row + 1) * many + 1].cpu()
    members = indices[int(pointers[0]) : int(pointers[-1])].cpu().long()
    return list(members.split(pointers.diff().tolist()))


def _positions(plan: SparsePlan, b: int, head: int, name: str) -> Tensor:
    """By rank; `MOST` for what is dead."""
    extent, order = plan.extent, getattr(plan, name)
    of_queries = name == "q_order"
    live = int((extent.query_count if of_queries else extent.key_count)[b])
    length = plan.query_len if of_queries else (plan.key_len if order is not None else extent.longest)
    numbers = torch.arange(length, device="cpu") if order is None else order[b, head].cpu().long()
    first = int(extent.first_position[b]) if of_queries else 0
    return torch.where(numbers < live, numbers + first, MOST)


def _by_block(positions: Tensor, block: int, blocks: int) -> Tensor:
    """``[blocks, block]``, each ascending."""
    width = min(block, len(positions))
    if blocks == 0 or width == 0:
        return positions[:0].view(0, 0)
    padded = F.pad(positions, (0, blocks * width - len(positions)), value=MOST)
    return padded.view(blocks, width).sort(dim=-1).values


def _edges(plan: SparsePlan, keys: Tensor) -> tuple[Tensor, Tensor]:
    """First and last position from which each key may be attended."""
    limit = plan.extent.limit
    reach = MOST if limit is None else limit - 1
    return keys if plan.extent.causal else (keys - reach).clamp(min=-1), (keys + reach).clamp(max=MOST - 1)


def _rows(plan: SparsePlan, queries: Tensor, keys: Tensor) -> Tensor:
    """How many of the sorted ``queries`` ``[n, width]`` attend each of the keys ``[n, m]``."""
    first, last = _edges(plan, keys)
    seen = torch.searchsorted(queries, last.contiguous(), right=True) - torch.searchsorted(queries, first.contiguous())
    return seen.masked_fill(keys >= MOST, 0)


def _in_blocks(plan: SparsePlan, queries: Tensor, keys: Tensor, blocks: Sequence[Tensor]) -> int:
    n = torch.cat(list(blocks))
    m = torch.arange(len(blocks), device="cpu").repeat_interleave(torch.tensor([len(x) for x in blocks], device="cpu"))
    total, step = 0, max(1, _BUDGET // keys.shape[1])
    height, width = (queries < MOST).sum(dim=1), (keys < MOST).sum(dim=1)
    for start in range(0, len(m), step):
        tall, wide = m[start : start + step], n[start : start + step]
        ends = keys[wide, 0], keys[wide, (width[wide] - 1).clamp(min=0)]
        first, last = (torch.stack(edge, dim=-1) for edge in zip(*(_edges(plan, end) for end in ends), strict=True))
        low, high = queries[tall, 0], queries[tall, (height[tall] - 1).clamp(min=0)]
        some = (height[tall] > 0) & (width[wide] > 0)
        whole = some & (low >= first.amax(dim=-1)) & (high <= last.amin(dim=-1))
        part = some & ~whole & (high >= first.amin(dim=-1)) & (low <= last.amax(dim=-1))
        total += int((height[tall] * width[wide])[whole].sum())
        total += int(_rows(plan, queries[tall[part]], keys[wide[part]]).sum())
    return total


def _in_columns(
    plan: SparsePlan, queries: Tensor, keys: Tensor, blocks: Sequence[Tensor], columns: Sequence[Tensor]
) -> int:
    """Pairs of columns outside the chosen blocks."""
    of_key = torch.zeros(plan.extent.longest, dtype=torch.int64, device="cpu")
    live = keys < MOST
    of_key[keys[live]] = torch.arange(len(keys), device="cpu")[:, None].expand_as(keys)[live]
    total = 0
    for group, listed in enumerate(columns):
        column = listed[listed < int(live.sum())]
        rows = range(group * plan.column_group, min((group + 1) * plan.column_group, len(queries)))
        step = max(1, _BUDGET // max(1, len(column), len(keys)))
        for start in range(rows.start, rows.stop if len(column) else rows.start, step):
            part = slice(start, min(start + step, rows.stop))
            seen = _rows(plan, queries[part], column.expand(part.stop - start, -1))
            chosen = torch.zeros(part.stop - start, len(keys), dtype=torch.bool, device="cpu")
            for row, block in enumerate(blocks[part]):
                chosen[row, block] = True
            total += int(seen.masked_fill(chosen[:, of_key[column]], 0).sum())
    return total
