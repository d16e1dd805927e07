"""Sparse-vDiT: one of five modes for each head, chosen once for a model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_share
from gossamer.methods.denoising import Denoising, axis_order, kept_through, layout_of, plan_of_mask, text_blocks
from gossamer.plan import Extent, Grid, SparsePlan, ceil_div
from gossamer.rules import Above, TopK

__all__ = ["MODES", "SparseVDiT"]

MODES = ("dense", "skip", "diagonal", "multi_diagonal", "stripe")


@dataclass(frozen=True)
class SparseVDiT(Denoising):
    """One mode of Sparse-vDiT (2506.03065), for heads of image and video transformers.

    * ``dense``: every pair.
    * ``skip``: none; the head's output is 0, that of text too.
    * ``diagonal``: patches near each other, frame by frame: ``|pos(i) - pos(j)| < share P / 2`` of P patches.
    * ``multi_diagonal``: the same with the frames of a place side by side: patches are ordered by height, width and
      then frame, and each block attends those around it, ``share`` of the blocks in all.
    * ``stripe``: for all queries the same ``share P`` keys, those that have the most mass.

    But under ``skip`` text attends and is attended by all. Which head has which mode `gossamer.calibrate` searches; a
    profile holds it (`gossamer.methods.PerHead`).

    Points left open by the paper, as decided here: what each mode leaves out is its field ``share`` (the paper's are
    not published), and what it costs is counted; stripes are found by the mass of every ``every``-th query block that
    holds tokens of its row, at the first call of a sampling,
    and stay for the rest of it (how the paper finds them is not said).
    """

    name: ClassVar[str] = "sparse_vdit"
    alone: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"mode": "diagonal", "share": share} for share in (0.1, 0.2, 0.4))
    candidates: ClassVar[Settings] = (
        {"mode": "skip"},
        *({"mode": mode, "share": share} for mode in MODES[2:] for share in (0.1, 0.2, 0.4)),
    )
    mode: str = "diagonal"
    share: float = 0.2
    block: int = 64
    every: int = 8

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise ValueError(f"{self.name}.mode must be one of {', '.join(MODES)}, got {self.mode!r}")
        require_share(self, "share")
        require_at_least(self, 1, "block", "every")

    def plan(self, call: AttentionCall) -> SparsePlan:
        given = {"query_len": call.query_len, "key_len": call.key_len, "extent": call.extent}
        if self.mode == "dense":
            return SparsePlan.dense(call.groups, **given)
        if self.mode == "skip":
            nothing = torch.zeros(call.batch, call.groups, dtype=torch.int64, device="cpu")
            return SparsePlan.unchecked(heads=call.groups, pairs=nothing, **given)
        if self.mode == "multi_diagonal":
            return kept_through(call, self, lambda: self._across_frames(call))
        return self._in_order(call)

    def _in_order(self, call: AttentionCall) -> SparsePlan:
        """Diagonals and stripes, exact to the token."""
        blocks = Blocks(call, self.block, self.block, per="head" if self.mode == "stripe" else "kv_head")
        rows, _ = text_blocks(call, blocks.grid)
        blocks.keep(own=0)
        if bool(rows.any()):
            whole = rows[:, None, :, None].expand(-1, blocks.heads, -1, blocks.grid.key_blocks)
            blocks.choose(range(blocks.grid.query_blocks), whole.float().to(call.device), Above(0.5))
        words = self._words(call)[:, None].expand(-1, blocks.heads, -1).to(call.device)
        patches = layout_of(call).patches
        if self.mode == "stripe":
            mass = self._column_mass(call).masked_fill(words, float("-inf"))
            kept = _taken(mass, max(1, round(self.share * patches))) | words
            blocks.columns(kept.float(), Above(0.5))
            return blocks.plan()
        if bool(words.any()):
            blocks.columns(words.float(), Above(0.5))
        return blocks.plan(window=max(1, round(self.share * patches / 2)))

    def _words(self, call: AttentionCall) -> Tensor:
        """Keys of text, bool ``[B, positions]``."""
        layout, position = layout_of(call), torch.arange(call.extent.longest, device="cpu")
        first = torch.tensor(layout.before, dtype=torch.int64, device="cpu")[:, None]
        live = position < call.extent.key_count[:, None]
        return live & ((position < first) | (position >= first + layout.patches))

    def _column_mass(self, call: AttentionCall) -> Tensor:
        """Mass of each key, fp32 ``[B, H, positions]``: of the first call of a sampling, where there is one."""
        from gossamer.oracle import exact_masses

        states: Sequence[dict[Any, Any]] = call.state or ()
        sizes = (call.heads, call.extent.longest)
        found = [state.get(self) for state in states]
        if found and all(one is not None and tuple(one.shape) == sizes for one in found):
            return torch.stack([one for one in found if one is not None])
        mass = torch.zeros(call.batch, *sizes, device=call.device)
        for row, count in enumerate(call.extent.key_count.tolist()):  # each as by itself
            step = min(self.every, max(1, ceil_div(count, self.block)))
            found_here = exact_masses(_living(call, row), block_q=self.block, block_k=self.block, step=step).columns
            mass[row, :, :count] = found_here[0]
        for row, state in enumerate(states):
            state[self] = mass[row]  # by the method: other heads of the layer may have another share
        return mass

    def _across_frames(self, call: AttentionCall) -> SparsePlan:
        order = axis_order(call, "HWF")
        number = ceil_div(call.query_len, self.block)
        reach = max(0, round(self.share * layout_of(call).patches / self.block - 1) // 2)
        block = torch.arange(number, device="cpu")
        band = (block[:, None] - block).abs() <= reach
        # Text lies where it lay, so that blocks of ranks hold it where those of positions do.
        rows, columns = (_widened(x, number) for x in text_blocks(call, Grid(call.extent, self.block, self.block)))
        mask = band | rows[:, :, None] | columns[:, None]
        of_heads = mask[:, None].to(call.device).expand(-1, call.groups, -1, -1)
        return plan_of_mask(call, of_heads, self.block, order)


def _living(call: AttentionCall, row: int) -> AttentionCall:
    """A batch row by itself, for scores alone; queries of padding are dead."""
    one = slice(row, row + 1)
    whole = call.extent.of_rows(one)
    count = whole.query_count.minimum(whole.key_count)
    own = Extent(whole.query_start, count, whole.key_start, whole.key_count, causal=False)
    bias = None if call.bias is None else call.bias[one]
    given = {"layout": None, "state": None, "bias": bias}
    return replace(call, q=call.q[one], k=call.k[one], v=None, extent=own, **given)


def _taken(mass: Tensor, count: int) -> Tensor:
    return TopK(count).select(mass[:, :, None], torch.zeros_like(mass[:, :, None], dtype=torch.bool))[:, :, 0]


def _widened(blocks: Tensor, number: int) -> Tensor:
    """To as many blocks as cover all tokens of a call, dead ones too."""
    return torch.nn.functional.pad(blocks, (0, number - blocks.shape[1]))
