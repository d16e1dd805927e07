"""Block-sparse: the best key blocks of each query block, by the product of their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.plan import SparsePlan
from gossamer.rules import TopK

__all__ = ["BlockSparse"]


@dataclass(frozen=True)
class BlockSparse(Method):
    """MInference's block-sparse pattern (2407.02490, 3.2 and Alg. 3): top-k of mean-pooled q times mean-pooled k.

    ``score[m, n] = mean(q in block m) . mean(k in block n)``; each query block keeps its ``blocks`` best visible key
    blocks. Default 100 blocks of 64.

    Deviations from the authors' code: the diagonal blocks are always kept, on top of the budget (there a block may
    lose its own diagonal); means run over live tokens only (there the padding zeros of the tail block count).
    """

    name: ClassVar[str] = "block_sparse"
    alone: ClassVar[bool] = True
    per_head: ClassVar[tuple[str, ...]] = ("blocks",)
    settings: ClassVar[Settings] = tuple({"blocks": blocks} for blocks in (8, 16, 32, 64))
    candidates: ClassVar[Settings] = tuple({"blocks": blocks} for blocks in (4, 8, 16, 32, 64, 100))
    blocks: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "blocks", "block")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        for part, products in scores.pooled_scores(call, blocks.grid):
            blocks.choose(part, products, TopK(self.blocks))
        return blocks.plan()
