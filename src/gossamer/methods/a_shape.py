"""A-shape: fixed bands at the first tokens and around the diagonal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.plan import SparsePlan
from gossamer.rules import PerHead

__all__ = ["AShape"]


@dataclass(frozen=True)
class AShape(Method):
    """Attention sinks and a local window (StreamingLLM, 2309.17453; MInference's A-shape, 2407.02490, 3.2).

    Pairs with ``pos(j) < sink`` or ``|pos(i) - pos(j)| < window``, exact to the token; the window counts the token
    itself, and is symmetric where attention is not causal. Defaults are MInference's library values, 128 + 3968.
    """

    name: ClassVar[str] = "a_shape"
    per_head: ClassVar[tuple[str, ...]] = ("sink", "window")
    settings: ClassVar[Settings] = tuple({"sink": 64, "window": window} for window in (256, 1024, 4096))
    candidates: ClassVar[Settings] = tuple(
        {"sink": 16, "window": window} for n in range(6, 13) for window in (1 << n, 3 << (n - 1))
    ) + tuple({"sink": 64, "window": window} for window in (256, 1024, 4096))
    sink: int = 128
    window: int = 3968

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "window")

    def plan(self, call: AttentionCall) -> SparsePlan:
        sink, window = of_heads(self.sink), of_heads(self.window)
        alike = isinstance(sink, int) and isinstance(window, int)
        return Blocks(call, per="kv_head" if alike else "head").plan(sink=sink, window=window)


def of_heads(size: PerHead) -> Tensor | int:
    """Tokens, as a plan takes them: one number, or one a query head."""
    return size if isinstance(size, int) else torch.as_tensor(size, dtype=torch.int32, device="cpu")
