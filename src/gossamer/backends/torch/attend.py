"""Attention over a plan in plain torch, slow and obvious: the definition beside which every kernel is tested."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.backends.torch.integers import Codes, integers_of
from gossamer.backends.torch.scores import block_means
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan
from gossamer.plan.checks import SKIP_TILE

__all__ = [
    "attend",
    "attend_rows",
    "cleared",
    "cleared_queries",
    "codes_of",
    "for_query_heads",
    "log_lengths",
    "logits",
    "of_query_heads",
    "products",
    "pruned_rows",
    "refuse_gradient",
    "row_parts",
    "soft_capped",
    "wide",
]

_LOGITS = 1 << 26  # held at once


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names, and its attributes, as `SparsePlan` says.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype, and lse ``[B, H, S]``: the natural log of the softmax denominator, the sink
        included, in fp32 (fp64 for fp64 input, in which all arithmetic then is). A row that attends nothing has
        ``out = 0`` and ``lse = -inf`` (or the sink's logit).

    Raises:
        ValueError: the plan is for another call, its tensors were written since, or the call has no values; a gradient
            is needed through a plan with `SparsePlan.skip` or ``quantised``; a bias beside ``pruned_mean`` or ``skip``.
    """
    call.check_plan(plan)
    refuse_bias_beside(call, plan)
    if call.needs_gradient:
        refuse_gradient(plan)
    plan.check()  # masks are as large as its numbers say; in kernels that would take too long
    out = torch.empty(*call.q.shape[:3], call.values.shape[-1], dtype=call.q.dtype, device=call.device)
    lse = torch.empty(call.q.shape[:3], dtype=wide(call.q[:0]).dtype, device=call.device)
    codes = codes_of(call) if plan.quantised else None
    for rows in row_parts(call, torch.arange(call.query_len, device="cpu"), _LOGITS):
        part, lse[:, :, rows] = _attend_rows(call, plan, rows, codes)
        out[:, :, rows] = part.to(out.dtype)
    return out, lse


def refuse_bias_beside(call: AttentionCall, plan: SparsePlan) -> None:
    """Raise for a bias beside an attribute of the plan.

    Raises:
        ValueError: the call has a bias, and the plan `SparsePlan.pruned_mean` or ``skip``.
    """
    if call.bias is not None and (plan.pruned_mean or plan.skip is not None):
        raise ValueError("a bias goes with plans that have neither pruned_mean nor skip; make the plan without them")


def refuse_gradient(plan: SparsePlan) -> None:
    """Raise for a plan that has no gradient.

    Raises:
        ValueError: what a row leaves out under `SparsePlan.skip` jumps with its logits, and numbers that are rounded to
            int8 (`SparsePlan.quantised`) do not follow those that they come from.
    """
    if plan.skip is not None:
        raise ValueError("a plan with skip has no gradient; make the plan without, or attend under torch.no_grad()")
    if plan.quantised:
        raise ValueError("a quantised plan has no gradient; make the plan without, or attend under torch.no_grad()")


