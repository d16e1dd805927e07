"""Stem: the best blocks by mean antidiagonal logit and the size of values, in a number that falls along the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import Grid, SparsePlan
from gossamer.rules import TopKOfRows

__all__ = ["Stem"]

SHORT_PROMPT = 160  # key blocks: below, twice the share


@dataclass(frozen=True)
class Stem(Method):
    """Stem's selection (Tencent's AngelSlim, no paper known): top-k with a schedule by layer and query block.

    The score of a block pair is the mean over its cells of ``stride`` x ``stride`` tokens of the mean scaled product on
    their antidiagonals (XAttention's logits), plus ``bonus * relu(z)`` of the cell's keys: z is the standard score of
    the log of their largest value norm, among all cells of the key/value head.

    Of N key blocks a query block keeps ``k = share N + extra``: twice the share below 160 blocks, and all below
    ``full_blocks``. Query block i has k up to i = k, and from there to N - 1 a number that falls evenly to ``decay k``
    (rounded down, at least 1). The first ``sink_blocks``, and ``window_blocks`` up to its own, are kept beside these.
    Layers before ``dense_layers`` are dense.

    Defaults are those of the authors' code; the configuration that they ship for Qwen3-8B has decay 0.7.

    Deviations: a mean has the cells that count alone, and standard scores have all live ones (theirs: on the diagonal
    later cells, too, which matters for its rank alone, since it is kept; and without the last, unfinished cell). N is
    what the call has keys for, so that a chunk of a prefill has a shorter schedule than the whole prompt.
    """

    name: ClassVar[str] = "stem"
    needs: ClassVar[frozenset[str]] = frozenset({"layer", "values"})
    settings: ClassVar[Settings] = tuple(
        {"share": share, "extra": 0, "full_blocks": 0} for share in (0.05, 0.1, 0.2, 0.4)
    )
    share: float = 0.1
    extra: int = 30
    decay: float = 1.0
    bonus: float = 0.2
    full_blocks: int = 56
    sink_blocks: int = 4
    window_blocks: int = 4
    dense_layers: int = 2
    block: int = 128
    stride: int = 8

    def __post_init__(self) -> None:
        require_share(self, "share", "decay", "bonus")
        require_at_least(self, 0, "extra", "full_blocks", "sink_blocks", "dense_layers")
        require_at_least(self, 1, "window_blocks", "block", "stride")
        if self.block % self.stride:
            raise ValueError(f"{self.name}.stride must divide block, got {self.stride} for blocks of {self.block}")

    def plan(self, call: AttentionCall) -> SparsePlan:
        assert call.layer is not None, "a call without a layer lacks what `needs` names"
        if call.layer < self.dense_layers:
            return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
        blocks = Blocks(call, self.block, self.block)
        blocks.keep(first=self.sink_blocks, own=self.window_blocks)
        bonus, counts = self.bonus * scores.value_bonus(call, self.stride), self.schedule(blocks.grid)
        for part, logits in scores.antidiagonal_means(call, blocks.grid, self.stride, bonus):
            blocks.choose(part, logits, TopKOfRows(counts[:, None, part.start : part.stop]))
        return blocks.plan()

    def schedule(self, grid: Grid) -> Tensor:
        """How many key blocks each query block keeps: int64 ``[B, M]``, on the CPU."""
        total = -(-grid.extent.key_count // self.block)[:, None]
        share = torch.where(total < SHORT_PROMPT, 2.0, 1.0).double() * self.share
        most = (total * share).floor().long() + self.extra
        most = torch.where(total < self.full_blocks, total, most.minimum(total))
        late = grid.first_block[:, None] + torch.arange(grid.query_blocks, device="cpu") - most
        past = (late.double() / (total - most - 1).clamp(min=1)).clamp(0, 1)
        return (most + (self.decay * most.double() - most) * past).floor().long().clamp(min=1)
