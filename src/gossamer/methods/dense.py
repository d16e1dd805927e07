"""Dense attention as a plan: the baseline that every other method is compared with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer.call import AttentionCall
from gossamer.methods.base import Method
from gossamer.plan import SparsePlan

__all__ = ["Dense"]


@dataclass(frozen=True)
class Dense(Method):
    """Every pair that the model allows.

    Fields:
        kernel: ``torch`` for its scaled_dot_product_attention, or ``gossamer`` for the backend that sparse plans
            run on: then a comparison shows what leaving pairs out gains, and not what the kernel gains.
    """

    name: ClassVar[str] = "dense"
    kernel: str = "torch"

    def __post_init__(self) -> None:
        if self.kernel not in ("torch", "gossamer"):
            raise ValueError(f"dense.kernel must be 'torch' or 'gossamer', got {self.kernel!r}")

    def plan(self, call: AttentionCall) -> SparsePlan:
        return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
