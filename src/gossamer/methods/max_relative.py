"""Max-relative: every query row against mean-pooled keys, kept relative to the best block. No sort."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gossamer.estimators import BlockVisibility, row_block_energy
from gossamer.methods._choice import BlockChoice, has_pairs, make_plan
from gossamer.methods.a_shape import tail_blocks
from gossamer.methods.base import Method, require_at_least
from gossamer.plan import Extent, SparsePlan, ceil_div

__all__ = ["MaxRelative"]


@dataclass(frozen=True)
class MaxRelative(Method):
    """FlashPrefill V2's selection (2608.19758), planned per key/value head, without its mean correction.

    A query block and the heads of a GQA group form one tile. Its energy for key block j is
    ``E[j] = sum over rows r that see j of exp(scale * q_r . mean(k in j))``; the tile keeps every j with
    ``E[j] >= alpha * max E``, the first ``sink_blocks``, its own and the ``window_blocks - 1`` blocks before, and
    everything in the last rows of the call. ``alpha = 0`` is dense.

    Defaults are those of the authors' README: alpha 0.1, 128-token blocks, 2 sink and 4 local blocks, 8 dense tiles
    of 128 packed rows (query rows times heads of a group), which is ``last_rows``.

    Deviations: a tile is ``block_q`` tokens times the group's heads (the authors pack 128 rows and may straddle a
    group); the dense tail is widened to whole query blocks; the pruned blocks are dropped, not replaced by their
    means.
    """

    name: ClassVar[str] = "max_relative"
    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_rows: int = 1024
    block_q: int = 64
    block_k: int = 128

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink_blocks", "last_rows")
        require_at_least(self, 1, "window_blocks", "block_q", "block_k")
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"max_relative.alpha must lie in [0, 1], got {self.alpha}")

    def plan(self, q: Tensor, k: Tensor, *, scale: float, extent: Extent, layer: int | None = None) -> SparsePlan:
        query_len, key_len = q.shape[2], k.shape[2]
        if not has_pairs(q, k):
            return SparsePlan(k.shape[1], query_len, key_len, extent, block_q=self.block_q, block_k=self.block_k)
        share = q.shape[1] // k.shape[1]
        visible = BlockVisibility(extent, query_len, key_len, self.block_q, self.block_k, q.device)
        tail = tail_blocks(extent, query_len, ceil_div(self.last_rows, share), self.block_q).to(
            q.device, non_blocking=True
        )
        choice = BlockChoice(visible, k.shape[1], window=self.window_blocks, leading=self.sink_blocks, tail=tail)
        for at, energy in row_block_energy(
            q, k, scale=scale, extent=extent, block_q=self.block_q, block_k=self.block_k
        ):
            choice.add(at, at + energy.shape[2], energy, alpha=self.alpha)
        return make_plan(
            k.shape[1],
            query_len,
            key_len,
            extent,
            block_q=self.block_q,
            block_k=self.block_k,
            blocks=choice,
        )
