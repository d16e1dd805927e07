"""`Grid`: how query and key blocks lie on a call's positions. The one place that does this arithmetic."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from gossamer.plan.extent import Extent
from gossamer.plan.integers import ceil_div

__all__ = ["Grid"]


@dataclass(frozen=True, eq=False)
class Grid:
    """Blocks of ``block_q`` queries and ``block_k`` keys, counted in positions from each row's first live key.

    The global number of a block is its first position divided by the block. A plan's rows are local: row m of batch row
    b is the global query block ``first_block[b] + m``. So the blocks of a token depend neither on padding nor on the
    other rows of a batch, and chunks of a prefill cut a prompt's blocks where one piece does if their borders are
    multiples of the block. All tensors are int64 on the CPU.
    """

    extent: Extent
    block_q: int
    block_k: int

    @cached_property
    def first_block(self) -> Tensor:
        """Global number of each batch row's first query block, ``[B]``."""
        return self.extent.first_position // self.block_q

    @cached_property
    def row_blocks(self) -> Tensor:
        """Number of query blocks that hold live queries, ``[B]``."""
        end = self.extent.first_position + self.extent.query_count
        blocks = -(-end // self.block_q) - self.first_block
        return torch.where(self.extent.query_count > 0, blocks, 0)

    @cached_property
    def query_blocks(self) -> int:
        """M: the largest number of query blocks of any batch row. Surplus rows of the others are empty."""
        # In Python's integers: every plan asks, and of few rows tensors' operations would take longer.
        most, block = 0, self.block_q
        for start, count in zip(self.extent.query_start.tolist(), self.extent.query_count.tolist(), strict=True):
            first = max(start, 0)
            most = max(most, (first + count - 1) // block - first // block + 1 if count else 0)
        return most

    @cached_property
    def key_blocks(self) -> int:
        """N: the number of key blocks of the batch row with the most keys."""
        return ceil_div(self.extent.longest, self.block_k)

    @cached_property
    def queries(self) -> Tensor:
        """Positions of the live queries of each block, half-open, ``[B, M, 2]``; empty in surplus rows."""
        begin = (self.first_block[:, None] + torch.arange(self.query_blocks, device="cpu")) * self.block_q
        first = self.extent.first_position[:, None]
        last = first + self.extent.query_count[:, None]
        low, high = begin.maximum(first), (begin + self.block_q).minimum(last)
        return torch.stack([low, high.maximum(low)], dim=-1)

    @cached_property
    def seen(self) -> Tensor:
        """Key blocks of which some query of the block may attend some key, half-open, ``[B, M, 2]``."""
        first, last = self.queries[..., 0], self.queries[..., 1] - 1
        low, high = torch.zeros_like(first), self.extent.key_count[:, None].expand_as(last)
        limit = self.extent.limit
        if self.extent.causal:
            high = high.minimum(last + 1)
        if limit is not None:
            low, high = (first - limit + 1).clamp(min=0), high.minimum(last + limit)
        some = (last >= first) & (high > low)
        low = torch.where(some, low // self.block_k, 0)
        return torch.stack([low, torch.where(some, -(-high // self.block_k), low)], dim=-1)

    def sees(self, part: range, device: torch.device | str = "cpu") -> Tensor:
        """Whether some query of a block may attend some key of a block, bool ``[B, len(part), N]``."""
        low, high = self.seen[:, part.start : part.stop].to(device)[..., None, :].unbind(-1)
        block = torch.arange(self.key_blocks, device=device)
        return (block >= low) & (block < high)

    def own(self, blocks: int = 1) -> Tensor:
        """Key blocks at the positions of the block's queries and the ``blocks - 1`` before, half-open, ``[B, M, 2]``.

        And as many after, where attention is not causal. Queries beyond the keys have the last key block for their own.
        """
        first, last = self.queries[..., 0] // self.block_k, (self.queries[..., 1] - 1) // self.block_k
        if not self.extent.causal:
            nearest = ((self.extent.key_count - 1) // self.block_k)[:, None].clamp(min=0)
            first, last = first.minimum(nearest), last.minimum(nearest)
        after = 0 if self.extent.causal else blocks - 1
        return torch.stack([first - (blocks - 1), last + 1 + after], dim=-1)

    def holds_last(self, queries: int) -> Tensor:
        """Query blocks that hold one of the last ``queries`` live queries of each row, bool ``[B, M]``."""
        end = (self.extent.first_position + self.extent.query_count)[:, None]
        return (self.queries[..., 1] > end - queries) & (self.queries[..., 1] > self.queries[..., 0])

    def parts(self, row_bytes: int, budget: int) -> Iterator[range]:
        """All plan rows in consecutive parts whose working sets, of ``row_bytes`` a row, fit ``budget`` bytes.

        Nothing if there is nothing to plan.
        """
        if self.key_blocks == 0:
            return
        step = max(1, budget // max(1, row_bytes))
        for first in range(0, self.query_blocks, step):
            yield range(first, min(first + step, self.query_blocks))

    def key_block_ends(self) -> tuple[Tensor, Tensor]:
        """First and one past the last live position of each key block, ``[B, N]`` each; equal where none is live."""
        low = (torch.arange(self.key_blocks, device="cpu") * self.block_k).expand(self.extent.batch, -1)
        low = low.minimum(self.extent.key_count[:, None])
        return low, (low + self.block_k).minimum(self.extent.key_count[:, None])
