"""A sparse product whose gradient is summed from some of its column-row pairs (RSC, 2210.10737, section 3.1)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

__all__ = ["topk_mm"]

_ENTRIES = 1 << 22  # numbers gathered at once for the gradient of a matrix's values


class Sample(NamedTuple):
    """Rows of a matrix ``[n, m]``, ascending, and the matrix of those rows transposed, CSR ``[m, k]``."""

    rows: Tensor
    transposed: Tensor


def topk_mm(a: Tensor, h: Tensor, k: int) -> Tensor:
    """``a @ h``, exactly, with an approximate gradient of ``h``.

    Of ``a.T @ grad``, a sum of outer products of ``a``'s rows with the gradient's, the ``k`` with the largest
    ``||a[i]|| * ||grad[i]||`` are summed up (2210.10737, section 3.1). The gradient of ``a``'s values is exact.

    Args:
        a: CSR ``[n, m]``.
        h: ``[m, d]``, of the same dtype.
        k: rows of ``a`` that the gradient uses; ``n`` makes it exact.

    Raises:
        ValueError: ``k`` is not in 0 .. n, or ``a`` is no CSR matrix whose size fits ``h``'s.
    """
    check(a, h)
    if not 0 <= k <= a.shape[0]:
        raise ValueError(f"k must be one of 0 .. {a.shape[0]}, the rows of the sparse matrix; got {k}")
    return product(a, h, lambda a, grad: sample_rows(a, top_rows(pair_scores(row_norms(a), grad), k)))


def row_norms(a: Tensor) -> Tensor:
    """Of a CSR matrix, ``[n]``."""
    values = a.values()
    squares = torch.zeros(a.shape[0], dtype=values.dtype, device=values.device)
    return squares.index_add_(0, _row_of_entry(a), values.square()).sqrt_()


def pair_scores(norms: Tensor, grad: Tensor) -> Tensor:
    """``||a[i]|| * ||grad[i]||`` of each row, ``[n]``."""
    return norms * torch.linalg.vector_norm(grad, dim=1)


def top_rows(scores: Tensor, k: int) -> Tensor:
    """The ``k`` rows of the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def sample_rows(a: Tensor, rows: Tensor | None = None) -> Sample:
    """Some rows of a CSR matrix, all by default."""
    n, m = a.shape
    columns, values, row = a.col_indices(), a.values().detach(), _row_of_entry(a)
    if rows is None:
        rows = torch.arange(n, device=row.device)
    else:
        row, kept = _places(row, rows, n)
        columns, values = columns[kept], values[kept]
    order = columns.argsort(stable=True)
    starts = torch.zeros(m + 1, dtype=columns.dtype, device=row.device)
    starts[1:] = torch.bincount(columns, minlength=m).cumsum(0)
    return _sample(rows, starts, row[order].to(columns.dtype), values[order])


def cut(whole: Sample, rows: Tensor) -> Sample:
    """Some rows of a sample of all: the same as `sample_rows` of the matrix, and nothing is sorted."""
    one = whole.transposed
    column, kept = _places(one.col_indices(), rows, one.shape[1])
    before = F.pad(kept.cumsum(0), (1, 0))
    starts = before[one.crow_indices()].to(one.crow_indices().dtype)
    return _sample(rows, starts, column.to(starts.dtype), one.values()[kept])


def _places(row: Tensor, rows: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """Of entries in rows of n: where their row is among some rows, and which entries are in one of them."""
    place = torch.full((n,), -1, dtype=torch.int64, device=row.device)
    place[rows] = torch.arange(len(rows), device=row.device)
    row = place[row]
    kept = row >= 0
    return row[kept], kept


def _sample(rows: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> Sample:
    size = (len(starts) - 1, len(rows))
    made = torch.sparse_csr_tensor(starts, columns, values, size=size, device=values.device, check_invariants=False)
    return Sample(rows, made)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, h: Tensor, sampler: Callable[[Tensor, Tensor], Sample]) -> Tensor:
        ctx.sampler, ctx.a = sampler, a
        ctx.version = version_of(a)
        ctx.save_for_backward(h if ctx.needs_input_grad[0] else None)
        return torch.sparse.mm(a, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a = ctx.a
        if version_of(a) != ctx.version:
            raise RuntimeError("the sparse matrix of a product was changed in place before its backward pass")
        (h,) = ctx.saved_tensors
        grad_a = None if h is None else _at_entries(a, grad, h)
        if not ctx.needs_input_grad[1]:
            return grad_a, None, None
        sample = ctx.sampler(a, grad)
        if not sample.transposed.values().numel():
            return grad_a, torch.zeros(a.shape[1], grad.shape[1], dtype=grad.dtype, device=grad.device), None
        taken = grad if len(sample.rows) == len(grad) else grad.index_select(0, sample.rows)
        return grad_a, torch.sparse.mm(sample.transposed, taken), None


def product(a: Tensor, h: Tensor, sampler: Callable[[Tensor, Tensor], Sample]) -> Tensor:
    return cast("Tensor", _Product.apply(a, h, sampler))


def _at_entries(a: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    """``grad @ h.T`` where ``a`` has entries, as a CSR matrix."""
    row, columns = _row_of_entry(a), a.col_indices()
    size = max(1, _ENTRIES // max(1, h.shape[1]))
    parts = [(grad[r] * h[c]).sum(1) for r, c in zip(row.split(size), columns.split(size), strict=True)] or [
        torch.zeros(0, dtype=grad.dtype, device=grad.device)
    ]
    return torch.sparse_csr_tensor(
        a.crow_indices(), columns, torch.cat(parts), size=a.shape, device=grad.device, check_invariants=False
    )


def _row_of_entry(a: Tensor) -> Tensor:
    counts = a.crow_indices().diff()
    return torch.repeat_interleave(torch.arange(a.shape[0], device=counts.device), counts)


def version_of(a: Tensor) -> tuple[int, int]:
    return a._version, a.values()._version


def check(a: Tensor, h: Tensor) -> None:
    if a.layout != torch.sparse_csr or a.dim() != 2:
        raise ValueError(f"the sparse matrix must be CSR [n, m], got {a.layout} of {tuple(a.shape)}: a.to_sparse_csr()")
    if h.layout != torch.strided or h.dim() != 2 or h.shape[0] != a.shape[1]:
        raise ValueError(f"a dense matrix [{a.shape[1]}, d] fits the sparse one, got {h.layout} of {tuple(h.shape)}")
