"""Rows of matrices, and their products: what the kernels that meet queries with keys share."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

from gossamer.backends.triton.availability import interprets

__all__ = ["ceil_div", "load_rows", "product"]

# Triton decides it as early: when it is imported.
_INTERPRETED = tl.constexpr(interprets())


@triton.jit
def ceil_div(a, b):
    return (a + b - 1) // b


@triton.jit
def load_rows(base, rows, stride, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows of a matrix of ``DIM`` columns; 0 where ``keep`` is False: those are never read, since they may hold NaN."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + rows.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=keep[:, None] & (column < DIM)[None, :], other=0.0)


@triton.jit
def product(a, b, total):
    """``a @ b + total`` in fp32, with a rounded to b's dtype. fp32 products are exact: no TF32."""
    if _INTERPRETED and b.dtype == tl.bfloat16:
        # The interpreter truncates to bf16, and multiplies its bit patterns.
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    else:
        a = a.to(b.dtype)
    return tl.dot(a, b, total, input_precision="ieee")
