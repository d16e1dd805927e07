"""MoA: for each head a window that grows with the prompt as its own line says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, require_at_least
from gossamer.methods.head_tables import Table, of_layer, require_table
from gossamer.plan import SparsePlan, ceil_div

__all__ = ["MoA"]


@dataclass(frozen=True)
class MoA(Method):
    """Mixture of attention spans (2406.14909, section 3): ``alpha + beta * N`` tokens for each query head.

    With N the row's keys and ``new_tokens``, a head's span is ``min(int(alpha + beta * N), N)`` tokens, at least
    ``least``, rounded up to blocks. Each query block attends the first ``sink`` tokens and, with its own, the blocks
    before it, ``span - sink`` tokens in all. Spans of a batch's rows differ where their lengths do.

    Fields:
        alphas, betas: ``[layer][query head]``; read the authors' files with `gossamer.profiles.read_moa`, or choose
            them for a model with `gossamer.calibrate`.

    Defaults are those of the authors' code: 64 sinks, at least 128 tokens, blocks of 64, room for 1024 new tokens.

    Deviations: a chunk of a prefill has the span of the keys that are there (the authors' code takes no chunks); where
    attention is not causal, which the paper has not, the whole span reaches to both sides.
    """

    name: ClassVar[str] = "moa"
    tables: ClassVar[tuple[str, ...]] = ("alphas", "betas")
    apart: ClassVar[bool] = False
    alphas: Table = ()
    betas: Table = ()
    sink: int = 64
    least: int = 128
    block: int = 64
    new_tokens: int = 1024

    def __post_init__(self) -> None:
        require_table(self, "alphas", "betas")
        if [len(layer) for layer in self.alphas] != [len(layer) for layer in self.betas]:
            raise ValueError(f"{self.name}.alphas and .betas must be for the same layers and heads")
        require_at_least(self, 0, "sink", "new_tokens")
        require_at_least(self, 1, "least", "block")

    def spans(self, tokens: Tensor | int, layer: int | None, heads: int) -> Tensor:
        """Tokens that each head of a layer keeps of ``tokens`` in all, new ones included: int64 ``[.., heads]``."""
        alpha, beta = (
            torch.tensor(of_layer(table, layer, [heads], f"{self.name}.{name}"), dtype=torch.float64, device="cpu")
            for name, table in (("alphas", self.alphas), ("betas", self.betas))
        )
        most = torch.as_tensor(tokens, device="cpu")[..., None]
        # Clamped before it becomes an integer, which not every float64 can.
        wanted = (alpha + beta * most).clamp(min=-1.0).minimum(most.double()).long()
        return ceil_div_all(wanted.clamp(min=self.least), self.block) * self.block

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        spans = self.spans(call.extent.key_count + self.new_tokens, call.layer, call.heads)
        behind = spans - self.sink if call.extent.causal else spans
        window = ceil_div_all(behind.clamp(min=0), self.block)
        widest = int(window.max()) if window.numel() else 0
        blocks.keep(first=ceil_div(self.sink, self.block))
        blocks.diagonals(torch.arange(widest, device="cpu") < window[..., None])
        return blocks.plan()


def ceil_div_all(numbers: Tensor, unit: int) -> Tensor:
    return -(-numbers // unit)
