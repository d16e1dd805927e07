"""Keys that know the layer that gave them, and which tensors may be written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.unread import Unread

__all__ = ["is_locked", "marked", "store_of"]

_STORE = "_gossamer_store"


def is_locked(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode, which has been left since: it can be written in that mode alone."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def marked(keys: Tensor, store: Any) -> Tensor:
    """Keys that know the layer that gave them."""
    if not isinstance(keys, Unread):  # those are made for each call
        keys = keys[:]  # a view of its own: the layer holds nothing that holds the layer
    setattr(keys, _STORE, store)
    return keys


def store_of(keys: Tensor) -> Any:
    """The layer that gave these keys by `StoreLayer.update`, if one did and holds them still.

    Layers of a model that share keys may see some that have been dropped since. In graphs, none does.
    """
    store = None if torch.compiler.is_compiling() else getattr(keys, _STORE, None)
    return store if store is not None and store.slots == keys.shape[2] else None
