"""Bounds of the keys in one cache's pages, for methods that choose by them what a decoding query reads."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor

from gossamer.backends import backend_of
from gossamer.paged import Paged
from gossamer.plan import ceil_div
from gossamer.summaries import PageBounds, Summary

__all__ = ["KeptBounds", "PageStore"]

T = TypeVar("T")


class KeptBounds:
    """Bounds of each ``size`` tokens in all pages of a cache, by the cache's own numbers of pages.

    They are worked out when a sequence's are first asked for, and for the tokens since, whoever wrote them: of each
    page is known how many of its first tokens its bounds are of. What a page holds changes by `forget` alone: a page
    that was given to another sequence is written by it from its first token on, and so has none from then on.

    Memory is taken for the whole cache and, as systems do, filled where it is first written.

    Attributes:
        bounds: ``[pages, G, page / size, 2 * D]``; see `gossamer.summaries.PageBounds`.
        held: int32 ``[pages]``.
    """

    def __init__(self, cache: Tensor, size: int) -> None:
        pages, groups, page, both = cache.shape
        dtype = torch.float16 if cache.dtype == torch.float16 else torch.bfloat16
        self.page, self.size = page, size
        self.bounds = torch.empty(pages, groups, page // size, both, dtype=dtype, device=cache.device)
        self.held = torch.zeros(pages, dtype=torch.int32, device=cache.device)

    @property
    def keys_of(self) -> Tensor:
        """Something with as many channels as a key, by which a backend is chosen."""
        return self.bounds[..., : self.bounds.shape[-1] // 2]

    @property
    def nbytes(self) -> int:
        """Memory once all pages are in use."""
        return self.bounds.nbytes + self.held.nbytes

    def forget(self, slots: Tensor) -> None:
        """Tokens were written at ``slots`` int64: ``page * number + place``, or below 0 for none."""
        backend_of(self.keys_of, "forget_slots").forget_slots(slots, self.page, self.held)

    def of(self, keys: Paged, counts: Tensor) -> Paged:
        """Those of sequences' pages in order, ``[B, G, N, 2 * D]``, up to date for ``counts`` int64 ``[B]`` tokens."""
        backend_of(self.keys_of, "keep_bounds").keep_bounds(keys, counts, self.bounds, self.held)
        per = self.bounds.shape[2]
        entries = ceil_div(keys.shape[2], self.size)
        return Paged(self.bounds.flatten(2), keys.listed, entries, per, "rows")


class PageStore:
    """What is known of some sequences' keys in a layer's pages: the `gossamer.call.Store` of decoding in vLLM.

    Args:
        kept: the layer's, by size; what is asked for first is added.
        cache: the layer's, of whose pages ``keys`` are.
        counts: int64 ``[B]``, tokens of each sequence.
    """

    sinks = recent = 0

    def __init__(self, kept: dict[int, KeptBounds], cache: Tensor, keys: Paged, counts: Tensor) -> None:
        self._kept, self._cache, self._keys, self._counts = kept, cache, keys, counts

    def summary(self, kind: Summary[T]) -> T:
        if not isinstance(kind, PageBounds):
            raise ValueError(f"vLLM's pages keep bounds of their keys, and no {type(kind).__name__}")
        if self._keys.page % kind.size:
            raise ValueError(f"bounds of {kind.size} tokens do not divide pages of {self._keys.page}")
        kept = self._kept.get(kind.size)
        if kept is None:
            kept = self._kept[kind.size] = KeptBounds(self._cache, kind.size)
        return kept.of(self._keys, self._counts)  # type: ignore[return-value]
