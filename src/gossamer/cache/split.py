"""Heads of one layer that keep different tokens, each in a store of its own; DuoAttention's streaming heads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor

from gossamer import methods
from gossamer.cache.evictions import StreamingLayer
from gossamer.cache.layer import Part, StoreLayer
from gossamer.cache.marks import marked
from gossamer.cache.policies import CachePolicy, require_tokens
from gossamer.call import AttentionCall
from gossamer.methods.base import require_share
from gossamer.methods.head_tables import Table, full_heads, of_layer, require_table
from gossamer.plan import Extent
from gossamer.summaries import Summary

__all__ = ["DuoAttention", "SplitLayer"]

T = TypeVar("T")


class SplitLayer(StoreLayer):
    """Key/value heads in several stores, as `parts` says; only the first call attends them all in one.

    To the model it looks like a cache of all tokens. From the second call on, or for a prompt of one token, `update`
    returns tensors without channels, which no other attention than ours takes for keys.

    Args:
        make: from the number of key/value heads to the stores, which take each of them once.
    """

    is_croppable = False

    def __init__(self, make: Callable[[int], tuple[Part, ...]]) -> None:
        super().__init__()
        self._make = make

    def _forget(self) -> None:
        super()._forget()
        self._parts: tuple[Part, ...] = ()
        self._first = False  # whether the last update was the first, of several tokens

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self._parts = self._make(key_states.shape[1])

    def parts(self) -> tuple[Part, ...]:
        return () if self._first else self._parts

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            self.refuse("torch.compile")
        self._first = self.length == 0 and key_states.shape[2] > 1
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        for heads, store in self._parts:
            store.update(key_states[:, heads], value_states[:, heads])
        self.length += key_states.shape[2]
        self.peak = max(self.peak, self.nbytes)
        if self._first:
            return marked(key_states, self), value_states
        nothing = key_states.new_empty(*key_states.shape[:2], self.length, 0)
        return marked(nothing, self), nothing

    def place(self, extent: Extent) -> None:
        for _, store in self._parts:
            store.place(extent)

    def attended(self, call: AttentionCall) -> None:
        for heads, store in self._parts:
            store.attended(call.of_groups(heads))

    def refuse(self, what: str) -> None:
        """Raise, but for calls that attend all heads in one, of parts that drop nothing.

        Raises:
            ValueError: this is none of them.
        """
        for _, store in self._parts:
            store.refuse(what)
        if self.parts() or not self._first:
            raise ValueError(
                f"a cache whose heads keep different tokens cannot be combined with {what}, where attention knows its "
                "mask alone; use one that drops nothing (cache='keep')"
            )

    def summary(self, kind: Summary[T]) -> T:
        """There are none: each part has its own."""
        raise ValueError(f"a layer whose heads keep different tokens has no common summary, {kind} or any other")

    def keep(self, index: Tensor) -> None:
        """Not here: each part keeps what it does."""
        raise ValueError("a layer whose heads keep different tokens cannot be told to keep the same of all")

    def crop(self, tokens_to_remove: int) -> None:
        if not self._parts:
            super().crop(tokens_to_remove)
        for _, store in sorted(self._parts, key=lambda part: -part[1].dropped):  # the first to refuse comes first
            store.crop(tokens_to_remove)
        self.length -= min(-tokens_to_remove, self.length)

    def _take_rows(self, index: Tensor) -> None:
        for _, store in self._parts:
            store.reorder_cache(index)
        self.state = [{} for _ in index.tolist()]

    def offload(self) -> None:
        for _, store in self._parts:
            store.offload()

    def prefetch(self) -> None:
        for _, store in self._parts:
            store.prefetch()

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for _, store in self._parts)


@dataclass(frozen=True)
class DuoAttention(CachePolicy):
    """DuoAttention (2410.10819, section 2.4): heads that retrieve keep all tokens, the others sinks and a window.

    Which heads are full follows from gates as in `gossamer.methods.DuoAttention`, of which this is the memory: a prompt
    is attended as the model's method says (that one, or dense), and a decode step of a streaming head attends
    ``sinks`` first tokens and the ``recent`` last ones, as `StreamingLLM`. Positions are the original ones.

    Fields:
        gates: ``[layer][head]``, for key/value heads, or for query heads: then a key/value head is full if one of its
            query heads is.
        sparsity: the share of the heads that streams.

    Defaults: those of the authors' deployment, as `gossamer.methods.DuoAttention`; gates have none.

    Deviation: the authors reorder a model's weights, so that full heads come first; here they stay where they are.
    """

    name: ClassVar[str] = "duo_attention"
    tables: ClassVar[tuple[str, ...]] = ("gates",)
    sinks: int = 64
    recent: int = 256
    gates: Table = ()
    sparsity: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens(self, "recent", 1)
        require_table(cast(Any, self), "gates")
        require_share(cast(Any, self), "sparsity")
        if not self.gates:
            raise ValueError(
                "the cache duo_attention needs gates, [layer][head]: read the authors' files with "
                "gossamer.profiles.read_duo, or train them, and take DuoAttention.of(method)"
            )

    @classmethod
    def of(cls, method: methods.DuoAttention) -> DuoAttention:
        """What the streaming heads of a method need of the cache."""
        return cls(method.sink, method.recent, method.gates, method.sparsity)

    @cached_property
    def full(self) -> tuple[tuple[bool, ...], ...]:
        """The heads that keep everything, ``[layer][head]``."""
        return full_heads(self.gates, self.sparsity)

    def layer(self, index: int, layers: int) -> SplitLayer:
        return SplitLayer(partial(self._parts, index))

    def _parts(self, index: int, groups: int) -> tuple[Part, ...]:
        had = len(self.full[0])
        whole = of_layer(self.full, index, [had if had % groups == 0 else groups], f"{self.name}.gates")
        share = len(whole) // groups
        kept = [any(whole[g * share : (g + 1) * share]) for g in range(groups)]
        full = [g for g, all_tokens in enumerate(kept) if all_tokens]
        streaming = [g for g, all_tokens in enumerate(kept) if not all_tokens]
        stores = StoreLayer(), StreamingLayer(sinks=self.sinks, recent=self.recent)
        return tuple((heads, store) for heads, store in zip((full, streaming), stores, strict=True) if heads)
