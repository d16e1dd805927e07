"""What our executors do where a gradient is asked of them: they say that there is none."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from gossamer.call import AttentionCall

# torch.func has no public name for this.
_is_wrapped: Any = vars(torch._C)["_functorch"].is_functorch_wrapped_tensor

__all__ = ["refuse", "refuse_transforms"]


def refuse(_context: Any, *_gradients: Tensor | None) -> NoReturn:
    """The backward of an executor's operator, for `torch.library.register_autograd`."""
    raise NotImplementedError(
        "a gradient was asked of a sparse executor, which has no backward; train with gossamer.sparse_attention, which "
        "runs dense attention where gradients are needed, or call the executor under torch.no_grad()"
    )


def refuse_transforms(call: AttentionCall) -> None:
    """Raise for tensors with tangents, or of ``torch.func``: kernels read plain numbers and would lose the rest.

    Raises:
        NotImplementedError: forward-mode derivatives, or vmap and the like.
    """
    for tensor in (call.q, call.k, call.v, call.sinks):
        if tensor is None:
            continue
        if _is_wrapped(tensor):
            raise NotImplementedError(
                "sparse attention does not work under torch.func (vmap, jvp, grad); put the extra dimension into the "
                "batch, or use gossamer.methods.create('dense')"
            )
        if forward_mode.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(
                "gossamer has no forward-mode derivative, by no method; ask for a gradient (reverse mode), which runs "
                "dense, or call torch's scaled_dot_product_attention under sdpa_kernel(SDPBackend.MATH)"
            )
