"""CoSA: key blocks that hold a share of the largest strided logits, those that some query looks at most first."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan
from gossamer.rules import TopPInTiers

__all__ = ["CoSA"]


@dataclass(frozen=True)
class CoSA(Method):
    """CoSA's selection (2607.25291): top-p over block maxima of strided antidiagonal logits, in an order of priority.

    In each row of cells of ``stride`` x ``stride`` tokens (XAttention's logits x), a key block has
    ``E = exp(largest x in the block - largest x in the row)``; its score is the sum over the rows of a query block, and
    it is flagged if E is within a thousandth of 1 in one of them: some query looks at it most. Key blocks are taken in
    the order {first, own}, flagged, others, each by score, up to the one with which they hold ``p`` of the scores' sum.
    ``p = 1`` takes all.

    Defaults are those of the authors' code, p 0.8, stride 8 and blocks of 128; the configuration that they ship for
    Qwen3-8B has p 0.95.

    Deviation: a plan lists blocks in ascending order. The authors' kernel walks the order of priority, so that the
    running maximum is met early, and leaves out what lies far below it; here the order decides what is chosen alone.
    """

    name: ClassVar[str] = "cosa"
    per_head: ClassVar[tuple[str, ...]] = ("p",)
    settings: ClassVar[Settings] = tuple({"p": p} for p in (0.5, 0.7, 0.8, 0.95))
    p: float = 0.8
    sink_blocks: int = 1
    block: int = 128
    stride: int = 8

    def __post_init__(self) -> None:
        require_share(self, "p")
        require_at_least(self, 0, "sink_blocks")
        require_at_least(self, 1, "block", "stride")
        if self.block % self.stride:
            raise ValueError(f"{self.name}.stride must divide block, got {self.stride} for blocks of {self.block}")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=self.sink_blocks)
        for part, peaks, flagged in scores.antidiagonal_peaks(call, blocks.grid, self.stride):
            blocks.choose(part, peaks, TopPInTiers(self.p, flagged))
        return blocks.plan()
