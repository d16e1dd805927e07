"""`sparse_attention`: choose dense or sparse, plan, attend, and say what was done."""

from __future__ import annotations

import functools
import logging
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Unpack, overload

import torch
from torch import Tensor

from gossamer import backends
from gossamer.backends.torch import dense
from gossamer.backends.torch.partial import merge
from gossamer.call import AttentionCall, CallFields
from gossamer.methods import Method, Reduced
from gossamer.methods.per_head import needs_of
from gossamer.plan import SparsePlan
from gossamer.policy import Decision, Policy
from gossamer.profiles import Profile
from gossamer.unread import Elsewhere

__all__ = ["CallRecord", "attend", "sparse_attention"]

logger = logging.getLogger("gossamer")


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What one call did. ``reason`` says why a call went dense; None where nothing else was asked for.

    ``density`` is computed pairs over the pairs that dense attention computes; seconds are wall-clock, on CUDA devices
    until the work is issued, not until it is done. ``executor`` is the backend, or ``sdpa`` for torch's own attention.
    """

    layer: int | None
    path: str
    reason: str | None
    density: float
    plan_seconds: float
    attention_seconds: float
    executor: str
    query_len: int
    key_len: int


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Policy | Method | Profile | str = "minference",
    *,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: Literal[False] = False,
    **call: Unpack[CallFields],
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Policy | Method | Profile | str = "minference",
    *,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: Literal[True],
    **call: Unpack[CallFields],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Policy | Method | Profile | str = "minference",
    *,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: bool = False,
    **call: Unpack[CallFields],
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a sparse method, or dense where that is better: short prompts, decoding, plans that do not pay.

    Differentiable once, for q, k, v, sinks and bias, through the output and the LSE: a selection is a constant.

    Args:
        q: ``[B, H, S, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, Dv]``.
        method: a method's name, a method, a profile, or a `Policy` with thresholds.
        record: called once with what was done.
        return_lse: also return the natural log of the softmax denominator, fp32 ``[B, H, S]``.
        call: ``extent`` says where the tokens sit; without it all keys are live and the queries are the last S, and
            ``causal=False`` asks for bidirectional or cross-attention, ``limit`` for a model's own sliding window.
            ``scale, sinks, softcap, bias, layer, store, layout, step, state``: see `gossamer.call.AttentionCall`.

    Returns:
        out ``[B, H, S, Dv]``, or ``(out, lse)``. Rows of padding are 0, their lse -inf.

    Raises:
        ValueError, TypeError: arguments that do not fit each other, or an unknown method.
    """
    return attend(AttentionCall.of(q, k, v, **call), Policy.of(method), record=record, return_lse=return_lse)


def attend(
    call: AttentionCall,
    policy: Policy,
    *,
    because: str | None = None,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sparse_attention` for a call that is made already, in its dtype: autocast does not reach inside.

    Args:
        because: a reason to run dense whatever the policy; then by torch, so that what is computed again under a
            gradient is computed in the same way.
    """
    kind = call.device.type
    if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
        with torch.autocast(kind, enabled=False):
            return attend(call, policy, because=because, record=record, return_lse=return_lse)
    started = time.perf_counter()
    decision = policy.decide(call) if because is None else Decision(None, reason=because)
    planned = time.perf_counter()
    if decision.reduced is not None:
        out, lse, executor = _reduced(decision.reduced)
    elif isinstance(call.k, Elsewhere) and call.query_len == 1:
        executor = backends.name_of(call)
        out, lse = call.k.attend(call, decision.plan)
    elif decision.plan is None:
        on_kernel = return_lse or policy.attends_on_kernel(call, decision.reason)
        out, lse, executor = _dense(call, on_kernel, by_torch=because is not None and not return_lse)
    else:
        executor = backends.name_of(call)
        if executor == "torch":
            _warn_slow(backends.why_slow(call))
        method = policy.planner(call)
        # What a method keeps over calls may be another's when the gradient is computed: then the plan is kept.
        keeps = policy.keep_plans or "state" in needs_of(method)
        out, lse = backends.attend(call, decision.plan, make=None if keeps else method.plan)
    if decision.reason is not None:
        _log_once(decision.reason)
    if record is not None:
        record(
            CallRecord(
                call.layer,
                "dense" if decision.is_dense else "sparse",
                decision.reason,
                decision.density,
                planned - started,
                time.perf_counter() - planned,
                executor,
                call.query_len,
                call.key_len,
            )
        )
    if not return_lse:
        return out
    if lse is None:
        raise ValueError(
            "return_lse=True is not supported where derivatives are computed forward, or under torch.func; call it "
            "outside of a transform"
        )
    return out, lse


def _reduced(reduced: Reduced) -> tuple[Tensor, Tensor, str]:
    """A call that stands for a larger one, and the one beside it."""
    call, plan = reduced.call, reduced.plan
    executor = backends.name_of(call)
    if executor == "torch":
        _warn_slow(backends.why_slow(call))
    if plan is None:
        plan = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    out, lse = backends.attend(call, plan)
    if reduced.beside is not None:
        out = out.float()
        other_out, other_lse, _ = _reduced(reduced.beside)
        merge(out, lse, other_out, other_lse)
    return out.to(call.q.dtype), lse, executor


def _dense(call: AttentionCall, on_kernel: bool, by_torch: bool) -> tuple[Tensor, Tensor | None, str]:
    """Every allowed pair: by torch's SDPA where it needs no S x T mask or must, else by a backend on a dense plan."""
    plain = dense.is_plain(call)
    short = call.query_len == 1 or backends.name_of(call) == "torch"
    by_torch = by_torch or backends.is_transformed(call)
    if by_torch or (not on_kernel and (not dense.needs_mask(call) or (plain and short))):
        return dense.dense(call), None, "sdpa" if plain else "torch"
    plan = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    return *backends.attend(call, plan), backends.name_of(call)


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("attention runs dense: %s (counted in stats; logged once)", reason)


@functools.cache
def _warn_slow(why: str) -> None:
    warnings.warn(
        f"gossamer runs its torch reference path, which is slower than dense attention and needs memory for S x T "
        f"logits in chunks: {why}. Results are right; there is no speed-up.",
        RuntimeWarning,
        stacklevel=4,
    )
