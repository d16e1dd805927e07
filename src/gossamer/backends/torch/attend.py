"""The definition of plan execution, in plain torch. Slow and obvious; every other executor is compared with it."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.plan import SparsePlan

__all__ = ["execute"]

_MASK_BUDGET = 1 << 26  # logits held at once


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names.

    Args:
        q: ``[B, H, S, D]``; k: ``[B, G, T, D]``; v: ``[B, G, T, Dv]``, with H a multiple of G.
        plan: for H or for G heads.
        scale: factor of the logits ``q . k``.
        sinks: ``[H]``, one extra logit a head in the softmax denominator, with no value (gpt-oss).
        softcap: logits become ``softcap * tanh(logits / softcap)`` before the mask (Gemma 2).

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype, and lse ``[B, H, S]``: the natural log of the softmax denominator, the
        sink included, in fp32 (fp64 for fp64 input, in which all arithmetic then is). A row that attends nothing has
        ``out = 0`` and ``lse = -inf`` (or the sink's logit).
    """
    check_inputs(q, k, v, plan, sinks)
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    share = heads // groups  # query heads that share a key/value head
    compute = torch.float64 if q.dtype == torch.float64 else torch.float32
    keys = k.to(compute)
    values = v.to(compute)
    # A dead slot may hold anything (the tail of a static cache), and 0 * NaN is NaN: clear it.
    kpos = plan.extent.key_positions(key_len)
    live = ((kpos >= 0) & (kpos < plan.extent.key_count[:, None])).to(v.device)[:, None, :, None]
    values = torch.where(live, values, 0.0)

    out = torch.empty(batch, heads, query_len, v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(batch, heads, query_len, dtype=compute, device=q.device)
    chunk = max(1, _MASK_BUDGET // max(1, batch * heads * key_len))
    for start in range(0, query_len, chunk):
        stop = min(start + chunk, query_len)
        rows = q[:, :, start:stop].to(compute).reshape(batch, groups, share * (stop - start), dim)
        logits = (rows @ keys.transpose(-1, -2) * scale).view(batch, heads, stop - start, key_len)
        if softcap is not None:
            logits = softcap * torch.tanh(logits / softcap)
        mask = plan.rows_mask(torch.arange(start, stop)).to(q.device)
        mask = mask.repeat_interleave(heads // plan.heads, dim=1)
        logits = logits.masked_fill(~mask, float("-inf"))
        row_lse = torch.logsumexp(logits, dim=-1)
        if sinks is not None:
            row_lse = torch.logaddexp(row_lse, sinks.to(row_lse).view(1, -1, 1))
        weights = torch.exp(logits - row_lse.masked_fill(row_lse == float("-inf"), 0.0)[..., None])
        weights = weights.reshape(batch, groups, share * (stop - start), key_len)
        out[:, :, start:stop] = (weights @ values).view(batch, heads, stop - start, v.shape[-1]).to(q.dtype)
        lse[:, :, start:stop] = row_lse
    return out, lse


def check_inputs(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, sinks: Tensor | None) -> None:
    """Shapes, dtypes and devices of an executor's arguments; shared by all executors.

    Raises:
        ValueError, TypeError: says what was given, what was expected and what to do.
    """
    if q.ndim != 4 or k.ndim != 4 or v.ndim != 4:
        raise ValueError(
            "q, k and v must be [batch, heads, tokens, head_dim], "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    batch, heads, query_len, dim = q.shape
    groups, key_len = k.shape[1], k.shape[2]
    if k.shape[0] != batch or v.shape[:3] != k.shape[:3] or k.shape[3] != dim:
        raise ValueError(
            f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not fit: batch and head_dim of q and k "
            "must agree, and v must have k's batch, heads and tokens"
        )
    if groups == 0 or heads % groups:
        raise ValueError(f"the {heads} query heads must be a multiple of the {groups} key/value heads")
    if q.dtype != k.dtype or q.dtype != v.dtype:
        raise TypeError(f"q, k and v must share a dtype, got {q.dtype}, {k.dtype}, {v.dtype}; convert them first")
    if not q.is_floating_point():
        raise TypeError(f"q, k and v must be floating point, got {q.dtype}")
    if q.device != k.device or q.device != v.device:
        raise ValueError(f"q, k and v must share a device, got {q.device}, {k.device}, {v.device}")
    if (plan.batch, plan.query_len, plan.key_len) != (batch, query_len, key_len):
        raise ValueError(
            f"the plan is for batch {plan.batch}, {plan.query_len} queries and {plan.key_len} keys, "
            f"but q and k have batch {batch}, {query_len} queries and {key_len} keys"
        )
    if plan.heads not in (heads, groups):
        raise ValueError(
            f"the plan has {plan.heads} heads; q has {heads} and k has {groups}: plan for either of these numbers"
        )
    if sinks is not None and sinks.shape != (heads,):
        raise ValueError(f"sinks must have shape ({heads},), one logit a query head, got {tuple(sinks.shape)}")
