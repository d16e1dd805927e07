"""Attention with a gradient that keeps no plan: it is made again when the gradient is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

import gossamer.backends.operator as operator
from gossamer.backends.torch.backward import Needs
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = ["attend"]

_TENSORS = ("q", "k", "v", "sinks", "bias")


def attend(
    call: AttentionCall, plan: SparsePlan, backend: str, make: Callable[[AttentionCall], SparsePlan]
) -> tuple[Tensor, Tensor]:
    """As `operator.attend`, but ``make`` finds the plan again, of a call with the same tensors and fields."""
    return _Remade.apply(*(getattr(call, name) for name in _TENSORS), call, plan, backend, make)  # pyright: ignore


class _Remade(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, call, plan, ctx.backend, ctx.make = given
        ctx.set_materialize_grads(False)
        out, lse = operator.attend(call, plan, ctx.backend)
        # What autograd saves it also frees; a call that held the tensors would not.
        ctx.fields = {name: getattr(call, name) for name in call.__slots__ if name not in _TENSORS}
        ctx.save_for_backward(*tensors, out, lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *reaching: Tensor | None) -> tuple[Any, ...]:
        *tensors, out, lse = ctx.saved_tensors
        grad_out, grad_lse = reaching
        if grad_out is None and grad_lse is None:
            return (None,) * 9
        call = AttentionCall(**dict(zip(_TENSORS, tensors, strict=True)), **ctx.fields)
        needs = Needs(*(needed and x is not None for needed, x in zip(ctx.needs_input_grad, tensors, strict=False)))
        grad_out = torch.zeros_like(out) if grad_out is None else grad_out
        plan = ctx.make(call)
        found = operator.attend_backward(call, plan, ctx.backend, out, lse, grad_out, grad_lse, needs)
        same = (None if x is None or one is None else one.to(x.dtype) for one, x in zip(found, tensors, strict=True))
        return (*same, None, None, None, None)
