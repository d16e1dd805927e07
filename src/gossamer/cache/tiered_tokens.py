"""`TieredTokens`: keys or values of a layer whose older tokens are in a file."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan
from gossamer.unread import Elsewhere, Unread

__all__ = ["TieredTokens", "tiered"]


class Layer(Protocol):
    """What reads the file."""

    def read(self) -> tuple[Tensor, Tensor]: ...

    def gathered(self, slots: Tensor, /) -> tuple[Tensor, Tensor]: ...

    def attend(self, call: AttentionCall, plan: SparsePlan | None, /) -> tuple[Tensor, Tensor]: ...


class _Both:
    """Keys and values of one call, which lie together in the file: what is read for one of them serves both."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self._rows: tuple[Tensor, Tensor] | None = None
        self._last: tuple[Tensor, tuple[Tensor, Tensor]] | None = None

    @property
    def is_read(self) -> bool:
        return self._rows is not None

    def rows(self) -> tuple[Tensor, Tensor]:
        if self._rows is None:
            self._rows = self.layer.read()
        return self._rows

    def gathered(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Of the same slots again: what was found before, for keys and values are asked one after the other."""
        if self._last is None or self._last[0] is not slots:
            self._last = slots, self.layer.gathered(slots)
        return self._last[1]


class TieredTokens(Elsewhere):
    """Keys, or values, ``[B, G, T, D]`` of a `gossamer.cache.tiers.TieredLayer`, for one decode step.

    A step that has a plan, or gathers tokens, reads their blocks of the file; who looks at all rows has the whole file
    read, once for keys and values. They are those of the layer until it changes.
    """

    both: _Both
    which: int

    @staticmethod
    def __new__(cls, both: _Both, which: int, shape: Any, like: Tensor) -> TieredTokens:
        return Unread.made(cls, shape, like)

    def __init__(self, both: _Both, which: int, shape: Any, like: Tensor) -> None:
        del shape, like
        self.both, self.which = both, which

    def copied(self) -> Tensor:
        return self.both.rows()[self.which].to(self.dtype)

    def gathered(self, slots: Tensor) -> Tensor:
        if self.both.is_read:
            return super().gathered(slots)
        return self.both.gathered(slots)[self.which].to(self.dtype)

    def of_some_heads(self, first: int, last: int) -> Tensor:
        return self.rows()[:, first:last]

    def attend(self, call: AttentionCall, plan: SparsePlan | None) -> tuple[Tensor, Tensor]:
        if not self.both.is_read:
            return self.both.layer.attend(call, plan)
        keys, values = (x.rows() if isinstance(x, Unread) else x for x in (call.k, call.values))
        here = replace(call, k=keys, v=values)
        return backends.attend(here, plan or SparsePlan.dense(call.groups, 1, call.key_len, call.extent))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Of another dtype, as autocast wants them, they are where they were."""
        if func is torch.ops.aten._to_copy.default and set(kwargs or {}) == {"dtype"}:
            (old,) = args
            return cls(old.both, old.which, old.shape, torch.empty(0, dtype=kwargs["dtype"], device=old.device))
        return super().__torch_dispatch__(func, types, args, kwargs)

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"TieredTokens({tuple(self.shape)}, {self.dtype})"


def tiered(layer: Layer, keys: Tensor, values: Tensor, slots: int) -> tuple[TieredTokens, TieredTokens]:
    """Keys and values of so many slots of a layer, like those ``[B, G, ., D]`` and ``[B, G, ., Dv]`` at hand."""
    both = _Both(layer)
    first, second = (
        TieredTokens(both, which, (*x.shape[:2], slots, x.shape[3]), x) for which, x in enumerate((keys, values))
    )
    return first, second
