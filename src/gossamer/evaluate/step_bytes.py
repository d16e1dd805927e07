"""How many bytes of a cache a decode step reads, of what a results file says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gossamer.methods import from_dict

__all__ = ["step_bytes"]


def step_bytes(record: Mapping[str, Any], model: Mapping[str, Any]) -> float | None:
    """Of a sample's line and its run's ``model``: keys and values that a step read, and what it read to choose them.

    The second, `gossamer.methods.Method.beside`, is counted in each layer but those that the method reads whole, for
    the tokens of the prompt. Query heads that choose apart count as if no two chose the same.

    Returns:
        None where the line does not say what the cache held.
    """
    if "cache_bytes" not in record:
        return None
    read = record.get("read", 1.0) * record["cache_bytes"]
    fields = record.get("decode_fields")
    if fields is None or "prompt_tokens" not in record or not {"layers", "kv_heads", "head_dim"} <= model.keys():
        return read
    layers, heads, dim = (int(model[name]) for name in ("layers", "kv_heads", "head_dim"))
    try:
        method = from_dict(dict(fields))
    except (TypeError, ValueError):  # of another version, or of a package that is not here
        return read
    whole = getattr(method, "dense_layers", 0)
    layers -= min(layers, whole) if isinstance(whole, int) else sum(layer < layers for layer in whole)
    dtype = getattr(torch, str(model.get("dtype")), None)
    itemsize = dtype.itemsize if isinstance(dtype, torch.dtype) else 4
    return read + method.beside(dim, itemsize) * layers * heads * record["prompt_tokens"]
