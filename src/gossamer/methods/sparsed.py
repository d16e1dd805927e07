"""SparseD: for diffusion language models, blocks by their exact mass, chosen once after the early steps."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_share
from gossamer.methods.denoising import (
    Denoising,
    keep,
    kept,
    layout_of,
    mass_of_blocks,
    plan_of_mask,
    plan_of_rows,
    step_of,
)
from gossamer.plan import Extent, Grid, SparsePlan
from gossamer.rules import top_k

__all__ = ["SparseD"]


@dataclass(frozen=True)
class SparseD(Denoising):
    """SparseD (2509.24014): early steps dense, then one block mask for each head that is used to the end.

    With T steps the first ``floor(skip T) + 2`` run dense; the last of them chooses. Of N blocks, g is the first that
    holds tokens to be filled in alone (else the last one). Each query block takes the ``floor(share N) + 1`` key blocks
    with the most mass of the softmax over all keys, of which those before g are kept; and, chosen apart, the
    ``floor(share (N - g)) + 1`` best of the others, by the softmax over the keys from g on. Both hold for all queries.

    Fields:
        share: the ratio that is selected (the paper's rho); skip: the share of dense steps; isolated: False chooses
            both at once, the paper's ablation.

    Defaults are the authors' for long contexts: blocks of 128 and 0.3 (blocks of 32 and 0.5 for short ones), 0.2.

    Paper against code, as decided here: budgets and steps are the code's, ``floor + 1`` blocks and two more dense steps
    than ``skip T``; the part before g is ranked among all blocks, so that it may fall below its share (the paper ranks
    it by itself). Selection uses the call's own scale: the authors' code for LLaDA divides by the root of the number of
    heads there, which sharpens the softmax. What a call fills in is what follows ``layout.before``.

    By the authors' own numbers it is for long texts: on an A800 LLaDA-1.5 takes 41 s for 38 s at 4k tokens and 95 s for
    94 s at 8k, and 1695 s for 2127 s at 64k.
    """

    name: ClassVar[str] = "sparsed"
    alone: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"layout", "step", "state"})
    settings: ClassVar[Settings] = tuple({"share": share} for share in (0.1, 0.2, 0.3, 0.5))
    share: float = 0.3
    skip: float = 0.2
    block: int = 128
    isolated: bool = True

    def __post_init__(self) -> None:
        require_share(self, "share", "skip")
        require_at_least(self, 1, "block")
        if not isinstance(self.isolated, bool):
            raise TypeError(f"{self.name}.isolated must be true or false, got {self.isolated!r}")

    def chooses_at(self, total: int) -> int:
        """The step that chooses, of so many; it still runs dense."""
        return int(total * self.skip) + 1

    def lacks(self, call: AttentionCall) -> str | None:
        missing = super().lacks(call)
        if missing is not None:
            return missing
        step = step_of(call)
        if step.total is None:
            return "the number of steps"
        first = self.chooses_at(step.total)
        return f"step {first} or later" if step.number < first else None

    def plan(self, call: AttentionCall) -> SparsePlan:
        step, found = step_of(call), kept(call, self)
        if found is None:
            plan = plan_of_mask(call, self.mask(call), self.block)
            keep(call, self, plan, step.number)
        else:
            plan = plan_of_rows(call, found)
        # Also where the layer runs again for a gradient: as it ran before.
        if step.total is not None and step.number == self.chooses_at(step.total):
            return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
        return plan

    def mask(self, call: AttentionCall) -> Tensor:
        """The blocks that are selected, bool ``[B, H, M, N]``."""
        grid = Grid(call.extent, self.block, self.block)
        mass = mass_of_blocks(call, grid)
        blocks = -(-call.extent.key_count // self.block)
        first = self._first_to_fill(call, blocks)
        chosen = top_k(_seen(mass, blocks), _budget(self.share, blocks))
        if not self.isolated:
            return chosen
        column = torch.arange(grid.key_blocks, device=mass.device)
        chosen &= (column < first.to(mass.device)[:, None])[:, None, None]
        rest, part = _from(call, first * self.block), blocks - first
        alone = mass_of_blocks(rest, Grid(rest.extent, self.block, self.block))
        filled = top_k(_seen(alone, part), _budget(self.share, part))
        for row, start in enumerate(first.tolist()):
            width = int(part[row])
            chosen[row, :, :, start : start + width] |= filled[row, :, :, :width]
        return chosen

    def _first_to_fill(self, call: AttentionCall, blocks: Tensor) -> Tensor:
        """g, ``[B]``."""
        before = torch.tensor(layout_of(call).before, dtype=torch.int64, device="cpu")
        return (-(-before // self.block)).minimum(blocks - 1).clamp(min=0)


def _from(call: AttentionCall, first: Tensor) -> AttentionCall:
    """The call with the keys from a position on, ``[B]``, alone."""
    extent, count = call.extent, call.extent.key_count - first
    own = Extent(extent.query_start, extent.query_count, extent.key_start + first, count.clamp(min=0), causal=False)
    return replace(call, extent=own)


def _seen(mass: Tensor, blocks: Tensor) -> Tensor:
    """Mass, -inf beyond a row's blocks."""
    beyond = torch.arange(mass.shape[-1], device="cpu") >= blocks[:, None]
    return mass.masked_fill(beyond[:, None, None].to(mass.device), float("-inf"))


def _budget(share: float, blocks: Tensor) -> Tensor:
    """``floor(share N) + 1``, int64 ``[B, 1, 1]``."""
    return ((blocks.double() * share).floor().long() + 1)[:, None, None]
