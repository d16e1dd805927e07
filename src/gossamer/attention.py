"""`sparse_attention`: choose dense or sparse, plan, execute, and say what was done."""

from __future__ import annotations

import functools
import logging
import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends, methods
from gossamer.backends import planners
from gossamer.methods import Dense, Method
from gossamer.plan import Extent, SparsePlan

__all__ = ["CallRecord", "Policy", "decodes_on_kernel", "dense_attention", "plan_under", "sparse_attention"]

logger = logging.getLogger("gossamer")

# With fewer queries than this a plan costs more than it saves, whatever the keys.
FEW_QUERIES = 32
# With fewer keys than this torch's SDPA decodes faster than our kernel (measured on AMD Zen 5): what a call costs by
# itself decides. By bytes of an element; SDPA is slow at decoding in 16 bits.
STREAMED_KEYS = {2: 512, 4: 4096}
# The reason of a call whose plan would compute nearly every pair: our own kernel then runs dense.
TOO_DENSE = "plan too dense to pay"


@dataclass(frozen=True)
class Policy:
    """A method, and when to use it.

    Fields:
        method: makes the plans.
        min_tokens: below this many keys (or a model's own window below it) attention is dense.
        max_density: a plan that computes more than this share of the dense pairs is not worth it: dense.
    """

    method: Method
    min_tokens: int = 2048
    max_density: float = 0.9

    def __post_init__(self) -> None:
        if not isinstance(self.method, Method):
            raise TypeError(
                f"Policy.method must be a gossamer.methods.Method, got {type(self.method).__name__}; "
                "build one with gossamer.methods.create(name)"
            )
        if self.min_tokens < 0:
            raise ValueError(f"Policy.min_tokens must not be negative, got {self.min_tokens}")
        if not self.max_density > 0:
            raise ValueError(f"Policy.max_density must be above 0, got {self.max_density}")

    @classmethod
    def of(cls, method: Policy | Method | str) -> Policy:
        """A policy as it is, or one with default thresholds for a method or a method's name."""
        if isinstance(method, Policy):
            return method
        return cls(methods.create(method) if isinstance(method, str) else method)


