"""The attention function: what a transformers layer asks for, done by `gossamer.attention` or densely with a reason."""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]
from transformers import AttentionInterface, AttentionMaskInterface

from gossamer.attention import CallRecord, attend
from gossamer.backends.torch.dense import sdpa
from gossamer.cache import StoreLayer, store_of
from gossamer.call import AttentionCall
from gossamer.integrations.transformers.fallback import (
    causal_pairs,
    dense_attention,
    listed_pairs,
    pairs_of_sequences,
    restricted,
)
from gossamer.integrations.transformers.masks import (
    compact_mask,
    compact_mask_bidirectional,
    compact_of,
    extent_of,
    extent_of_one_query,
    is_compact,
    pairs_of,
    read,
)
from gossamer.integrations.transformers.operator import named, operator, trains
from gossamer.integrations.transformers.owners import NAME, Observation, Owner, owner_for
from gossamer.integrations.transformers.parts import before, in_parts, take_padding
from gossamer.plan import Extent
from gossamer.policy import TRAINING

__all__ = ["BIDIRECTIONAL", "hf_attention", "register"]

logger = logging.getLogger("gossamer")

BIDIRECTIONAL = "gossamer_bidirectional"

# Keywords that models pass along and that do not change the result of attention.
IGNORED = frozenset(
    {
        "cache_position",
        "cu_seq_lens_k",
        "deterministic",
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


def register() -> None:
    """Register the attention function and the mask functions. Idempotent."""
    for name, mask in ((NAME, compact_mask), (BIDIRECTIONAL, compact_mask_bidirectional)):
        AttentionInterface.register(name, hf_attention)
        AttentionMaskInterface.register(name, mask)


@dataclass(frozen=True, slots=True, eq=False)
class _Asked:
    """What a layer asks for: tensors as `AttentionCall` has them, and the mask as it came."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    sinks: Tensor | None
    scale: float
    softcap: float | None
    window: int | None
    causal: bool
    layer: int | None
    store: StoreLayer | None = None

    @property
    def batch(self) -> int:
        return self.query.shape[0]

    @property
    def query_len(self) -> int:
        return self.query.shape[2]

    @property
    def key_len(self) -> int:
        return self.key.shape[2]


def hf_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention for one layer, as transformers calls it.

    A decode step whose keys come from a store (`gossamer.cache`) reads what the policy's ``decode`` chooses.

    Dense, and counted with the reason: a module in training unless its policy trains sparse, a mask that is not plain,
    packed sequences, bidirectional attention that was not asked for, dropout, a position bias, and keys that the model
    itself was trained to choose; and whatever the policy finds not worth a plan (decoding, short prompts). Under
    autocast all is done in its dtype. Under ``torch.compile`` and ``torch.export`` a prefill is one operator, which
    counts when it runs; a decode step and dense training are plain torch there, and are not counted.

    Args:
        query: ``[B, H, S, D]``; key: ``[B, G, T, D]``; value: ``[B, G, T, Dv]``.
        attention_mask: a form that `compact_mask` returns, or a 4-D mask of the caller's own (bool, or float to add).
        scaling: factor of the logits; default ``D ** -0.5``.
        sliding_window: the layer's window; one that the mask carries comes first.
        softcap, s_aux: the soft-cap of the logits, and sinks ``[H]``; see `gossamer.call.AttentionCall`.
        dropout, is_causal, position_bias: as for transformers' ``sdpa``.
        indices: int ``[B, S, n]``, the keys that each query attends (DeepSeek sparse attention), below 0 for none.
        cu_seq_lens_q: where each of several sequences in one row starts and ends.
        **kwargs: those that change no result are ignored.

    Returns:
        out ``[B, S, H, Dv]``, and None: weights are never formed.

    Raises:
        NotImplementedError: a paged cache, trained block indices, or a keyword that is not known here.
        TypeError: dtypes differ, outside autocast.
        ValueError: sinks or a soft-cap with dropout, a position bias or an additive mask; or shapes that do not fit.
    """
    return _attend(module, query, key, value, attention_mask, **kwargs), None


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
) -> Tensor:
    _refuse_unknown(module, cache, block_indices, kwargs)
    store = store_of(key)
    query, key, value = _of_one_dtype(module, query, key, value)
    asked = _Asked(
        query,
        key,
        value,
        attention_mask,
        s_aux,
        scaling if scaling is not None else query.shape[-1] ** -0.5,
        softcap,
        sliding_window,
        bool(is_causal if is_causal is not None else getattr(module, "is_causal", True)),
        getattr(module, "layer_idx", None),
        store,
    )
    packed = cu_seq_lens_q if cu_seq_lens_q is not None and cu_seq_lens_q.numel() > 2 else None
    extras = _Extras(dropout, position_bias, indices, packed)
    if is_tracing():
        return _densely(module, asked, extras)
    if torch.compiler.is_compiling():
        training = module.training or (torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)))
        dense = training and not trains(module)
        if dense or extras.reason is not None or asked.query_len == 1:
            return _densely(module, asked, extras)
        fields = asked.mask, s_aux, asked.scale, softcap, asked.window, asked.causal, asked.layer
        return _operator(query, key, value, *fields, *named(module))
    owner = owner_for(module)
    owner.reached[asked.layer] += 1
    if owner.context is not None:
        return _shared(owner.context, asked, extras)
    if extras.reason is not None:
        if store is not None:
            store.refuse(extras.reason)
        return _counted(owner, asked, extras.reason, lambda: _densely(module, asked, extras))
    return _by_policy(owner, asked, TRAINING if module.training and not owner.policy.training else None)


