"""Products with weights of linear layers that are stored packed, in C++: a weight is never whole in memory.

Their definition is ``x @ weight.T + bias`` with the weight that `gossamer.compressed.packed.PackedLinear` makes whole.
Sums are fp32; of bf16 inputs against int8 they may be of integers, where an input is two numbers of 16 bits and errs by
no more than fp32 does, or 2^-31 of the largest one of its row. Nothing depends on the number of threads.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import DTYPES, active_isa, is_available, kernels
from gossamer.backends.cpu.views import dtype_of
from gossamer.backends.gradient import in_forward_mode, is_wrapped

__all__ = ["level_weight", "make_whole", "multiply", "sparse_weight", "takes"]


def takes(x: Tensor) -> bool:
    """Whether the kernels are built, and x is something that they read: floats on the CPU that need no gradient."""
    return (
        not torch.compiler.is_compiling()
        and type(x) is Tensor
        and is_available()
        and x.device.type == "cpu"
        and x.dtype in DTYPES
        and not (x.requires_grad and torch.is_grad_enabled())
        and not in_forward_mode()
        and not is_wrapped(x)
    )


def sparse_weight(columns: int, bitmap: Tensor, values: Tensor, starts: Tensor, scale: Tensor | None) -> Any:
    """What `multiply` and `make_whole` take, of the tensors of a `gossamer.compressed.SparseLinear`.

    It keeps none of them alive, and holds as long as they stay where they are.

    Raises:
        ValueError, TypeError: tensors that do not fit each other.
    """
    native = kernels()
    if values.dtype not in (*DTYPES, torch.int8):
        raise TypeError(f"numbers of a sparse weight are float32, bfloat16, float16 or int8, got {values.dtype}")
    return native.SparseWeight(
        shape=[len(bitmap), columns],
        bitmap=_array(bitmap, torch.uint8),
        values=_array(values, values.dtype),
        type=getattr(native.ValueType, str(values.dtype).removeprefix("torch.")),
        starts=_array(starts, torch.int64),
        scale=(0, 0) if scale is None else _array(scale, torch.float32),
    )


def level_weight(columns: int, block: int, codes: Tensor, levels: Tensor, salient: Tensor, *, rounded: bool) -> Any:
    """The same of a `gossamer.compressed.OneBitLinear`; ``rounded`` levels are those of a weight in bf16.

    Raises:
        ValueError, TypeError: tensors that do not fit each other.
    """
    return kernels().LevelWeight(
        shape=[len(codes), columns],
        block=block,
        codes=_array(codes, torch.uint8),
        levels=_array(levels, torch.float16),
        salient=_array(salient, torch.uint8),
        rounded=rounded,
    )


def _array(x: Tensor, dtype: torch.dtype) -> tuple[int, int]:
    if x.dtype != dtype or x.device.type != "cpu":
        raise TypeError(f"a part of a packed weight must be {dtype} on the CPU, got {x.dtype} on {x.device}")
    if not x.is_contiguous():
        raise ValueError("the parts of a packed weight must be contiguous; load or make the layer again")
    return x.data_ptr(), x.numel()


def multiply(x: Tensor, weight: Any, out_features: int, bias: Tensor | None) -> Tensor:
    """``[..., out]`` of inputs ``[..., in]``, that `takes` takes, in their dtype; few: none is shared."""
    out = x.new_empty((*x.shape[:-1], out_features))
    stride = x.shape[-1]
    if not x.is_contiguous():  # as most are: in decoding, a call has no time for a view
        x = x.reshape(-1, stride)
        x = x if x.stride(1) == 1 or stride == 1 else x.contiguous()
        stride = x.stride(0)
    added = (0, 0)
    if bias is not None:
        bias = bias.to(x.dtype)
        added = _array(bias, x.dtype)
    kernels().multiply(
        active_isa(x.dtype),
        weight,
        inputs=(x.data_ptr(), x.numel()),
        stride=stride,
        bias=added,
        out=(out.data_ptr(), out.numel()),
        dtype=dtype_of(x),
        threads=torch.get_num_threads(),
    )
    return out


def make_whole(weight: Any, first: int, out: Tensor) -> Tensor:
    """Rows of a weight from ``first`` on, as many as ``out`` has, which is contiguous fp32 or bf16 ``[n, in]``."""
    kernels().make_whole(
        active_isa(torch.float32),
        weight,
        first=first,
        out=_array(out, out.dtype),
        dtype=dtype_of(out),
        threads=torch.get_num_threads(),
    )
    return out
