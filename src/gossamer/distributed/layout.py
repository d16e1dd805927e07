"""`Layout`: which positions of a sequence a rank owns, and in which order keys and values travel. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.plan import ceil_div
from gossamer.plan.integers import integer

__all__ = ["KINDS", "Layout", "Run"]

KINDS = ("contiguous", "zigzag", "striped", "hierarchical")


class Run(NamedTuple):
    """Consecutive positions ``[start, stop)`` that a rank owns, from its token ``slot`` on."""

    start: int
    stop: int
    slot: int

    @property
    def tokens(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Layout:
    """How ``length`` positions are dealt out to ``ranks`` processes, in units of ``unit`` positions; the last is short.

    A rank holds its tokens in the order of their positions.

    - ``contiguous``: consecutive units; with causal attention the last rank has most of the work.
    - ``zigzag``: of 2 W pieces rank r has the pieces r and 2 W - 1 - r. Even for dense causal attention.
    - ``striped``: unit u goes to rank ``u mod W``. Even for whatever lies on columns and diagonals too (MTraining,
      2510.18830, 3.3).
    - ``hierarchical``: owns as ``striped``; keys and values travel in rings of ``inner`` ranks, and between those rings
      a whole ring's time ahead (MTraining's nested ring, 3.4). Ranks ``n * inner .. n * inner + inner - 1`` are a node.

    Where units do not divide evenly, the first ranks (or pieces) have one more; a rank may own nothing.

    Fields:
        kind: one of `KINDS`.
        length: positions, N.
        ranks: processes, W.
        unit: positions that stay together. Blocks of a plan must divide it.
        inner: ranks of a node; ``ranks`` but for ``hierarchical``.

    Raises:
        ValueError, TypeError: an unknown kind; a number out of range; ``inner`` given for another kind, or no divisor.
    """

    kind: str
    length: int
    ranks: int
    unit: int = 128
    inner: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Layout.kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        integer(self.length, "Layout.length")
        integer(self.ranks, "Layout.ranks", least=1)
        integer(self.unit, "Layout.unit", least=1)
        if self.kind == "hierarchical":
            if self.inner is None:
                raise ValueError("Layout.inner must say how many ranks a node has; give inner=, or kind='striped'")
            if self.ranks % integer(self.inner, "Layout.inner", least=1):
                raise ValueError(f"Layout.inner must divide the {self.ranks} ranks, got {self.inner}")
        elif self.inner is not None:
            raise ValueError(f"Layout.inner goes with kind='hierarchical', got kind={self.kind!r}")

    @property
    def units(self) -> int:
        return ceil_div(self.length, self.unit)

    def unit_owners(self) -> Tensor:
        """Rank of each unit, int64 ``[units]``."""
        return self._owners.clone()

    @cached_property
    def _owners(self) -> Tensor:
        unit = torch.arange(self.units, device="cpu")
        if self.kind in ("striped", "hierarchical"):
            return unit % self.ranks
        pieces = self.ranks * (2 if self.kind == "zigzag" else 1)
        share, more = divmod(self.units, pieces)
        sizes = torch.full((pieces,), share, dtype=torch.int64, device="cpu")
        sizes[:more] += 1
        piece = torch.repeat_interleave(sizes)
        return torch.minimum(piece, 2 * self.ranks - 1 - piece) if self.kind == "zigzag" else piece

    def runs(self, rank: int) -> list[Run]:
        """What a rank owns, in order."""
        return list(self._runs[self._known(rank)])

    @cached_property
    def _runs(self) -> list[tuple[Run, ...]]:
        of_rank: list[list[Run]] = [[] for _ in range(self.ranks)]
        for unit, rank in enumerate(self._owners.tolist()):
            start, stop = unit * self.unit, min((unit + 1) * self.unit, self.length)
            runs = of_rank[rank]
            if runs and runs[-1].stop == start:
                runs[-1] = runs[-1]._replace(stop=stop)
            else:
                runs.append(Run(start, stop, runs[-1].slot + runs[-1].tokens if runs else 0))
        return [tuple(runs) for runs in of_rank]

    def tokens(self, rank: int) -> int:
        """How many positions a rank owns."""
        return sum(run.tokens for run in self._runs[self._known(rank)])

    def positions(self, rank: int) -> Tensor:
        """The positions that a rank owns, ascending, int64 ``[tokens]``."""
        parts = [torch.arange(run.start, run.stop, device="cpu") for run in self.runs(rank)]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device="cpu")

    def slots(self, rank: int) -> Tensor:
        """Where a rank has each position, int64 ``[length]``; -1 for those that it does not own."""
        slots = torch.full((self.length,), -1, dtype=torch.int64, device="cpu")
        slots[self.positions(rank)] = torch.arange(self.tokens(rank), device="cpu")
        return slots

    def split(self, x: Tensor, rank: int, dim: int = 2) -> Tensor:
        """A rank's part of a whole tensor.

        Raises:
            ValueError: the dimension does not have ``length`` entries.
        """
        if x.shape[dim] != self.length:
            raise ValueError(f"dimension {dim} must have the layout's {self.length} positions, got {tuple(x.shape)}")
        parts = [x.narrow(dim, run.start, run.tokens) for run in self.runs(rank)]
        return torch.cat(parts or [x.narrow(dim, 0, 0)], dim)

    def join(self, parts: Sequence[Tensor], dim: int = 2) -> Tensor:
        """The whole tensor of all ranks' parts.

        Raises:
            ValueError: another number of parts than ranks, or a part of another length than its rank owns.
        """
        if len(parts) != self.ranks:
            raise ValueError(f"parts must be of all {self.ranks} ranks, got {len(parts)}")
        for rank, part in enumerate(parts):
            if part.shape[dim] != self.tokens(rank):
                raise ValueError(f"rank {rank} owns {self.tokens(rank)} positions, got a part {tuple(part.shape)}")
        pieces = [
            (run.start, part.narrow(dim, run.slot, run.tokens))
            for rank, part in enumerate(parts)
            for run in self.runs(rank)
        ]
        return torch.cat([piece for _, piece in sorted(pieces, key=lambda one: one[0])] or [parts[0]], dim)

    @property
    def node(self) -> int:
        """Ranks of an inner ring."""
        return self.ranks if self.inner is None else self.inner

    def source(self, rank: int, step: int) -> int:
        """Whose keys a rank has at a step; its own at step 0. All ranks have different ones at each step."""
        return self._moved(rank, step, -1)

    def holder(self, source: int, step: int) -> int:
        """Which rank has the keys of another at a step: `source` the other way round."""
        return self._moved(source, step, 1)

    def _moved(self, rank: int, step: int, way: int) -> int:
        node, place = divmod(self._known(rank), self.node)
        outer, inner = divmod(step, self.node)
        nodes = self.ranks // self.node
        return (node + way * outer) % nodes * self.node + (place + way * inner) % self.node

    def _known(self, rank: int) -> int:
        if not 0 <= rank < self.ranks:
            raise ValueError(f"a rank must be 0 to {self.ranks - 1}, got {rank}")
        return rank
