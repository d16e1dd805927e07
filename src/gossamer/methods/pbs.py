"""PBS-Attn: keys sorted inside segments by what the last queries attend, then blocks that hold a share of the mass."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag, require_share
from gossamer.methods.segments import order_in_segments, reorder_keys
from gossamer.plan import Grid, SparsePlan
from gossamer.rules import TopP

__all__ = ["PBS"]


@dataclass(frozen=True)
class PBS(Method):
    """Permuted block-sparse attention (2510.21270, 3). The output does not depend on the order of the keys.

    Inside each segment of ``segment`` tokens keys are sorted by their mass under the last ``block`` queries, so that
    those that matter share blocks. A query block's own segment is dense, causal by the original positions; of the
    blocks in other segments it keeps the fewest that hold ``threshold`` of the softmax over ``scale * mean query . mean
    key``, the one that crosses it included, and the block with the first token. ``plus`` takes antidiagonal scores of
    the sorted keys in place of products of means (PBS+), with cells of ``stride`` tokens. Defaults are the authors'.

    Deviations from the authors' code:
        * The heads of a group share one order, and one choice by their mean score: keys are stored once (the paper's
          appendix shares the order). ``shared=False`` is per query head, with a copy of the keys for each.
        * The probe is causal inside the last block too; means are over the tokens that there are.
        * Where rounding keeps the sum below the threshold all blocks are kept; there none is.
        * The probe's softmax runs over all keys, those of the last, shorter segment too, which stays in order.
      Chunks, padding and attention that is not causal are ours; a model's window is kept.
    """

    name: ClassVar[str] = "pbs"
    settings: ClassVar[Settings] = tuple({"threshold": threshold} for threshold in (0.6, 0.75, 0.9, 0.95))
    threshold: float = 0.9
    segment: int = 256
    block: int = 128
    plus: bool = False
    stride: int = 16
    shared: bool = True

    def __post_init__(self) -> None:
        require_share(self, "threshold")
        require_at_least(self, 1, "segment", "block", "stride")
        require_flag(self, "plus", "shared")
        if self.segment % self.block or (self.plus and self.block % self.stride):
            raise ValueError(
                f"{self.name}.segment must be a multiple of block, and block one of stride where plus is set, got "
                f"{self.segment}, {self.block} and {self.stride}"
            )

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block, per="kv_head" if self.shared else "head")
        columns, _ = scores.last_query_probe(call, self.block)
        order = order_in_segments(call, self._of_plan(columns, blocks), self.segment)
        blocks.order_keys(order, self.segment)
        first = (order == 0).int().argmax(dim=-1) if order.shape[-1] else order.new_zeros(order.shape[:2])
        number = torch.arange(blocks.grid.key_blocks, device=call.device)
        blocks.block_columns(number == (first // self.block)[..., None])
        for part, mass in self._mass(reorder_keys(call, order, self.segment), blocks):
            blocks.choose(part, self._of_plan(mass, blocks), TopP(self.threshold))
        return blocks.plan()

    def _mass(self, call: AttentionCall, blocks: Blocks) -> Iterator[tuple[range, Tensor]]:
        """Shares of the blocks outside a query block's own segment."""
        grid = Grid(call.extent, self.block, self.block)
        if not self.plus:
            for part, products in scores.pooled_scores(call, grid):
                yield part, scores.masked_softmax(products * abs(call.scale), blocks.outside(part))
            return
        for part, mass in scores.antidiagonal_scores(call, grid, self.stride):
            mass = mass * blocks.outside(part)
            yield part, mass / mass.sum(dim=-1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)

    def _of_plan(self, x: Tensor, blocks: Blocks) -> Tensor:
        """Scores of query heads as means over those that share a head of the plan."""
        return x.unflatten(1, (blocks.heads, -1)).mean(dim=2)
