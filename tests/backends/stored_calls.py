"""Calls of one query whose keys a store holds."""

from __future__ import annotations

import torch

from gossamer import AttentionCall, Extent
from gossamer.cache import StoreLayer

__all__ = ["step"]


def step(
    keys: int = 333,
    *,
    padding: tuple[int, ...] = (0, 21),
    groups: int = 2,
    share: int = 4,
    dim: int = 64,
    dtype: torch.dtype = torch.float32,
    sinks: int = 0,
    recent: int = 0,
) -> AttentionCall:
    """A row for each number of dead keys before it."""
    draw = torch.Generator().manual_seed(keys + dim)
    q = torch.randn(len(padding), groups * share, 1, dim, generator=draw).to(dtype)
    k = torch.randn(len(padding), groups, keys, dim, generator=draw).to(dtype)
    store = StoreLayer(sinks=sinks, recent=recent)
    k, v = store.update(k, k)
    counts = [keys - dead for dead in padding]
    extent = Extent([n - 1 for n in counts], [1] * len(padding), list(padding), counts)
    store.place(extent)
    return AttentionCall(q, k, v, extent, store=store)
