"""FlashPrefill: every query against mean-pooled keys, and means in place of what is pruned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from gossamer.call import AttentionCall
from gossamer.methods.base import Method, Settings, require_at_least, require_share
from gossamer.methods.max_relative import blocks_of_energy
from gossamer.plan import SparsePlan, ceil_div
from gossamer.plan.checks import check_attributes

__all__ = ["FlashPrefill"]

_FEWEST = 16  # tokens of a query block: less is slower, not sparser


@dataclass(frozen=True)
class FlashPrefill(Method):
    """FlashPrefill, version 2 (2608.19758) or 1 (2603.06199): blocks near the best one of a tile, the others by a mean.

    With ``x[r, j] = scale * q_r . mean(k in j)`` the energy of key block j for a tile is
    ``E[j] = sum over rows r that see j of exp(x[r, j])``. The tile keeps every j with ``E[j] >= alpha * max E``, the
    first ``sink_blocks``, its own and the ``window_blocks - 1`` blocks before; the last ``last_tiles`` keep everything.

    - Version 2: a tile is ``tile_rows`` packed rows, tokens times the query heads of a key/value head, which share the
      plan; a row sees the blocks that begin at or before it. Blocks that the whole tile sees and does not keep count by
      their mean key and value (``pruned_mean``).
    - Version 1: a tile is ``tile_rows`` tokens of one query head; a row sees the blocks that end at or before it. What
      is not kept is dropped.

    In both, causal tiles score only blocks that end at or before their last row. ``alpha = 0`` is dense.

    Defaults are those of version 2's README: alpha 0.1, blocks and tiles of 128, 2 sink and 4 local blocks, 8 dense
    tiles. Version 1's authors calibrate alpha by model (0.08 to 0.18) and have 2 dense tiles.

    Fields of the plan: ``pruned_mean``, None for the version's own; ``skip``, of tiles far below a row's maximum
    (`SparsePlan`), which is no part of the papers.

    Deviations: a tile of version 2 does not straddle a group of heads; its tokens are the largest power of two whose
    rows fit, and at least 16. Tiles and blocks lie on positions, not on a chunk's own rows. The dense tail is counted
    in rows, and widened to whole query blocks. A last key block that is not full is never scored.
    """

    name: ClassVar[str] = "flash_prefill"
    settings: ClassVar[Settings] = tuple({"alpha": alpha} for alpha in (0.5, 0.2, 0.1, 0.05, 0.02))
    version: Literal[1, 2] = 2
    alpha: float = 0.1
    sink_blocks: int = 2
    window_blocks: int = 4
    last_tiles: int = 8
    tile_rows: int = 128
    block_k: int = 128
    pruned_mean: bool | None = None
    skip: float | None = None

    def __post_init__(self) -> None:
        if self.version not in (1, 2):
            raise ValueError(f"{self.name}.version must be 1 or 2, got {self.version!r}")
        require_at_least(self, 0, "sink_blocks", "last_tiles")
        require_at_least(self, 1, "window_blocks", "tile_rows", "block_k")
        require_share(self, "alpha")
        check_attributes(self.means, self.skip, self.block_k, self.name)

    @property
    def means(self) -> bool:
        """Whether pruned blocks count by their mean."""
        return self.version == 2 if self.pruned_mean is None else self.pruned_mean

    def plan(self, call: AttentionCall) -> SparsePlan:
        packed = 1 if self.version == 1 else call.share
        block_q = self.tile_rows if packed == 1 else _tokens(self.tile_rows, packed)
        tail = ceil_div(self.last_tiles * self.tile_rows, packed)
        blocks = blocks_of_energy(
            call,
            self.alpha,
            blocks=(block_q, self.block_k),
            keep={"first": self.sink_blocks, "own": self.window_blocks, "last_rows": tail},
            per="head" if self.version == 1 else "kv_head",
            ended=self.version == 1,
        )
        return blocks.plan(pruned_mean=self.means, skip=self.skip)


def _tokens(rows: int, share: int) -> int:
    """The largest power of two of tokens that in ``share`` heads have at most so many rows."""
    return max(_FEWEST, 1 << max(0, (rows // share).bit_length() - 1))
