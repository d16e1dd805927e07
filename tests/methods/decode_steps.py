"""Decode steps on a cache, and the arithmetic of naive choices."""

from __future__ import annotations

import math

import torch

from gossamer.cache import StoreLayer
from gossamer.call import AttentionCall
from gossamer.plan import Extent

LAYER = 5


def step(
    keys: int = 150,
    *,
    padding: tuple[int, ...] = (0, 21),
    groups: int = 2,
    share: int = 2,
    dim: int = 8,
    seed: int = 0,
    **fields: int,
) -> AttentionCall:
    """A decode step on a cache, in rows with left padding that holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    batch = len(padding)
    q = torch.randn(batch, groups * share, 1, dim, generator=generator)
    k, v = (torch.randn(batch, groups, keys, dim, generator=generator) for _ in range(2))
    for row, dead in enumerate(padding):
        k[row, :, :dead] = v[row, :, :dead] = torch.nan
    store = StoreLayer(**fields)
    k, v = store.update(k, v)
    counts = [keys - dead for dead in padding]
    extent = Extent([n - 1 for n in counts], [1] * batch, list(padding), counts)
    store.place(extent)
    return AttentionCall(q, k, v, extent, layer=LAYER, store=store, state=store.state)


def best(scores: list[float], count: int, held: set[int]) -> set[int]:
    order = sorted(range(len(scores)), key=lambda n: (n not in held, -scores[n], n))
    return set(order[: max(count, len(held))])


def softmax(scores: list[float]) -> list[float]:
    weights = [math.exp(score - max(scores)) for score in scores]
    return [weight / sum(weights) for weight in weights]
