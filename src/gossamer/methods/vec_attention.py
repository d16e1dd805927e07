"""VecAttention: for each query block the single keys whose logit is near the largest of all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan

__all__ = ["VecAttention"]


@dataclass(frozen=True)
class VecAttention(Method):
    """VecAttention's columns (Tencent's AngelSlim): min-p on the logits of a block's mean query, without a sort.

    A query block computes every key with ``exp(x - max x) >= threshold``, x being ``scale * mean query . k`` over the
    keys that it sees; and in whole the first ``sink_blocks`` and its own ``window_blocks``. ``threshold = 0`` is dense.
    Each query block scores every key: planning takes as many steps as one in ``block`` rows of dense attention.

    Defaults are those of the authors' configuration, threshold 0.1 and blocks of 64.

    Deviations: the maximum is that of all keys, as in the authors' reference; their kernel compares with the running
    one, and so may keep some more. Whole blocks are those of their kernel; the reference has 16 more before its own.
    """

    name: ClassVar[str] = "vec_attention"
    per_head: ClassVar[tuple[str, ...]] = ("threshold",)
    settings: ClassVar[Settings] = tuple({"threshold": threshold} for threshold in (0.3, 0.1, 0.03, 0.01))
    threshold: float = 0.1
    sink_blocks: int = 1
    window_blocks: int = 1
    block: int = 64

    def __post_init__(self) -> None:
        require_share(self, "threshold")
        require_at_least(self, 0, "sink_blocks")
        require_at_least(self, 1, "window_blocks", "block")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=self.sink_blocks, own=self.window_blocks)
        own = blocks.grid.own(self.window_blocks) * self.block
        first = torch.tensor([0, self.sink_blocks * self.block], device="cpu").expand_as(own)
        bar = torch.as_tensor(self.threshold, dtype=torch.float64, device="cpu").log()
        blocks.near_columns(None, bar, group=1, left_out=torch.stack([first, own], dim=2))
        return blocks.plan()
