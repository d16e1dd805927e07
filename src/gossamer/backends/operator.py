"""Attention over a plan as an operator of torch with a gradient, whichever backend attends.

One piece for autograd, ``torch.compile`` and ``torch.export``: a graph holds the plan as tensors and sees nothing of
how the gradient is found. What autograd keeps for the backward are the inputs, the output, the LSE and the plan.
"""

from __future__ import annotations

import importlib
from typing import Any, NoReturn

import torch
from torch import Tensor

from gossamer.backends.torch.backward import Gradients, Needs
from gossamer.backends.torch.backward import attend_backward as definition
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan
from gossamer.plan.parts import plan_of, plan_parts

__all__ = ["attend", "attend_backward"]

_library = torch.library.Library("gossamer", "FRAGMENT")
_GIVEN = "Tensor q, Tensor k, Tensor v, Tensor? sinks, Tensor? bias, Tensor[] plan, int[] sizes, float scale, "
_GIVEN += "float? softcap, str backend"
_library.define(f"attend({_GIVEN}) -> (Tensor, Tensor)")
_library.define(
    f"attend_backward({_GIVEN}, Tensor out, Tensor lse, Tensor? grad_out, Tensor? grad_lse, bool[] needs) -> Tensor[]"
)
_PLAN = 5  # place of the plan among what is given


def attend(call: AttentionCall, plan: SparsePlan, backend: str) -> tuple[Tensor, Tensor]:
    """`gossamer.backends.torch.attend` by a backend of that name; differentiable."""
    return torch.ops.gossamer.attend(
        call.q, call.k, call.values, call.sinks, call.bias, *plan_parts(plan), call.scale, call.softcap, backend
    )


def attend_backward(
    call: AttentionCall,
    plan: SparsePlan,
    backend: str,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None,
    needs: Needs,
) -> Gradients:
    """By a backend, or by the definition where it has no backward."""
    module = importlib.import_module(f"gossamer.backends.{backend}")
    return getattr(module, "attend_backward", definition)(call, plan, out, lse, grad_out, grad_lse, needs)


def _call_of(given: tuple[Any, ...]) -> tuple[AttentionCall, SparsePlan, str]:
    q, k, v, sinks, bias, tensors, sizes, scale, softcap, backend = given
    plan = plan_of(list(tensors), list(sizes))
    fields = {"scale": scale, "sinks": sinks, "softcap": softcap, "bias": bias}
    return AttentionCall(q, k, v, plan.extent, **fields), plan, backend


@torch.library.impl(_library, "attend", "CompositeExplicitAutograd")
def _attend(*given: Any) -> tuple[Tensor, Tensor]:
    call, plan, backend = _call_of(given)
    with torch.no_grad():
        return importlib.import_module(f"gossamer.backends.{backend}").attend(call, plan)


@torch.library.impl(_library, "attend_backward", "CompositeExplicitAutograd")
def _attend_backward(*given: Any) -> list[Tensor]:
    *inputs, out, lse, grad_out, grad_lse, needs = given
    call, plan, backend = _call_of(tuple(inputs))
    grad_out = torch.zeros_like(out) if grad_out is None else grad_out
    with torch.no_grad():
        found = attend_backward(call, plan, backend, out, lse, grad_out, grad_lse, Needs(*needs))
    return [gradient for gradient in found if gradient is not None]


@torch.library.register_fake("gossamer::attend", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_others: object) -> tuple[Tensor, Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    return q.new_empty(*q.shape[:3], v.shape[-1]), q.new_empty(q.shape[:3], dtype=wide)


@torch.library.register_fake("gossamer::attend_backward", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, bias: Tensor | None, *others: Any) -> list[Tensor]:
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    found = [
        None if x is None or not needed else x.new_empty(x.shape, dtype=q.dtype if n < 3 else wide)
        for n, (x, needed) in enumerate(zip((q, k, v, sinks, bias), others[-1], strict=True))
    ]
    return [x for x in found if x is not None]


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, sinks, bias, tensors, *ctx.sizes = inputs
    ctx.has = (sinks is not None, bias is not None)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, sinks, bias, *output, *tensors)


def _backward(ctx: Any, grad_out: Tensor | None, grad_lse: Tensor | None) -> tuple[Any, ...]:
    q, k, v, sinks, bias, out, lse, *tensors = ctx.saved_tensors
    nothing = [None] * len(tensors), *(None for _ in ctx.sizes)
    has = (True, True, True, *ctx.has)
    needs = [bool(needed and there) for needed, there in zip(ctx.needs_input_grad[:_PLAN], has, strict=True)]
    if (grad_out is None and grad_lse is None) or not any(needs):
        return (*(None for _ in range(_PLAN)), *nothing)
    given = (q, k, v, sinks, bias, tensors, *ctx.sizes)
    found = iter(torch.ops.gossamer.attend_backward(*given, out, lse, grad_out, grad_lse, needs))
    gradients = [next(found) if needed else None for needed in needs]
    own = (x if x is None else x.to(of.dtype) for x, of in zip(gradients, given[:_PLAN], strict=True))
    return (*own, *nothing)


def _refuse_second(_context: Any, *_gradients: Any) -> NoReturn:
    raise NotImplementedError(
        "a gradient of a gradient was asked of attention over a plan, which has only the first; use "
        "gossamer.backends.torch.attend, whose operations have all, or torch's scaled_dot_product_attention"
    )


torch.library.register_autograd("gossamer::attend", _backward, setup_context=_keep, lib=_library)
torch.library.register_autograd("gossamer::attend_backward", _refuse_second, lib=_library)
