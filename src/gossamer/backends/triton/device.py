"""What every verb of this backend needs of a device: checks, copies that do not wait, launches, and the one wait."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.triton.availability import DTYPES, MAX_HEAD_DIM, interprets, why_unavailable
from gossamer.call import AttentionCall
from gossamer.plan import Extent, on_device

__all__ = ["UNLIMITED", "check_call", "check_device", "extent_on", "fetch", "flags_on", "integers_on", "kernels", "run"]

# Positions, bands and their sums are 32-bit in kernels.
UNLIMITED = 1 << 29


def check_call(call: AttentionCall) -> None:
    """Validate that kernels take a call's tensors.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError, TypeError: another device, dtype or head dimension, or positions of 2^29 and more.
    """
    check_device(call.device)
    if call.q.dtype not in DTYPES:
        raise TypeError(f"Triton kernels take float32, bfloat16 or float16, got {call.q.dtype}; convert q, k and v")
    dims = (call.q.shape[-1], call.q.shape[-1] if call.v is None else call.v.shape[-1])
    if max(dims) > MAX_HEAD_DIM or min(dims) < 1:
        raise ValueError(
            f"Triton kernels take head dimensions 1 to {MAX_HEAD_DIM}, got {dims[0]} and {dims[1]}; "
            "use gossamer.backends.torch"
        )
    extent = call.extent
    extent.check(call.query_len, call.key_len)  # it may have been written since
    last = int((extent.first_position + extent.query_count).max()) if extent.batch else 0
    if max(call.query_len, call.key_len, last) >= UNLIMITED:
        raise ValueError(
            f"Triton kernels take fewer than {UNLIMITED} tokens, got {call.query_len} queries up to position {last} "
            f"and {call.key_len} keys; use gossamer.backends.torch"
        )


def check_device(device: torch.device) -> None:
    """Validate that kernels run on a device.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError: they do not.
    """
    failure = why_unavailable()
    if failure is not None:
        raise RuntimeError(failure)
    if device.type != "cuda" and not (device.type == "cpu" and interprets()):
        raise ValueError(
            f"Triton kernels take CUDA tensors, got {device}; move them, or set TRITON_INTERPRET=1 before Triton is "
            "imported to interpret it on a CPU"
        )


def kernels() -> Any:
    """The module of kernels, which imports Triton."""
    failure = why_unavailable()
    if failure is not None:
        raise RuntimeError(failure)
    from gossamer.backends.triton import kernels

    return kernels


def run(kernel: Any, programs: int, *arguments: Any, **meta: Any) -> None:
    """Launch on the device of the first argument."""
    if programs == 0:
        return
    device = arguments[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[(programs,)](*arguments, **meta)


def fetch(numbers: Tensor) -> list[int]:
    """The one place where planning waits for the device."""
    return numbers.tolist()


def extent_on(extent: Extent, device: torch.device) -> Tensor:
    """int32 ``[B, 6]``, as `gossamer.backends.triton.kernels.extent` reads it."""
    limit = UNLIMITED if extent.limit is None else min(extent.limit, UNLIMITED)
    rows = torch.ones_like(extent.key_count)
    ahead = rows if extent.causal else rows * limit
    start = extent.query_start.clamp(-UNLIMITED, UNLIMITED)
    fields = (start, extent.query_count, extent.key_start, extent.key_count, ahead, rows * limit)
    return integers_on(torch.stack(fields, dim=1), device)


def integers_on(values: Tensor, device: torch.device) -> Tensor:
    """As int32 on the device."""
    return on_device(values.to(torch.int32), device).contiguous()


def flags_on(values: Tensor, device: torch.device) -> Tensor:
    """Bools as uint8 on the device."""
    return on_device(values, device).contiguous().view(torch.uint8)
