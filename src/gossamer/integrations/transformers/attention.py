"""The attention function: what a transformers layer asks for, done by `sparse_attention` or densely with a reason."""

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
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gossamer.attention import CallRecord, Policy, decodes_on_kernel, dense_attention, sparse_attention
from gossamer.integrations.transformers.masks import (
    compact_mask,
    explicit_mask,
    extent_of,
    extent_of_one_query,
    window_of,
)
from gossamer.plan import Extent

__all__ = ["NAME", "AttentionCall", "hf_attention", "owner_of", "register", "set_owner"]

logger = logging.getLogger("gossamer")

NAME = "gossamer"

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
class AttentionCall:
    """What went into and came out of one call with several queries, for `Handle.observe`.

    Fields:
        layer: the model's index of it.
        q: ``[B, H, S, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, Dv]``; out: ``[B, H, S, Dv]``. Read, do not write.
        scale, extent, limit, sinks, softcap: see `gossamer.sparse_attention`.
    """

    layer: int | None
    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    scale: float
    extent: Extent
    limit: int | None
    sinks: Tensor | None
    softcap: float | None


@dataclass(frozen=True, slots=True)
class Owner:
    """Who decides for an attention module: the policy, and where its calls are recorded."""

    policy: Policy
    record: Callable[[CallRecord], None] | None
    observe: Callable[[AttentionCall], None] | None = None


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
    """Register the attention function and the mask function as ``gossamer``. Idempotent."""
    AttentionInterface.register(NAME, hf_attention)
    AttentionMaskInterface.register(NAME, compact_mask)


def hf_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for one layer, as transformers calls it.

    Dense, and counted with the reason: a mask that is not plain, packed sequences, bidirectional attention, dropout,
    a position bias, and keys that the model itself was trained to choose; and whatever `sparse_attention` finds not
    worth a plan (decoding, short prompts, training). Under ``torch.compile`` a decode step stays one graph and is not
    counted; a prefill leaves the graph.

    Args:
        query: ``[B, H, S, D]``; key: ``[B, G, T, D]``; value: ``[B, G, T, Dv]``.
        attention_mask: a form that `compact_mask` returns, or a 4-D mask of the caller's own (bool, or float to add).
        scaling: factor of the logits; default ``D ** -0.5``.
        sliding_window: the layer's window; one that the mask carries comes first.
        softcap: see `gossamer.backends.torch.execute`; s_aux: ``[H]``, its sinks.
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
    compiling = torch.compiler.is_compiling()
    if cache is not None or block_indices is not None:
        what = "a paged cache (generate_batch)" if cache is not None else "trained block indices (MiniMax-M3)"
        raise NotImplementedError(f"gossamer does not support {what}; use attn_implementation='sdpa' for this model")
    if not compiling:
        _warn_unknown(frozenset(name for name, given in kwargs.items() if given is not None) - IGNORED)

    # Nothing is looked up, timed or counted inside a compiled decode step: its graph must stay whole.
    owner = None if compiling else owner_of(module) or _default_owner()
    layer = getattr(module, "layer_idx", None)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = bool(is_causal if is_causal is not None else getattr(module, "is_causal", True))
    packed = cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2
    pairwise = attention_mask is not None and attention_mask.ndim == 4
    query_len, key_len = query.shape[2], key.shape[2]

    reason, one_query = None, None
    if position_bias is not None:
        reason = "position bias"
    elif dropout > 0:
        reason = "training: dropout"
    elif indices is not None:
        reason = "keys chosen by the model"
    elif packed:
        reason = "packed sequences"
    elif not causal:
        reason = "not causal"
    elif query_len == 1:
        if owner is not None and decodes_on_kernel(owner.policy, query, key_len):
            one_query = extent_of_one_query(attention_mask, query.shape[0], key_len)
        reason = "decode" if one_query is None else None
    elif pairwise:
        reason = "mask is not plain"

    # A single query sees every key that its mask leaves; positions matter from the second one on.
    mask, extent, used, limit = attention_mask, None, key_len, None
    if one_query is not None:
        extent, used = one_query
    elif causal and not pairwise and (query_len > 1 or attention_mask is not None):
        window = window_of(attention_mask) or sliding_window
        extent, used = extent_of(attention_mask, query.shape[0], query_len, key_len)
        limit = window if window is not None and window < used else None
        if reason is not None:
            mask = explicit_mask(extent, query_len, key_len, limit, query.device)

    if reason is None:
        assert owner is not None
        out = sparse_attention(
            query,
            key[:, :, :used],
            value[:, :, :used],
            owner.policy,
            scale=scale,
            extent=extent,
            limit=limit,
            sinks=s_aux,
            softcap=softcap,
            layer=layer,
            record=owner.record,
        )
        assert isinstance(out, Tensor)
        if owner.observe is not None and query_len > 1:
            keys, values = key[:, :, :used], value[:, :, :used]
            where = extent if extent is not None else Extent.full(query.shape[0], query_len, used)
            owner.observe(AttentionCall(layer, query, keys, values, out, scale, where, limit, s_aux, softcap))
        return out.transpose(1, 2).contiguous(), None

    started = 0.0 if compiling else time.perf_counter()
    if packed:
        mask = _both(mask, _same_sequence(cu_seq_lens_q, query, key))
    if indices is not None:
        mask = _both(mask, _listed(indices, key_len))
    plain_torch = s_aux is not None or softcap is not None
    additive = position_bias is not None or (mask is not None and mask.is_floating_point())
    if not plain_torch and (dropout > 0 or additive):
        out, _ = sdpa_attention_forward(
            module, query, key, value, mask, dropout, scale, is_causal=False, position_bias=position_bias
        )
    else:
        _refuse(plain_torch, dropout, additive)
        out = dense_attention(query, key, value, mask=mask, scale=scale, sinks=s_aux, softcap=softcap)
        out = out.transpose(1, 2).contiguous()
    if owner is not None:
        _log_once(reason)
        if owner.record is not None:
            seconds, executor = time.perf_counter() - started, "torch" if plain_torch else "sdpa"
            owner.record(CallRecord(layer, "dense", reason, 1.0, 0.0, seconds, executor, query_len, key_len))
    return out, None


