"""The C++ executor: AMX, AVX-512, AVX2 and portable kernels, chosen at run time.

``GOSSAMER_CPU_ISA`` forces one of `supported_isas` (read at every call); without it each dtype gets the fastest that
this machine has. ``amx``, ``amx_emulated`` and ``avx512_bf16`` compute in bf16 and serve bf16 tensors; others then run
on the fp32 kernels of the same machine. ``amx_emulated`` is the AMX kernel over emulated tile operations, for tests on
machines without AMX.
"""

from __future__ import annotations

from gossamer.backends.cpu.attend import execute
from gossamer.backends.cpu.native import (
    ENVIRONMENT,
    MAX_HEAD_DIM,
    active_isa,
    has_openmp,
    is_available,
    supported_isas,
    why_unavailable,
)

__all__ = [
    "ENVIRONMENT",
    "MAX_HEAD_DIM",
    "active_isa",
    "execute",
    "has_openmp",
    "is_available",
    "supported_isas",
    "why_unavailable",
]
