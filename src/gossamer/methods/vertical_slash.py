"""Vertical-slash: the columns and diagonals that the last queries attend most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_flag
from gossamer.methods.slashes import MINIMUM_DIAGONALS, slash_lists
from gossamer.plan import SparsePlan
from gossamer.rules import PerHead, TopK, top_k

__all__ = ["VerticalSlash"]

BLOCK = 64
FORCED_COLUMNS = 30
FORCED_BANDS = 2  # of 64, for the authors' 100 forced diagonals


@dataclass(frozen=True)
class VerticalSlash(Method):
    """MInference's vertical-slash pattern (2407.02490, 3.2 and Alg. 2), for all heads alike.

    The softmax of the last ``last`` queries is summed by column and by diagonal; the ``vertical_size`` best columns
    (the first 30 live tokens among them) and the ``slash_size`` best diagonals (the last 100 among them) are computed
    for all queries. Note that the choice for early rows looks at the prompt's end: what is attended stays causal,
    which pairs are computed does not.

    Two lowerings of the diagonals:
        * ``exact=False`` (default): diagonals are chosen as bands of 64, each a block diagonal of the plan, by the
          mass that falls into it; ``ceil(slash_size / 64)`` bands, so that the cost equals the budget whatever the
          data. The forced diagonals become the first two bands.
        * ``exact=True``: the authors' index construction. Every chosen diagonal costs an unaligned 64 x 64 block in
          every row block, so scattered diagonals become almost dense: cost is a property of the data. Meant for
          studies of causal attention; in C++ on the CPU, elsewhere in torch with a step per diagonal.

    Defaults: the authors' for a head without a searched pattern, 1000 columns and 6096 diagonals.

    Deviations from the authors' code: ties, of the forced entries too, break by lower index, and the main diagonal is
    always kept. Where attention is not causal, which the paper has not, distances count by their size, and every
    diagonal is computed on both sides.
    """

    name: ClassVar[str] = "vertical_slash"
    alone: ClassVar[bool] = True
    per_head: ClassVar[tuple[str, ...]] = ("vertical_size", "slash_size")
    settings: ClassVar[Settings] = tuple(
        {"vertical_size": columns, "slash_size": slashes}
        for columns, slashes in ((128, 512), (256, 1024), (512, 2048), (1000, 4096))
    )
    candidates: ClassVar[Settings] = tuple(
        {"vertical_size": columns, "slash_size": slashes}
        for columns in (30, 128, 500, 1000, 3500)
        for slashes in (128, 512, 1024, 2048, 4096)
    )
    vertical_size: int = 1000
    slash_size: int = 6096
    last: int = 64
    exact: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "vertical_size", "slash_size")
        require_at_least(self, 1, "last")
        require_flag(self, "exact")

    @property
    def needs(self) -> frozenset[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        return frozenset({"causal"} if self.exact else ())

    def least_density(self, call: AttentionCall) -> float:
        """1 where a head's budget has all columns or all diagonals, in each head."""
        keys = call.extent.longest
        columns = at_least(self.vertical_size, FORCED_COLUMNS) >= keys
        unit = 1 if self.exact else BLOCK
        # One band more than blocks: distances are those of tokens, bands those of blocks.
        diagonals = at_least(self.slash_size, MINIMUM_DIAGONALS, unit) >= -(-keys // unit) + (not self.exact)
        return float((columns | diagonals).all())

    def plan(self, call: AttentionCall) -> SparsePlan:
        columns, diagonals = scores.last_query_probe(call, self.last)
        columns[..., :FORCED_COLUMNS] = float("inf")
        blocks = Blocks(call, BLOCK, BLOCK)
        if self.exact:
            budgets = at_least(self.vertical_size, FORCED_COLUMNS), at_least(self.slash_size, MINIMUM_DIAGONALS)
            blocks.lists(slash_lists(call, blocks.grid, columns, diagonals, *budgets))
            return blocks.plan()
        blocks.columns(columns, TopK(at_least(self.vertical_size, FORCED_COLUMNS)))
        blocks.diagonals(top_k(band_mass(diagonals), at_least(self.slash_size, FORCED_BANDS * BLOCK, BLOCK)))
        return blocks.plan()


def band_mass(mass: Tensor, forced: int = FORCED_BANDS) -> Tensor:
    """Mass of the block diagonals, ``[B, H, bands]``, band b holding distances around ``64 b``; forced ones infinite.

    A pair at distance d = 64 b + r lies on block diagonal b for the share (64 - r) / 64 of the rows and on b + 1 for
    the others, so each diagonal's mass is split in that proportion.
    """
    split = torch.arange(BLOCK, device=mass.device) / BLOCK
    padded = torch.nn.functional.pad(mass, (0, -mass.shape[-1] % BLOCK)).unflatten(-1, (-1, BLOCK))
    bands = torch.zeros(*mass.shape[:2], padded.shape[2] + 1, device=mass.device)
    bands[..., :-1] += (padded * (1 - split)).sum(-1)
    bands[..., 1:] += (padded * split).sum(-1)
    bands[..., :forced] = float("inf")
    return bands


def at_least(size: PerHead, minimum: int, unit: int = 1) -> Tensor:
    """Budgets of each head in ``unit`` tokens, with the authors' minimum. On the CPU, where selecting needs them."""
    sizes = size if isinstance(size, Tensor) else torch.tensor(size, device="cpu")
    return -(-sizes.clamp(min=minimum) // unit)
