"""Block-sparse: the best key blocks of each query block, by the product of their means."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.estimators import BlockVisibility, pooled_scores
from gossamer.methods.base import Method, require_at_least
from gossamer.plan import Extent, SparsePlan
from gossamer.selectors import CsrBuilder, local_blocks, top_k

__all__ = ["BlockSparse", "own_blocks"]


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
        visible = BlockVisibility(extent, query_len, key_len, self.block, self.block, q.device)
        csr = CsrBuilder()
        for at, scores in pooled_scores(q, k, extent=extent, block_q=self.block, block_k=self.block):
            chosen = top_k(scores, self.blocks)
            csr.add(chosen | own_blocks(visible, at, at + scores.shape[2])[:, None])
        indptr, indices = csr.build()
        return SparsePlan(
            q.shape[1],
            query_len,
            key_len,
            extent,
            block_q=self.block,
            block_k=self.block,
            block_indptr=indptr,
            block_indices=indices,
        )


def own_blocks(visible: BlockVisibility, at: int, stop: int, window: int = 1) -> Tensor:
    """Key blocks from ``window - 1`` before the block of the first row to that of the last: bool ``[B, m, N]``."""
    first, last = visible.own_key_blocks(at, stop)
    return local_blocks(first, last, window, visible.first_key.shape[1]) & visible.any_pair(at, stop)
