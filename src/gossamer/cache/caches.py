"""Whole caches: made for a model, or a stock one that takes our layers."""

from __future__ import annotations

from typing import Any

from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, EncoderDecoderCache

from gossamer.cache.layer import StoreLayer
from gossamer.cache.policies import CachePolicy

__all__ = ["adopt", "nbytes", "new_cache", "peak_nbytes"]


def new_cache(config: Any, policy: CachePolicy) -> DynamicCache | EncoderDecoderCache:
    """An empty cache for a model with this config: stores for layers of full attention, transformers' own for others.

    Sliding windows, chunks and linear layers hold little and have structures of their own.

    Args:
        config: a transformers config; of a composite model, its text part counts; an encoder-decoder's cache has a
            stock one for the keys of the encoder.
    """
    cache = DynamicCache(config=config)
    adopt(cache, policy)
    return EncoderDecoderCache(cache, DynamicCache()) if config.is_encoder_decoder else cache


def adopt(cache: Any, policy: CachePolicy, layers: int | None = None) -> bool:
    """Give a cache stores for its layers of full attention, in place; what they hold moves over.

    Args:
        layers: how many the model has, for a cache that knows no config and makes them as they come.

    Returns:
        Whether it has any: a static or quantised cache stays as it is. Of an encoder-decoder's, the decoder's own is
        meant.
    """
    if isinstance(cache, EncoderDecoderCache):
        cache = cache.self_attention_cache
    if not isinstance(cache, Cache):
        return False
    made, grows = cache.layers, cache.layer_class_to_replicate is DynamicLayer
    count = max(layers or 0, len(made)) if grows else len(made)
    for index, layer in enumerate(made):
        if type(layer) is DynamicLayer:
            made[index] = _moved(layer, _next(policy.layer(index, count), made[:index]))
    if grows:
        cache.layer_class_to_replicate = _Made(cache, policy, count)  # type: ignore[assignment]  # it is only called
    return isinstance(cache.layer_class_to_replicate, _Made) or any(isinstance(layer, StoreLayer) for layer in made)


def _next(store: StoreLayer, before: list[Any]) -> StoreLayer:
    store.leads = not before
    return store


def _moved(layer: DynamicLayer, store: StoreLayer) -> StoreLayer:
    if layer.get_seq_length():
        assert layer.keys is not None
        assert layer.values is not None
        store.update(layer.keys, layer.values)
        store.told()  # by whoever attended them
    return store


class _Made:
    """Makes the layers of a cache that knows no config, as they come."""

    def __init__(self, cache: Cache, policy: CachePolicy, count: int) -> None:
        self._layers, self._policy, self._count = cache.layers, policy, count

    def __call__(self) -> StoreLayer:
        made = self._policy.layer(len(self._layers), max(self._count, len(self._layers) + 1))
        return _next(made, self._layers)


def nbytes(cache: Cache) -> int:
    """Bytes that a cache holds of keys and values, of layers without a store too; see `StoreLayer.nbytes`."""
    if isinstance(cache, EncoderDecoderCache):
        return nbytes(cache.self_attention_cache) + nbytes(cache.cross_attention_cache)
    total = 0
    for layer in cache.layers:
        if isinstance(layer, StoreLayer):
            total += layer.nbytes
        else:
            held = getattr(layer, "keys", None), getattr(layer, "values", None)
            total += sum(x.numel() * x.element_size() for x in held if x is not None)
    return total


def peak_nbytes(cache: Cache) -> int:
    """The most bytes that a cache has held of keys and values at once: while one layer has a call's tokens as they
    came, the others hold what is left of them. See `nbytes`. What was cut off again (`crop`) counts in one layer alone.
    """
    if isinstance(cache, EncoderDecoderCache):
        return peak_nbytes(cache.self_attention_cache) + nbytes(cache.cross_attention_cache)
    over = [layer.peak - layer.nbytes for layer in cache.layers if isinstance(layer, StoreLayer)]
    return nbytes(cache) + max(over, default=0)
