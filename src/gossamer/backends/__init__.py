"""Executors: ``execute(q, k, v, plan, *, scale, sinks, softcap) -> (out, lse)``. `reference` is the definition.

`executor_for` says which one runs: C++ on the CPU; Triton on CUDA devices, and FlexAttention there where Triton has no
kernel. ``GOSSAMER_EXECUTOR`` (read at every call) forces ``cpu``, ``triton``, ``flex`` or ``reference``: all compute
the same pairs.
"""

from __future__ import annotations

import os

from torch import Tensor, bfloat16, float16, float32

from gossamer.backends import cpu, flex, triton
from gossamer.backends import torch as reference
from gossamer.backends.torch import check_inputs
from gossamer.plan import SparsePlan

__all__ = ["check_inputs", "execute", "executor_for", "why_reference"]

ENVIRONMENT = "GOSSAMER_EXECUTOR"
_EXECUTORS = {"cpu": cpu.execute, "triton": triton.execute, "flex": flex.execute, "reference": reference.execute}
_DTYPES = (float32, bfloat16, float16)


def executor_for(q: Tensor) -> str:
    """Name of the executor that `execute` uses for tensors like q.

    ``cpu/<instruction set>``, ``triton``, ``flex`` or ``reference``.

    Raises:
        ValueError: ``GOSSAMER_EXECUTOR`` names no executor.
    """
    name = _executor(q)
    return f"cpu/{cpu.active_isa(q.dtype)}" if name == "cpu" else name


def _executor(q: Tensor) -> str:
    forced = os.environ.get(ENVIRONMENT, "")
    if forced:
        if forced not in _EXECUTORS:
            raise ValueError(f"{ENVIRONMENT}={forced!r} is not known; use one of: {', '.join(_EXECUTORS)}")
        return forced
    if q.dtype not in _DTYPES:
        return "reference"
    if q.device.type == "cpu" and q.shape[-1] <= cpu.MAX_HEAD_DIM and cpu.is_available():
        return "cpu"
    # FlexAttention's kernels are Triton's too.
    if q.device.type == "cuda" and triton.is_available():
        return "triton" if q.shape[-1] <= triton.MAX_HEAD_DIM else "flex"
    return "reference"


def why_reference(q: Tensor) -> str:
    """Why plans for tensors like q run on the reference executor."""
    failures = {"cpu": cpu.why_unavailable, "cuda": triton.why_unavailable}
    failure = failures[q.device.type]() if q.device.type in failures else None
    return failure or "no kernel for this device, dtype or head dimension"


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the plan on the best executor for q's device and dtype. See `reference.execute`, the definition."""
    return _EXECUTORS[_executor(q)](q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
