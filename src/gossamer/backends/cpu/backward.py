"""Gradients of attention over the pairs of a plan, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.cpu.bias import gradient_of_bias, takes_bias, with_bias_as_dimensions
from gossamer.backends.cpu.native import active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import arrays, dense_rows, plan_view, tensor_view
from gossamer.backends.torch.attend import refuse_gradient
from gossamer.backends.torch.backward import ALL, Gradients, Needs
from gossamer.backends.torch.backward import attend_backward as definition
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan
from gossamer.plan.parts import plan_parts

__all__ = ["attend_backward"]


def attend_backward(
    call: AttentionCall,
    plan: SparsePlan,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    needs: Needs = ALL,
) -> Gradients:
    """See `gossamer.backends.torch.attend_backward`, the definition, which also runs what the kernels lack.

    That is: plans with an order of keys or with ``pruned_mean``, and a bias that `attend` does not take. All else is
    computed in fp32, where the kernels are of bf16 from weights and slopes that are rounded to it, on
    ``torch.get_num_threads()`` threads without the GIL. Bit for bit, gradients do not depend on the number of threads.
    Beside the gradients it holds about 200 MiB, or as much as the keys and values of one head take as floats, twice.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError, TypeError: as the definition and `attend`.
    """
    refuse_gradient(plan)
    if plan.k_order is not None or plan.pruned_mean or not takes_bias(call):
        return definition(call, plan, out, lse, grad_out, grad_lse, needs)
    call.check_plan(plan)
    if call.bias is not None:
        wider = needs._replace(k=needs.k or needs.bias, bias=False)
        found = attend_backward(with_bias_as_dimensions(call), plan, out, lse, grad_out, grad_lse, wider)
        return _without_dimensions(call, found, needs)
    q, k, v = (dense_rows(x) for x in (call.q, call.k, call.values))
    check_tensors(q, k, v, out, grad_out)
    if plan.device.type != "cpu":
        raise ValueError(f"the cpu backend takes plans on the CPU, got one on {plan.device}; move it")
    asked = zip((q, k, v), needs, strict=False)
    found = Gradients(
        *(torch.zeros(x.shape, dtype=x.dtype, device="cpu") if needed else None for x, needed in asked),
        sinks=torch.zeros(call.heads, device="cpu") if needs.sinks and call.sinks is not None else None,
    )
    native, nothing = kernels(), torch.empty(0, device="cpu")
    # Held by name until the kernel is done: only their addresses are handed over.
    out, grad_out = dense_rows(out.detach()), dense_rows(_where_attended(call, out, lse, grad_out))
    lse = lse.contiguous()
    grad_lse = nothing if grad_lse is None else grad_lse.float().contiguous()
    sinks = nothing if call.sinks is None else call.sinks.detach().float().contiguous()
    grad_sinks = nothing if found.sinks is None else found.sinks
    tensors, sizes = plan_parts(plan)
    tensors = [x.contiguous() for x in tensors]
    lse_array, sinks_array, reaching_lse, to_sinks = arrays((lse, sinks, grad_lse, grad_sinks), (torch.float32,) * 4)
    attended = native.AttentionCall(
        q=tensor_view(q),
        k=tensor_view(k),
        v=tensor_view(v),
        out=tensor_view(out),
        lse=lse_array,
        sinks=sinks_array,
        scale=call.scale,
        softcap=0.0 if call.softcap is None else float(call.softcap),
        threads=torch.get_num_threads(),
        rows=(0, 0),
    )
    gradients = native.GradientCall(
        attended=attended,
        reaching=tensor_view(grad_out),
        reaching_lse=reaching_lse,
        queries=None if found.q is None else tensor_view(found.q),
        keys=None if found.k is None else tensor_view(found.k),
        values=None if found.v is None else tensor_view(found.v),
        sinks=to_sinks,
    )
    native.attend_backward(active_isa(q.dtype), plan_view(tensors, sizes), gradients)
    return found


def _where_attended(call: AttentionCall, out: Tensor, lse: Tensor, grad_out: Tensor) -> Tensor:
    """What reaches the output, 0 where a row attends its sink alone and that is no number: kernels multiply by it."""
    if call.sinks is None:
        return grad_out
    alone = lse == call.sinks.detach().to(lse).view(1, -1, 1)
    if not bool(alone.any()):
        return grad_out
    alone = alone & (out == 0).all(dim=-1) & ~grad_out.isfinite().all(dim=-1)
    return grad_out.masked_fill(alone[..., None], 0.0) if bool(alone.any()) else grad_out


def _without_dimensions(call: AttentionCall, found: Gradients, needs: Needs) -> Gradients:
    """From the gradients of a call whose bias was dimensions."""
    dim = call.q.shape[-1]
    return found._replace(
        q=None if found.q is None else found.q[..., :dim].contiguous(),
        k=found.k[..., :dim].contiguous() if needs.k and found.k is not None else None,
        bias=gradient_of_bias(call, found.k) if needs.bias and found.k is not None else None,
    )