_attend_outside_graph = torch.compiler.disable(_attend)


def _both(mask: Tensor | None, pairs: Tensor) -> Tensor:
    if mask is None:
        return pairs
    if mask.is_floating_point():
        return mask.masked_fill(~pairs, torch.finfo(mask.dtype).min)
    return mask & pairs


def _listed(indices: Tensor, key_len: int) -> Tensor:
    """The pairs that ``indices`` int ``[B, S, n]`` name, bool ``[B, 1, S, T]``."""
    slots = torch.where(indices >= 0, indices, key_len).long()
    listed = torch.zeros(*indices.shape[:2], key_len + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, slots, True)[:, None, :, :key_len]


def _same_sequence(cu_seq_lens: Tensor | None, query: Tensor, key: Tensor) -> Tensor:
    """The pairs within one of several sequences that are packed into a row, bool ``[1, 1, S, T]``."""
    assert cu_seq_lens is not None
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seq_lens_q describes {cu_seq_lens.numel() - 1} sequences packed into one row without a cache, but "
            f"got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys; pass use_cache=False"
        )
    slots = torch.arange(key.shape[2], device=key.device)
    sequence = torch.searchsorted(cu_seq_lens.to(slots), slots, right=True)
    return (sequence[:, None] == sequence[None, :])[None, None]


def _refuse(plain_torch: bool, dropout: float, additive: bool) -> None:
    """No dense path combines these; say so instead of leaving one out."""
    if plain_torch and (dropout > 0 or additive):
        what = "dropout" if dropout > 0 else "an additive mask or position bias"
        raise ValueError(
            f"attention sinks or a logit soft-cap cannot be combined with {what} here; "
            "call model.eval(), pass a boolean mask, or use attn_implementation='eager'"
        )


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
