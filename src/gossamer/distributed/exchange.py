"""What ranks hand to each other in a ring: keys and values ahead of their use, gradients after it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gossamer.distributed.layout import Layout

__all__ = ["Collector", "Exchange", "Pending", "Traveller"]

Group = Any  # a torch.distributed process group; its class has other names in builds without it


@dataclass(eq=False)
class Pending:
    """What is under way: whoever needs it waits."""

    tensors: list[Tensor]
    what: str
    works: list[Any] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)  # sent, and not to be freed before they are

    def wait(self) -> list[Tensor]:
        """The tensors that have come.

        Raises:
            RuntimeError: a rank has ended, or sent nothing within the group's time-out.
        """
        for work in self.works:
            try:
                work.wait()
            except RuntimeError as error:
                raise RuntimeError(
                    f"{self.what} did not come through: a rank of the group has ended or hangs. Start all ranks again; "
                    f"what torch.distributed says: {error}"
                ) from error
        self.works.clear()
        self.kept.clear()
        return self.tensors


class Exchange:
    """Sends and receives between the ranks of a group.

    Attributes:
        rank: in the group.
    """

    def __init__(self, layout: Layout, group: Group | None = None) -> None:
        if not dist.is_available() or not dist.is_initialized():
            raise ValueError("torch.distributed has no process group; call torch.distributed.init_process_group first")
        ranks = dist.get_world_size(group)
        if ranks != layout.ranks:
            raise ValueError(f"the layout is for {layout.ranks} ranks, but the group has {ranks}")
        self.layout, self.group = layout, group
        self.rank = dist.get_rank(group)

    def swap(self, to: int, sent: Sequence[Tensor], source: int, received: Sequence[Tensor], what: str) -> Pending:
        """Send tensors to one rank and receive some from another, without waiting. Empty ones stay.

        Raises:
            RuntimeError: a rank has ended.
        """
        if to == self.rank:  # then the source is this rank too
            return Pending(list(sent), what)
        operations = [dist.P2POp(dist.isend, x, self._global(to), self.group) for x in sent if x.numel()]
        operations += [dist.P2POp(dist.irecv, x, self._global(source), self.group) for x in received if x.numel()]
        try:
            works = dist.batch_isend_irecv(operations) if operations else []
        except RuntimeError as error:
            raise RuntimeError(f"{what} could not be sent: a rank of the group has ended ({error})") from error
        return Pending(list(received), what, works, list(sent))

    def _global(self, rank: int) -> int:
        return rank if self.group is None else dist.get_global_rank(self.group, rank)


class Traveller:
    """Tensors of every rank on their way round: `at` gives those that this rank has at a step, and sends on.

    Keys and values travel ahead: what the next step needs is under way while this one computes, and what the next
    node needs while a whole ring of a node computes.

    Args:
        own: this rank's, contiguous, the tokens in dimension 2.
    """

    def __init__(self, exchange: Exchange, own: Sequence[Tensor], what: str) -> None:
        self.exchange, self.what = exchange, what
        self._ready: dict[int, Pending] = {0: Pending(list(own), what)}

    def at(self, step: int) -> list[Tensor]:
        """Those of rank ``layout.source(rank, step)``. Steps in order, each once.

        Raises:
            RuntimeError: a rank has ended, or sent nothing within the group's time-out.
        """
        layout = self.exchange.layout
        held = self._ready.pop(step).wait()
        node, place = layout.node, step % layout.node
        if place == 0 and step + node < layout.ranks:
            self._send(held, step, step + node)
        if place + 1 < node and step + 1 < layout.ranks:
            self._send(held, step, step + 1)
        return held

    def _send(self, held: list[Tensor], step: int, later: int) -> None:
        exchange = self.exchange
        layout, rank = exchange.layout, exchange.rank
        to = layout.holder(layout.source(rank, step), later)
        coming = layout.source(rank, later)
        received = empty_like(held, layout.tokens(coming))
        what = f"{self.what} of rank {coming}"
        self._ready[later] = exchange.swap(to, held, layout.holder(coming, step), received, what)


class Collector:
    """Sums of every rank's keys on their way round: each rank adds, the last sends them home.

    Args:
        zeros: makes the sums of so many tokens.
    """

    def __init__(self, exchange: Exchange, zeros: Callable[[int], list[Tensor]], what: str) -> None:
        self.exchange, self.zeros, self.what = exchange, zeros, what
        self._coming = Pending(zeros(exchange.layout.tokens(exchange.rank)), what)

    def add(self, step: int, add: Callable[[list[Tensor]], None]) -> None:
        """Add to those of rank ``layout.source(rank, step)``, and send them on."""
        exchange = self.exchange
        layout, rank = exchange.layout, exchange.rank
        held = self._coming.wait()
        add(held)
        source, later = layout.source(rank, step), (step + 1) % layout.ranks
        coming = layout.source(rank, later)
        received = self.zeros(layout.tokens(coming))
        sender = layout.holder(coming, step)
        what = f"{self.what} of rank {coming}"
        self._coming = exchange.swap(layout.holder(source, later), held, sender, received, what)

    def own(self) -> list[Tensor]:
        """This rank's, to which all have added."""
        return self._coming.wait()


def empty_like(tensors: Sequence[Tensor], tokens: int) -> list[Tensor]:
    return [torch.empty(*x.shape[:2], tokens, *x.shape[3:], dtype=x.dtype, device=x.device) for x in tensors]