def attend_rows(call: AttentionCall, plan: SparsePlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """`attend` for the query rows ``int64 [R]``, or ``[B, R]`` where batch rows have their own, in any order.

    Returns:
        out ``[B, H, R, Dv]`` and lse ``[B, H, R]``, both in the dtype of all arithmetic; dead rows attend nothing.
    """
    codes = codes_of(call) if plan.quantised else None
    parts = [_attend_rows(call, plan, part, codes) for part in row_parts(call, rows, _LOGITS)]
    return torch.cat([out for out, _ in parts], dim=2), torch.cat([lse for _, lse in parts], dim=2)


def _attend_rows(call: AttentionCall, plan: SparsePlan, rows: Tensor, codes: Codes | None) -> tuple[Tensor, Tensor]:
    """At once; from products of integers where there are ``codes``."""
    mask = for_query_heads(plan.rows_mask(rows), call)
    scores = logits(call, rows) if codes is None else _integer_logits(call, rows, codes)
    if call.bias is not None:
        scores = scores + of_query_heads(call.bias, call)
    scores = scores.masked_fill(~mask, float("-inf"))
    values = wide(cleared(call.values, call))
    if plan.skip is not None:
        scores = scores.masked_fill(_left_out(scores, call, plan.skip), float("-inf"))
    if plan.pruned_mean and plan.num_query_blocks:
        means = _logits(call, rows, block_means(call.k, plan.grid)) + log_lengths(plan).to(scores)[:, None, None]
        pruned = for_query_heads(pruned_rows(plan, rows), call)
        scores = torch.cat([scores, means.masked_fill(~pruned, float("-inf"))], dim=-1)
        values = torch.cat([values, block_means(call.values, plan.grid)], dim=-2)
    # By the softmax, not by the LSE: beside large logits that has no room for the log of a sum.
    lse = torch.logsumexp(scores, dim=-1)
    weights = scores.softmax(dim=-1).masked_fill((lse == float("-inf"))[..., None], 0.0)
    if call.sinks is not None:
        sinks = call.sinks.to(lse).view(1, -1, 1)
        # A sink that is NaN says nothing of pairs that are not there.
        weights = (weights * torch.sigmoid(lse - sinks)[..., None]).masked_fill(scores == float("-inf"), 0.0)
        lse = torch.logaddexp(lse, sinks)
    weights = weights.view(call.batch, call.groups, call.share * rows.shape[-1], values.shape[-2])
    out = weights @ values
    return out.view(call.batch, call.heads, rows.shape[-1], out.shape[-1]), lse


def of_query_heads(bias: Tensor, call: AttentionCall) -> Tensor:
    """A bias ``[B, G, T]`` as ``[B, H, 1, T]``, in the dtype of all arithmetic."""
    own = torch.promote_types(call.q.dtype, torch.float32)  # whatever the bias has
    return bias.to(own).repeat_interleave(call.share, dim=1)[:, :, None]


def for_query_heads(mask: Tensor, call: AttentionCall) -> Tensor:
    """A plan's ``[B, heads, ..]`` as ``[B, H, ..]`` on the call's device."""
    return mask.to(call.device).repeat_interleave(call.heads // mask.shape[1], dim=1)


def _left_out(scores: Tensor, call: AttentionCall, skip: float) -> Tensor:
    """Which keys each row leaves out, bool ``[B, H, R, T]``, of logits that are -inf where there is no pair."""
    left = torch.zeros_like(scores, dtype=torch.bool)
    for b, (start, count) in enumerate(zip(call.extent.key_start, call.extent.key_count, strict=True)):
        if count == 0:
            continue
        live = slice(int(start), int(start) + int(count))
        tiles = F.pad(scores[b, :, :, live], (0, -int(count) % SKIP_TILE), value=float("-inf"))
        largest = tiles.unflatten(-1, (-1, SKIP_TILE)).amax(-1)
        before = F.pad(largest, (1, 0), value=float("-inf")).cummax(-1).values[..., :-1]
        left[b, :, :, live] = (largest < before - skip).repeat_interleave(SKIP_TILE, dim=-1)[..., : int(count)]
    return left


def pruned_rows(plan: SparsePlan, rows: Tensor) -> Tensor:
    """Key blocks whose mean each row attends, bool ``[B, heads, R, N]``."""
    blocks, row = plan.pruned_blocks(), plan.row_blocks(rows)
    live = plan.extent.live_queries(plan.query_len, plan.device).gather(1, rows.to(plan.device).expand(plan.batch, -1))
    return blocks.gather(2, row[..., None].expand(-1, -1, -1, blocks.shape[-1])) & live[:, None, :, None]


def log_lengths(plan: SparsePlan) -> Tensor:
    """Log of the number of live keys of each key block, ``[B, N]``."""
    low, high = plan.grid.key_block_ends()
    return (high - low).double().log()


def logits(call: AttentionCall, rows: Tensor | slice, keys: slice = slice(None)) -> Tensor:
    """Logits of some query rows against some key slots, before any mask: ``[B, H, rows, keys]``, at least fp32.

    Rows are ``[R]``, or ``[B, R]``.
    """
    return _logits(call, rows, wide(call.k[:, :, keys]))


def _logits(call: AttentionCall, rows: Tensor | slice, keys: Tensor) -> Tensor:
    """Of some query rows and ``[B, G, keys, D]``, in the dtype of all arithmetic."""
    if isinstance(rows, Tensor) and rows.ndim == 2:
        q = wide(call.q.take_along_dim(rows.to(call.device)[:, None, :, None], dim=2))
    else:
        q = wide(call.q[:, :, rows])
    return soft_capped(products(call, q, keys), call)


def _integer_logits(call: AttentionCall, rows: Tensor, codes: Codes) -> Tensor:
    """As `logits` of all keys, from products of integers."""
    rows = rows.to(call.device).expand(call.batch, -1)[:, None]
    own, q = codes.q_steps.dtype, codes.q.take_along_dim(rows[..., None], dim=2)
    # Sums of products are integers below 2^24, which fp32 holds.
    scores = products(call, q.to(own), codes.k.to(own))
    scores = scores * codes.q_steps.take_along_dim(rows, dim=2)[..., None]
    scores = scores * codes.k_steps.repeat_interleave(call.share, dim=1)[:, :, None]
    return soft_capped(scores + call.scale * codes.shifts.take_along_dim(rows, dim=2)[..., None], call)


def codes_of(call: AttentionCall) -> Codes:
    """A call's queries and keys in int8; dead ones are 0."""
    live = call.extent.live_keys(call.key_len).to(call.device)
    return integers_of(wide(cleared_queries(call)), wide(cleared(call.k, call)), live)


def products(call: AttentionCall, q: Tensor, keys: Tensor) -> Tensor:
    """``scale * q . k`` of ``[B, H, rows, D]`` and ``[B, G, keys, D]``: ``[B, H, rows, keys]``."""
    # All heads of a group at once, so that keys are not expanded.
    stacked = q.reshape(call.batch, call.groups, call.share * q.shape[2], q.shape[3])
    scores = (stacked @ keys.transpose(-1, -2)).mul_(call.scale)
    return scores.view(call.batch, call.heads, q.shape[2], scores.shape[-1])


def soft_capped(scores: Tensor, call: AttentionCall) -> Tensor:
    """Writes over them."""
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


def row_parts(call: AttentionCall, rows: Tensor, most: int) -> tuple[Tensor, ...]:
    """Rows in parts that hold at most so many logits, one row at least."""
    return rows.split(max(1, most // max(1, call.batch * call.heads * call.key_len)), dim=-1)
