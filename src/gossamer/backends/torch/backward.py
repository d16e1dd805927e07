"""Gradients of attention over a plan in plain torch: the definition beside which every kernel's backward is tested."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from gossamer.backends.torch.attend import (
    cleared,
    cleared_queries,
    for_query_heads,
    log_lengths,
    of_query_heads,
    products,
    pruned_rows,
    refuse_gradient,
    row_parts,
    soft_capped,
    wide,
)
from gossamer.backends.torch.scores import block_means
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["ALL", "Gradients", "Needs", "attend_backward", "shared_by_keys"]

_LOGITS = 1 << 22  # held at once


class Needs(NamedTuple):
    """Of which inputs a gradient is asked for."""

    q: bool = True
    k: bool = True
    v: bool = True
    sinks: bool = True
    bias: bool = True


ALL = Needs()


class Gradients(NamedTuple):
    """Of the inputs of a call, in their shapes; None where it was not asked for, or the call has no such input.

    Those of q, k and v are in q's dtype, those of sinks and bias at least fp32.
    """

    q: Tensor | None
    k: Tensor | None
    v: Tensor | None
    sinks: Tensor | None = None
    bias: Tensor | None = None


def attend_backward(
    call: AttentionCall,
    plan: SparsePlan,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    needs: Needs = ALL,
) -> Gradients:
    """Gradients through `attend`, for a plan that is a constant.

    With the logits ``x = scale q . k``, ``y = softcap tanh(x / softcap)`` and ``z = y + bias``, the weights are
    ``p = exp(z - lse)``, and ::

        dP = dO . v        D = sum(dO * out) - dlse        dz = p (dP - D)        dx = dz (1 - (y / softcap)^2)
        dv = sum over queries of p dO       dq = scale sum over keys of dx k       dk = scale sum over queries of dx q
        dbias = sum over queries of dz      dsink = - sum over queries of exp(sink - lse) D

    A pruned block's mean is one more key, whose gradients its live keys share alike. Weights are computed again, some
    query rows at a time: memory is linear in the length. Rows and slots that are dead, and rows that attend nothing,
    have gradients of 0, whatever they hold and whatever reaches them.

    Args:
        out, lse: of `attend` for the same call and plan.
        grad_out: ``[B, H, S, Dv]``; grad_lse: ``[B, H, S]``, None for zeros.

    Raises:
        ValueError: the plan is for another call, its tensors were written since, or it has `SparsePlan.skip`.
    """
    call.check_plan(plan)
    refuse_gradient(plan)
    plan.check()
    with torch.no_grad():
        sums = _Sums(call, plan, needs)
        for rows in row_parts(call, torch.arange(call.query_len, device="cpu"), _LOGITS):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            reaching = None if grad_lse is None else grad_lse[:, :, part]
            sums.add(rows, out[:, :, part], lse[:, :, part], grad_out[:, :, part], reaching)
        return sums.gradients()


class _Sums:
    """What the parts of the queries have added so far."""

    def __init__(self, call: AttentionCall, plan: SparsePlan, needs: Needs) -> None:
        self.call, self.plan, self.needs = call, plan, needs
        self.queries = wide(cleared_queries(call))
        self.keys, self.values = wide(cleared(call.k, call)), wide(cleared(call.values, call))
        self.slots = call.key_len
        if plan.pruned_mean and plan.num_query_blocks:
            self.keys = torch.cat([self.keys, block_means(call.k, plan.grid)], dim=2)
            self.values = torch.cat([self.values, block_means(call.values, plan.grid)], dim=2)
        self.q = torch.zeros_like(call.q) if needs.q else None
        self.k = torch.zeros_like(self.keys) if needs.k else None
        self.v = torch.zeros_like(self.values) if needs.v else None
        has_sinks, has_bias = needs.sinks and call.sinks is not None, needs.bias and call.bias is not None
        self.sinks = self.queries.new_zeros(call.heads) if has_sinks else None
        self.bias = self.keys.new_zeros(self.keys.shape[:3]) if has_bias else None

    def add(self, rows: Tensor, out: Tensor, lse: Tensor, grad_out: Tensor, grad_lse: Tensor | None) -> None:
        call, part = self.call, slice(int(rows[0]), int(rows[-1]) + 1)
        queries = self.queries[:, :, part]
        pairs, added = self._pairs(rows)
        capped = soft_capped(products(call, queries, self.keys), call)
        lse = lse.to(capped)
        weights = torch.exp(capped + added - lse.masked_fill(lse == float("-inf"), 0.0)[..., None])
        weights = weights.masked_fill_(~pairs, 0.0)
        some = pairs.any(dim=-1)
        grad = wide(grad_out).masked_fill(~some[..., None], 0.0)
        level = (grad * wide(out)).sum(dim=-1)  # D
        if grad_lse is not None:
            level = level - grad_lse.to(level).masked_fill(~self._live(rows, some), 0.0)
        if self.sinks is not None:
            assert call.sinks is not None
            sink = call.sinks.to(lse).view(1, -1, 1)
            share = torch.where(sink == lse, 1.0, torch.exp(sink - lse))
            self.sinks -= (share * level).masked_fill(~self._live(rows, some), 0.0).sum(dim=(0, 2))
        if self.v is not None:
            self.v += self._of_groups(weights).transpose(-1, -2) @ self._of_groups(grad)
        if self.q is None and self.k is None and self.bias is None:
            return
        reaching = (self._of_groups(grad) @ self.values.transpose(-1, -2)).view_as(weights)
        slopes = weights.mul_(reaching - level[..., None]).masked_fill_(~pairs, 0.0)
        if self.bias is not None:
            self.bias += self._of_groups(slopes).sum(dim=2)
        if call.softcap is not None:
            slopes = slopes.mul_(1 - (capped / call.softcap).square())
        slopes = self._of_groups(slopes.mul_(call.scale))
        if self.q is not None:
            self.q[:, :, part] = (slopes @ self.keys).view_as(queries).to(self.q.dtype)
        if self.k is not None:
            self.k += slopes.transpose(-1, -2) @ self._of_groups(queries)

    def _pairs(self, rows: Tensor) -> tuple[Tensor, Tensor | float]:
        """Keys, and means of pruned blocks behind them, that rows attend; and what is added to their logits."""
        call, plan = self.call, self.plan
        pairs = for_query_heads(plan.rows_mask(rows), call)
        if call.bias is not None:
            return pairs, of_query_heads(call.bias, call)
        if self.keys.shape[2] == self.slots:
            return pairs, 0.0
        lengths = log_lengths(plan).to(self.keys)[:, None, None]
        added = torch.cat([lengths.new_zeros(*lengths.shape[:3], self.slots), lengths], dim=-1)
        return torch.cat([pairs, for_query_heads(pruned_rows(plan, rows), call)], dim=-1), added

    def _live(self, rows: Tensor, some: Tensor) -> Tensor:
        """Rows whose LSE depends on anything: live ones that attend nothing have that of their sink."""
        if self.call.sinks is None:
            return some
        live = self.call.extent.live_queries(self.call.query_len)[:, rows]
        return live.to(some.device)[:, None].expand_as(some)

    def _of_groups(self, x: Tensor) -> Tensor:
        """``[B, H, rows, n]`` as ``[B, G, rows of all heads of a group, n]``."""
        return x.reshape(self.call.batch, self.call.groups, -1, x.shape[-1])

    def gradients(self) -> Gradients:
        call = self.call
        k, v = (None if x is None else self._of_slots(x).to(call.q.dtype) for x in (self.k, self.v))
        return Gradients(self.q, k, v, self.sinks, None if self.bias is None else self.bias[..., : self.slots])

    def _of_slots(self, sums: Tensor) -> Tensor:
        """With what the means have, shared out among the live keys of their blocks."""
        if sums.shape[2] == self.slots:
            return sums
        own, means = sums[:, :, : self.slots], sums[:, :, self.slots :]
        return own + shared_by_keys(means, self.call, self.plan)


def shared_by_keys(means: Tensor, call: AttentionCall, plan: SparsePlan) -> Tensor:
    """What means of key blocks have, ``[B, G, N, dim]``, shared out among the live keys of each: ``[B, G, T, dim]``."""
    low, high = (ends.to(means.device) for ends in plan.grid.key_block_ends())
    share = means / (high - low).clamp(min=1)[:, None, :, None]
    position = call.extent.key_positions(call.key_len, means.device)
    block = (position // plan.block_k).clamp(0, means.shape[2] - 1)[:, None, :, None]
    live = call.extent.live_keys(call.key_len, means.device)[:, None, :, None]
    return torch.where(live, share.take_along_dim(block, dim=2), 0.0)
