"""Vertical-slash: the columns and diagonals that the last queries attend most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility, last_query_probe
from gossamer.methods._exact_slash import exact_slash_blocks
from gossamer.methods.base import Method, require_at_least
from gossamer.methods.block_sparse import own_blocks
from gossamer.plan import Extent, SparsePlan, ceil_div
from gossamer.selectors import CsrBuilder, top_k

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
          studies; building it takes a step per diagonal.

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
        columns, diagonals = last_query_probe(q, k, scale=scale, extent=extent, last=self.last)
        column_mask = select_columns(columns, self.vertical_size, extent)
        if self.exact:
            slashes = select_diagonals(diagonals, self.slash_size, extent)
            return exact_slash_blocks(column_mask, slashes, extent, query_len)
        bands = select_bands(diagonals, self.slash_size)
        csr = CsrBuilder()
        visible = BlockVisibility(extent, query_len, key_len, BLOCK, BLOCK, q.device)
        for at, stop in band_chunks(extent.batch * heads, query_len, key_len):
            csr.add(band_blocks(bands, visible, at, stop))
        indptr, indices = csr.build()
        return SparsePlan(
            heads,
            query_len,
            key_len,
            extent,
            block_q=BLOCK,
            block_k=BLOCK,
            block_indptr=indptr,
            block_indices=indices,
            **column_fields(column_mask, query_len),
        )


def select_columns(mass: Tensor, size: Tensor | int, extent: Extent) -> Tensor:
    """The ``max(size, 30)`` best live columns, the first 30 live ones forced: bool ``[B, H, T]``.

    ``size`` is one number or one a head; a size below 0 selects nothing for that head.
    """
    position = extent.key_positions(mass.shape[-1]).to(mass.device)[:, None]
    live = (position >= 0) & (position < extent.key_count.to(mass.device)[:, None, None])
    scores = mass.masked_fill((position < FORCED_COLUMNS) & live, float("inf")).masked_fill(~live, float("-inf"))
    return top_k(scores, at_least(size, FORCED_COLUMNS, mass.device))


def select_diagonals(mass: Tensor, size: Tensor | int, extent: Extent) -> Tensor:
    """The ``max(size, 50)`` best distances, the first 100 forced: bool ``[B, H, T]``, always with distance 0."""
    distance = torch.arange(mass.shape[-1], device=mass.device)
    scores = mass.masked_fill(distance < FORCED_DIAGONALS, float("inf"))
    beyond = distance >= extent.key_count.to(mass.device)[:, None]
    return top_k(scores.masked_fill(beyond[:, None], float("-inf")), at_least(size, MINIMUM_DIAGONALS, mass.device))


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
    budget = at_least(size, MINIMUM_DIAGONALS, mass.device)
    budget = torch.where(budget > 0, (-(-budget // BLOCK)).clamp(min=forced), 0)
    return top_k(bands, budget)


def at_least(size: Tensor | int, minimum: int, device: torch.device) -> Tensor:
    """Budgets with the authors' minimum; negative ones mean that the head has no such part."""
    budget = torch.as_tensor(size, device=device)
    return torch.where(budget < 0, 0, budget.clamp(min=minimum))


def band_chunks(rows: int, query_len: int, key_len: int) -> list[tuple[int, int]]:
    """Chunks of query blocks whose block masks stay below 64 MiB."""
    blocks = ceil_div(query_len, BLOCK)
    step = max(1, (64 << 20) // max(1, rows * ceil_div(key_len, BLOCK)))
    return [(at, min(at + step, blocks)) for at in range(0, blocks, step)]


def band_blocks(bands: Tensor, visible: BlockVisibility, at: int, stop: int) -> Tensor:
    """Key blocks on the chosen block diagonals, and the own ones: bool ``[B, H, m, N]``.

    The block diagonal of a query block is counted from the key block of its last row, so that one rule serves
    chunks that start anywhere.
    """
    key_blocks = visible.first_key.shape[1]
    _, own = visible.own_key_blocks(at, stop)
    band = own[..., None] - torch.arange(key_blocks, device=bands.device)  # [B, m, N]
    inside = (band >= 0) & (band < bands.shape[-1])
    index = band.clamp(0, bands.shape[-1] - 1)[:, None].expand(-1, bands.shape[1], -1, -1)
    rows = bands[:, :, None].expand(-1, -1, stop - at, -1)
    chosen = rows.gather(3, index) & inside[:, None]
    # A head with no bands at all (another pattern of a profile) gets no own blocks either.
    active = bands.any(dim=-1)[:, :, None, None]
    return (chosen | (own_blocks(visible, at, stop)[:, None] & active)) & visible.any_pair(at, stop)[:, None]


def column_fields(column_mask: Tensor, query_len: int) -> dict[str, Any]:
    """One column list a head, for all its query blocks: the plan's column fields."""
    csr = CsrBuilder()
    csr.add(column_mask[:, :, None])
    indptr, indices = csr.build()
    blocks = max(1, ceil_div(query_len, BLOCK))
    return {"column_indptr": indptr, "column_indices": indices, "column_group": blocks}
