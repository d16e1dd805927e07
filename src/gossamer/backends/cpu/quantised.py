"""What linear layers in int8 need beside the product itself: their inputs in uint8, and what the scale cuts off."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.cpu.native import DTYPES, active_isa, kernels
from gossamer.backends.cpu.views import arrays, dtype_of

__all__ = ["QuantisedInputs"]


def _check_dtype(name: str, x: Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16 or float16, got {x.dtype}")


class QuantisedInputs:
    """Inputs ``[rows, features]`` of one scale as uint8 about 128; what is beyond 127 times the scale is remembered.

    Attributes:
        numbers: uint8 ``[rows, features]``; all 128 in `lost` rows.
        lost: rows with a number that is not finite.
        beyond: how many numbers are beyond the scale.

    Raises:
        ValueError: a scale that is not above 0 and finite, or inputs of another shape.
        TypeError: inputs that are not float32, bfloat16 or float16.
    """

    def __init__(self, x: Tensor, scale: float) -> None:
        if x.ndim != 2:
            raise ValueError(f"inputs must be [rows, features], got {list(x.shape)}")
        _check_dtype("inputs", x)
        x = x if x.stride(-1) == 1 else x.contiguous()
        self.numbers = torch.empty(x.shape, dtype=torch.uint8, device="cpu")
        self._native = kernels().QuantisedInputs(
            active_isa(x.dtype),
            x.data_ptr(),
            shape=x.shape,
            stride=x.stride(0),
            dtype=dtype_of(x),
            scale=scale,
            out=(self.numbers.data_ptr(), self.numbers.numel()),
            threads=torch.get_num_threads(),
        )
        self.lost: list[int] = self._native.lost
        self.beyond: int = self._native.beyond

    def add_to(self, out: Tensor, weight: Tensor, by_row: Tensor) -> None:
        """Add what was cut off, times ``weight * by_row``, in place: each row in fp32, rounded once.

        Args:
            out: ``[rows, outputs]``, fp32, bf16 or fp16.
            weight: int8 ``[outputs, features]``.
            by_row: fp32 ``[outputs]``, the weight's scales.
        """
        _check_dtype("out", out)
        if out.stride(-1) != 1 and out.shape[-1] != 1:
            raise ValueError("out must have its rows in one piece; make it contiguous")
        weight, by_row = weight.contiguous(), by_row.contiguous()
        numbers, scales = arrays((weight, by_row), (torch.int8, torch.float32))
        self._native.add(
            weight=numbers,
            by_row=scales,
            out=out.data_ptr(),
            shape=out.shape,
            stride=out.stride(0),
            dtype=dtype_of(out),
            threads=torch.get_num_threads(),
        )
