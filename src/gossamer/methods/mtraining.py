"""MTraining's index: columns and diagonals of the last queries, in the number that a share of their attention needs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.methods.vertical_slash import BLOCK, band_mass
from gossamer.plan import SparsePlan, ceil_div
from gossamer.rules import AtLeast, top_k

__all__ = ["MTraining", "best_below"]


@dataclass(frozen=True)
class MTraining(Method):
    """Vertical-slash with budgets by mass (MTraining, 2510.18830), on one process; a ring's is `plan_vertical_slash`.

    The softmax of the last ``last`` queries is summed by column and by diagonal. Of either, the best are computed for
    all queries that together hold less than ``p`` of the mass: of each head by itself, and at most ``most`` tokens.
    Meant for training as for serving: a plan is made anew for each forward pass. Defaults: the authors'.

    Deviations from the authors' code, as in `gossamer.distributed.plan_vertical_slash`: diagonals are bands of 64 as
    `VerticalSlash` has them, where theirs are single diagonals lowered to blocks; a query block's own key blocks are
    always kept; ``p = 1`` takes all.
    """

    name: ClassVar[str] = "mtraining"
    alone: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"p": p} for p in (0.7, 0.8, 0.9, 0.95))
    p: float = 0.95
    most: int = 4096
    last: int = 64

    def __post_init__(self) -> None:
        require_share(self, "p")
        require_at_least(self, 1, "most", "last")

    def plan(self, call: AttentionCall) -> SparsePlan:
        columns, diagonals = scores.last_query_probe(call, self.last)
        asked = call.extent.query_count.clamp(max=self.last).to(call.device, torch.float32)[:, None]
        blocks = Blocks(call, BLOCK, BLOCK)
        blocks.diagonals(best_below(band_mass(diagonals, forced=0), self.p, asked, ceil_div(self.most, BLOCK)))
        blocks.columns(best_below(columns, self.p, asked, self.most).float(), AtLeast(0.5))
        return blocks.plan()


def best_below(masses: Tensor, p: float, whole: Tensor, most: int) -> Tensor:
    """The best whose sum, with all that are better, stays below ``p`` of the whole; bool of the same shape.

    Args:
        masses: ``[..., n]``; negative ones count 0, and are taken by no p but 1, which takes all.
        whole: broadcasts to the leading dimensions.
        most: of a row.
    """
    if p == 1:
        return top_k(masses, most)
    best = masses.clamp(min=0.0).sort(dim=-1, descending=True, stable=True).values
    count = (best.double().cumsum(dim=-1) < (p * whole).double()[..., None]).sum(dim=-1)
    return top_k(masses, count.clamp(max=most)) & (masses > 0)
