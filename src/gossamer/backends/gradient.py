"""What our executors do where a derivative is asked of them: they say that there is none."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.autograd.forward_ad as forward_mode
from torch import Tensor

from gossamer.call import AttentionCall

# torch.func has no public names for these.
_functorch: Any = vars(torch._C)["_functorch"]

__all__ = ["in_forward_mode", "is_transformed", "is_wrapped", "refuse", "refuse_transforms"]


def refuse(_context: Any, *_gradients: Tensor | None) -> NoReturn:
    """The backward of an executor's operator, for `torch.library.register_autograd`."""
    raise NotImplementedError(
        "a gradient was asked of one backend's attention by itself, which has no backward; use "
        "gossamer.backends.attend or gossamer.sparse_attention, which have one, or call it under torch.no_grad()"
    )


def in_forward_mode() -> bool:
    """Whether somebody computes derivatives forward, by dual tensors or ``torch.func.jvp``.

    Which tensors carry tangents does not always show: another transform may hide them.
    """
    return forward_mode._current_level >= 0


def is_wrapped(x: Tensor) -> bool:
    """Whether a tensor stands for others, in ``torch.func``."""
    return _functorch.is_functorch_wrapped_tensor(x)


def is_transformed(call: AttentionCall) -> bool:
    """Whether tensors carry tangents, or belong to ``torch.func``: kernels read plain numbers and lose the rest."""
    given = [tensor for tensor in (call.q, call.k, call.v, call.sinks, call.bias) if tensor is not None]
    if any(map(is_wrapped, given)):
        return True
    if not in_forward_mode():
        return False
    # Inside a transform, tangents of a tensor from outside are hidden.
    hidden = _functorch.peek_interpreter_stack() is not None
    return hidden or any(forward_mode.unpack_dual(tensor).tangent is not None for tensor in given)


def refuse_transforms(call: AttentionCall) -> None:
    """Raise where `is_transformed`.

    Raises:
        NotImplementedError: forward-mode derivatives, or vmap and the like.
    """
    if not is_transformed(call):
        return
    if in_forward_mode():
        raise NotImplementedError(
            "a sparse method has no forward-mode derivative (dual tensors, torch.func.jvp); use "
            "gossamer.methods.create('dense'), which has one, or ask for a gradient "
            "(reverse mode), which sparse methods have"
        )
    raise NotImplementedError(
        "a sparse method does not run under torch.func.vmap; put the extra dimension into the batch instead: "
        "q.flatten(0, 1), and k and v likewise, in one call"
    )
