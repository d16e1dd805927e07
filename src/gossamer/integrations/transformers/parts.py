"""Calls of layers whose heads are in several stores, and what comes before a call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor

from gossamer.cache import Part, StoreLayer
from gossamer.call import AttentionCall
from gossamer.integrations.transformers.owners import Owner
from gossamer.methods import Method

__all__ = ["before", "in_parts"]


def in_parts(
    parts: Iterable[Part],
    owner: Owner,
    asked: Any,
    because: str | None,
    attend: Callable[[Owner, Any, str | None], Tensor],
) -> Tensor:
    """``[B, S, H, Dv]`` of a layer whose heads are in several stores, each attended by itself.

    The first part is recorded for all. Methods whose numbers belong to heads by their place run dense.

    Args:
        asked: what the layer asks for, as the attention function has it.
        because: why dense.
        attend: does the same for one store.
    """
    policy, share = owner.policy, asked.query.shape[1] // asked.key.shape[1]
    method = policy.decode if asked.query_len == 1 else policy.method
    if method is not None and not method.apart:
        because = because or "heads that keep different tokens"
    owner = replace(owner, observe=None, instead=None)
    out = None
    for groups, store in parts:
        heads = [group * share + member for group in groups for member in range(share)]
        keys, values = store.read()
        sinks = None if asked.sinks is None else asked.sinks[heads]
        part = replace(asked, query=asked.query[:, heads], key=keys, value=values, sinks=sinks, store=store)
        own = attend(owner, part, because)
        if out is None:
            out = own.new_empty(*own.shape[:2], asked.query.shape[1], own.shape[3])
        out[:, :, heads] = own
        owner = replace(owner, record=None)
    assert out is not None
    return out


def before(call: AttentionCall, store: StoreLayer, decode: Method | None) -> None:
    """Before a call's attention: what a method for steps has to know of prompts sees the call."""
    for kind in () if decode is None else decode.watches(call):
        store.begin(kind)
    store.seen(call)
