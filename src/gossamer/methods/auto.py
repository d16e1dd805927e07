"""Auto: single keys for each group of queries, as many as an accepted error allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan
from gossamer.plan.plan import WHOLE
from gossamer.rules import TopP

__all__ = ["Auto"]

# error = SCALE * (share left out) ** POWER: fitted on five layers of SmolLM2-135M-Instruct under two prompts of 7,680
# tokens, shares of 0.06 to 0.61. On six other layers and four prompts the error was 1.3 to 1.4 times as large
# (compare_smollm2.jsonl in benchmarks/results).
SCALE, POWER = 0.230, 0.335


@dataclass(frozen=True)
class Auto(Method):
    """The keys that groups of queries attend most, under one knob: the accepted error of the attention output.

    ``group`` blocks of ``block`` queries form a group. Each block's mean query attends all keys that the block sees;
    a key's share is the largest that any block of the group gives it. The group computes the fewest keys that hold
    all of these shares but ``left_out``, the first ``sink`` keys, and each query the ``window`` latest ones. So heads,
    layers and prompts get as many keys as they need, and no more.

    ``error`` is the relative L2 error of a layer's output, mean over heads, on the model that `SCALE` and `POWER` were
    fitted on, and says which share may be left out; 0 is dense. It does not bound what the whole model loses: on that
    model, logits under it differ more from dense ones than under `AShape` at the same error. Shares of the first
    keys do not count: their values are small in trained models, so that the others decide the error.

    Ours, from parts of others: stripes for groups of queries (AnchorAttention, 2505.23520), mean queries against all
    keys (VecAttention, in Tencent's AngelSlim), a share of a row's sum (XAttention, 2503.16428). It plans for each
    query head. Groups count from the first query of a call, so chunks are planned as one piece if their borders are
    multiples of a group.
    """

    name: ClassVar[str] = "auto"
    settings: ClassVar[Settings] = tuple({"error": error} for error in (0.2, 0.15, 0.12, 0.1, 0.08))
    error: float = 0.1
    sink: int = 4
    window: int = 64
    group: int = 8
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink")
        require_at_least(self, 1, "window", "group", "block")
        require_share(self, "error")

    @property
    def left_out(self) -> float:
        """Share of what the mean queries attend that is not computed."""
        return min(1.0, (self.error / SCALE) ** (1 / POWER))

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        if self.error == 0:
            return blocks.plan(window=WHOLE)
        for part, shares in scores.group_shares(call, blocks.grid, self.group):
            shares[..., : self.sink] = 0.0
            blocks.group_columns(part, shares, TopP(1 - self.left_out), group=self.group, first=self.sink)
        return blocks.plan(window=self.window)
