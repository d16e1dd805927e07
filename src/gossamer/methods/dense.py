"""Dense attention as a plan: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.methods.base import Method
from gossamer.plan import Extent, SparsePlan

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Method):
    """Every causal pair."""

    name: ClassVar[str] = "dense"

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        return SparsePlan.dense(k.shape[1], q.shape[2], k.shape[2], extent)
