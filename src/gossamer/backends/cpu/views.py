"""Tensors, extents and plans as the kernels take them: addresses and sizes, by name.

A view keeps nothing alive: whoever makes one holds its tensors until the kernel is done. So these functions copy none,
and `dense_rows` and ``contiguous`` come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import kernels

__all__ = ["address", "dense_rows", "extent_view", "tensor_view"]


def dense_rows(x: Tensor) -> Tensor:
    """The tensor as it is where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def address(x: Tensor | None) -> int:
    """Of a contiguous tensor; 0 for none."""
    return 0 if x is None else x.data_ptr()


def tensor_view(x: Tensor) -> Any:
    """Of `dense_rows`, ``[B, heads, tokens, dim]``."""
    native = kernels()
    dtypes = {torch.float32: native.DType.float32, torch.bfloat16: native.DType.bfloat16}
    return native.Tensor(x.data_ptr(), x.shape, x.stride(), dtypes.get(x.dtype, native.DType.float16))


def extent_view(query_start: Tensor, key_start: Tensor, key_count: Tensor, *, causal: bool, limit: int | None) -> Any:
    """Of contiguous int64 tensors ``[B]``."""
    return kernels().Extent(
        batch=query_start.numel(),
        query_start=query_start.data_ptr(),
        key_start=key_start.data_ptr(),
        key_count=key_count.data_ptr(),
        causal=causal,
        limit=limit,
    )
