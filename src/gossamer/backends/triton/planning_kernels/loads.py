"""What the kernels that multiply queries with keys share."""

# Triton compiles these functions; their parameters and constants are not what Python sees.
# pyright: reportOperatorIssue=false, reportArgumentType=false, reportCallIssue=false, reportIndexIssue=false
# pyright: reportAttributeAccessIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["load_rows"]


@triton.jit
def load_rows(base, slots, stride, keep, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Rows ``slots`` of a matrix; 0 where ``keep`` is False, so that dead slots are never read."""
    column = tl.arange(0, BLOCK_DIM)
    pointers = base + slots.to(tl.int64)[:, None] * stride + column[None, :]
    return tl.load(pointers, mask=keep[:, None] & (column < DIM)[None, :], other=0.0)
