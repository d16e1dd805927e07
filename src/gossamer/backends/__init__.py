"""Backends: what computes scores, chooses candidates, counts pairs and attends. `backend_of` alone says which one does.

Each backend is a module with the same functions (verbs), of which it may lack some; ``torch`` has all of them and is
their definition. ``GOSSAMER_BACKEND`` forces ``torch``, ``cpu``, ``triton`` or ``flex`` to attend, and
``GOSSAMER_PLANNER`` forces ``torch``, ``cpu`` or ``triton`` for all other verbs; both are read at every call. From
equal scores all backends choose the same sets, and all attend the same pairs.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from types import ModuleType

from torch import Tensor, bfloat16, compiler, device, float16, float32

from gossamer.backends import cpu, operator, remade, triton
from gossamer.backends.cpu.bias import takes_bias
from gossamer.backends.gradient import is_transformed, refuse_transforms
from gossamer.backends.torch.attend import refuse_gradient
from gossamer.backends.torch.backward import ALL, Gradients, Needs
from gossamer.call import AttentionCall
from gossamer.plan import SparsePlan

__all__ = [
    "ALL",
    "Gradients",
    "Needs",
    "attend",
    "attend_backward",
    "backend_of",
    "is_transformed",
    "name_of",
    "refuse_transforms",
    "why_slow",
]

ATTEND = "GOSSAMER_BACKEND"
PLAN = "GOSSAMER_PLANNER"
MAX_HEAD_DIM = 256
_NAMES = {ATTEND: ("torch", "cpu", "triton", "flex"), PLAN: ("torch", "cpu", "triton")}
_ATTENDING = ("attend", "attend_backward")
_DTYPES = (float32, bfloat16, float16)


def backend_of(subject: AttentionCall | SparsePlan | Tensor, verb: str) -> ModuleType:
    """The backend whose function ``verb`` serves a call, a plan, or tensors like this one (whose last dimension is D).

    C++ on the CPU; Triton on CUDA devices, and FlexAttention where Triton has no kernel; else torch.

    Raises:
        ValueError: an environment variable names no backend.
    """
    environment = ATTEND if verb in _ATTENDING else PLAN
    forced = os.environ.get(environment, "")
    if forced and forced not in _NAMES[environment]:
        raise ValueError(f"{environment}={forced!r} is not known; use one of: {', '.join(_NAMES[environment])}")
    name = forced or _fastest(subject, verb)
    backend = importlib.import_module(f"gossamer.backends.{name}")
    return backend if hasattr(backend, verb) else importlib.import_module("gossamer.backends.torch")


def _fastest(subject: AttentionCall | SparsePlan | Tensor, verb: str) -> str:
    # Kernels read addresses; while torch compiles, there are none.
    if verb not in _ATTENDING and compiler.is_compiling():
        return "torch"
    if isinstance(subject, SparsePlan):
        return _on(subject.device) or "torch"
    q, widest = (subject.q, _widest(subject)) if isinstance(subject, AttentionCall) else (subject, subject.shape[-1])
    name = _on(q.device)
    if isinstance(subject, AttentionCall) and subject.bias is not None and verb.startswith("attend"):
        return name if name is not None and _takes_bias(name, subject, verb) else "torch"
    if name is None or q.dtype not in _DTYPES:
        return "torch"
    if widest <= MAX_HEAD_DIM:
        return name
    # FlexAttention's kernels are Triton's too.
    return "flex" if name == "triton" and verb == "attend" else "torch"


def _takes_bias(name: str, call: AttentionCall, verb: str) -> bool:
    """Whether a backend with kernels adds a call's bias: as dimensions in C++, forward alone in Triton."""
    if name == "cpu":
        return verb != "attend_rows" and takes_bias(call)
    return verb == "attend" and call.q.dtype in _DTYPES and _widest(call) <= MAX_HEAD_DIM


def _widest(call: AttentionCall) -> int:
    return max(call.q.shape[-1], 0 if call.v is None else call.v.shape[-1])


def _on(where: device) -> str | None:
    """The backend with kernels of our own for a device, if it is there."""
    if where.type == "cpu" and cpu.is_available():
        return "cpu"
    return "triton" if where.type == "cuda" and triton.is_available() else None


def name_of(subject: AttentionCall | Tensor) -> str:
    """Name of the backend that attends, with its instruction set: ``cpu/avx512_bf16``, ``triton``, ``torch``."""
    name = _name(backend_of(subject, "attend"))
    dtype = subject.dtype if isinstance(subject, Tensor) else subject.q.dtype
    return f"cpu/{cpu.active_isa(dtype)}" if name == "cpu" else name


def why_slow(call: AttentionCall) -> str:
    """Why plans for a call run on the torch backend."""
    failures = {"cpu": cpu.why_unavailable, "cuda": triton.why_unavailable}
    failure = failures[call.device.type]() if call.device.type in failures else None
    if failure is None and call.bias is not None:
        return "no kernel for a bias"
    return failure or "no kernel for this device, dtype or head dimension"


def attend(
    call: AttentionCall, plan: SparsePlan, *, make: Callable[[AttentionCall], SparsePlan] | None = None
) -> tuple[Tensor, Tensor]:
    """Run the plan on the best backend for the call. See `gossamer.backends.torch.attend`, the definition.

    Differentiable, once.

    Args:
        make: makes the plan again for the gradient; without it the plan is kept. In graphs it is kept all the same.

    Raises:
        ValueError: a gradient is needed through a plan with `SparsePlan.skip` or ``quantised``.
        NotImplementedError: tensors that carry tangents, or belong to ``torch.func``.
    """
    refuse_transforms(call)
    if not call.needs_gradient:
        return backend_of(call, "attend").attend(call, plan)
    refuse_gradient(plan)
    call.check_plan(plan)
    name = _name(backend_of(call, "attend"))
    if make is None or compiler.is_compiling():
        return operator.attend(call, plan, name)
    return remade.attend(call, plan, name, make)


def attend_backward(
    call: AttentionCall,
    plan: SparsePlan,
    out: Tensor,
    lse: Tensor,
    grad_out: Tensor,
    grad_lse: Tensor | None = None,
    needs: Needs = ALL,
) -> Gradients:
    """Gradients through `attend`. See `gossamer.backends.torch.attend_backward`, the definition."""
    given = (out, lse, grad_out, grad_lse, needs)
    return operator.attend_backward(call, plan, _name(backend_of(call, "attend")), *given)


def _name(backend: ModuleType) -> str:
    return backend.__name__.rpartition(".")[2]
