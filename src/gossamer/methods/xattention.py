"""XAttention: the key blocks that hold a share of the attention mass, estimated from antidiagonals."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan
from gossamer.rules import TopP

__all__ = ["XAttention"]


@dataclass(frozen=True)
class XAttention(Method):
    """Antidiagonal scores and an inclusive top-p for each query block (2503.16428, 2.1 and 2.2).

    The score of a block pair is its share of a softmax over cells of ``stride`` x ``stride`` tokens, each of which has
    the mean of its antidiagonal for its logit (`gossamer.backends.torch.antidiagonal_scores`). A query block keeps the
    first key block and its own, which use up their part of ``threshold``, and then the best others until ``threshold``
    of its scores' sum is held, the one that crosses it included. ``threshold = 1`` keeps every block whose score is
    above 0. An antidiagonal holds distances of one parity: of slashes that are one token wide, an even stride meets
    those at odd distances.

    Heads and layers have thresholds of their own in `PerHead` of this method; `gossamer.calibrate.thresholds` finds
    some. Defaults are the authors': stride 16, threshold 0.9, blocks of 128.

    Deviations from the authors' code: all query blocks are treated alike (there, those of the first chunk of a prompt
    do not keep the first key block, but one block more than the sum needs); its ``keep_sink``, which sets a query row
    where it means a key column, is left out; blocks are counted in positions, so that lengths need no alignment, and
    padding is no part of any score.
    """

    name: ClassVar[str] = "xattention"
    alone: ClassVar[bool] = True
    per_head: ClassVar[tuple[str, ...]] = ("threshold",)
    settings: ClassVar[Settings] = tuple({"threshold": threshold} for threshold in (0.6, 0.75, 0.85, 0.9, 0.95))
    threshold: float = 0.9
    stride: int = 16
    block: int = 128

    def __post_init__(self) -> None:
        require_share(self, "threshold")
        require_at_least(self, 1, "stride", "block")
        if self.block % self.stride:
            raise ValueError(
                f"{self.name}.stride must divide block, got {self.stride} for blocks of {self.block} tokens"
            )

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=1)
        for part, mass in scores.antidiagonal_scores(call, blocks.grid, self.stride):
            blocks.choose(part, mass, TopP(self.threshold, forced_first=True))
        return blocks.plan()
