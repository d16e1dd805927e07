"""The attention function: what a transformers layer asks for, done by `gossamer.attention` or densely with a reason."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from gossamer.attention import CallRecord, attend
from gossamer.call import AttentionCall
from gossamer.integrations.transformers.fallback import (
    allowed_pairs,
    dense_attention,
    listed_pairs,
    pairs_of_sequences,
    restricted,
)
from gossamer.integrations.transformers.masks import (
    compact_mask,
    compact_mask_bidirectional,
    extent_of,
    extent_of_one_query,
    is_bidirectional,
    two_sided_pairs,
)
from gossamer.plan import Extent
from gossamer.policy import Policy

__all__ = ["BIDIRECTIONAL", "NAME", "Observation", "hf_attention", "owner_of", "register", "set_owner"]

logger = logging.getLogger("gossamer")

NAME = "gossamer"
BIDIRECTIONAL = "gossamer_bidirectional"

# Keywords that models pass along and that do not change the result of attention.
IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "labels",
        "logits_to_keep",
        "max_length_k",
        "max_length_q",
        "num_items_in_batch",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "return_dict",
        "seq_idx",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True)
class Observation:
    """What went into and came out of one call with several queries, for `Handle.observe`. Read, do not write.

    Fields:
        call: with ``layer``, the model's index of it.
        out: ``[B, H, S, Dv]``.
    """

    call: AttentionCall
    out: Tensor


@dataclass(frozen=True, slots=True)
class Owner:
    """Who decides for an attention module: the policy, and where its calls are recorded."""

    policy: Policy
    record: Callable[[CallRecord], None] | None
    observe: Callable[[Observation], None] | None = None


# Which model object a module belongs to; the one piece of process-wide state, written by `Handle` alone.
_owners: WeakKeyDictionary[nn.Module, Owner] = WeakKeyDictionary()


def owner_of(module: nn.Module) -> Owner | None:
    return _owners.get(module)


def set_owner(module: nn.Module, owner: Owner | None) -> None:
    if owner is None:
        _owners.pop(module, None)
    else:
        _owners[module] = owner


@functools.cache
def _default_owner() -> Owner:
    logger.warning(
        "a model uses attn_implementation=%r without gossamer.enable(model): it runs the default policy, unrecorded. "
        "(Two models built from one config object share it; copy.deepcopy the config to keep them apart.)",
        NAME,
    )
    return Owner(Policy.of("minference"), None)


def register() -> None:
    """Register the attention function and the mask functions. Idempotent."""
    for name, mask in ((NAME, compact_mask), (BIDIRECTIONAL, compact_mask_bidirectional)):
        AttentionInterface.register(name, hf_attention)
        AttentionMaskInterface.register(name, mask)


def hf_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for one layer, as transformers calls it.

    Dense, and counted with the reason: a mask that is not plain, packed sequences, bidirectional attention that was not
    asked for, dropout, a position bias, and keys that the model itself was trained to choose; and whatever the policy
    finds not worth a plan (decoding, short prompts, training). Under ``torch.compile`` a decode step stays one graph
    and is not counted; a prefill leaves the graph.

    Args:
        query: ``[B, H, S, D]``; key: ``[B, G, T, D]``; value: ``[B, G, T, Dv]``.
        attention_mask: a form that `compact_mask` returns, or a 4-D mask of the caller's own (bool, or float to add).
        scaling: factor of the logits; default ``D ** -0.5``.
        sliding_window: the layer's window; one that the mask carries comes first.
        softcap, s_aux: the soft-cap of the logits, and sinks ``[H]``; see `gossamer.call.AttentionCall`.
        dropout, is_causal, position_bias: as for transformers' ``sdpa``.
        indices: int ``[B, S, n]``, the keys that each query attends (DeepSeek sparse attention), below 0 for none.
        cu_seq_lens_q: where each of several sequences in one row starts and ends.
        **kwargs: others are ignored, with a warning if they may matter.

    Returns:
        out ``[B, S, H, Dv]``, and None: weights are never formed.

    Raises:
        NotImplementedError: a paged cache, or trained block indices.
        ValueError: sinks or a soft-cap with dropout, a position bias or an additive mask; or shapes that do not fit.
    """
    # Not only while compiling: of a frame that leaves the graph, the functions it calls are compiled on their own.
    run = _attend if query.shape[2] == 1 else cast(Any, _attend_outside_graph)
    return run(module, query, key, value, attention_mask, **kwargs)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    indices: Tensor | None = None,
    block_indices: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cache: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    if cache is not None or block_indices is not None:
        what = "a paged cache (generate_batch)" if cache is not None else "trained block indices (MiniMax-M3)"
        raise NotImplementedError(f"gossamer does not support {what}; use attn_implementation='sdpa' for this model")
    # Nothing is looked up, timed or counted inside a compiled decode step: its graph must stay whole.
    owner = None
    if not torch.compiler.is_compiling():
        _warn_unknown(frozenset(name for name, given in kwargs.items() if given is not None) - IGNORED)
        owner = owner_of(module) or _default_owner()
    packed = cu_seq_lens_q if cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2 else None
    extras = (position_bias is not None, dropout > 0, indices is not None, packed is not None)
    reason = next((why for given, why in zip(extras, _EXTRAS, strict=True) if given), None)
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    layer, scale = getattr(module, "layer_idx", None), scaling if scaling is not None else query.shape[-1] ** -0.5
    asked = _asked(query, key, owner, attention_mask, causal, sliding_window)

    if reason is None and asked.reason is None and asked.extent is not None and owner is not None:
        keys, values = key[:, :, : asked.used], value[:, :, : asked.used]
        call = AttentionCall(query, keys, values, asked.extent, scale, s_aux, softcap, layer)
        out = attend(call, owner.policy, record=owner.record)
        assert isinstance(out, Tensor)
        if owner.observe is not None and query.shape[2] > 1:
            owner.observe(Observation(call, out))
        return out.transpose(1, 2).contiguous(), None

    started = 0.0 if owner is None else time.perf_counter()
    mask = _mask_of(asked, attention_mask, query, key)
    if packed is not None:
        mask = restricted(mask, pairs_of_sequences(packed, query, key))
    if indices is not None:
        mask = restricted(mask, listed_pairs(indices, key.shape[2]))
    softening = {"sinks": s_aux, "softcap": softcap}
    out = dense_attention(
        module, query, key, value, mask, scale=scale, dropout=dropout, position_bias=position_bias, **softening
    )
    reason = reason or asked.reason
    if owner is not None and reason is not None:
        _log_once(reason)
        if owner.record is not None:
            seconds, executor = time.perf_counter() - started, "sdpa" if s_aux is None and softcap is None else "torch"
            sizes = query.shape[2], key.shape[2]
            owner.record(CallRecord(layer, "dense", reason, 1.0, 0.0, seconds, executor, *sizes))
    return out, None


