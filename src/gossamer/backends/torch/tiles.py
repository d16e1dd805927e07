"""Softmax mass in tiles of queries by keys, and sums over blocks: block mass by definition, and the exact oracle's."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.attend import wide
from gossamer.call import AttentionCall
from gossamer.plan import Grid

__all__ = ["Piece", "RowMass", "key_pieces", "query_pieces"]

# Working set of a tile: what caches hold. Half or twice as much is slower by a tenth.
TILE_BYTES = 4 << 20
MOST_QUERIES = 256
MOST_KEYS = 2048


class RowMass:
    """The softmax mass of rectangles of one batch row's score matrix, in positions: it has no padding."""

    def __init__(self, call: AttentionCall, lse: Tensor, row: int) -> None:
        extent = call.extent
        first, count = int(extent.first_query[row]), int(extent.query_count[row])
        start, keys = int(extent.key_start[row]), int(extent.key_count[row])
        self._q = call.q[row, :, first : first + count]
        self._k = call.k[row, :, start : start + keys]
        self._lse = lse[row, :, first : first + count]
        self._call, self._first = call, int(extent.first_position[row])
        elements = max(1, TILE_BYTES // (8 * call.heads))
        self.most_queries = min(MOST_QUERIES, max(16, int((elements / 4) ** 0.5)))
        self.most_keys = min(MOST_KEYS, max(64, elements // self.most_queries))

    def mass(self, queries: range, keys: range) -> Tensor | None:
        """``[H, queries, keys]``, 0 where a pair is not allowed; None where no pair is."""
        some, every = self._allowed(queries, keys)
        if not some:
            return None
        rows = slice(queries.start - self._first, queries.stop - self._first)
        q = wide(self._q[:, rows])
        stacked = (q * self._call.scale).reshape(self._call.groups, -1, q.shape[-1])
        scores = stacked @ wide(self._k[:, keys.start : keys.stop]).transpose(-1, -2)
        scores = scores.view(self._call.heads, len(queries), len(keys))
        if self._call.softcap is not None:
            scores = scores.div_(self._call.softcap).tanh_().mul_(self._call.softcap)
        mass = scores.sub_(self._lse[:, rows, None]).exp_()
        if every:
            return mass
        query = torch.arange(queries.start, queries.stop, device=mass.device)[:, None]
        key = torch.arange(keys.start, keys.stop, device=mass.device)
        pairs = torch.ones(len(queries), len(keys), dtype=torch.bool, device=mass.device)
        if self._call.extent.causal:
            pairs = pairs & (key <= query)
        if self._call.extent.limit is not None:
            pairs = pairs & ((query - key).abs() < self._call.extent.limit)
        return mass.masked_fill_(~pairs, 0.0)

    def _allowed(self, queries: range, keys: range) -> tuple[bool, bool]:
        """Whether some and whether all pairs of a tile are allowed."""
        if not queries or not keys:
            return False, False
        some = every = True
        if self._call.extent.causal:
            some, every = keys.start < queries.stop, keys.stop - 1 <= queries.start
        limit = self._call.extent.limit
        if limit is not None:
            nearest = max(queries.start - (keys.stop - 1), keys.start - (queries.stop - 1), 0)
            farthest = max(queries.stop - 1 - keys.start, keys.stop - 1 - queries.start)
            some, every = some and nearest < limit, every and farthest < limit
        return some, every


class Piece:
    """Consecutive tokens: whole blocks, or a part of one block."""

    def __init__(self, tokens: range, first_block: int, block: int, lead: int) -> None:
        self.tokens, self.first_block = tokens, first_block
        self._block, self._lead = block, lead

    def sums(self, x: Tensor, dim: int) -> Tensor:
        """Sums over the blocks that the piece meets, of the dimension ``dim`` (-1 or -2) that runs over its tokens."""
        return self._by_block(x, dim).sum(dim)

    def peaks(self, x: Tensor, dim: int) -> Tensor:
        """The largest member of each block, likewise, of what is not negative."""
        return self._by_block(x, dim).amax(dim)

    def _by_block(self, x: Tensor, dim: int) -> Tensor:
        """The dimension ``dim`` as two, blocks and their tokens, with zeros for tokens that the piece lacks."""
        if self._lead + len(self.tokens) <= self._block:
            return x.unsqueeze(dim - 1)
        padding = [self._lead, -(self._lead + len(self.tokens)) % self._block]
        if padding != [0, 0]:
            x = F.pad(x, padding if dim == -1 else [0, 0, *padding])
        return x.unflatten(dim, (-1, self._block))


def query_pieces(grid: Grid, row: int, blocks: range, most: int) -> Iterator[Piece]:
    """The live queries of some query blocks of a batch row, as positions, in pieces of about ``most``.

    A piece's ``first_block`` is an index among the ``blocks``.
    """
    queries = grid.queries[row].tolist()
    together = max(1, most // grid.block_q) if blocks.step == 1 else 1
    for index in range(0, len(blocks), together):
        rows = [(low, high) for low, high in (queries[m] for m in blocks[index : index + together]) if high > low]
        if not rows:
            return
        begin, end = rows[0][0], rows[-1][1]
        first = (int(grid.first_block[row]) + blocks[index]) * grid.block_q
        yield from _pieces(range(begin, end), index, grid.block_q, begin - first, most if together == 1 else end)


def key_pieces(grid: Grid, row: int, most: int) -> Iterator[Piece]:
    """The live keys of a batch row, as positions, in pieces of about ``most``."""
    together, count = max(1, most // grid.block_k), int(grid.extent.key_count[row])
    for index in range(0, grid.key_blocks, together):
        tokens = range(index * grid.block_k, min((index + together) * grid.block_k, count))
        yield from _pieces(tokens, index, grid.block_k, 0, most if together == 1 else count)


def _pieces(tokens: range, first_block: int, block: int, lead: int, most: int) -> Iterator[Piece]:
    for start in range(tokens.start, tokens.stop, max(1, most)):
        part = range(start, min(start + max(1, most), tokens.stop))
        yield Piece(part, first_block, block, lead if start == tokens.start and len(part) == len(tokens) else 0)
