"""FlexPrefill: block columns and diagonals that hold a share of the probed mass, or pooled scores as well."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag, require_share
from gossamer.plan import SparsePlan, ceil_div
from gossamer.rules import TopPOfAllRows, top_k

__all__ = ["FlexPrefill"]


@dataclass(frozen=True)
class FlexPrefill(Method):
    """A pattern and a budget for each head, from the attention of the last ``block`` queries (2502.20766, 4).

    The budgets are as many blocks of tokens as hold the share ``gamma`` of the probe's mass by column and by diagonal,
    plus one, within ``min_budget`` and ``max_budget`` tokens: so many block columns (the first among them) and block
    diagonals (the main one among them) are computed, the best by their mass. Where the Jensen-Shannon distance between
    the probe's shares of blocks and those by means (`scores.probed_blocks`) is below ``tau``, the head is query-aware:
    ``min_budget`` of both, and of the softmax over mean query times mean key the entries that hold ``gamma`` of the sum
    over all query blocks, the one that crosses it left out. ``tau = 0`` has no such heads. Defaults: the authors'.

    Deviations from the authors' code:
        * A pair on a token diagonal lies on one of two block diagonals; both are computed, the nearer and the one
          after. There the nearer alone is, which loses up to half of a slash.
        * Budgets are counted in blocks of ``block`` tokens; there always in 128.
        * A share of 0 counts 0 in the distance; there it makes the distance NaN, and the head not query-aware.
        * Distances are grouped from 0; there from the last query's place in its block.
      ``faithful=True`` is as the authors' code in all four.
        * Each query block keeps its own key blocks; ties break by the lower index. Chunks, padding and attention
          that is not causal (distances by their size) are ours.
    """

    name: ClassVar[str] = "flexprefill"
    per_head: ClassVar[tuple[str, ...]] = ("gamma",)
    settings: ClassVar[Settings] = tuple({"gamma": gamma} for gamma in (0.7, 0.8, 0.9, 0.95))
    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 512
    max_budget: int | None = None
    block: int = 128
    faithful: bool = False

    def __post_init__(self) -> None:
        require_share(self, "gamma", "tau")
        require_at_least(self, 1, "min_budget", "block", *(() if self.max_budget is None else ("max_budget",)))
        require_flag(self, "faithful")

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = Blocks(call, self.block, self.block)
        columns, diagonals = scores.last_query_probe(call, self.block)
        exact, by_means = scores.probed_blocks(call, blocks.grid, columns, self.block)
        aware = self._is_aware(exact, by_means)
        before = -(call.extent.first_position + call.extent.query_count) % self.block if self.faithful else None
        slashes = self._best(call, scores.block_sums(diagonals, self.block, before), diagonals, aware)
        blocks.diagonals(slashes if self.faithful else slashes | F.pad(slashes[..., :-1], (1, 0)))
        blocks.block_columns(self._best(call, exact, columns, aware))
        if self.tau > 0:
            rule = TopPOfAllRows(self.gamma)
            for part, mass in scores.pooled_mass(call, blocks.grid):
                blocks.choose(part, mass, rule, heads=aware)
        return blocks.plan()

    def _is_aware(self, p: Tensor, q: Tensor) -> Tensor:
        """Whether the square root of the Jensen-Shannon divergence is below tau, bool ``[B, H]``."""
        middle = (p + q) / 2
        divergence = sum((torch.where(x > 0, x * (x / middle).log(), 0.0) for x in (p, q)), torch.zeros_like(p))
        aware = (divergence.sum(dim=-1) / 2).clamp(min=0).sqrt() < self.tau
        return aware & ~((p > 0) != (q > 0)).any(dim=-1) if self.faithful else aware

    def _best(self, call: AttentionCall, mass: Tensor, tokens: Tensor, aware: Tensor) -> Tensor:
        """The best blocks, the first among them, of a mass by block whose share by token makes the budget."""
        count = scores.count_top_p(call, tokens[:, :, None], self.gamma).squeeze(-1) + 1
        budget = count // (128 if self.faithful else self.block) + 1
        least = ceil_div(self.min_budget, self.block)
        budget = budget.masked_fill(aware, 0).clamp(min=least)
        if self.max_budget is not None:
            budget = budget.clamp(max=ceil_div(self.max_budget, self.block))
        mass = mass.clone()
        mass[..., :1] = float("inf")
        return top_k(mass, budget)
