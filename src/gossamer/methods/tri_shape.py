"""Tri-shape: A-shape, with the last queries dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.plan import SparsePlan

__all__ = ["TriShape"]


@dataclass(frozen=True)
class TriShape(Method):
    """A-shape, with the last queries of the call dense (MInference's tri-shape; TriangleMix, 2507.21526).

    Deviation: the dense tail of ``last`` live queries is widened to whole query blocks, so up to ``block - 1`` more
    rows are dense; and it attends the sinks and window rows as any dense row does, in one softmax. In a chunked
    prefill every chunk has its dense tail.
    """

    name: ClassVar[str] = "tri_shape"
    settings: ClassVar[Settings] = tuple({"sink": 64, "window": window} for window in (256, 1024, 4096))
    sink: int = 128
    window: int = 3968
    last: int = 100
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink", "last")
        require_at_least(self, 1, "window", "block")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block, per="kv_head")
        blocks.keep(own=0, last_rows=self.last)
        return blocks.plan(sink=self.sink, window=self.window)
