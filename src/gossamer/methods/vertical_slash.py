"""Vertical-slash: the columns and diagonals that the last queries attend most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility, last_query_probe
from gossamer.methods._choice import BlockChoice, Lists, column_lists, has_pairs, make_plan
from gossamer.methods._exact_slash import exact_slash_blocks
from gossamer.methods.base import Method, require_at_least
from gossamer.plan import Extent, SparsePlan, ceil_div
from gossamer.selectors import top_k

__all__ = ["VerticalSlash", "select_bands", "select_columns", "select_diagonals"]

FORCED_COLUMNS = 30
FORCED_DIAGONALS = 100
MINIMUM_DIAGONALS = 50
BLOCK = 64


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
          studies; built in C++ on the CPU, elsewhere in torch with a step per diagonal.

    Defaults: the authors' for a head without a searched pattern, 1000 columns and 6096 diagonals.

    Deviation from the authors' code: ties, of the forced entries too, break by lower index, and the main diagonal is
    always kept.
    """

    name: ClassVar[str] = "vertical_slash"
    vertical_size: int = 1000
    slash_size: int = 6096
    last: int = 64
    exact: bool = False

    def __post_init__(self) -> None:
        require_at_least(self, 0, "vertical_size", "slash_size")
        require_at_least(self, 1, "last")

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        heads, query_len, key_len = q.shape[1], q.shape[2], k.shape[2]
        if not has_pairs(q, k):
            return SparsePlan(heads, query_len, key_len, extent, block_q=BLOCK, block_k=BLOCK)
        columns, diagonals = last_query_probe(q, k, scale=scale, extent=extent, last=self.last)
        if self.exact:
            column_mask = select_columns(columns, self.vertical_size, extent)
            slashes = select_diagonals(diagonals, self.slash_size, extent)
            return exact_slash_blocks(column_mask, slashes, extent, query_len)
        visible = BlockVisibility(extent, query_len, key_len, BLOCK, BLOCK, q.device)
        choice = band_choice(visible, select_bands(diagonals, self.slash_size))
        choice.add_all()
        return make_plan(
            heads,
            query_len,
            key_len,
            extent,
            block_q=BLOCK,
            block_k=BLOCK,
            blocks=choice,
            columns=choose_columns(columns, self.vertical_size, extent),
            column_group=column_group(query_len),
        )


def select_columns(mass: Tensor, size: Tensor | int, extent: Extent) -> Tensor:
    """The ``max(size, 30)`` best live columns, the first 30 live ones forced: bool ``[B, H, T]``.

    ``size`` is one number or one a head; a size below 0 selects nothing for that head.
    """
    return top_k(column_scores(mass, extent), at_least(size, FORCED_COLUMNS))


def column_scores(mass: Tensor, extent: Extent) -> Tensor:
    """The mass, infinite for the forced columns and -inf for dead slots."""
    position = extent.key_positions(mass.shape[-1], mass.device)[:, None]
    live = (position >= 0) & (position < extent.key_count.to(mass.device, non_blocking=True)[:, None, None])
    return mass.masked_fill((position < FORCED_COLUMNS) & live, float("inf")).masked_fill(~live, float("-inf"))


def select_diagonals(mass: Tensor, size: Tensor | int, extent: Extent) -> Tensor:
    """The ``max(size, 50)`` best distances, the first 100 forced: bool ``[B, H, T]``, always with distance 0."""
    distance = torch.arange(mass.shape[-1], device=mass.device)
    scores = mass.masked_fill(distance < FORCED_DIAGONALS, float("inf"))
    beyond = distance >= extent.key_count.to(mass.device)[:, None]
    return top_k(scores.masked_fill(beyond[:, None], float("-inf")), at_least(size, MINIMUM_DIAGONALS))


def select_bands(mass: Tensor, size: Tensor | int) -> Tensor:
    """The best block diagonals: bool ``[B, H, bands]``, band b holding distances around ``64 b``.

    A pair at distance d = 64 b + r lies on block diagonal b for the share (64 - r) / 64 of the rows and on b + 1 for
    the others, so each diagonal's mass is split in that proportion. The forced first bands count towards the budget
    of ``ceil(max(size, 50) / 64)``, and are kept if they exceed it.
    """
    key_len = mass.shape[-1]
    split = torch.arange(BLOCK, device=mass.device) / BLOCK
    padded = torch.nn.functional.pad(mass, (0, -key_len % BLOCK)).unflatten(-1, (-1, BLOCK))
    bands = torch.zeros(*mass.shape[:2], padded.shape[2] + 1, device=mass.device)
    bands[..., :-1] += (padded * (1 - split)).sum(-1)
    bands[..., 1:] += (padded * split).sum(-1)
    forced = ceil_div(FORCED_DIAGONALS, BLOCK)
    bands[..., :forced] = float("inf")
    budget = at_least(size, MINIMUM_DIAGONALS)
    budget = torch.where(budget > 0, (-(-budget // BLOCK)).clamp(min=forced), 0)
    return top_k(bands, budget)


def at_least(size: Tensor | int, minimum: int) -> Tensor:
    """Budgets with the authors' minimum; negative ones mean that the head has no such part.

    They stay where ``size`` is, on the CPU: what selects needs the largest one there.
    """
    budget = torch.as_tensor(size)
    return torch.where(budget < 0, 0, budget.clamp(min=minimum))


def band_choice(visible: BlockVisibility, bands: Tensor) -> BlockChoice:
    """Blocks on the chosen block diagonals, and the own ones of heads that have any band at all."""
    return BlockChoice(visible, bands.shape[1], bands=bands, forcing=bands.any(dim=-1))


def choose_columns(mass: Tensor, size: Tensor | int, extent: Extent) -> Lists:
    """`select_columns` as lists, one a head."""
    return column_lists(column_scores(mass, extent), at_least(size, FORCED_COLUMNS).expand(mass.shape[1]))


def column_group(query_len: int) -> int:
    """All query blocks of a head share its columns."""
    return max(1, ceil_div(query_len, BLOCK))
