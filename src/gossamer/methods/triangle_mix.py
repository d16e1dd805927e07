"""TriangleMix: dense in the first layers, tri-shape in the others."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import require_at_least
from gossamer.methods.tri_shape import TriShape
from gossamer.plan import SparsePlan

__all__ = ["TriangleMix"]


@dataclass(frozen=True)
class TriangleMix(TriShape):
    """`TriShape` in the layers from ``first_layer`` on, dense attention before (TriangleMix, 2507.21526).

    What lies between the sinks, the window and the last queries matters in shallow layers; deep ones read it for
    tokens inside the prompt, which nobody asks for. Defaults are the authors' for Llama-3.1-8B, of 32 layers: 8 sinks,
    a window of 512, 128 last queries, from layer 16 on (20 for Qwen2.5-7B and its 28 layers).

    Deviations: those of `TriShape`. The authors' code reads the last queries' number under another name than their
    README gives it, and so keeps 100.
    """

    name: ClassVar[str] = "triangle_mix"
    needs: ClassVar[frozenset[str]] = frozenset({"layer"})
    sink: int = 8
    window: int = 512
    last: int = 128
    first_layer: int = 16

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "first_layer")

    def plan(self, call: AttentionCall) -> SparsePlan:
        assert call.layer is not None, "a call without a layer lacks what `needs` names"
        if call.layer < self.first_layer:
            return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
        return super().plan(call)
