"""Whole caches: made for a model, or a stock one that takes our layers."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from gossamer.cache.layer import StoreLayer
from gossamer.cache.policies import CachePolicy

__all__ = ["adopt", "new_cache"]


def new_cache(config: Any, policy: CachePolicy) -> DynamicCache:
    """An empty cache for a model with this config: stores for layers of full attention, transformers' own for others.

    Sliding windows, chunks and linear layers hold little and have structures of their own.

    Args:
        config: a transformers config; of a composite model, its text part counts.
    """
    cache = DynamicCache(config=config)
    adopt(cache, policy)
    return cache


def adopt(cache: Any, policy: CachePolicy) -> bool:
    """Give a cache stores for its layers of full attention, in place; what they hold moves over.

    Returns:
        Whether it has any: a static, quantised or encoder-decoder cache stays as it is.
    """
    if not isinstance(cache, Cache):
        return False
    layers, count = cache.layers, len(cache.layers)
    for index, layer in enumerate(layers):
        if type(layer) is DynamicLayer:
            layers[index] = _moved(layer, policy.layer(index, count))
    if cache.layer_class_to_replicate is DynamicLayer:
        cache.layer_class_to_replicate = _Made(cache, policy)  # type: ignore[assignment]  # it is only called
    return isinstance(cache.layer_class_to_replicate, _Made) or any(isinstance(layer, StoreLayer) for layer in layers)


def _moved(layer: DynamicLayer, store: StoreLayer) -> StoreLayer:
    if layer.get_seq_length():
        assert layer.keys is not None
        assert layer.values is not None
        store.update(layer.keys, layer.values)
    return store


class _Made:
    """Makes the layers of a cache that knows no config, as they come."""

    def __init__(self, cache: Cache, policy: CachePolicy) -> None:
        self._layers, self._policy = cache.layers, policy

    def __call__(self) -> StoreLayer:
        # How many there will be, nobody knows.
        return self._policy.layer(len(self._layers), len(self._layers) + 1)
