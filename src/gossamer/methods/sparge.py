"""SpargeAttn: the best blocks by mean-pooled attention, but only where a mean stands for its block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan
from gossamer.rules import Besides, TopPBelow, per_head

__all__ = ["Sparge"]


@dataclass(frozen=True)
class Sparge(Method):
    """SpargeAttn's first stage (2502.18137, Alg. 1): which blocks are computed.

    A block's self-similarity is the mean cosine of all pairs of its tokens; keys are taken less the mean of the row's
    keys. Blocks above ``similarity`` have a mean that stands for them: a query block's softmax over the means of such
    key blocks keeps the best ones that hold at most ``p`` of it, and at least one (the one that crosses p is out). Key
    blocks below are computed by all query blocks, and query blocks below compute all they see.

    Defaults are those of the authors' API with a cumulative threshold: similarity 0.6, p 0.98, blocks of 128 queries
    and 64 keys. Both thresholds may differ between heads, as their search gives them.

    Deviations: a query block's own key blocks are always kept, as are the first ``sink_blocks``. Their second stage,
    leaving products with values out inside the kernel, and the 8-bit products are attributes of a plan, not of this
    choice. The mean that keys are taken less is that of the keys at hand: a chunk of a prefill has another one than the
    whole prompt. It cancels in the softmax, and so decides self-similarity alone.
    """

    name: ClassVar[str] = "sparge"
    per_head: ClassVar[tuple[str, ...]] = ("similarity", "p")
    settings: ClassVar[Settings] = tuple({"p": p} for p in (0.5, 0.7, 0.85, 0.95))
    similarity: float = 0.6
    p: float = 0.98
    sink_blocks: int = 0
    block_q: int = 128
    block_k: int = 64

    def __post_init__(self) -> None:
        require_share(self, "similarity", "p")
        require_at_least(self, 0, "sink_blocks")
        require_at_least(self, 1, "block_q", "block_k")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block_q, self.block_k)
        blocks.keep(first=self.sink_blocks)
        least = per_head(self.similarity, call.heads, torch.float32, call.device)[:, None]
        all_keys = scores.query_similarity(call, blocks.grid) <= least  # [B, H, M]
        similar = scores.key_similarity(call, blocks.grid)[:, :, None]  # [B, G, 1, N]
        all_queries = (similar <= least.unflatten(0, (call.groups, call.share))).flatten(1, 2)  # [B, H, N]
        for part, attention in scores.pooled_mass(call, blocks.grid, excluded=all_queries):
            taken = all_keys[:, :, part.start : part.stop, None] | all_queries[:, :, None]
            blocks.choose(part, attention, Besides(TopPBelow(self.p), taken))
        return blocks.plan()
