"""Executors: ``execute(q, k, v, plan, *, scale, sinks, softcap) -> (out, lse)``. `reference` is the definition."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.ops import cpu, reference
from gossamer.ops.reference import check_inputs
from gossamer.plan import SparsePlan

__all__ = ["check_inputs", "execute", "executor_for", "why_reference"]

_CPU_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def executor_for(q: Tensor) -> str:
    """Name of the executor that `execute` uses for tensors like q: ``cpu/<instruction set>`` or ``reference``."""
    if q.device.type == "cpu" and q.dtype in _CPU_DTYPES and q.shape[-1] <= 256 and cpu.is_available():
        return f"cpu/{cpu.active_isa(q.dtype)}"
    return "reference"


def why_reference() -> str:
    """Why plans run on the reference executor here."""
    return cpu.why_unavailable() or "no kernel for this device, dtype or head dimension"


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
    run = reference.execute if executor_for(q) == "reference" else cpu.execute
    return run(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
