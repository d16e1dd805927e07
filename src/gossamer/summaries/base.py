"""What a summary of a cache's keys is, and what keeps one up."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from gossamer.plan.integers import ceil_div
from gossamer.unread import Unread

__all__ = ["Growing", "Held", "Kept", "Summary", "raised"]

T = TypeVar("T")


class Held:
    """What a layer of a cache holds.

    Attributes:
        keys: ``[B, G, T, D]``; values: ``[B, G, T, Dv]``. Where a part of them lies elsewhere it is read for this:
            what is kept up from token to token asks for the last ones, by `keys_from` and `values_from`.
        shape: ``(B, G, T, D)``; dtype, device: of both.
        starts: slot of each row's first live key.
        prompt: slots that were there at the end of the last prompt; what came since are an answer's tokens.
    """

    def __init__(self, keys: Tensor, values: Tensor, starts: Sequence[int], prompt: int) -> None:
        self.shape, self.dtype, self.device = tuple(keys.shape), keys.dtype, keys.device
        self.starts, self.prompt = starts, prompt
        self._all = keys, values

    @property
    def slots(self) -> int:
        return self.shape[2]

    @property
    def keys(self) -> Tensor:
        return self._all[0]

    @property
    def values(self) -> Tensor:
        return self._all[1]

    def keys_from(self, slot: int) -> Tensor:
        """Those of the slots from ``slot`` on: ``[B, G, T - slot, D]``."""
        return _from(self.keys, slot)

    def values_from(self, slot: int) -> Tensor:
        """``[B, G, T - slot, Dv]``."""
        return _from(self.values, slot)


def _from(x: Tensor, slot: int) -> Tensor:
    return x.between(slot, x.shape[2]) if isinstance(x, Unread) else x[:, :, slot:]


class Summary(ABC, Generic[T]):
    """What a method needs of its store besides keys and values. Subclasses are frozen dataclasses: equal ones are one.

    A store makes it when first asked (`gossamer.call.Store.summary`) and keeps it up from then on.
    """

    @abstractmethod
    def begin(self) -> Kept[T]:
        """An empty one, to be kept up beside a layer's keys."""


class Kept(ABC, Generic[T]):
    """A summary of one layer, which follows what happens to the layer's tokens.

    What `of` gives depends on what is held alone, not on how it came to be held: it is what an empty one would give.
    """

    @abstractmethod
    def of(self, held: Held) -> T:
        """The summary, brought up to date. Nobody writes to it, and the next call may."""

    @abstractmethod
    def cut(self, slots: int) -> None:
        """Only the first ``slots`` are as they were; others may follow."""

    @abstractmethod
    def take_rows(self, index: Tensor) -> None:
        """Batch rows ``index`` int64, any of them more than once, take the place of all."""

    def seen(self, call: Any) -> None:
        """The queries of a `gossamer.call.AttentionCall` on the layer, for what depends on them.

        Its keys are all that the layer holds; those of one query may be read from a file when they are looked at. Most
        summaries are of keys and values alone.
        """


class Growing(Kept[T]):
    """Tensors with an entry for each ``size`` tokens, counted from each row's first live key: padding is in none.

    Entries are worked out from the keys themselves, from the one on in which keys were added or cut off since.

    Args:
        size: tokens of an entry.
        dims: of each tensor, the dimension of its entries; batch rows are the first.
    """

    def __init__(self, size: int, dims: tuple[int, ...]) -> None:
        self.size = size
        self._dims = dims
        self._tensors: list[Tensor] = []
        self._starts: list[int] = []
        self._slots = 0  # slots of keys that have an entry

    @abstractmethod
    def blank(self, held: Held, entries: int) -> list[Tensor]:
        """Tensors with so many entries, of anything finite."""

    @abstractmethod
    def write(self, to: list[Tensor], held: Held, row: slice, begin: int) -> None:
        """Work out the entries of the slots from ``begin`` on, for batch rows with one start.

        Args:
            to: the tensors of these rows, from the first entry to write on.
        """

    def bring(self, held: Held) -> list[Tensor]:
        """The tensors, up to date: as many entries as the row with the most live keys has."""
        batch, slots = len(held.starts), held.slots
        entries = ceil_div(slots - min(held.starts, default=slots), self.size)
        if list(held.starts) != self._starts:
            self._slots, self._starts = 0, list(held.starts)
        self._make_room(held, entries)
        if self._slots < slots:
            self._unlock()
            rows = [slice(None)] if len(set(held.starts)) == 1 else [slice(b, b + 1) for b in range(batch)]
            for row in rows:
                start = held.starts[row.start or 0]
                entry = max(self._slots - start, 0) // self.size
                to = [
                    x[row].narrow(dim, entry, x.shape[dim] - entry)
                    for x, dim in zip(self._tensors, self._dims, strict=True)
                ]
                self.write(to, held, row, start + entry * self.size)
            self._slots = slots
        return [x.narrow(dim, 0, entries) for x, dim in zip(self._tensors, self._dims, strict=True)]

    def _make_room(self, held: Held, entries: int) -> None:
        if self._tensors and self._tensors[0].shape[self._dims[0]] >= entries:
            return
        grown = self.blank(held, max(entries + ceil_div(entries, 8), ceil_div(256, self.size)))
        for new, old, dim in zip(grown, self._tensors, self._dims, strict=False):
            new.narrow(dim, 0, old.shape[dim]).copy_(old)
        self._tensors = grown

    def _unlock(self) -> None:
        """Tensors that were made in inference mode are written in that mode alone."""
        if self._tensors[0].is_inference() and not torch.is_inference_mode_enabled():
            self._tensors = [x.clone() for x in self._tensors]

    def forget(self) -> None:
        """Work out everything anew when next asked."""
        self._slots = 0

    def cut(self, slots: int) -> None:
        if slots < self._slots:  # what is left of an entry that was cut is an entry anew
            self._slots = slots - max(((slots - start) % self.size for start in self._starts), default=0)

    def take_rows(self, index: Tensor) -> None:
        self._starts = [self._starts[row] for row in index.tolist()] if self._starts else []
        self._tensors = [x.index_select(0, index.to(x.device)) for x in self._tensors]


def raised(x: Tensor) -> Tensor:
    """The smallest bf16 that is no smaller."""
    near = x.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.to(x.dtype) < x, above, near)
