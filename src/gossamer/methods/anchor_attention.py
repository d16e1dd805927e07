"""AnchorAttention: single keys whose logit is near the largest one of the first tokens and the local ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.plan import SparsePlan

__all__ = ["AnchorAttention"]


@dataclass(frozen=True)
class AnchorAttention(Method):
    """Stripes by their difference to an anchor, without a sort (2505.23520, 3).

    ``step`` query blocks form a group. Dense are the first ``first_blocks`` key blocks and the group's own. A query
    block's anchor is the mean over its rows of their largest logit there; of all other keys the group computes those
    with ``scale * mean query . k >= anchor - theta`` in one of its blocks. ``theta`` is in nats; infinite, it is dense.
    Defaults are those of the authors' latest release; the paper's first region is a single block.

    Deviations from the authors' code: stripes are exactly the complement of the dense regions (there keys of the first
    region may count twice, and the last block before a group never counts); the last tokens that fill no group form a
    shorter one (there they are dense), so that lengths need not be multiples; groups are counted from the first query
    of a call, so that chunks are planned as one piece if their borders are multiples of a group; where attention is
    not causal, a group's own blocks lie on both sides, and later keys may be stripes.
    """

    name: ClassVar[str] = "anchor_attention"
    per_head: ClassVar[tuple[str, ...]] = ("theta",)
    settings: ClassVar[Settings] = tuple(
        {"theta": theta, "step": 8, "first_blocks": 1} for theta in (2.0, 4.0, 6.0, 8.0)
    )
    theta: float = 12.0
    step: int = 16
    first_blocks: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        require_at_least(self, 1, "step", "first_blocks", "block")
        if isinstance(self.theta, bool) or not isinstance(self.theta, (int, float)):
            raise TypeError(f"{self.name}.theta must be a number, got {self.theta!r}")
        if not self.theta >= 0:
            raise ValueError(f"{self.name}.theta must be at least 0, got {self.theta}")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=self.first_blocks, group=self.step)
        end = self.first_blocks * self.block
        local = blocks.grid.group(self.step)
        first = torch.tensor([0, end], device="cpu").expand_as(local)
        anchors = scores.mean_row_maxima(call, blocks.grid, torch.stack([first, local.clamp(min=end)], dim=2))
        bar = -torch.tensor(self.theta, device="cpu")
        dense = torch.stack([first, local], dim=2)[:, :: self.step]
        blocks.near_columns(anchors, bar, group=self.step, left_out=dense)
        return blocks.plan()
