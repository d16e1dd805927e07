"""SeerAttention: a small trained gate says which key blocks a query block attends."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, require_at_least, require_share
from gossamer.methods.seer_gates import gate_inputs, gate_of, gate_scores
from gossamer.plan import SparsePlan
from gossamer.rules import Above, TopKOfRows

__all__ = ["SeerAttention"]


@dataclass(frozen=True)
class SeerAttention(Method):
    """SeerAttention (2410.13276, section 3): softmax of a gate on pooled q and k, cut at a threshold or at top-k.

    Queries and keys are taken as they were before their rotary embedding: the call says how they were turned, and the
    turn is undone (`AttentionCall.before_rotary`). A query block is the mean of its queries; a key block the largest,
    the smallest and the mean of its keys by channel, through a linear layer for each head. Then both are turned by the
    position of their block's first token, and ``P = softmax(q . k / sqrt(head_dim))`` over the key blocks that a query
    block sees. It attends those with ``P > threshold``; or, with ``share`` r, the best
    ``max(1, int((1 - sqrt(1 - r)) * N))`` of N: of causal attention about the share r of all pairs of blocks.

    Fields:
        gates: a file from ``gossamer train-gates``; without one the mean keys stand for themselves, untrained.
        threshold: where ``share`` is 0; 0 is dense.
        last_blocks: the last query blocks of the call attend everything.

    Defaults: a threshold of 0.002, as the authors evaluate (5e-4 to 5e-3 in their README), two dense blocks of 64.

    Deviations from the authors' code: a query block always attends its own key blocks (there it may attend nothing);
    the last block's pools are of live tokens alone; N counts the keys of the row. In a chunked prefill each chunk has
    its dense tail.
    """

    name: ClassVar[str] = "seer_attention"
    needs: ClassVar[frozenset[str]] = frozenset({"rotary"})
    apart: ClassVar[bool] = False
    files: ClassVar[tuple[str, ...]] = ("gates",)
    gates: str = ""
    threshold: float = 0.002
    share: float = 0.0
    last_blocks: int = 2

    def __post_init__(self) -> None:
        if not isinstance(self.gates, str):
            raise TypeError(f"{self.name}.gates must be the path of a file, got {type(self.gates).__name__}")
        require_share(self, "threshold", "share")
        require_at_least(self, 0, "last_blocks")

    def plan(self, call: AttentionCall) -> SparsePlan:
        gate, block = gate_of(call, self.gates)
        blocks = Blocks(call, block, block)
        # So many rows are those of the last blocks, however few of the last one are live.
        blocks.keep(last_rows=(self.last_blocks - 1) * block + 1 if self.last_blocks else 0)
        counts = (-(-call.extent.key_count // block)).double() * (1 - math.sqrt(1 - self.share))
        budget = counts.long().clamp(min=1)[:, None, None]
        for part, shares in gate_scores(call, blocks.grid, gate, *gate_inputs(call, blocks.grid)):
            of_rows = TopKOfRows(budget.expand(-1, -1, len(part)))
            blocks.choose(part, shares, of_rows if self.share else Above(self.threshold))
        return blocks.plan()
