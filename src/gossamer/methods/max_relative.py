"""Max-relative: every query against mean-pooled keys, kept relative to the best block. No sort."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from gossamer import scores
from gossamer.blocks import Blocks
from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.plan import SparsePlan, ceil_div
from gossamer.rules import RelativeToMax

__all__ = ["MaxRelative", "blocks_of_energy"]


def blocks_of_energy(
    call: AttentionCall,
    alpha: float,
    *,
    blocks: tuple[int, int],
    keep: Mapping[str, Any],
    per: Literal["head", "kv_head"] = "kv_head",
    ended: bool = False,
) -> Blocks:
    """Key blocks whose energy is at least ``alpha`` times the largest of their query block, and those that it keeps.

    Args:
        blocks: tokens of a query block and of a key block.
        keep: of `Blocks.keep`; per, ended: of `gossamer.scores.row_block_energy`.
    """
    chosen = Blocks(call, *blocks, per=per)
    chosen.keep(**keep)
    for part, energy in scores.row_block_energy(call, chosen.grid, per=per, ended=ended):
        chosen.choose(part, energy, RelativeToMax(alpha))
    return chosen


@dataclass(frozen=True)
class MaxRelative(Method):
    """FlashPrefill V2's selection (2608.19758), planned per key/value head: the plain form of `FlashPrefill`.

    A query block and the heads of a GQA group form one tile. Its energy for key block j is
    ``E[j] = sum over rows r that see j of exp(scale * q_r . mean(k in j))``; the tile keeps every j with
    ``E[j] >= alpha * max E``, the first ``sink_blocks``, its own and the ``window_blocks - 1`` blocks before, and
    everything in the last rows of the call. ``alpha = 0`` is dense.

    Defaults are those of the authors' README: alpha 0.1, 128-token blocks, 2 sink and 4 local blocks, 8 dense tiles
    of 128 packed rows (query rows times heads of a group), which is ``last_rows``.

    Deviations: a tile is ``block_q`` tokens times the group's heads (the authors pack 128 rows and may straddle a
    group); the dense tail is widened to whole query blocks; the pruned blocks are dropped, not replaced by their
    means (which `FlashPrefill` does, and `Corrected` for any method).
    """

    name: ClassVar[str] = "max_relative"
    settings: ClassVar[Settings] = tuple({"alpha": alpha} for alpha in (0.5, 0.2, 0.1, 0.05, 0.02))
    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_rows: int = 1024
    block_q: int = 64
    block_k: int = 128

    def __post_init__(self) -> None:
        require_at_least(self, 0, "sink_blocks", "last_rows")
        require_at_least(self, 1, "window_blocks", "block_q", "block_k")
        require_share(self, "alpha")

    def plan(self, call: AttentionCall) -> SparsePlan:
        tail = ceil_div(self.last_rows, call.share)
        keep = {"first": self.sink_blocks, "own": self.window_blocks, "last_rows": tail}
        blocks = blocks_of_energy(call, self.alpha, blocks=(self.block_q, self.block_k), keep=keep)
        return blocks.plan()
