"""Clusters of keys, with the mean of what their tokens hold."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from gossamer.summaries.base import Held, Kept, Summary
from gossamer.summaries.zones import middle

__all__ = ["ClusterSet", "Clusters", "cluster"]

_ROUNDS = 9  # of k-means within segments; a last one is over all
_CHUNK = 1024  # tokens that are compared with centroids at once


@dataclass(frozen=True, slots=True, eq=False)
class ClusterSet:
    """Clusters of each row and key/value head. Rows with fewer have empty ones behind.

    Fields:
        centroids: ``[B, G, N, D]``, mean keys; means: ``[B, G, N, Dv]``, mean values. Both in their dtype; of empty
            clusters anything finite.
        sizes: int64 ``[B, G, N]``, tokens.
        owners: int32 ``[B, G, positions]``, the cluster of each position; -1 where it is in none.
        counts: clusters of each row.
    """

    centroids: Tensor
    means: Tensor
    sizes: Tensor
    owners: Tensor
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Clusters(Summary[ClusterSet]):
    """Keys that lie in one direction, in clusters of about ``size`` (RetroInfer, 2505.02922, section 4.2).

    Of the prompt without its first ``sinks`` and last ``recent`` tokens, where at least ``least`` are left; of an
    answer's tokens ``step`` at a time, each step in clusters of its own. Short prompts have none until there are
    ``least`` tokens. See `cluster`.

    Fields:
        segment: tokens within which k-means runs, about.
    """

    size: int
    segment: int
    sinks: int
    recent: int
    least: int
    step: int

    def begin(self) -> Kept[ClusterSet]:
        return _Clusters(self)


def cluster(keys: Tensor, segments: int, count: int) -> tuple[Tensor, Tensor]:
    """Spherical k-means within segments, and one plain round over all (RetroInfer's ``kmeans.py``).

    Keys count less their mean. Centroids begin as tokens at even distances; nine times each token joins the one of its
    segment with the largest product, and each centroid becomes the mean of its tokens, at length 1 (an empty one
    stays). In the end each token joins the one with the largest product of all.

    Args:
        keys: ``[G, n, D]``.
        segments: equal parts of the tokens, to within one; count: clusters, a multiple of it.

    Returns:
        owners int64 ``[G, n]``, sizes int64 ``[G, count]``.
    """
    _, tokens, dim = keys.shape
    x = keys.float()
    x = x - x.mean(dim=1, keepdim=True)
    each, found = count // segments, []
    for n in range(segments):
        first, stop = n * tokens // segments, (n + 1) * tokens // segments
        own = x[:, first:stop]
        places = ((torch.arange(each, device=x.device) + 0.5) * (stop - first) / each).long()
        centroids = own[:, places]
        for _ in range(_ROUNDS):
            owners = _nearest(own, centroids)
            sums = torch.zeros_like(centroids).scatter_add_(1, owners[..., None].expand(-1, -1, dim), own)
            held = _sizes(owners, each) > 0
            norm = sums.norm(dim=-1, keepdim=True).clamp(min=1e-30)
            centroids = torch.where(held[..., None], sums / norm, centroids)
        found.append(centroids)
    owners = _nearest(x, torch.cat(found, dim=1))
    return owners, _sizes(owners, count)


def _nearest(x: Tensor, centroids: Tensor) -> Tensor:
    across = centroids.transpose(1, 2)
    return torch.cat([(part @ across).argmax(dim=-1) for part in x.split(_CHUNK, dim=1)], dim=1)


def _sizes(owners: Tensor, count: int) -> Tensor:
    sizes = torch.zeros(owners.shape[0], count, dtype=torch.int64, device=owners.device)
    return sizes.scatter_add_(1, owners, torch.ones_like(owners))


@dataclass(frozen=True, slots=True, eq=False)
class _Piece:
    """Clusters of consecutive tokens of a row; never written to."""

    stop: int
    centroids: Tensor  # [G, n, D]
    means: Tensor
    sizes: Tensor
    owners: Tensor  # [G, tokens]


@dataclass(slots=True)
class _Row:
    base: int = 0
    pieces: list[_Piece] = field(default_factory=list)

    def copy(self) -> _Row:
        return _Row(self.base, list(self.pieces))


class _Clusters(Kept[ClusterSet]):
    def __init__(self, kind: Clusters) -> None:
        self.kind = kind
        self._starts: list[int] = []
        self._rows: list[_Row] = []
        self._whole: ClusterSet | None = None

    def of(self, held: Held) -> ClusterSet:
        kind = self.kind
        if list(held.starts) != self._starts:
            self._starts, self._rows, self._whole = list(held.starts), [_Row() for _ in held.starts], None
        zone = {"sinks": kind.sinks, "recent": kind.recent, "first": kind.least, "step": kind.step}
        for n, (row, start) in enumerate(zip(self._rows, held.starts, strict=True)):
            base, end = middle(held.slots - start, held.prompt - start, **zone)
            if base != row.base:
                row.base, row.pieces, self._whole = base, [], None
            while row.pieces and row.pieces[-1].stop > end:
                row.pieces.pop()
                self._whole = None
            if end == (row.pieces[-1].stop if row.pieces else 0):
                continue
            first = row.pieces[-1].stop if row.pieces else 0
            keys, values = held.keys_from(start + first)[n], held.values_from(start + first)[n]
            if not row.pieces:
                row.pieces.append(self._first(keys[:, kind.sinks : base], values[:, kind.sinks : base], base))
                self._whole = None
            for stop in range(row.pieces[-1].stop + kind.step if row.pieces else end + 1, end + 1, kind.step):
                begin = stop - kind.step
                own = slice(begin - first, stop - first)
                row.pieces.append(_piece(keys[:, own], values[:, own], 1, self._count(kind.step, 1), stop))
                self._whole = None
        if self._whole is None:
            self._whole = self._joined(held)
        return self._whole

    def _first(self, keys: Tensor, values: Tensor, stop: int) -> _Piece:
        tokens = keys.shape[1]
        segments = max(1, round(tokens / self.kind.segment))
        return _piece(keys, values, segments, self._count(tokens, segments), stop)

    def _count(self, tokens: int, segments: int) -> int:
        """Clusters of so many tokens: a multiple of 8 and of the segments, as published, where there are enough."""
        multiple = math.lcm(8, segments)
        count = max(1, round(tokens / self.kind.size / multiple)) * multiple
        return count if count <= tokens else max(1, tokens // segments) * segments

    def _joined(self, held: Held) -> ClusterSet:
        groups, device = held.shape[1], held.device
        counts = tuple(sum(piece.sizes.shape[1] for piece in row.pieces) for row in self._rows)
        most, last = max(counts, default=0), max((row.pieces[-1].stop for row in self._rows if row.pieces), default=0)
        shape = len(self._rows), groups
        keys, values = held.keys_from(held.slots), held.values_from(held.slots)  # of their dtypes and dimensions
        centroids = keys.new_zeros(*shape, most, keys.shape[3])
        means = values.new_zeros(*shape, most, values.shape[3])
        sizes = torch.zeros(*shape, most, dtype=torch.int64, device=device)
        owners = torch.full((*shape, last), -1, dtype=torch.int32, device=device)
        for n, row in enumerate(self._rows):
            done = 0
            for piece in row.pieces:
                to = slice(done, done + piece.sizes.shape[1])
                centroids[n, :, to], means[n, :, to], sizes[n, :, to] = piece.centroids, piece.means, piece.sizes
                owners[n, :, piece.stop - piece.owners.shape[1] : piece.stop] = piece.owners + done
                done = to.stop
        return ClusterSet(centroids, means, sizes, owners, counts)

    def cut(self, slots: int) -> None:
        for row, start in zip(self._rows, self._starts, strict=True):
            while row.pieces and row.pieces[-1].stop > slots - start:
                row.pieces.pop()
                self._whole = None

    def take_rows(self, index: Tensor) -> None:
        rows = index.tolist()
        if self._starts:
            self._starts, self._rows = [self._starts[n] for n in rows], [self._rows[n].copy() for n in rows]
        self._whole = None


def _piece(keys: Tensor, values: Tensor, segments: int, count: int, stop: int) -> _Piece:
    owners, sizes = cluster(keys, segments, count)
    over = sizes.clamp(min=1)[..., None]
    found = []
    for x in (keys, values):
        sums = torch.zeros(x.shape[0], count, x.shape[2], device=x.device)
        sums.scatter_add_(1, owners[..., None].expand(-1, -1, x.shape[2]), x.float())
        found.append((sums / over).to(x.dtype))
    return _Piece(stop, found[0], found[1], sizes, owners.to(torch.int32))
