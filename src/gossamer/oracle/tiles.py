"""Softmax mass in tiles of rows by keys, and sums over blocks: the machinery of `gossamer.oracle`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.plan import Extent

__all__ = ["Tiles", "spans", "sum_blocks", "sum_row_blocks", "wide"]

# Working set of a tile: what caches hold. Half or twice as much is slower by a tenth.
TILE_BYTES = 4 << 20
_TILE_ROWS = 256
_TILE_KEYS = 2048


def wide(x: Tensor) -> Tensor:
    """In the dtype that masses are computed in."""
    return x if x.dtype == torch.float64 else x.float()


class Tiles:
    """The softmax mass of rectangles of the score matrix."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        lse: Tensor,
        scale: float,
        extent: Extent,
        causal: bool,
        limit: int | None,
        softcap: float | None,
    ) -> None:
        self.batch, self.heads, self.query_len, self.dim = q.shape
        self.groups, self.key_len = k.shape[1], k.shape[2]
        if lse.shape != q.shape[:3]:
            raise ValueError(
                f"lse must be [batch, heads, queries] = {tuple(q.shape[:3])}, got {tuple(lse.shape)}; "
                "make it with gossamer.oracle.log_sum_exp"
            )
        self._q, self._k, self._lse = q, k, lse
        self._scale, self._causal, self._limit, self._softcap = scale, causal, limit, softcap
        self._extent = extent
        self._rows = extent.query_positions(self.query_len)
        self._keys = extent.key_positions(self.key_len)
        elements = max(1, TILE_BYTES // (8 * self.batch * self.heads))
        self.row_cap = min(_TILE_ROWS, max(16, int((elements / 4) ** 0.5)))
        self.key_cap = min(_TILE_KEYS, max(64, elements // self.row_cap))

    def mass(self, rows: slice, keys: slice) -> Tensor | None:
        """``[B, H, rows, keys]``, 0 where a pair is not attended; None where no pair is."""
        row, key, count = self._rows[:, rows, None], self._keys[:, None, keys], self._extent.key_count[:, None, None]
        row_live, key_live = (row >= 0) & (row < count), (key >= 0) & (key < count)
        some, whole = self._attended(row, key, row_live, key_live)
        if not some:
            return None
        q = wide(self._q[:, :, rows]).reshape(self.batch, self.groups, -1, self.dim)
        scores = (q * self._scale @ wide(self._k[:, :, keys]).transpose(-1, -2)).view(
            self.batch, self.heads, row.shape[1], key.shape[2]
        )
        if self._softcap is not None:
            scores = scores.div_(self._softcap).tanh_().mul_(self._softcap)
        mass = scores.sub_(self._lse[:, :, rows, None]).exp_()
        if whole:
            return mass
        visible = row_live & key_live
        if self._causal:
            visible = visible & (key <= row)
        if self._limit is not None:
            visible = visible & ((row - key).abs() < self._limit)
        # After exp: a dead slot may hold anything, NaN too.
        return mass.masked_fill_(~visible[:, None].to(mass.device), 0.0)

    def _attended(self, row: Tensor, key: Tensor, row_live: Tensor, key_live: Tensor) -> tuple[bool, bool]:
        """Whether some and whether all pairs of a tile are attended."""
        far = torch.iinfo(torch.int64).max // 4
        # Of the live ones: [B] each.
        first_row = row.masked_fill(~row_live, far).amin((1, 2))
        last_row = row.masked_fill(~row_live, -far).amax((1, 2))
        first_key = key.masked_fill(~key_live, far).amin((1, 2))
        last_key = key.masked_fill(~key_live, -far).amax((1, 2))
        some = (last_row >= 0) & (last_key >= 0)
        whole = row_live.all((1, 2)) & key_live.all((1, 2))
        if self._causal:
            some, whole = some & (first_key <= last_row), whole & (last_key <= first_row)
        if self._limit is not None:
            some = some & (first_row - last_key < self._limit) & (first_key - last_row < self._limit)
            whole = whole & (last_row - first_key < self._limit) & (last_key - first_row < self._limit)
        return bool(some.any()), bool(whole.all())


def spans(blocks: range, length: int, block: int, cap: int) -> Iterator[tuple[int, slice]]:
    """The tokens of some blocks in pieces of about ``cap``: whole blocks, or a part of one block.

    Yields:
        index among the ``blocks`` of the first block of the piece, and the piece.
    """
    many = max(1, cap // block) if blocks.step == 1 else 1
    step = many * block if block <= cap else cap
    for at in range(0, len(blocks), many):
        stop = min((blocks[at] + many) * block, length)
        for start in range(blocks[at] * block, stop, step):
            yield at, slice(start, min(start + step, stop))


def sum_blocks(x: Tensor, block: int) -> Tensor:
    """Sums over blocks of the last dimension, for a piece that `spans` gave."""
    if x.shape[-1] <= block:
        return x.sum(-1, keepdim=True)
    if x.shape[-1] % block:
        x = F.pad(x, (0, -x.shape[-1] % block))
    return x.unflatten(-1, (-1, block)).sum(-1)


def sum_row_blocks(x: Tensor, block: int) -> Tensor:
    """The same over the last but one dimension."""
    if x.shape[-2] <= block:
        return x.sum(-2, keepdim=True)
    if x.shape[-2] % block:
        x = F.pad(x, (0, 0, 0, -x.shape[-2] % block))
    return x.unflatten(-2, (-1, block)).sum(-2)
