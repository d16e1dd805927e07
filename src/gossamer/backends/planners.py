"""Which planner serves: C++ for CPU tensors, Triton for CUDA tensors, else torch.

From equal scores all choose the same sets; scores agree up to rounding in fp32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType

import torch
from torch import Tensor

from gossamer.backends.cpu import planning as cpu_planning

__all__ = ["cpu_planner", "device_planner", "model_window", "planner_for", "triton_on_cpu", "within"]

_TRITON_ON_CPU: ContextVar[bool] = ContextVar("triton_on_cpu", default=False)
_MODEL_WINDOW: ContextVar[int | None] = ContextVar("model_window", default=None)


def planner_for(*tensors: Tensor) -> ModuleType | None:
    """The planning module of the cpu or triton backend, where one serves these tensors; else None."""
    planner = device_planner(tensors[0].device)
    if planner is None and not _TRITON_ON_CPU.get():
        planner = cpu_planning
    return planner if planner is not None and planner.serves(*tensors) else None


def cpu_planner(device: torch.device) -> ModuleType | None:
    """The planner in C++, where it chooses for tensors on the device."""
    serves = device.type == "cpu" and not _TRITON_ON_CPU.get() and cpu_planning.enabled()
    return cpu_planning if serves else None


def device_planner(device: torch.device) -> ModuleType | None:
    """The planner in Triton, where it chooses for tensors on the device."""
    if device.type != "cuda" and not (_TRITON_ON_CPU.get() and device.type == "cpu"):
        return None
    from gossamer.backends.triton import planning

    return planning if planning.enabled() else None


@contextmanager
def triton_on_cpu() -> Iterator[None]:
    """Plan with Triton's interpreter on CPU tensors: a test's way to run the device planner without a device."""
    token = _TRITON_ON_CPU.set(True)
    try:
        yield
    finally:
        _TRITON_ON_CPU.reset(token)


def model_window() -> int | None:
    """The model's own sliding window in tokens, as `within` says; under it pairs are counted."""
    return _MODEL_WINDOW.get()


@contextmanager
def within(limit: int | None) -> Iterator[None]:
    """Plan for a model with its own sliding window of ``limit`` tokens.

    Methods do not take it: it changes no choice, only which pairs of a choice are computed. A planner on a device
    counts these in the one wait that it has.
    """
    token = _MODEL_WINDOW.set(limit)
    try:
        yield
    finally:
        _MODEL_WINDOW.reset(token)
