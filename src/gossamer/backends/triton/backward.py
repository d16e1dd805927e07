"""Gradients of attention over a plan in Triton."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.torch.attend import refuse_gradient
from gossamer.backends.torch.backward import ALL, Gradients, Needs
from gossamer.backends.torch.backward import attend_backward as definition
from gossamer.backends.triton.forward import arguments_of
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

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
    """See `gossamer.backends.torch.attend_backward`, the definition, which also runs a call with a bias:
    these kernels have none.

    fp32, bf16 or fp16 with sums in fp32; weights and slopes are rounded to the call's dtype before they are multiplied.
    Each tile of queries, and of keys, is summed up by one program in a fixed order: gradients repeat bit for bit.
    Beside the gradients it holds two floats a row and head, the plan's lists by key, a bit for each pair of blocks
    where a plan has columns or `SparsePlan.pruned_mean`, and, of plans with columns or an order of keys, the gradients
    of keys and values as floats.

    Raises:
        RuntimeError, ValueError, TypeError: as the definition and `attend`.
    """
    refuse_gradient(plan)
    if call.bias is not None:
        return definition(call, plan, out, lse, grad_out, grad_lse, needs)
    given = arguments_of(call, plan)
    if not any((needs.q, needs.k, needs.v, needs.sinks and call.sinks is not None)):
        return Gradients(None, None, None)
    from gossamer.backends.triton.launch_backward import Reached, launch_backward

    reached = Reached(out.detach(), lse.detach(), grad_out, grad_lse)
    with torch.no_grad():
        return launch_backward(call, plan, given, reached, needs)
