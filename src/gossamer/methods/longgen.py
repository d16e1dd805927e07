"""LongGen's sparse layers: recent blocks, and beside them the first ones or one block in so many."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least
from gossamer.plan import SparsePlan
from gossamer.rules import PerHead, per_head

__all__ = ["LongGen"]


@dataclass(frozen=True)
class LongGen(Method):
    """The two static patterns of LongGen ("A Little Goes a Long Way", 2410.01485): sink, and block stride.

    Every query block computes its own key block and those before, ``recent`` in all; the first ``sink`` blocks; and,
    with a ``stride``, all key blocks n with ``(n + offset) % stride == 0``. A model's layers that are sparse so, and
    those that are not, are a profile: `gossamer.profiles.hybrid_profile` makes it, with offsets by head that spread
    the heads over the stride.

    Defaults: the paper's sink pattern, one block of 64 tokens and the 32 most recent. Its block stride keeps one block
    in 64, some 2,048 of 131,072 tokens: how many recent blocks beside, and which block of each stride, is not in the
    text that this was written from; the rule above is that of the authors' earlier kernels, as we remember them.
    """

    name: ClassVar[str] = "longgen"
    per_head: ClassVar[tuple[str, ...]] = ("offset",)
    settings: ClassVar[Settings] = tuple({"recent": recent} for recent in (4, 8, 16, 32))
    sink: int = 1
    recent: int = 32
    stride: int = 0
    offset: int = 0
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink", "stride", "offset")
        require_at_least(self, 1, "recent", "block")
        if self.offset and not self.offset < self.stride:
            raise ValueError(f"{self.name}.offset must be below the stride, got {self.offset} and {self.stride}")

    def plan(self, call: AttentionCall) -> SparsePlan:
        alike = isinstance(self.offset, int)
        blocks = Blocks(call, self.block, self.block, per="kv_head" if alike else "head")
        blocks.keep(first=self.sink, own=self.recent)
        if self.stride:
            blocks.block_columns(self._strided(self.offset, blocks).expand(call.batch, -1, -1))
        return blocks.plan()

    def _strided(self, offset: PerHead, blocks: Blocks) -> Tensor:
        offsets = per_head(offset, blocks.heads, torch.int64, blocks.call.device)
        number = torch.arange(blocks.grid.key_blocks, device=blocks.call.device)
        return ((number + offsets[:, None]) % self.stride == 0)[None]
