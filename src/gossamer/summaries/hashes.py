"""Locality-sensitive hashes of keys."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.plan.integers import ceil_div
from gossamer.summaries.base import Held, Kept, Summary
from gossamer.summaries.zones import middle

__all__ = ["TILE", "HashSet", "Hashes"]

TILE = 64  # tokens whose codes lie together, table by table
_BLOCK = 256  # tokens that are hashed together, counted from a row's first: so none depends on how they came


@dataclass(frozen=True, slots=True, eq=False)
class HashSet:
    """Hashes by position, of positions before ``ends`` in each row.

    Fields:
        codes: int16 ``[B, G, tiles, tables, 64]``, of 64 tokens a tile: a bit for each direction of a table.
        norms: fp32 ``[B, G, tiles * 64]``, of keys less the mean.
        mean: fp32 ``[B, G, D]``.
        ends: of each row; 0 where nothing is hashed.
    """

    codes: Tensor
    norms: Tensor
    mean: Tensor
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Hashes(Summary[HashSet]):
    """The sides of random planes on which keys lie, less their mean (MagicPIG, 2410.16179, sections 4.2 and 4.3).

    ``tables`` codes of ``bits`` bits for each key. The mean is of the middle of the prompt, without its first
    ``sinks`` and last ``recent`` tokens (of the first ``step`` tokens after the sinks, where a prompt has fewer). Those
    that come later are hashed ``step`` at a time, less the same mean. What is hashed ends ``recent`` tokens before the
    newest or earlier.

    Fields:
        seed: of the planes, which all layers and heads share.
    """

    bits: int
    tables: int
    sinks: int
    recent: int
    step: int
    seed: int

    def begin(self) -> Kept[HashSet]:
        return _Hashes(self)

    def codes(self, x: Tensor) -> Tensor:
        """Of vectors fp32 ``[..., D]``: int16 ``[..., tables]``."""
        sides = (x @ planes(x.shape[-1], self.bits, self.tables, self.seed).to(x.device)) > 0
        sides = sides.unflatten(-1, (self.bits, self.tables))
        codes = sides[..., 0, :].to(torch.int16)
        for bit in range(1, self.bits):
            codes |= sides[..., bit, :].to(torch.int16) << bit
        return codes


@functools.lru_cache(maxsize=4)
def planes(dim: int, bits: int, tables: int, seed: int) -> Tensor:
    """Normals of planes, fp32 ``[dim, bits * tables]``."""
    with torch.inference_mode(False):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(dim, bits * tables, generator=generator, device="cpu")


class _Hashes(Kept[HashSet]):
    def __init__(self, kind: Hashes) -> None:
        self.kind = kind
        self._tensors: list[Tensor] = []  # codes, norms, means
        self._starts: list[int] = []
        self._bases: list[int] = []  # of each row, where the tokens end that its mean is of
        self._done: list[int] = []  # where those end that are hashed

    def of(self, held: Held) -> HashSet:
        kind, batch = self.kind, len(held.starts)
        counts = [held.slots - start for start in held.starts]
        zone = {"sinks": kind.sinks, "recent": kind.recent, "first": kind.step, "step": kind.step}
        ends = [middle(n, held.prompt - start, **zone) for n, start in zip(counts, held.starts, strict=True)]
        if list(held.starts) != self._starts:
            self._starts, self._bases, self._done = list(held.starts), [0] * batch, [0] * batch
        tiles = ceil_div(max((end for _, end in ends), default=0), TILE)
        self._make_room(held, tiles)
        for row, (base, end) in enumerate(ends):
            self._bring(held, row, base, end)
        codes, norms, means = self._tensors
        return HashSet(codes[:, :, :tiles], norms[:, :, : tiles * TILE], means, tuple(end for _, end in ends))

    def _make_room(self, held: Held, tiles: int) -> None:
        batch, groups, _, dim = held.shape
        if self._tensors and self._tensors[0].shape[2] >= tiles:
            if self._tensors[0].is_inference() and not torch.is_inference_mode_enabled():
                self._tensors = [x.clone() for x in self._tensors]
            return
        room, device = tiles + ceil_div(tiles, 8) + _BLOCK // TILE, held.device
        codes = torch.zeros(batch, groups, room, self.kind.tables, TILE, dtype=torch.int16, device=device)
        grown = [
            codes,
            torch.zeros(batch, groups, room * TILE, device=device),
            torch.zeros(batch, groups, dim, device=device),
        ]
        for new, old, filled in zip(grown, self._tensors, (1, TILE, 0), strict=False):
            count = self._tensors[0].shape[2] * filled or dim
            new[:, :, :count] = old
        self._tensors = grown

    def _bring(self, held: Held, row: int, base: int, end: int) -> None:
        if base == self._bases[row] and self._done[row] >= end:
            return
        codes, norms, means = (x[row] for x in self._tensors)
        origin = 0 if base != self._bases[row] else self._done[row] // _BLOCK * _BLOCK
        keys = held.keys_from(held.starts[row] + origin)[row]
        if base != self._bases[row]:
            self._bases[row], self._done[row] = base, 0
            if end:
                means.copy_(keys[:, self.kind.sinks : base].float().mean(dim=1))
        for begin in range(origin, end, _BLOCK):
            some = keys[:, begin - origin : min(begin + _BLOCK, end) - origin].float() - means[:, None]
            count = some.shape[1]
            if count < _BLOCK:
                some = torch.cat([some, some.new_zeros(some.shape[0], _BLOCK - count, some.shape[2])], dim=1)
            norms[:, begin : begin + count] = some.norm(dim=-1)[:, :count]
            found = self.kind.codes(some).unflatten(1, (-1, TILE)).transpose(2, 3)
            first, last = begin // TILE, ceil_div(begin + count, TILE)
            codes[:, first:last] = found[:, : last - first]
        self._done[row] = max(self._done[row], end)

    def cut(self, slots: int) -> None:
        for row, start in enumerate(self._starts):
            if slots - start < self._bases[row]:
                self._bases[row] = 0
            self._done[row] = min(self._done[row], max(slots - start, 0))

    def take_rows(self, index: Tensor) -> None:
        rows = index.tolist()
        if self._starts:
            self._starts, self._bases, self._done = (
                [own[row] for row in rows] for own in (self._starts, self._bases, self._done)
            )
        self._tensors = [x.index_select(0, index.to(x.device)) for x in self._tensors]