@dataclass(frozen=True, slots=True, eq=False)
class _Extras:
    """What only a dense call can have."""

    dropout: float = 0.0
    position_bias: Tensor | None = None
    indices: Tensor | None = None
    packed: Tensor | None = None

    @property
    def reason(self) -> str | None:
        if self.position_bias is not None:
            return "position bias"
        if self.dropout > 0:
            return "training: dropout"
        if self.indices is not None:
            return "keys chosen by the model"
        return "packed sequences" if self.packed is not None else None


def _by_policy(owner: Owner, asked: _Asked, training: str | None) -> Tensor:
    """``[B, S, H, Dv]``: by the owner's policy, where the mask can be described to it."""
    store = asked.store
    if store is not None and store.parts():
        return in_parts(store.parts(), owner, asked, training, _by_policy)
    extent, used, reason = _described(asked, owner)
    if extent is None or reason is not None:
        if store is not None:
            store.refuse(reason or "a mask that is not plain")
        return _counted(owner, asked, reason, lambda: _densely(None, asked, _Extras()))
    keys, values = asked.key, asked.value
    if used < asked.key_len:
        keys, values = keys[:, :, :used], values[:, :, :used]
    several = asked.query_len > 1 or used == 1 or owner.policy.method.extends  # or a prompt of one token
    whole = several and (store is None or not store.dropped)  # else keys do not stand one after the other
    rotary = owner.rotary(extent) if owner.rotary is not None and whole else None
    fields = asked.scale, asked.sinks, asked.softcap, asked.layer
    if store is not None:
        store.place(extent)
    given = owner.about(asked.layer, extent, asked.query_len, None if store is None else store.state)
    call = AttentionCall(asked.query, keys, values, extent, *fields, store=store, rotary=rotary, **given)
    kept = None if call.needs_gradient else store
    if kept is not None:
        before(call, kept, owner.policy.decode)
    instead = owner.instead if asked.query_len > 1 else None
    out = instead(call) if instead else attend(call, owner.policy, because=training, record=owner.record)
    assert isinstance(out, Tensor)
    if owner.observe is not None and asked.query_len > 1:
        owner.observe(Observation(call, out))
    if kept is not None:
        kept.attended(call)
    return out.transpose(1, 2).contiguous()


def _shared(attend_shared: Callable[[AttentionCall], Tensor], asked: _Asked, extras: _Extras) -> Tensor:
    """``[B, S, H, Dv]`` of tokens whose mask only the context knows."""
    if extras.reason is not None or not asked.causal:
        raise ValueError(f"a context-parallel model cannot have {extras.reason or 'layers that are not causal'}")
    fields = {"scale": asked.scale, "sinks": asked.sinks, "softcap": asked.softcap, "layer": asked.layer}
    call = AttentionCall(asked.query, asked.key, asked.value, **fields)
    return attend_shared(call).transpose(1, 2).contiguous()


def _run_operator(owner: Owner, *tensors_and_fields: Any) -> Tensor:
    asked = _Asked(*tensors_and_fields)
    owner.reached[asked.layer] += 1
    # In a graph nobody sees which positions the model gives its tokens; what was seen before it is another forward's.
    return _by_policy(replace(owner, rotary=None, modalities=None), asked, None)


_operator = operator(_run_operator)


