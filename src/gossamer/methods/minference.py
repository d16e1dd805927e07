"""MInference: each head has its own pattern, chosen offline and filled in online."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import require_at_least
from gossamer.methods.per_head import PerHead
from gossamer.methods.vertical_slash import VerticalSlash
from gossamer.plan import SparsePlan

__all__ = ["MInference"]


@dataclass(frozen=True)
class MInference(PerHead):
    """MInference (2407.02490): A-shape, vertical-slash or block-sparse per head, chosen offline, filled in online.

    ``layers`` names each head's pattern and budget. Without it, every head is vertical-slash with 1000 columns and
    6096 diagonals, which is what the authors' code does for a head that its configuration lacks.

    Deviations: slashes are block-aligned bands (see `VerticalSlash`, where the token-exact form is); block-sparse
    heads keep their diagonal (see `BlockSparse`); nothing is repeated for GQA, and batches, padding and chunks work.
    """

    name: ClassVar[str] = "minference"
    vertical_size: int = 1000
    slash_size: int = 6096
    last: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "vertical_size", "slash_size")
        require_at_least(self, 1, "last")

    def plan(self, call: AttentionCall) -> SparsePlan:
        return super().plan(call) if self.layers else self._everywhere().plan(call)

    def least_density(self, call: AttentionCall) -> float:
        return super().least_density(call) if self.layers else self._everywhere().least_density(call)

    def _everywhere(self) -> VerticalSlash:
        return VerticalSlash(self.vertical_size, self.slash_size, self.last)