_attend_outside_graph = torch.compiler.disable(_attend)
_EXTRAS = ("position bias", "training: dropout", "keys chosen by the model", "packed sequences")


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a mask and a layer ask for: the pairs as an extent, as far as they are one, and why not sparse.

    ``used`` are the key slots that the extent is for.
    """

    extent: Extent | None
    used: int
    reason: str | None = None


def _asked(
    query: Tensor, key: Tensor, owner: Owner | None, mask: Tensor | None, causal: bool, window: int | None
) -> _Asked:
    batch, query_len, key_len = query.shape[0], query.shape[2], key.shape[2]
    pairwise = mask is not None and mask.ndim == 4
    if is_bidirectional(mask):
        extent, used = extent_of(mask, batch, query_len, key_len)
        return _Asked(extent, used, "left padding without causality" if extent is None else None)
    if not causal:
        return _Asked(None, key_len, "not causal")
    if query_len == 1:
        if owner is not None and owner.policy.decodes_on_kernel(query, key_len):
            found = extent_of_one_query(mask, batch, key_len)
            if found is not None:
                return _Asked(*found)
        # A single query sees every key that its mask leaves; positions matter from the second one on.
        if mask is None or pairwise:
            return _Asked(None, key_len, "decode")
        return _Asked(*extent_of(mask, batch, 1, key_len, window), "decode")
    if pairwise:
        return _Asked(None, key_len, "mask is not plain")
    return _Asked(*extent_of(mask, batch, query_len, key_len, window))


def _mask_of(asked: _Asked, mask: Tensor | None, query: Tensor, key: Tensor) -> Tensor | None:
    """What is asked for as a mask over all key slots, the unused ones included."""
    if mask is not None and mask.ndim == 4:
        return mask
    if asked.extent is not None:
        pairs = allowed_pairs(asked.extent, query.shape[2], asked.used, query.device)
        return torch.nn.functional.pad(pairs, (0, key.shape[2] - asked.used))
    return two_sided_pairs(mask, query.shape[2]) if mask is not None and is_bidirectional(mask) else mask


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("attention runs dense: %s (counted in stats; logged once)", reason)


@functools.cache
def _warn_unknown(names: frozenset[str]) -> None:
    if names:
        logger.warning(
            "attention was called with %s, which gossamer does not know and ignores; if it changes the result, "
            "use attn_implementation='sdpa' and report it",
            ", ".join(sorted(names)),
        )
