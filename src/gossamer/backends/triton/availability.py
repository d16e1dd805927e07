"""Whether Triton is there, and what its kernels take."""

from __future__ import annotations

import functools
import importlib.util
import os

import torch

__all__ = ["DTYPES", "MAX_HEAD_DIM", "interprets", "is_available", "why_unavailable"]

MAX_HEAD_DIM = 256
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def is_available() -> bool:
    """Whether Triton is installed."""
    return why_unavailable() is None


@functools.cache
def why_unavailable() -> str | None:
    """Why `is_available` is False, or None."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; pip install triton"
    return None


def interprets() -> bool:
    """Whether kernels run under Triton's interpreter, which is what CPU tensors need."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes")
