"""Calls on stores: of layers whose heads are in several, of padded rows, and what comes before a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from gossamer.attention import CallRecord
from gossamer.cache import Part, StoreLayer
from gossamer.call import AttentionCall
from gossamer.integrations.transformers.owners import Owner
from gossamer.methods import Method

__all__ = ["before", "in_parts", "take_padding"]


def in_parts(
    parts: Iterable[Part],
    owner: Owner,
    asked: Any,
    because: str | None,
    attend: Callable[[Owner, Any, str | None], Tensor],
) -> Tensor:
    """``[B, S, H, Dv]`` of a layer whose heads are in several stores, each attended by itself.

    They are recorded as one call, of the tokens that the first has. Methods whose numbers belong to heads by their
    place run dense.

    Args:
        asked: what the layer asks for, as the attention function has it.
        because: why dense.
        attend: does the same for one store.
    """
    policy, share = owner.policy, asked.query.shape[1] // asked.key.shape[1]
    method = policy.decode if asked.query_len == 1 else policy.method
    if method is not None and not method.apart:
        because = because or "heads that keep different tokens"
    record, records = owner.record, []
    owner = replace(owner, observe=None, instead=None, record=None if record is None else records.append)
    weights, out = [], None
    for groups, store in parts:
        heads = [group * share + member for group in groups for member in range(share)]
        keys, values = store.read()
        sinks = None if asked.sinks is None else asked.sinks[heads]
        part = replace(asked, query=asked.query[:, heads], key=keys, value=values, sinks=sinks, store=store)
        own = attend(owner, part, because)
        if out is None:
            out = own.new_empty(*own.shape[:2], asked.query.shape[1], own.shape[3])
        out[:, :, heads] = own
        weights.append(len(heads) * keys.shape[2])
    assert out is not None
    if record is not None and len(records) == len(weights):
        record(_together(records, weights))
    return out


def _together(records: list[CallRecord], keys: list[int]) -> CallRecord:
    """Of parts that hold so many keys each: the share of all that was read, and all seconds."""
    read = sum(one.density * held for one, held in zip(records, keys, strict=True))
    return replace(
        records[0],
        density=read / max(1, sum(keys)),
        plan_seconds=sum(one.plan_seconds for one in records),
        attention_seconds=sum(one.attention_seconds for one in records),
    )


def before(call: AttentionCall, store: StoreLayer, decode: Method | None) -> None:
    """Before a call's attention: what a method for steps has to know of prompts sees the call."""
    for kind in () if decode is None else decode.watches(call):
        store.begin(kind)
    store.seen(call)


def take_padding(asked: Any, store: StoreLayer) -> None:
    """Tell a cache that has dropped tokens of padding before a row's first token, as in chunks of a padded prompt.

    Raises:
        ValueError: padding elsewhere: its mask no longer says where that is.
    """
    mask = asked.mask
    if mask is None:
        return
    if mask.ndim == 2:
        live = mask[:, -asked.query_len :] > 0
    else:  # of pairs: among themselves the new tokens must be causal, and no more
        pairs = mask[:, 0, :, -asked.query_len :]
        pairs = pairs if pairs.dtype == torch.bool else pairs == 0  # what is added to logits
        live = pairs[:, -1]
        if not bool(((pairs == live[:, None] & torch.ones_like(pairs[0]).tril()) | ~live[:, :, None]).all()):
            store.refuse("a mask that is not plain")
    before = live.long().cumsum(1) == 0
    if asked.causal and bool((live | before).all()) and store.pad(asked.query_len, before.sum(1).expand(asked.batch)):
        return
    store.refuse("padding between turns, or a mask of another kind")