@dataclass(frozen=True, slots=True)
class CallRecord:
    """What one call did. ``reason`` says why a call went dense; None where nothing else was asked for.

    ``density`` is computed pairs over the pairs that dense attention computes; seconds are wall-clock, on CUDA devices
    until the work is issued, not until it is done.
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
    method: Policy | Method | str = "minference",
    *,
    scale: float | None = None,
    extent: Extent | None = None,
    causal: bool = True,
    limit: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    layer: int | None = None,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Policy | Method | str = "minference",
    *,
    scale: float | None = None,
    extent: Extent | None = None,
    causal: bool = True,
    limit: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    layer: int | None = None,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    method: Policy | Method | str = "minference",
    *,
    scale: float | None = None,
    extent: Extent | None = None,
    causal: bool = True,
    limit: int | None = None,
    sinks: Tensor | None = None,
    softcap: float | None = None,
    layer: int | None = None,
    record: Callable[[CallRecord], None] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention by a sparse method, or dense where that is better: short prompts, decoding, plans that do not pay.

    Args:
        q: ``[B, H, S, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, Dv]``.
        method: a method's name, a method, or a `Policy` with thresholds.
        scale: factor of the logits; default ``D ** -0.5``.
        extent: where the tokens sit; default: all keys live, the queries are the last S.
        causal: must be True for a sparse method; dense attention may be bidirectional.
        limit: the model's own sliding window.
        sinks, softcap: see `gossamer.backends.torch.execute`.
        layer: passed to the method (profiles differ between layers).
        record: called once with what was done.
        return_lse: also return the natural log of the softmax denominator, fp32 ``[B, H, S]``.

    Returns:
        out ``[B, H, S, Dv]``, or ``(out, lse)``.

    Raises:
        ValueError, TypeError: arguments that do not fit each other, or an unknown method.
    """
    policy = Policy.of(method)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    query_len, key_len = q.shape[2], k.shape[2]
    if extent is None:
        extent = Extent.full(q.shape[0], query_len, key_len)
    full = SparsePlan.dense(k.shape[1], query_len, key_len, extent, causal=causal, limit=limit)
    backends.check_inputs(q, k, v, full, sinks)

    started = time.perf_counter()
    plan, density, reason = plan_under(
        policy, q, k, v, scale=scale, extent=extent, causal=causal, limit=limit, layer=layer
    )
    planned = time.perf_counter()

    if plan is None:
        own_kernel = _runs_own_kernel(policy, reason, q, key_len)
        out, lse, executor = _dense(q, k, v, full, scale, sinks, softcap, return_lse or own_kernel)
    else:
        executor = backends.executor_for(q)
        if executor == "reference":
            _warn_reference(backends.why_reference(q))
        out, lse = backends.execute(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
    if reason is not None:
        _log_once(reason)
    if record is not None:
        record(
            CallRecord(
                layer,
                "dense" if plan is None else "sparse",
                reason,
                density,
                planned - started,
                time.perf_counter() - planned,
                executor,
                query_len,
                key_len,
            )
        )
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def plan_under(
    policy: Policy,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    extent: Extent,
    causal: bool = True,
    limit: int | None = None,
    layer: int | None = None,
) -> tuple[SparsePlan | None, float, str | None]:
    """What `sparse_attention` computes: the plan (None: dense), its density, and why dense where it was not asked for.

    Arguments are those of `sparse_attention`.
    """
    reason = _reason_for_dense(q, k, v, policy, causal, limit)
    if reason is not None or policy.method.name == "dense":
        return None, 1.0, reason
    with planners.within(limit):
        plan = policy.method.plan(q, k, scale=scale, extent=extent, layer=layer).with_limit(limit)
    density = plan.density()
    return (None, 1.0, TOO_DENSE) if density > policy.max_density else (plan, density, None)


def _reason_for_dense(q: Tensor, k: Tensor, v: Tensor, policy: Policy, causal: bool, limit: int | None) -> str | None:
    """Why no plan is even tried, or None."""
    reach = k.shape[2] if limit is None else min(limit, k.shape[2])
    if policy.method.name == "dense":
        return None
    if not causal:
        return "not causal"
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        return "training: sparse executors have no backward"
    if q.shape[2] == 1:
        return "decode"
    if reach < policy.min_tokens:
        return "short prompt" if limit is None or limit >= k.shape[2] else "short model window"
    if q.shape[2] < min(FEW_QUERIES, policy.min_tokens):
        return "few queries"
    return None


def _runs_own_kernel(policy: Policy, reason: str | None, q: Tensor, key_len: int) -> bool:
    """Whether dense attention runs on our executor where torch's SDPA could do it too."""
    if isinstance(policy.method, Dense):
        return policy.method.kernel == "gossamer"
    if reason == TOO_DENSE:
        return q.device.type == "cpu" and backends.executor_for(q) != "reference"
    return reason in ("decode", "few queries") and decodes_on_kernel(policy, q, key_len)


def decodes_on_kernel(policy: Policy, q: Tensor, key_len: int) -> bool:
    """Whether few queries against these keys run on our executor: on CPUs, where it splits them over the keys.

    Not under plain dense attention, nor against short caches.
    """
    if q.device.type != "cpu" or (isinstance(policy.method, Dense) and policy.method.kernel == "torch"):
        return False
    return key_len >= STREAMED_KEYS.get(q.element_size(), key_len + 1) and backends.executor_for(q) != "reference"


def _dense(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    need_lse: bool,
) -> tuple[Tensor, Tensor | None, str]:
    """Dense attention for an extent: torch's SDPA where it needs no S x T mask, else an executor on a dense plan."""
    query_len, key_len, extent = plan.query_len, plan.key_len, plan.extent
    training = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    plain = sinks is None and softcap is None and not need_lse
    unlimited = plan.limit is None or plan.limit >= key_len
    if plain and unlimited and extent.is_trivial(query_len, key_len):
        if not plan.causal or query_len == 1:
            return _sdpa(q, k, v, scale), None, "sdpa"
        if query_len == key_len:
            return _sdpa(q, k, v, scale, is_causal=True), None, "sdpa"
    if training or (plain and (query_len == 1 or backends.executor_for(q) == "reference")):
        mask = plan.rows_mask(torch.arange(query_len))[:, :1].to(q.device)
        out = dense_attention(q, k, v, mask=mask, scale=scale, sinks=sinks, softcap=softcap)
        return out, None, "sdpa" if sinks is None and softcap is None else "torch"
    out, lse = backends.execute(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
    return out, lse, backends.executor_for(q)


def dense_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Dense attention under an explicit bool mask ``[B, 1, S, T]`` (or broadcastable); None means no mask.

    Torch's SDPA, or plain torch where there are sinks or a soft-cap, which SDPA lacks. Differentiable.
    """
    if sinks is None and softcap is None:
        return _sdpa(q, k, v, scale, attn_mask=mask)
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    rows = q.reshape(batch, groups, -1, dim)
    logits = (rows @ k.transpose(-1, -2)).float().mul(scale).view(batch, heads, query_len, key_len)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    if sinks is not None:
        extra = sinks.float().view(1, heads, 1, 1).expand(batch, heads, query_len, 1)
        weights = torch.cat([logits, extra], dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = logits.softmax(dim=-1)
    weights = weights.to(v.dtype).view(batch, groups, -1, key_len)
    return (weights @ v).view(batch, heads, query_len, v.shape[-1])


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, scale: float, attn_mask: Tensor | None = None, is_causal: bool = False
) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


@functools.cache
def _log_once(reason: str) -> None:
    logger.info("attention runs dense: %s (counted in stats; logged once)", reason)


@functools.cache
def _warn_reference(why: str) -> None:
    warnings.warn(
        f"gossamer runs its torch reference path, which is slower than dense attention and needs memory for S x T "
        f"logits in chunks: {why}. Results are right; there is no speed-up.",
        RuntimeWarning,
        stacklevel=3,
    )
