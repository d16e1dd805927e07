"""Which channels of a model's keys decide its logits, for Double Sparsity's labels. Needs transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

import gossamer
from gossamer.call import AttentionCall
from gossamer.integrations.transformers import Observation

__all__ = ["KINDS", "find_channels", "weights"]

KINDS = ("k", "keys", "q", "qk")
Channels = tuple[tuple[tuple[int, ...], ...], ...]


@torch.inference_mode()
def find_channels(
    model: Any, samples: Iterable[Tensor], kind: str = "k", progress: Callable[[int], object] | None = None
) -> Channels:
    """Channels ``[layer][head]`` by falling mean weight over all tokens of some texts (2408.07092, section 3.2).

    Queries and keys are those of the attention call, turned by position as a cache holds them. Deviations from the
    authors' code: it weighs |q| and |k| before they are turned; of its products it counts the last sample alone, by a
    mistake; and it has no products for key/value heads.

    Args:
        model: a transformers model that is not enabled.
        samples: int64 ``[1, S]`` each.
        kind: see `weights`.
        progress: called with the number of samples read.

    Raises:
        ValueError: an unknown kind, no sample, or layers that made no attention call that can be looked at.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, got {kind!r}")
    sums: dict[int, Tensor] = {}

    def visit(observed: Observation) -> None:
        layer, own = observed.call.layer, weights(observed.call, kind).double()
        if layer is not None:
            sums[layer] = sums[layer] + own if layer in sums else own

    count = 0
    with gossamer.enable(model, "dense") as handle:
        handle.observe(visit)
        for sample in samples:
            model(input_ids=sample.to(model.device), use_cache=False, logits_to_keep=1)
            count += 1
            if progress is not None:
                progress(count)
    layers = model.config.get_text_config().num_hidden_layers
    missing = next((layer for layer in range(layers) if layer not in sums), None)
    if missing is not None:
        raise ValueError(
            f"layer {missing} of {type(model).__name__} made no call that can be looked at, in {count} samples"
        )
    if len({tuple(own.shape) for own in sums.values()}) > 1:
        raise ValueError(f"layers of {type(model).__name__} differ in their heads, for which a table has no room")
    orders = [sums[layer].sort(dim=-1, descending=True, stable=True).indices.tolist() for layer in range(layers)]
    return tuple(tuple(map(tuple, heads)) for heads in orders)


def weights(call: AttentionCall, kind: str) -> Tensor:
    """Sums over the live tokens of one call, fp32 ``[heads, D]``.

    Args:
        kind: ``k``: |q * k| of each token with itself, summed over the query heads of a key/value head; ``keys``: |k|;
            both of key/value heads. ``qk``: |q * k|; ``q``: |q|; both of query heads.
    """
    extent = call.extent
    queries = extent.live_queries(call.query_len, call.device)[:, None, :, None]
    q = call.q.float().masked_fill(~queries, 0.0)
    keys = extent.live_keys(call.key_len).to(call.device)
    k = call.k.float().masked_fill(~keys.expand(call.batch, -1)[:, None, :, None], 0.0)
    if kind == "keys":
        return k.abs().sum(dim=(0, 2))
    if kind == "q":
        return q.abs().sum(dim=(0, 2))
    # The queries of a call that has them all: those of the last keys.
    own = k[:, :, call.key_len - call.query_len :].repeat_interleave(call.share, dim=1)
    products = (q * own).abs().sum(dim=(0, 2))
    return products if kind == "qk" else products.unflatten(0, (call.groups, call.share)).sum(dim=1)
