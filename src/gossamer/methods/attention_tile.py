"""Attention tile: each frame attends itself and a few reference frames, which attend and are attended by all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least
from gossamer.methods.denoising import Denoising, kept_through, layout_of, plan_of_mask, text_blocks
from gossamer.methods.head_tables import of_layer
from gossamer.plan import Grid, SparsePlan

__all__ = ["AttentionTile"]


@dataclass(frozen=True)
class AttentionTile(Denoising):
    """The attention tile of Efficient-vDiT (2502.06155): the map of a video repeats frame by frame.

    A tile is a frame by a frame. Of F frames, ``frames`` are references, evenly apart; tile (i, j) is kept where
    ``i == j`` or one of both is a reference. So ``1 - (k F + (F - k) (k + 1)) / F^2`` of the pairs are left out, and
    what is kept grows with F alone. Text attends and is attended by all.

    Fields:
        frames: k, the references; no fewer are used than 1, and all tiles are kept from F on.
        layers: k of each layer, in place of it, as the authors' search by layer has it; () for none.

    Points left open, as decided here: reference n is the frame ``n * F // k``, the first one among them. Blocks that
    hold tokens of several frames are kept if one of their tiles is, so that a little more is computed where a frame is
    no multiple of the block. The authors' distillation, to fewer steps, is no part of it: about 5 of their 7.8 times.
    """

    name: ClassVar[str] = "attention_tile"
    alone: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"frames": frames} for frames in (1, 2, 4))
    frames: int = 4
    layers: Sequence[int] = ()
    block: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 1, "frames", "block")
        object.__setattr__(self, "layers", tuple(self.layers))
        if any(not isinstance(k, int) or isinstance(k, bool) or k < 1 for k in self.layers):
            raise ValueError(f"{self.name}.layers must hold a number of frames from 1 on for each, got {self.layers}")

    def lacks(self, call: AttentionCall) -> str | None:
        missing = super().lacks(call)
        return "several frames" if missing is None and layout_of(call).frames < 2 else missing

    def plan(self, call: AttentionCall) -> SparsePlan:
        return kept_through(call, self, lambda: self._tiles(call))

    def _tiles(self, call: AttentionCall) -> SparsePlan:
        layout, grid = layout_of(call), Grid(call.extent, self.block, self.block)
        k = self.frames
        if self.layers:
            (k,) = of_layer([[k] for k in self.layers], call.layer, [1], f"{self.name}.layers")
        reference = torch.zeros(layout.frames, dtype=torch.bool, device="cpu")
        k = min(k, layout.frames)
        reference[torch.arange(k, device="cpu") * layout.frames // k] = True
        first = torch.tensor(layout.before, dtype=torch.int64, device="cpu")[:, None]
        rows, columns = text_blocks(call, grid)
        ranges = [self._frames(ends, first, layout.patches // layout.frames) for ends in _ends(grid)]
        (low_q, high_q), (low_k, high_k) = ranges
        own = (low_q[:, :, None] <= high_k[:, None]) & (low_k[:, None] <= high_q[:, :, None])
        rows, columns = rows | _any(reference, low_q, high_q), columns | _any(reference, low_k, high_k)
        mask = own | rows[:, :, None] | columns[:, None]
        return plan_of_mask(call, mask[:, None].to(call.device).expand(-1, call.groups, -1, -1), self.block)

    def _frames(self, ends: tuple[Tensor, Tensor], first: Tensor, size: int) -> tuple[Tensor, Tensor]:
        """First and last frame of each block ``[B, blocks]``; of text and of nothing, whatever."""
        low, high = ends
        return (low - first).clamp(min=0) // size, (high - 1 - first).clamp(min=0) // size


def _ends(grid: Grid) -> list[tuple[Tensor, Tensor]]:
    low, high = grid.queries.unbind(-1)
    return [(low, high), grid.key_block_ends()]


def _any(reference: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Whether one of the frames ``low`` to ``high`` is a reference."""
    count = torch.cat([reference.new_zeros(1), reference]).long().cumsum(0)
    most = len(reference)
    return count[(high + 1).clamp(max=most)] > count[low.clamp(max=most)]
