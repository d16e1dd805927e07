"""PAROAttention: patches in the order of axes that makes a head's attention fall into blocks, then the best blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least, require_flag, require_share
from gossamer.methods.denoising import (
    ORDERS,
    Denoising,
    axis_order,
    keep,
    kept,
    mass_of_blocks,
    plan_of_mask,
    plan_of_rows,
    reordered,
    step_of,
    text_blocks,
)
from gossamer.plan import Grid, SparsePlan, ceil_div, on_device
from gossamer.rules import top_k

__all__ = ["PARO"]


@dataclass(frozen=True)
class PARO(Denoising):
    """PAROAttention (2506.16054) for one order of axes; which one a head has, a search finds and a profile holds.

    Queries and keys of patches stand in ``order``, the slowest axis first (frame, height, width); text stays where it
    is. Of the blocks in that order each head keeps the ``density`` with the most mass, over all its query blocks at
    once, and besides them every block that touches text and each query block's own. The mask is found at the first step
    of each of ``buckets`` equal parts of a sampling and kept through it; with ``halves`` the second half of the steps
    has one mask alone, as in the paper (the authors' code has 10 parts, ``int((step + 1) / T * 10)``).

    Defaults: half of the blocks, of 64, as in the paper's table for 50%.

    Points left open by the paper, as decided here: the threshold of a mask is not published, so that blocks are taken
    by their exact mass to the wanted density; masks come from the sampling itself and not from calibration files (of
    about 1 GB), the order alone is calibrated. Masks are by query and key block, square or not; the authors' kernel
    takes square ones, and their bench always keeps the last key block, which has to earn its place here.

    INT8: with ``quantised`` queries and keys are multiplied in int8 where the executor does it (Triton's, which no GPU
    has run yet, and torch's, the slow definition; not the CPU's), with a scale for each token in place of one for each
    block. Probabilities and values are not, as they are in the paper's option, and nothing is in INT4: the page on
    benchmarks says why ("Products in integers").

    To compare: the paper's rows for SVG are without its dense first steps (PSNR 18.50 at 50%, 25.37 with them).
    """

    name: ClassVar[str] = "paro"
    alone: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"layout", "step", "state"})
    settings: ClassVar[Settings] = tuple({"density": density} for density in (0.2, 0.3, 0.5))
    candidates: ClassVar[Settings] = tuple({"order": order} for order in ORDERS)
    order: str = "FHW"
    density: float = 0.5
    block: int = 64
    buckets: int = 10
    halves: bool = True
    quantised: bool = False

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"{self.name}.order must be one of {', '.join(ORDERS)}, got {self.order!r}")
        require_share(self, "density")
        require_at_least(self, 1, "block", "buckets")
        require_flag(self, "halves", "quantised")

    def lacks(self, call: AttentionCall) -> str | None:
        missing = super().lacks(call)
        return "the number of steps" if missing is None and step_of(call).total is None else missing

    def bucket(self, step: int, total: int) -> int:
        """Which mask a step has."""
        number = min(self.buckets - 1, (step + 1) * self.buckets // total)
        return min(number, -(-self.buckets // 2)) if self.halves else number

    def plan(self, call: AttentionCall) -> SparsePlan:
        step, found = step_of(call), kept(call, self)
        total = step.total or 1
        if found is not None and self.bucket(found[0].step, total) == self.bucket(step.number, total):
            return plan_of_rows(call, found)
        order = axis_order(call, self.order)
        plan = plan_of_mask(call, self.mask(call, order), self.block, order)
        plan = plan.with_attributes(quantised=True) if self.quantised else plan
        keep(call, self, plan, step.number)
        return plan

    def mask(self, call: AttentionCall, order: Tensor) -> Tensor:
        """The blocks of ranks that are kept, bool ``[B, H, M, M]``."""
        permuted = reordered(call, order)
        grid = Grid(permuted.extent, self.block, self.block)
        mass = mass_of_blocks(permuted, grid)
        rows, columns = (on_device(x, call.device) for x in text_blocks(call, grid))
        forced = rows[:, None, :, None] | columns[:, None, None]
        low, high = grid.key_block_ends()
        free = ~forced & on_device(high > low, call.device)[:, None, None]
        budget = (self.density * free.sum(dim=(2, 3)).double()).ceil().long()
        best = top_k(mass.masked_fill(~free, float("-inf")).flatten(2), budget.cpu()).view(mass.shape)
        number = ceil_div(call.query_len, self.block)
        missing = (0, number - mass.shape[3], 0, number - mass.shape[2])
        own = torch.eye(number, dtype=torch.bool, device=call.device)
        return torch.nn.functional.pad(best | forced, missing) | own
