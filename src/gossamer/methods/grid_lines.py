"""Grid heads: attention that repeats after a stride of tokens, such as a frame of a video or a row of an image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.layout import ModalityLayout
from gossamer.methods.base import Method, Settings, require_at_least, require_flag
from gossamer.methods.flagged import FlaggedLists, parts
from gossamer.methods.probed_rows import by_distance, padded_order, probed_rows
from gossamer.plan import SparsePlan, ceil_div
from gossamer.plan.integers import MOST

__all__ = ["LINES", "GridLines", "Lines"]

BLOCK = 64
LINES: tuple[dict[str, bool], ...] = tuple(
    {"hline": bool(n & 1), "vline": bool(n & 2), "slash": bool(n & 4)} for n in (1, 2, 3, 4, 6, 7)
)


@dataclass(frozen=True, eq=False)
class Lines:
    """The grid of each of some heads, int64 ``[heads]`` each.

    Fields:
        stride: s, in tokens. column: phase of the keys that all queries attend. row: that of the queries which attend
            all keys. distance: that of the distances at which all queries attend.
    """

    stride: Tensor
    column: Tensor
    row: Tensor
    distance: Tensor

    def of(self, heads: slice) -> Lines:
        """Of some of the heads."""
        return Lines(self.stride[heads], self.column[heads], self.row[heads], self.distance[heads])


@dataclass(frozen=True)
class GridLines(Method):
    """The grid head of MMInference (2504.16083, 3.1 and Algorithm 1): pairs that repeat after a stride s.

    Vertical lines are keys with ``pos(j) = p_k (mod s)``, horizontal ones queries with ``pos(i) = p_q``, slashes the
    pairs with ``pos(i) - pos(j) = p_d``. Stride and phases are found for each head from the softmax of the last
    ``last`` queries. Queries and keys are then ordered by ``(pos - p_k) mod s``, so that vertical lines are the first
    key blocks, horizontal ones a band of query blocks, and slashes block diagonals. A tile of that order is kept if one
    of its queries and one of its keys lie on a line together and some pair of it is causal; so is a query's own key
    block. Causality goes by the original positions.

    Fields:
        stride: s; 0 to find it, in 2 to ``max_stride`` and at most half of the prompt. frames: to look among the
            strides that the call's layout names (frames and rows of them); where it names none, among all.
        hline, vline, slash: which lines are kept; the paper's search has six of the eight combinations.

    Points left open by the paper, as decided here: the best stride is the one whose best class of keys, and of
    distances, holds the most mass above its share of the tokens (the largest sum alone would always be that of the
    smallest stride), each counted where its lines are kept, and columns where horizontal ones alone are. Of equal ones
    it is the smallest. Phases of columns and distances are those classes. The phase of horizontal lines is that of the
    queries among the last ones whose attention is spread the most (by the least mean sum of squares of their weights),
    so that with a stride above ``last`` some phases are never seen. A prompt that is too short for any stride has 1,
    which keeps everything.
    """

    name: ClassVar[str] = "grid"
    alone: ClassVar[bool] = True
    modal: ClassVar[bool] = True
    needs: ClassVar[frozenset[str]] = frozenset({"causal", "whole prompt"})
    settings: ClassVar[Settings] = ({"hline": False, "slash": False}, {"hline": False}, {})
    candidates: ClassVar[Settings] = tuple({"frames": frames} | lines for frames in (True, False) for lines in LINES)
    stride: int = 0
    frames: bool = False
    hline: bool = True
    vline: bool = True
    slash: bool = True
    max_stride: int = 1024
    last: int = 64

    def __post_init__(self) -> None:
        require_at_least(self, 0, "stride")
        require_at_least(self, 1, "max_stride", "last")
        require_flag(self, "frames", "hline", "vline", "slash")
        if not (self.hline or self.vline or self.slash):
            raise ValueError(f"{self.name} needs one of hline, vline and slash, got none of them")

    def least_density(self, call: AttentionCall) -> float:
        del call
        return float(self.stride == 1)

    def plan(self, call: AttentionCall) -> SparsePlan:
        blocks = FlaggedLists(ceil_div(call.query_len, BLOCK), call.device)
        orders = [
            torch.empty(call.batch, call.heads, n, dtype=torch.int32, device=call.device)
            for n in (call.query_len, call.key_len)
        ]
        for row in range(call.batch):
            queries, keys = int(call.extent.query_count[row]), int(call.extent.key_count[row])
            if not queries or not keys:
                for order in orders:
                    order[row] = torch.arange(order.shape[-1], device=call.device)
                blocks.add_empty(call.heads)
                continue
            lines, first = self.lines(call, row), int(call.extent.first_position[row])
            of_queries, of_keys = _by_class(lines, first, queries), _by_class(lines, 0, keys)
            live = ceil_div(queries, BLOCK)
            for heads, part in parts(call.heads, live, ceil_div(keys, BLOCK)):
                ranks = of_queries[heads, part.start * BLOCK : part.stop * BLOCK]
                blocks.add(self._tiles(lines.of(heads), ranks, of_keys[heads]), live, part)
            orders[0][row] = padded_order(of_queries - first, call.query_len)
            orders[1][row] = padded_order(of_keys, call.key_len)
        return SparsePlan(
            heads=call.heads,
            query_len=call.query_len,
            key_len=call.key_len,
            extent=call.extent,
            block_q=BLOCK,
            block_k=BLOCK,
            block_indptr=blocks.indptr,
            block_indices=blocks.indices,
            q_order=orders[0],
            k_order=orders[1],
        )

    def lines(
        self, call: AttentionCall, row: int, positions: Tensor | None = None, keys: Tensor | None = None
    ) -> Lines:
        """Stride and phases of each query head in a batch row.

        Args:
            positions: of the queries that are looked at, int64 ``[L]`` on the CPU; None: the last ``last``.
            keys: bool, those that count; None: all.
        """
        if positions is None:
            first, count = int(call.extent.first_position[row]), int(call.extent.query_count[row])
            positions = torch.arange(max(0, count - self.last), count, device="cpu") + first
        strides = self._strides(call, row)
        parts = []
        for _, weights in probed_rows(call, row, positions):
            counted = weights if keys is None else weights * keys.to(weights.device)
            parts.append(self._found(counted, positions.to(weights.device), strides))
        return Lines(*(torch.cat(numbers) for numbers in zip(*parts, strict=True)))

    def _strides(self, call: AttentionCall, row: int) -> list[int]:
        """Those that are looked at, ascending."""
        if self.stride:
            return [max(1, min(self.stride, int(call.extent.key_count[row])))]  # beyond it, each key is a class
        most = min(self.max_stride, int(call.extent.key_count[row]) // 2)
        named: tuple[int, ...] = ()
        if self.frames and isinstance(call.layout, ModalityLayout) and call.layout.strides:
            named = call.layout.strides[row]
        strides = sorted({s for s in named if 2 <= s <= most}) or list(range(2, most + 1))
        return strides or [1]

    def _found(self, weights: Tensor, positions: Tensor, strides: list[int]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        columns, distances = weights.sum(dim=1), by_distance(weights, positions)
        heads = weights.shape[0]
        best = torch.full((heads,), float("-inf"), device=weights.device)
        stride, column, distance = (torch.zeros(heads, dtype=torch.int64, device=weights.device) for _ in range(3))
        for s in strides:
            of_columns, class_c = _above_share(columns, s)
            of_distances, class_d = _above_share(distances, s)
            score = torch.zeros_like(of_columns)
            if self.vline or not self.slash:
                score = score + of_columns
            if self.slash:
                score = score + of_distances
            better = score > best + 1e-6  # sums of another order are no better
            best = torch.where(better, score, best)
            stride[better], column[better], distance[better] = s, class_c[better], class_d[better]
        return stride, column, self._row(weights, positions, stride), distance

    def _row(self, weights: Tensor, positions: Tensor, stride: Tensor) -> Tensor:
        """The phase of the queries whose weights are spread the most, the lowest of equal ones."""
        if not self.hline:
            return torch.zeros_like(stride)
        total = weights.sum(dim=2).clamp(min=torch.finfo(weights.dtype).tiny)
        together = weights.square().sum(dim=2) / total.square()
        phase = positions % stride[:, None]
        sums, counts = (torch.zeros(len(stride), int(stride.max()), device=weights.device) for _ in range(2))
        sums.scatter_add_(1, phase, together)
        counts.scatter_add_(1, phase, torch.ones_like(together))
        return torch.where(counts > 0, sums / counts.clamp(min=1), float("inf")).argmin(dim=1)

    def _tiles(self, lines: Lines, q_order: Tensor, k_order: Tensor) -> Tensor:
        """Which tiles are kept, bool ``[H, m, n]``.

        Args:
            q_order, k_order: positions by rank, ``[H, .]``: of some blocks of queries, and of all keys.
        """
        queries, keys = _Tiles(lines, q_order), _Tiles(lines, k_order)
        m, n = queries.first[:, :, None], keys.first[:, None]
        last_m, last_n = queries.last[:, :, None], keys.last[:, None]
        s = lines.stride[:, None, None]
        kept = torch.zeros(len(q_order), m.shape[1], n.shape[2], dtype=torch.bool, device=q_order.device)
        if self.vline:
            kept |= n == 0
        if self.hline:
            row = ((lines.row - lines.column) % lines.stride)[:, None, None]
            kept |= (m <= row) & (row <= last_m)
        if self.slash:
            for turn in (0, s):
                shift = lines.distance[:, None, None] - turn
                kept |= (n + shift <= last_m) & (m <= last_n + shift)
        kept &= keys.low[:, None] <= queries.high[:, :, None]
        rank = torch.arange(k_order.shape[1], device=k_order.device).expand_as(k_order)
        rank = torch.empty_like(k_order).scatter_(1, k_order, rank)
        own = rank.gather(1, q_order.clamp(max=k_order.shape[1] - 1)) // BLOCK
        place = torch.arange(q_order.shape[1], device=q_order.device) // BLOCK
        kept.view(len(kept), -1).scatter_(1, place * kept.shape[2] + own, True)
        return kept


class _Tiles:
    """Of each block of ranks ``[H, blocks]``: its first and last class, its lowest and highest position."""

    def __init__(self, lines: Lines, order: Tensor) -> None:
        classes = (order - lines.column[:, None]) % lines.stride[:, None]
        blocks = ceil_div(order.shape[1], BLOCK)
        ends = (torch.arange(1, blocks + 1, device=order.device) * BLOCK).clamp(max=order.shape[1]) - 1
        self.first, self.last = classes[:, ::BLOCK], classes[:, ends]
        missing = blocks * BLOCK - order.shape[1]
        self.low = F.pad(order, (0, missing), value=MOST).view(len(order), -1, BLOCK).amin(dim=-1)
        self.high = F.pad(order, (0, missing), value=-1).view(len(order), -1, BLOCK).amax(dim=-1)


def _by_class(lines: Lines, first: int, count: int) -> Tensor:
    """``count`` positions from the first one on, by class and then by place, int64 ``[H, count]``."""
    place = torch.arange(count, device=lines.stride.device)
    classes = (place + first - lines.column[:, None]) % lines.stride[:, None]
    return (classes * count + place).argsort(dim=1) + first


def _above_share(mass: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """How much more than its share of the positions the best class of a stride holds, and which it is: ``[H]`` each."""
    length = mass.shape[1]
    total = mass.sum(dim=1, keepdim=True).clamp(min=torch.finfo(mass.dtype).tiny)
    classes = F.pad(mass, (0, -length % stride)).unflatten(1, (-1, stride)).sum(dim=1) / total
    count = (length - torch.arange(stride, device=mass.device) + stride - 1) // stride
    above, which = (classes - count / max(1, length)).max(dim=1)
    return above, which
