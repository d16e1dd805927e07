"""What SparseD is held beside: as many blocks, chosen otherwise, and as many sparse steps, lying elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.denoising import kept, mass_of_blocks, plan_of_mask, step_of
from gossamer.methods.sparsed import SparseD
from gossamer.plan import Grid, SparsePlan
from gossamer.rules import top_k

__all__ = ["CHOICES", "SPANS", "Variant"]

CHOICES: Mapping[str, str] = MappingProxyType(
    {
        "isolated": "as SparseD, once",
        "fresh": "as SparseD, anew at each step",
        "joint": "the blocks with the most mass, prompt and answer together, once",
        "best": "the same, anew at each step: no choice of as many blocks of a row keeps more mass",
        "window": "the row's own block, the first, and the nearest ones",
        "random": "the row's own block and any others",
    }
)
SPANS = ("after", "first", "last")


@dataclass(frozen=True)
class Variant(SparseD):
    """As many blocks in each row of each head as `SparseD` selects there, but others; or at other steps.

    Fields:
        choice: one of `CHOICES`.
        span: the steps that are sparse: ``after`` the dense ones, as in SparseD; or a ``part`` of all, ``first`` or
            ``last``. The step before them, and of the first ones step 0, runs dense and chooses: so both spans have as
            many sparse steps.
        part: the share of all steps that a span has.
        seed: of ``random``.
    """

    name: ClassVar[str] = "sparsed_variant"
    choice: str = "isolated"
    span: str = "after"
    part: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("choice", tuple(CHOICES)), ("span", SPANS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{self.name}.{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}")
        if not 0 < self.part < 1:
            raise ValueError(f"{self.name}.part must be between 0 and 1, got {self.part}")

    def chooses_at(self, total: int) -> int:
        starts = {"after": super().chooses_at(total), "first": 0}
        return starts.get(self.span, total - self._sparse(total) - 1)

    def ends(self, total: int) -> tuple[int, int]:
        """The step that chooses, and the first dense one after the sparse ones."""
        return self.chooses_at(total), self._sparse(total) + 1 if self.span == "first" else total

    def _sparse(self, total: int) -> int:
        """Steps of a span."""
        return min(total - 1, int(total * self.part))

    def lacks(self, call: AttentionCall) -> str | None:
        missing, step = super().lacks(call), call.step
        if missing is None and step is not None and step.total is not None:
            stop = self.ends(step.total)[1]
            return None if step.number < stop else f"a step before {stop}"
        return missing

    def plan(self, call: AttentionCall) -> SparsePlan:
        step, chosen = step_of(call), kept(call, self) is not None
        plan = super().plan(call)
        again = step.total is None or step.number != self.chooses_at(step.total)
        if chosen and again and self.choice in ("fresh", "best"):
            counts = plan.block_mask().sum(dim=-1)
            plan = plan_of_mask(call, self.mask(call, counts), self.block)
        return plan

    def mask(self, call: AttentionCall, counts: Tensor | None = None) -> Tensor:
        """The blocks that are selected, bool ``[B, H, M, N]``.

        Args:
            counts: of each row, int64 ``[B, H, M]``; None: as many as SparseD selects now.
        """
        if counts is None or self.choice == "fresh":
            own = super().mask(call)
            if self.choice in ("isolated", "fresh"):
                return own
            counts = own.sum(dim=-1)
        scores = self._scores(call)
        blocks = -(-call.extent.key_count // self.block)
        beyond = torch.arange(scores.shape[-1], device="cpu") >= blocks[:, None]
        return top_k(scores.masked_fill(beyond[:, None, None].to(scores.device), float("-inf")), counts)

    def _scores(self, call: AttentionCall) -> Tensor:
        """What to choose by, fp32 ``[B, H, M, N]``."""
        grid = Grid(call.extent, self.block, self.block)
        if self.choice in ("joint", "best"):
            return mass_of_blocks(call, grid)
        rows, columns = (
            torch.arange(grid.query_blocks, device="cpu")[:, None],
            torch.arange(grid.key_blocks, device="cpu"),
        )
        if self.choice == "window":
            scores = -(rows - columns).abs().float()
            scores[:, :1] = 1.0
            scores.masked_fill_(rows == columns, 2.0)
            found = scores.expand(call.batch, call.heads, -1, -1)
        else:
            layer, step = call.layer or 0, call.step.number if call.step is not None else 0
            generator = torch.Generator().manual_seed((self.seed * 1_000 + layer) * 1_000_003 + step)
            shape = (1, call.heads, grid.query_blocks, grid.key_blocks)
            scores = torch.rand(shape, generator=generator, device="cpu").masked_fill(rows == columns, 2.0)
            found = scores.expand(call.batch, -1, -1, -1)
        return found.to(call.device)
