"""The compiled kernels: whether they load, and which instruction set a call runs on."""

from __future__ import annotations

import functools
import os
from typing import Any

import torch
from torch import Tensor

__all__ = ["active_isa", "check_tensors", "has_openmp", "is_available", "kernels", "supported_isas", "why_unavailable"]

try:
    import gossamer.backends.cpu._kernels as _kernels  # pyright: ignore[reportMissingModuleSource]

    _failure: str | None = None
except ImportError as error:
    _kernels = None
    _failure = f"the C++ kernels are not built ({error}); install a C++17 compiler and reinstall gossamer"

ENVIRONMENT = "GOSSAMER_CPU_ISA"
MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Instruction sets whose tiles are pairs of bf16; other dtypes run on the fp32 set given here.
_BF16_ONLY = {"avx512_bf16": "avx512", "amx": "avx512", "amx_emulated": "portable"}


def kernels() -> Any:
    """The compiled module.

    Raises:
        RuntimeError: the kernels are not built.
    """
    if _kernels is None:
        raise RuntimeError(_failure)
    return _kernels


def is_available() -> bool:
    """Whether the C++ kernels are built and load."""
    return _kernels is not None


def why_unavailable() -> str | None:
    """Why `is_available` is False, or None."""
    return _failure


def supported_isas() -> list[str]:
    """Instruction sets that this build has and this machine runs; any of them can be forced."""
    return list(_supported())


@functools.cache
def _supported() -> tuple[str, ...]:
    return tuple(_kernels.supported()) if _kernels is not None else ()


def has_openmp() -> bool:
    """Whether the kernels run on OpenMP's threads, shared with torch; without it they start threads of their own."""
    return _kernels is not None and bool(_kernels.has_openmp())


def active_isa(dtype: torch.dtype) -> str:
    """The instruction set that a call with this dtype uses.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError: ``GOSSAMER_CPU_ISA`` names none of `supported_isas`.
    """
    prefers_bf16_dot = kernels().prefers_bf16_dot
    known = _supported()
    forced = os.environ.get(ENVIRONMENT, "")
    if forced:
        if forced not in known:
            raise ValueError(f"{ENVIRONMENT}={forced!r} is not supported here; use one of: {', '.join(known)}")
        return forced if dtype == torch.bfloat16 else _BF16_ONLY.get(forced, forced)
    if dtype == torch.bfloat16 and "amx" in known:
        return "amx"
    if dtype == torch.bfloat16 and prefers_bf16_dot():
        return "avx512_bf16"
    return next(isa for isa in ("avx512", "avx2", "portable") if isa in known)


def check_tensors(*tensors: Tensor) -> None:
    """What the kernels cannot take: another device, dtype or head dimension.

    Raises:
        ValueError, TypeError: says what was given, what was expected and what to do.
    """
    for x in tensors:
        if x.device.type != "cpu":
            raise ValueError(f"the cpu backend takes CPU tensors, got {x.device}; move them")
        if x.dtype not in DTYPES:
            raise TypeError(f"the cpu backend takes float32, bfloat16 or float16, got {x.dtype}; convert q, k and v")
        if not 1 <= x.shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(
                f"the cpu backend takes head dimensions 1 to {MAX_HEAD_DIM}, got {x.shape[-1]}; "
                "use gossamer.backends.torch"
            )
