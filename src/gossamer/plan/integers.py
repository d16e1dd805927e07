"""Integers as the plan takes them: Python's or a tensor's, in one range that every kernel can count in."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "MOST",
    "Integers",
    "band",
    "bounded",
    "ceil_div",
    "integer",
    "integers_per_head",
    "integers_per_row",
    "ranks_of",
    "starts_of",
]

# Positions, lengths, bands and their sums are int32 in kernels; tensors of more tokens than this do not exist.
MOST = (1 << 31) - 1

Integers = Tensor | Sequence[int] | int


def starts_of(counts: Tensor) -> Tensor:
    """Where lists of so many members begin, one behind the other, and where the last one ends: int64 ``[n + 1]``."""
    starts = torch.zeros(counts.numel() + 1, dtype=torch.int64, device=counts.device)
    torch.cumsum(counts.flatten(), 0, out=starts[1:])
    return starts


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def integer(value: int, name: str, least: int = 0) -> int:
    """The value, if it is an integer in ``least .. MOST``.

    Raises:
        TypeError, ValueError: it is none; the message names it.
    """
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an integer, got {value!r}")
    if not least <= value <= MOST:
        raise ValueError(f"{name} must be at least {least} and at most {MOST}, got {value}")
    return value


def bounded(value: Integers, name: str, least: int) -> Tensor:
    """A copy as int64 on the CPU, every value in ``least .. MOST``."""
    if type(value) is int and least <= value <= MOST:  # a step of decoding makes several of these
        return torch.tensor(value, dtype=torch.int64, device="cpu")
    try:
        tensor = value if isinstance(value, Tensor) else torch.tensor(value, device="cpu")
    except (OverflowError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must hold integers of at most {MOST}, got {value!r}") from error
    if not tensor.numel():  # of an empty list, torch makes floats
        tensor = tensor.to(torch.int64)
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
        raise TypeError(f"{name} must hold integers, got {tensor.dtype}")
    tensor = tensor.to("cpu", torch.int64, copy=True)
    if tensor.numel() and not least <= int(tensor.min()) <= int(tensor.max()) <= MOST:
        wrong = int(tensor.min()) if int(tensor.min()) < least else int(tensor.max())
        below = "must not be negative" if least == 0 else f"must be at least {least}"
        raise ValueError(f"{name} {below} and must be at most {MOST}, got {wrong}")
    return tensor


def integers_per_row(value: Integers, name: str, batch: int | None, least: int = 0) -> Tensor:
    """One integer for each batch row, int64 ``[B]`` on the CPU; a number serves all where ``batch`` is known."""
    tensor = bounded(value, name, least)
    if tensor.ndim == 0 and batch is not None:
        tensor = tensor.expand(batch).contiguous()
    if tensor.ndim != 1 or (batch is not None and tensor.numel() != batch):
        many = "" if batch is None else f" ({batch} of them)"
        raise ValueError(f"{name} must hold one integer for each batch row{many}, got shape {tuple(tensor.shape)}")
    return tensor


def integers_per_head(value: Integers, name: str, heads: int) -> Tensor:
    """One integer for each head of a plan, int32 ``[heads]`` on the CPU; a number serves all heads."""
    tensor = bounded(value, name, 0)
    if tensor.ndim == 0:
        tensor = tensor.expand(heads)
    if tensor.shape != (heads,):
        raise ValueError(
            f"{name} must hold one integer for each of the plan's {heads} heads, got shape {tuple(tensor.shape)}"
        )
    return tensor.to(torch.int32).contiguous()


def band(given: Integers, name: str, heads: int, device: torch.device) -> Tensor:
    """int32 ``[heads]`` on a plan's device; values that lie on a device are not read, nor is it waited for."""
    wait = device.type == "cpu"
    if type(given) is int and 0 <= given <= MOST:
        return torch.full((heads,), given, dtype=torch.int32, device=device)
    if isinstance(given, Tensor) and given.dtype == torch.int32 and given.shape == (heads,):
        return given.to(device, non_blocking=not wait).contiguous()
    if isinstance(given, Tensor) and given.device.type != "cpu":
        if given.is_floating_point() or given.shape not in ((), (heads,)):
            raise ValueError(
                f"{name} must hold one integer for each of the plan's {heads} heads, got {given.dtype} of "
                f"shape {tuple(given.shape)}"
            )
        # A band beyond MOST is as wide as one of MOST.
        given = given.clamp(max=MOST).to(torch.int32)
        return given.to(device, non_blocking=not wait).expand(heads).contiguous()
    return integers_per_head(given, name, heads).to(device, non_blocking=not wait)


def ranks_of(order: Tensor) -> Tensor:
    """Rank of each original number, of the last dimension of ``[B, heads, length]``: int64."""
    ranks = torch.arange(order.shape[-1], device=order.device).expand(order.shape)
    return torch.empty(order.shape, dtype=torch.int64, device=order.device).scatter_(2, order.long(), ranks)
