"""MInference: each head has its own pattern, from a profile."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.estimators import BlockVisibility, last_query_probe, pooled_scores
from gossamer.methods._choice import BlockChoice, has_pairs, make_plan
from gossamer.methods.base import Method, require_at_least
from gossamer.methods.vertical_slash import (
    BLOCK,
    VerticalSlash,
    band_choice,
    choose_columns,
    column_group,
    select_bands,
)
from gossamer.plan import Extent, SparsePlan
from gossamer.profiles import HeadPattern, Profile

__all__ = ["MInference"]


@dataclass(frozen=True)
class MInference(Method):
    """MInference (2407.02490): A-shape, vertical-slash or block-sparse per head, chosen offline, filled in online.

    The profile names each head's pattern and budget. Without one, every head is vertical-slash with 1000 columns and
    6096 diagonals, which is what the authors' code does for a head that its configuration lacks.

    Deviations: slashes are block-aligned bands (see `VerticalSlash`, where the token-exact form is); block-sparse
    heads keep their diagonal (see `BlockSparse`); nothing is repeated for GQA, and batches, padding and chunks work.
    """

    name: ClassVar[str] = "minference"
    profile: Profile | None = None
    vertical_size: int = 1000
    slash_size: int = 6096
    last: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "vertical_size", "slash_size")
        require_at_least(self, 1, "last")
        if self.profile is not None and not isinstance(self.profile, Profile):
            raise TypeError(f"minference.profile must be a Profile or None, got {type(self.profile).__name__}")

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"profile": self.profile.to_dict() if self.profile else None}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Method:
        profile = values.get("profile")
        if isinstance(profile, dict):
            values = values | {"profile": Profile.from_dict(profile)}
        return super().from_fields(values)

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        if self.profile is None:
            uniform = VerticalSlash(self.vertical_size, self.slash_size, self.last)
            return uniform.plan(q, k, scale=scale, extent=extent)
        patterns = self.profile.layer(layer, q.shape[1])
        return _mixed_plan(q, k, scale, extent, patterns, self.last)


def _mixed_plan(
    q: Tensor, k: Tensor, scale: float, extent: Extent, patterns: tuple[HeadPattern, ...], last: int
) -> SparsePlan:
    heads, query_len, key_len = q.shape[1], q.shape[2], k.shape[2]
    if not has_pairs(q, k):
        return SparsePlan(heads, query_len, key_len, extent, block_q=BLOCK, block_k=BLOCK)
    everything = query_len + key_len

    # On the CPU, whatever q's device: they come from the profile, and reading them must not wait.
    def budgets(kind: str, at: int, absent: int) -> Tensor:
        return torch.tensor([p.budget[at] if p.kind == kind else absent for p in patterns])

    kinds = {p.kind for p in patterns}
    visible = BlockVisibility(extent, query_len, key_len, BLOCK, BLOCK, q.device)
    lists, bands, choice = None, None, None
    if "vertical_slash" in kinds:
        columns, diagonals = last_query_probe(q, k, scale=scale, extent=extent, last=last)
        lists = choose_columns(columns, budgets("vertical_slash", 0, -1), extent)
        bands = select_bands(diagonals, budgets("vertical_slash", 1, -1))
    if "block_sparse" in kinds:
        best = budgets("block_sparse", 0, 0)
        forcing = (best > 0).to(q.device, non_blocking=True).expand(extent.batch, heads)
        choice = BlockChoice(
            visible, heads, bands=bands, forcing=forcing if bands is None else forcing | bands.any(dim=-1)
        )
        for at, scores in pooled_scores(q, k, extent=extent, block_q=BLOCK, block_k=BLOCK):
            choice.add(at, at + scores.shape[2], scores, budgets=best)
    elif bands is not None:
        choice = band_choice(visible, bands)
        choice.add_all()
    dense = torch.tensor([p.kind == "dense" for p in patterns])
    window = budgets("a_shape", 1, 0)
    is_a_shape = torch.tensor([p.kind == "a_shape" for p in patterns])
    return make_plan(
        heads,
        query_len,
        key_len,
        extent,
        block_q=BLOCK,
        block_k=BLOCK,
        blocks=choice,
        columns=lists,
        column_group=column_group(query_len),
        sink=budgets("a_shape", 0, 0),
        window=torch.where(dense, everything, torch.where(is_a_shape, window.clamp(min=1), 0)),
    )
