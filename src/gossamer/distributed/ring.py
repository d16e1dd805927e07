"""Ring attention: every rank attends from its own queries to the keys of all, which pass by (2310.01889).

What a rank has of a row is merged by the log of the softmax's denominator. The backward computes the weights of each
step from the final one, so that its pieces are the plan's own gradients.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from gossamer import backends
from gossamer.backends import Needs
from gossamer.backends.torch.partial import merge
from gossamer.call import AttentionCall, CallFields
from gossamer.distributed.exchange import Collector, Exchange, Traveller
from gossamer.distributed.layout import Layout
from gossamer.distributed.selection import Selection, selection_of
from gossamer.distributed.steps import Piece, pieces_of
from gossamer.plan import Extent, SparsePlan

__all__ = ["RingPlan", "merge", "ring_attention"]

Group = Any


class RingPlan:
    """A plan for a whole sequence as one rank of a ring computes it; made once, used by any number of layers and steps.

    Args:
        plan: for all ``layout.length`` positions, equal on all ranks: a `SparsePlan` of causal self-attention, or what
            `plan_vertical_slash` gives.
        layout: its unit is a multiple of the plan's blocks.
        rank: whose.

    Raises:
        ValueError: the plan is for another length, or one that a ring cannot take.
    """

    def __init__(self, plan: SparsePlan | Selection, layout: Layout, rank: int) -> None:
        if isinstance(plan, SparsePlan) and (plan.query_len, plan.key_len) != (layout.length, layout.length):
            raise ValueError(
                f"the plan is for {plan.query_len} queries and {plan.key_len} keys; a ring of {layout.length} "
                "positions takes one for the whole sequence, on every rank"
            )
        self.layout, self.rank = layout, rank
        self.selection = selection_of(plan, layout.unit)
        self._pieces: dict[int, list[Piece]] = {}

    @classmethod
    def dense(cls, layout: Layout, rank: int, heads: int, *, batch: int = 1, limit: int | None = None) -> RingPlan:
        """Every causal pair.

        Args:
            heads: key/value heads.
            limit: the model's own sliding window, or None.
        """
        length = layout.length
        extent = Extent.full(batch, length, length, limit=limit)
        return cls(SparsePlan.dense(heads, length, length, extent), layout, rank)

    @property
    def live(self) -> Tensor:
        """Which of the rank's tokens are no padding, bool ``[B, S]``."""
        return self.layout.positions(self.rank) < self.selection.lengths[:, None]

    def pieces(self, source: int) -> list[Piece]:
        """What is computed with the keys of a rank."""
        if source not in self._pieces:
            self._pieces[source] = pieces_of(self.selection, self.layout, self.rank, source)
        return self._pieces[source]

    def check(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        """Raise where tensors are not those of this rank.

        Raises:
            ValueError: another batch, number of heads or of tokens.
        """
        tokens = self.layout.tokens(self.rank)
        for name, x in (("q", q), ("k", k), ("v", v)):
            if x.ndim != 4 or x.shape[2] != tokens:
                raise ValueError(
                    f"{name} must be [batch, heads, {tokens}, head_dim], the tokens of rank {self.rank}, got "
                    f"{tuple(x.shape)}; use Layout.split"
                )
        heads = self.selection.heads
        if self.selection.batch != q.shape[0] or heads not in (q.shape[1], k.shape[1]):
            raise ValueError(
                f"the plan is for batch {self.selection.batch} and {heads} heads, but q has batch {q.shape[0]} and "
                f"{q.shape[1]} heads, k {k.shape[1]}"
            )


class _Given(NamedTuple):
    """Of a call, but for its tensors."""

    plan: RingPlan
    group: Group
    scale: float
    softcap: float | None


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: RingPlan,
    *,
    group: Group | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention over a sequence that the ranks of a group share; all of them call it. Differentiable, once.

    While a step computes, the keys and values of the next one are under way. The result is that of one process within
    what merging rounds: partial outputs are in q's dtype, sums in fp32 (fp64 for fp64). Gradients of keys and values
    travel in that too.

    Args:
        q: ``[B, H, S, D]``, this rank's tokens by their positions; k: ``[B, G, S, D]``; v: ``[B, G, S, Dv]``.
        plan: this rank's, for the layout of the sequence.
        group: a ``torch.distributed`` group; default: all processes. gloo is tested, nccl takes the same way and has
            not been run.
        scale, softcap, sinks: see `gossamer.AttentionCall`.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype, and the natural log of the softmax denominator, ``[B, H, S]``.

    Raises:
        ValueError, TypeError: tensors or a plan that do not fit.
        RuntimeError: a rank has ended, or did not answer within the group's time-out.
    """
    plan.check(q, k, v)
    fields: CallFields = {"scale": scale, "softcap": softcap, "sinks": sinks}
    own = AttentionCall.of(q, k, v, **fields)
    if dist.is_initialized() and dist.get_rank(group) != plan.rank:
        raise ValueError(f"the plan is of rank {plan.rank}, but this process is rank {dist.get_rank(group)}")
    out, lse = _Ring.apply(q, k, v, _Given(plan, group, own.scale, softcap))  # pyright: ignore[reportGeneralTypeIssues]
    if sinks is None:
        return out, lse
    logit = sinks.to(lse).view(1, -1, 1)
    # As of one process, rows of padding have a sink's logit and no gradient.
    logit = torch.where(plan.live.to(q.device)[:, None], logit, logit.detach())
    with_sinks = torch.logaddexp(lse, logit)
    share = torch.exp(lse - with_sinks).masked_fill(with_sinks == float("-inf"), 0.0)
    return (out * share[..., None]).to(q.dtype), with_sinks


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, given: _Given) -> tuple[Tensor, Tensor]:
        ctx.given = given
        ctx.set_materialize_grads(False)
        out, lse = _forward(q, k, v, given)
        ctx.save_for_backward(q, k, v, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse = ctx.saved_tensors
        # Even a rank whose own result reaches nothing has keys that others attend, and passes on theirs.
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        found = _backward(q, k, v, ctx.given, out, lse, grad_out, grad_lse)
        return *(x if needed else None for x, needed in zip(found, ctx.needs_input_grad, strict=False)), None


def _wide(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _forward(q: Tensor, k: Tensor, v: Tensor, given: _Given) -> tuple[Tensor, Tensor]:
    layout = given.plan.layout
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=_wide(q), device=q.device)
    lse = torch.full(q.shape[:3], float("-inf"), dtype=_wide(q), device=q.device)
    keys = Traveller(Exchange(layout, given.group), [k.contiguous(), v.contiguous()], "keys and values")
    for step in range(layout.ranks):
        source = layout.source(given.plan.rank, step)
        for piece, call, plan in _calls(q, keys.at(step), given, source):
            part_out, part_lse = backends.attend(call, plan)
            _merge_piece(out, lse, part_out, part_lse, piece)
    return out.to(q.dtype), lse


def _calls(
    q: Tensor, keys: list[Tensor], given: _Given, source: int
) -> Iterator[tuple[Piece, AttentionCall, SparsePlan]]:
    """The pieces of a step."""
    for piece in given.plan.pieces(source):
        plan = piece.plan.to(q.device)
        k, v = (piece.keys.of(x) for x in keys)
        yield piece, AttentionCall(piece.queries.of(q), k, v, plan.extent, given.scale, softcap=given.softcap), plan


def _merge_piece(out: Tensor, lse: Tensor, part_out: Tensor, part_lse: Tensor, piece: Piece) -> None:
    spans = piece.queries.spans
    part_out, part_lse = (x.unflatten(0, (-1, len(spans))) for x in (part_out, part_lse))
    for n, span in enumerate(spans):
        merge(out.narrow(2, *span), lse.narrow(2, *span), part_out[:, n], part_lse[:, n])


def _backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    given: _Given,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    layout, wide = given.plan.layout, _wide(q)
    exchange = Exchange(layout, given.group)
    to_q = torch.zeros(q.shape, dtype=wide, device=q.device)
    keys = Traveller(exchange, [k.contiguous(), v.contiguous()], "keys and values")

    def zeros(tokens: int) -> list[Tensor]:
        return [torch.zeros(*x.shape[:2], tokens, x.shape[3], dtype=wide, device=x.device) for x in (k, v)]

    sums = Collector(exchange, zeros, "gradients of the keys and values")
    needs = Needs(sinks=False, bias=False)
    for step in range(layout.ranks):
        source = layout.source(given.plan.rank, step)
        found = []
        for piece, call, plan in _calls(q, keys.at(step), given, source):
            part = piece.queries
            reaching = None if grad_lse is None else part.of_rows(grad_lse)
            rows = part.of(out), part.of_rows(lse).to(wide), part.of(grad_out), reaching
            gradients = backends.attend_backward(call, plan, *rows, needs)
            assert gradients.q is not None
            part.add(to_q, gradients.q.to(wide))
            found.append((piece.keys, gradients))

        def add(held: list[Tensor], found: list[Any] = found) -> None:
            for part, gradients in found:
                part.add(held[0], gradients.k.to(wide))
                part.add(held[1], gradients.v.to(wide))

        sums.add(step, add)
    to_k, to_v = sums.own()
    return to_q.to(q.dtype), to_k.to(k.dtype), to_v.to(v.dtype)
