"""AdaSpa: blocks by their exact mass, searched at few steps, with more of them for the heads that lose more."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_flag, require_share
from gossamer.methods.denoising import Denoising, keep, kept, mass_of_blocks, plan_of_rows, step_of, text_blocks
from gossamer.plan import Grid, SparsePlan
from gossamer.rules import TopKOfRows, top_k

__all__ = ["AdaSpa"]


@dataclass(frozen=True)
class AdaSpa(Denoising):
    """AdaSpa (2502.21079) for image and video transformers: dense first, then a block mask that is kept over steps.

    At the steps ``search`` the mass of every block is summed exactly, ``W = sum exp(logit - lse)`` over its pairs, with
    the LSE of the first search at all later ones. Each query block keeps the ``(1 - s)`` of the key blocks of patches
    that have the most mass, and every block that touches text, in rows and columns, is kept besides. Heads adapt: of
    the heads whose uniform mask holds more than ``bar`` of their mass, as many as may be, the best take the sparsity
    ``(1 + s) / 2``, as many of the worst ``(3 s - 1) / 2``, the others ``s``, so that the mean stays.

    Fields:
        sparsity: s; search: steps of a sampling, ascending. Steps before the first run dense, and so does the first
            itself, which finds the LSE.
        adaptive: whether heads adapt; bar: the recall above which a head counts as good.
        cached: whether later searches use the first one's LSE, as published; else they find it anew.

    Defaults are the paper's: 0.8, blocks of 64, searches at steps 10 and 30 of 50.

    Errata and points left open, as decided here:
        * Algorithms 1 and 2 print ``Log(qk - LSE)``; the mass is its ``Exp``.
        * At most half of the heads count as good (the paper does not say what happens beyond, where the best and the
          worst would overlap); adapting needs ``s >= 1/3``.
        * Text blocks are outside of the budget, which counts the key blocks of patches, rounded up; the density that is
          reported is the true one. Each query block keeps its own key block besides.
        * Recall is that of the query blocks of patches. Guidance branches and samples of a batch have their own masks.
    """

    name: ClassVar[str] = "adaspa"
    apart: ClassVar[bool] = False
    needs: ClassVar[frozenset[str]] = frozenset({"layout", "step", "state"})
    settings: ClassVar[Settings] = tuple({"sparsity": sparsity} for sparsity in (0.9, 0.8, 0.7, 0.5))
    sparsity: float = 0.8
    search: tuple[int, ...] = (10, 30)
    block: int = 64
    adaptive: bool = True
    bar: float = 0.8
    cached: bool = True

    def __post_init__(self) -> None:
        require_share(self, "sparsity", "bar")
        require_at_least(self, 1, "block")
        require_flag(self, "adaptive", "cached")
        steps = tuple(self.search)
        object.__setattr__(self, "search", steps)
        if not steps or any(not isinstance(n, int) or n < 0 for n in steps) or list(steps) != sorted(set(steps)):
            raise ValueError(f"{self.name}.search must be steps from 0 on, ascending, got {self.search}")
        if self.adaptive and 0 < self.sparsity < 1 / 3:
            raise ValueError(f"{self.name}.sparsity must be 0, or at least 1/3 where heads adapt, got {self.sparsity}")

    def lacks(self, call: AttentionCall) -> str | None:
        missing = super().lacks(call)
        if missing is None and step_of(call).number < self.search[0]:
            return f"step {self.search[0]} or later"
        return missing

    def plan(self, call: AttentionCall) -> SparsePlan:
        from gossamer.oracle import log_sum_exp

        step, found = step_of(call).number, kept(call, self)
        # Also where the layer runs again for a gradient, or as the second stage of a step: as it ran before.
        is_first = step == self.search[0] and (found is None or found[0].step == step)
        if found is not None and not any(found[0].step < due <= step for due in self.search):
            plan = plan_of_rows(call, found)
        else:
            stale = found is not None and self.cached
            lse = torch.stack([one.extra for one in found]) if stale and found is not None else log_sum_exp(call)
            grid = Grid(call.extent, self.block, self.block)
            plan = self._chosen(call, mass_of_blocks(call, grid, lse), grid)
            again = self.cached and step < self.search[-1]
            keep(call, self, plan, step, list(lse) if again else None)
        return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent) if is_first else plan

    def _chosen(self, call: AttentionCall, mass: Tensor, grid: Grid) -> SparsePlan:
        rows, columns = text_blocks(call, grid)
        patches = mass.masked_fill(columns[:, None, None].to(mass.device), float("-inf"))
        free = (grid.key_block_ends()[1] > grid.key_block_ends()[0]).sum(dim=1) - columns.sum(dim=1)
        shares = torch.full((call.batch, call.heads), self.sparsity, dtype=torch.float64, device="cpu")
        if self.adaptive and self.sparsity > 0:
            shares = self._adapted(mass, patches, free, rows, columns)
        counts = _counts(shares, free)[..., None].expand(-1, -1, grid.query_blocks)
        counts = torch.where(rows[:, None], grid.key_blocks, counts)
        blocks = Blocks(call, self.block, self.block)
        blocks.block_columns(columns[:, None].expand(-1, call.heads, -1).to(call.device))
        blocks.choose(range(grid.query_blocks), patches, TopKOfRows(counts))
        return blocks.plan()

    def _adapted(self, mass: Tensor, patches: Tensor, free: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        """Sparsity of each head, ``[B, H]``, from what the uniform mask would hold."""
        uniform = torch.full(mass.shape[:2], self.sparsity, dtype=torch.float64, device="cpu")
        chosen = top_k(patches, _counts(uniform, free)[..., None]) | columns[:, None, None].to(mass.device)
        own = mass.masked_fill(rows[:, None, :, None].to(mass.device), 0.0).double()
        recall = ((own * chosen).sum(dim=(2, 3)) / own.sum(dim=(2, 3)).clamp(min=1e-30)).cpu()
        good = (recall > self.bar).sum(dim=1).clamp(max=recall.shape[1] // 2)[:, None]
        place = recall.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        best, worst = place < good, place >= recall.shape[1] - good
        s = self.sparsity
        return torch.where(best, (1 + s) / 2, torch.where(worst, (3 * s - 1) / 2, uniform))


def _counts(sparsity: Tensor, free: Tensor) -> Tensor:
    """Key blocks of patches that are kept, at least one: int64 ``[B, H]``."""
    # Rounded, since a product such as 0.2 * 5 lies above the integer that it means.
    return ((1 - sparsity) * free[:, None]).mul(1e9).round().div(1e9).ceil().long().clamp(min=1)
