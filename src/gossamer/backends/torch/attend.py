"""Attention over a plan in plain torch, slow and obvious: the definition beside which every kernel is tested."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["attend", "cleared", "logits"]

_LOGITS = 1 << 26  # held at once


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype, and lse ``[B, H, S]``: the natural log of the softmax denominator, the sink
        included, in fp32 (fp64 for fp64 input, in which all arithmetic then is). A row that attends nothing has
        ``out = 0`` and ``lse = -inf`` (or the sink's logit).

    Raises:
        ValueError: the plan is for another call, or the call has no values.
    """
    call.check_plan(plan)
    batch, heads, query_len, _ = call.q.shape
    values = wide(cleared(call.values, call))
    out = torch.empty(batch, heads, query_len, values.shape[-1], dtype=call.q.dtype, device=call.device)
    lse = torch.empty(batch, heads, query_len, dtype=values.dtype, device=call.device)
    for rows in _chunks(call):
        mask = plan.rows_mask(rows).to(call.device).repeat_interleave(heads // plan.heads, dim=1)
        scores = logits(call, rows).masked_fill(~mask, float("-inf"))
        row_lse = torch.logsumexp(scores, dim=-1)
        if call.sinks is not None:
            row_lse = torch.logaddexp(row_lse, call.sinks.to(row_lse).view(1, -1, 1))
        weights = torch.exp(scores - row_lse.masked_fill(row_lse == float("-inf"), 0.0)[..., None])
        weights = weights.reshape(batch, call.groups, -1, call.key_len)
        out[:, :, rows] = (weights @ values).view(batch, heads, len(rows), -1).to(out.dtype)
        lse[:, :, rows] = row_lse
    return out, lse


def logits(call: AttentionCall, rows: Tensor | slice, keys: slice = slice(None)) -> Tensor:
    """Logits of some query rows against some key slots, before any mask: ``[B, H, rows, keys]``, at least fp32."""
    q = wide(call.q[:, :, rows])
    stacked = q.reshape(call.batch, call.groups, -1, q.shape[-1])  # all heads of a group, so that keys are not expanded
    scores = (stacked @ wide(call.k[:, :, keys]).transpose(-1, -2)).mul_(call.scale)
    scores = scores.view(call.batch, call.heads, q.shape[2], -1)
    return scores if call.softcap is None else scores.div_(call.softcap).tanh_().mul_(call.softcap)


def wide(x: Tensor) -> Tensor:
    """In the dtype of all arithmetic: fp64 for fp64, else fp32."""
    return x if x.dtype == torch.float64 else x.float()


def cleared(x: Tensor, call: AttentionCall) -> Tensor:
    """Zeros in dead key slots, which may hold anything; 0 * NaN is NaN."""
    live = call.extent.live_keys(call.key_len)
    return x if bool(live.all()) else torch.where(live.to(x.device)[:, None, :, None], x, 0.0)


def _chunks(call: AttentionCall) -> Iterator[Tensor]:
    step = max(1, _LOGITS // max(1, call.batch * call.heads * call.key_len))
    for start in range(0, call.query_len, step):
        yield torch.arange(start, min(start + step, call.query_len))