def _described(asked: _Asked, owner: Owner) -> tuple[Extent | None, int, str | None]:
    """The pairs that are asked for as an extent, as far as they are one; the key slots that it is for; why dense."""
    mask, batch, keys = asked.mask, asked.batch, asked.key_len
    if asked.store is not None and asked.store.dropped:
        take_padding(asked, asked.store)
        return asked.store.extent(asked.query_len), keys, None
    if mask is not None and mask.ndim == 4 and asked.query_len > 1:
        mask = compact_of(mask)
        if mask is None or mask.shape[0] != batch:
            return None, keys, "mask is not plain" if asked.causal else "not causal"
    if is_compact(mask):
        extent, used = extent_of(mask, batch, asked.query_len, keys, asked.window)
        if extent is not None:
            return extent, used, None
        two_sided = read(cast(Tensor, mask), batch, keys).end is None
        return None, used, "left padding without causality" if two_sided else "mask is not plain"
    if asked.query_len == 1:
        # A single query sees every key that its mask leaves; positions matter from the second one on.
        wanted = asked.store is not None or owner.policy.decodes_on_kernel(asked.query, keys)
        found = extent_of_one_query(mask, batch, keys) if wanted else None
        return (None, keys, owner.policy.why_undescribed(asked.store)) if found is None else (*found, None)
    if not asked.causal:
        return None, keys, "not causal"
    return *extent_of(None, batch, asked.query_len, keys, asked.window), None


def _counted(owner: Owner, asked: _Asked, reason: str | None, run: Callable[[], Tensor]) -> Tensor:
    """A dense call, recorded with its reason."""
    started = time.perf_counter()
    out = run()
    if reason is not None:
        _log_once(reason)
        if owner.record is not None:
            seconds = time.perf_counter() - started
            executor = "sdpa" if asked.sinks is None and asked.softcap is None else "torch"
            sizes = asked.query_len, asked.key_len
            owner.record(CallRecord(asked.layer, "dense", reason, 1.0, 0.0, seconds, executor, *sizes))
    return out


def _densely(module: nn.Module | None, asked: _Asked, extras: _Extras) -> Tensor:
    """``[B, S, H, Dv]`` in plain torch, pair by pair where there is a mask; differentiable, and fit for graphs."""
    mask, length = asked.mask, asked.key_len
    plain = asked.sinks is None and asked.softcap is None and extras.reason is None
    if mask is None and asked.causal and 1 < length == asked.query_len <= (asked.window or length) and plain:
        out = sdpa(asked.query, asked.key, asked.value, asked.scale, is_causal=True)
        return out.transpose(1, 2).contiguous()
    if is_compact(mask):
        mask = pairs_of(cast(Tensor, mask), asked.query_len, asked.key_len, asked.window)
    elif mask is None and asked.causal and asked.query_len > 1:
        mask = causal_pairs(asked.query_len, asked.key_len, asked.window, asked.query.device)
    if extras.packed is not None:
        mask = restricted(mask, pairs_of_sequences(extras.packed, asked.query, asked.key))
    if extras.indices is not None:
        mask = restricted(mask, listed_pairs(extras.indices, asked.key_len))
    return dense_attention(
        module,
        asked.query,
        asked.key,
        asked.value,
        mask,
        scale=asked.scale,
        dropout=extras.dropout,
        position_bias=extras.position_bias,
        sinks=asked.sinks,
        softcap=asked.softcap,
    )


def _of_one_dtype(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As stock attention sees them under autocast: norms and rotations leave queries and keys in float32 there.

    Raises:
        TypeError: dtypes differ, and there is no autocast.
    """
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (t if t.dtype == torch.float64 else t.to(dtype) for t in (query, key, value))
    if query.dtype == key.dtype == value.dtype:
        return query, key, value
    raise TypeError(
        f"{_name(module)} gives query, key and value of {query.dtype}, {key.dtype} and {value.dtype}; they must "
        "share a dtype: load the model in one dtype (dtype=...), or run it under torch.autocast"
    )


def _refuse_unknown(module: nn.Module, cache: Any, block_indices: Tensor | None, others: dict[str, Any]) -> None:
    if cache is not None or block_indices is not None:
        what = "a paged cache (generate_batch)" if cache is not None else "trained block indices (MiniMax-M3)"
        raise NotImplementedError(f"gossamer does not support {what}; use attn_implementation='sdpa' for this model")
    unknown = sorted(name for name, given in others.items() if name not in IGNORED and given is not None)
    if unknown:
        raise NotImplementedError(
            f"{_name(module)} gives its attention {', '.join(unknown)}, which gossamer does not know and which may "
            "change the result; use attn_implementation='eager' for this model, and report it"
        )
    if others.get("output_attentions") and not torch.compiler.is_compiling():
        _warn_of_weights()


def _name(module: nn.Module) -> str:
    layer = getattr(module, "layer_idx", None)
    return type(module).__name__ + ("" if layer is None else f" of layer {layer}")


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("attention runs dense: %s (counted in stats; logged once)", reason)


@functools.cache
def _warn_of_weights() -> None:
    logger.warning(
        "output_attentions=True: gossamer, as sdpa, never forms attention weights, and returns none; "
        "use attn_implementation='eager' to get them"
    )
