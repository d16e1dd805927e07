"""Block-sparse: the best key blocks of each query block, by the product of their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility, pooled_scores
from gossamer.methods._choice import BlockChoice, has_pairs, make_plan
from gossamer.methods.base import Method, require_at_least
from gossamer.plan import Extent, SparsePlan

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
    blocks: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "blocks", "block")

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        query_len, key_len = q.shape[2], k.shape[2]
        if not has_pairs(q, k):
            return SparsePlan(q.shape[1], query_len, key_len, extent, block_q=self.block, block_k=self.block)
        visible = BlockVisibility(extent, query_len, key_len, self.block, self.block, q.device)
        choice = BlockChoice(visible, q.shape[1])
        budgets = torch.full((q.shape[1],), self.blocks)
        for at, scores in pooled_scores(q, k, extent=extent, block_q=self.block, block_k=self.block):
            choice.add(at, at + scores.shape[2], scores, budgets=budgets)
        return make_plan(
            q.shape[1],
            query_len,
            key_len,
            extent,
            block_q=self.block,
            block_k=self.block,
            blocks=choice,
        )
