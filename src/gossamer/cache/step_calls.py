"""A step's queries on keys and values that were gathered for it."""

from __future__ import annotations

from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.plan import Extent, SparsePlan

__all__ = ["dense_on", "on_keys"]


def on_keys(call: AttentionCall, keys: Tensor, values: Tensor, extent: Extent, sinks: Tensor | None) -> AttentionCall:
    """The call's queries on other keys and values, in the call's dtype."""
    keys, values = (x.to(call.q) for x in (keys, values))
    return AttentionCall(call.q, keys, values, extent, call.scale, sinks, call.softcap, call.layer)


def dense_on(
    call: AttentionCall, keys: Tensor, values: Tensor, extent: Extent, sinks: Tensor | None
) -> tuple[Tensor, Tensor]:
    """All of these keys: out and LSE."""
    own = on_keys(call, keys, values, extent, sinks)
    return backends.attend(own, SparsePlan.dense(own.groups, own.query_len, own.key_len, extent))
