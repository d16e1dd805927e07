"""Attention over a plan in plain torch, slow and obvious: the definition beside which every kernel is tested."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["attend", "attend_rows", "cleared", "cleared_queries", "logits", "wide"]

_LOGITS = 1 << 26  # held at once


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype, and lse ``[B, H, S]``: the natural log of the softmax denominator, the sink
        included, in fp32 (fp64 for fp64 input, in which all arithmetic then is). A row that attends nothing has
        ``out = 0`` and ``lse = -inf`` (or the sink's logit).

    Raises:
        ValueError: the plan is for another call, its tensors were written since, or the call has no values.
    """
    call.check_plan(plan)
    plan.check()  # masks are as large as its numbers say; in kernels that would take too long
    out = torch.empty(*call.q.shape[:3], call.values.shape[-1], dtype=call.q.dtype, device=call.device)
    lse = torch.empty(call.q.shape[:3], dtype=wide(call.q[:0]).dtype, device=call.device)
    for rows in _chunks(call):
        part, lse[:, :, rows] = attend_rows(call, plan, rows)
        out[:, :, rows] = part.to(out.dtype)
    return out, lse


def attend_rows(call: AttentionCall, plan: SparsePlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` for the query rows ``int64 [R]``, at once and in the dtype of all arithmetic."""
    mask = plan.rows_mask(rows).to(call.device).repeat_interleave(call.heads // plan.heads, dim=1)
    scores = logits(call, rows).masked_fill(~mask, float("-inf"))
    lse = torch.logsumexp(scores, dim=-1)
    if call.sinks is not None:
        lse = torch.logaddexp(lse, call.sinks.to(lse).view(1, -1, 1))
    weights = torch.exp(scores - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
    weights = weights.view(call.batch, call.groups, call.share * len(rows), call.key_len)
    out = weights @ wide(cleared(call.values, call))
    return out.view(call.batch, call.heads, len(rows), out.shape[-1]), lse


def logits(call: AttentionCall, rows: Tensor | slice, keys: slice = slice(None)) -> Tensor:
    """Logits of some query rows against some key slots, before any mask: ``[B, H, rows, keys]``, at least fp32."""
    q = wide(call.q[:, :, rows])
    # All heads of a group at once, so that keys are not expanded.
    stacked = q.reshape(call.batch, call.groups, call.share * q.shape[2], q.shape[3])
    scores = (stacked @ wide(call.k[:, :, keys]).transpose(-1, -2)).mul_(call.scale)
    scores = scores.view(call.batch, call.heads, q.shape[2], scores.shape[-1])
    return scores if call.softcap is None else scores.div_(call.softcap).tanh_().mul_(call.softcap)


def wide(x: Tensor) -> Tensor:
    """In the dtype of all arithmetic: fp64 for fp64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()


def cleared(x: Tensor, call: AttentionCall) -> Tensor:
    """Zeros in dead key slots, which may hold anything; 0 * NaN is NaN."""
    live = call.extent.live_keys(call.key_len)
    return x if bool(live.all()) else torch.where(live.to(x.device)[:, None, :, None], x, 0.0)


def cleared_queries(call: AttentionCall) -> Tensor:
    """q with zeros in dead rows, which may hold anything."""
    live = call.extent.live_queries(call.query_len)
    return call.q if bool(live.all()) else torch.where(live.to(call.device)[:, None, :, None], call.q, 0.0)


def _chunks(call: AttentionCall) -> Iterator[Tensor]:
    step = max(1, _LOGITS // max(1, call.batch * call.heads * call.key_len))
    for start in range(0, call.query_len, step):
        yield torch.arange(start, min(start + step, call.query_len), device="cpu")
