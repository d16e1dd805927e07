"""Tensors, extents and plans as the kernels take them: addresses and sizes, by name.

A view keeps nothing alive: whoever makes one holds its tensors until the kernel is done. So these functions copy none,
and `dense_rows` and ``contiguous`` come first.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import DTYPES, kernels
from gossamer.call import AttentionCall
from gossamer.encoded import EncodedTokens
from gossamer.paged import Paged
from gossamer.plan import Extent, Grid
from gossamer.unread import Unread

__all__ = [
    "address",
    "arrays",
    "dense_rows",
    "dtype_of",
    "extent_view",
    "grid_view",
    "part_view",
    "plan_view",
    "score_view",
    "tensor_view",
    "tokens_view",
]


_EXTENT_DTYPES = (torch.int64,) * 4
# Of the tensors of `plan_parts`.
_PLAN_DTYPES = (*_EXTENT_DTYPES, torch.int64, torch.int32, torch.int64, *[torch.int32] * 5)


def dense_rows(x: Tensor) -> Tensor:
    """The tensor as it is where its last dimension is contiguous, else a copy.

    Pages and encoded tokens stay, unless they were read; of encoded ones, those whose dimension 16 divides.
    """
    if isinstance(x, Unread):
        return x.rows() if isinstance(x, EncodedTokens) and x.shape[3] % 16 else x.at_hand()
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def address(x: Tensor | None) -> int:
    """Of a contiguous tensor; 0 for none."""
    return 0 if x is None else x.data_ptr()


def arrays(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> list[tuple[int, int]]:
    """Address and number of elements of contiguous tensors: the kernels check the numbers against what they read.

    Raises:
        TypeError: a tensor of another dtype.
    """
    # All at once: in decoding, a call has no time for a check of each.
    if [x.dtype for x in tensors] != list(dtypes):
        given = ", ".join(str(x.dtype) for x in tensors)
        raise TypeError(f"tensors must be {', '.join(map(str, dtypes))} in this order, got {given}; make a new plan")
    return [(x.data_ptr(), x.numel()) for x in tensors]


def tensor_view(x: Tensor) -> Any:
    """Of `dense_rows`, ``[B, heads, tokens, dim]``."""
    return kernels().Tensor(x.data_ptr(), x.shape, x.stride(), _dtypes()[x.dtype])


def tokens_view(x: Tensor) -> Any:
    """Of keys or values as `dense_rows` has them: rows, pages, or encoded."""
    if isinstance(x, EncodedTokens):
        return _encoded_view(x)
    if not isinstance(x, Paged):
        return tensor_view(x)
    pages = x.pages
    return kernels().Tokens(
        data=pages.data_ptr(),
        shape=pages.shape[:2],
        strides=pages.stride()[:2],
        form=getattr(kernels().PageForm, x.form),
        page=x.page,
        dim=x.shape[3],
        dtype=_dtypes()[x.dtype],
        tokens=x.shape[2],
        table=(x.table.data_ptr(), x.table.numel()),
        batch=x.shape[0],
    )


def _encoded_view(x: EncodedTokens) -> Any:
    encoded, tail, native = x.encoded, tensor_view(x.tail), kernels()
    dtypes = [t.dtype for t in encoded.tensors]
    if dtypes != [torch.uint8] + [x.dtype] * (len(dtypes) - 1):
        raise TypeError(f"encoded tokens of {x.dtype} have bytes and numbers of that dtype, got {dtypes}")

    def numbers(given: Tensor) -> Any:
        return native.Numbers(given.data_ptr(), given.shape, given.stride())

    if encoded.coding == "bitmap":
        return native.Tokens(tail=tail, bitmap=numbers(encoded.bitmap), packed=numbers(encoded.packed))
    return native.Tokens(
        tail=tail,
        codes=numbers(encoded.codes),
        scale=numbers(encoded.scale),
        zero=numbers(encoded.zero),
        bits=encoded.bits,
        group=encoded.group,
        over_tokens=encoded.over == "tokens",
    )


def dtype_of(x: Tensor) -> Any:
    """As the kernels name it."""
    return _dtypes()[x.dtype]


@functools.cache
def _dtypes() -> dict[torch.dtype, Any]:
    return {dtype: getattr(kernels().DType, str(dtype).removeprefix("torch.")) for dtype in DTYPES}


def extent_view(extent: Extent) -> Any:
    fields = (extent.query_start, extent.query_count, extent.key_start, extent.key_count)
    return _extent(arrays(fields, _EXTENT_DTYPES), extent.causal, extent.limit)


def _extent(fields: Sequence[tuple[int, int]], causal: bool, limit: int | None) -> Any:
    query_start, query_count, key_start, key_count = fields
    return kernels().Extent(
        query_start=query_start,
        query_count=query_count,
        key_start=key_start,
        key_count=key_count,
        causal=causal,
        limit=limit,
    )


def grid_view(grid: Grid) -> Any:
    return kernels().Grid(extent_view(grid.extent), block_q=grid.block_q, block_k=grid.block_k)


def part_view(part: range) -> Any:
    return kernels().Part(part.start, part.stop)


def score_view(q: Tensor, k: Tensor, call: AttentionCall) -> Any:
    """Of `dense_rows` in place of the call's own tensors."""
    return kernels().ScoreCall(
        q=tensor_view(q),
        k=tokens_view(k),
        extent=extent_view(call.extent),
        scale=call.scale,
        threads=torch.get_num_threads(),
    )


def plan_view(tensors: list[Tensor], sizes: list[int], skip: float | None = None) -> Any:
    """Of `gossamer.plan.parts.plan_parts`, contiguous.

    Raises:
        ValueError, TypeError: tensors and sizes that do not fit each other, as after a write to a plan's tensors.
    """
    native = kernels()
    heads, query_len, key_len, query_blocks, column_group, block_q, block_k, causal, limit, means = sizes
    *fields, block_indptr, block_indices, column_indptr, column_indices, sink, window, q_order, k_order = arrays(
        tensors, _PLAN_DTYPES
    )
    extent = _extent(fields, bool(causal), None if limit < 0 else limit)
    return native.Plan(
        native.Grid(extent, block_q=block_q, block_k=block_k),
        heads=heads,
        query_len=query_len,
        key_len=key_len,
        query_blocks=query_blocks,
        column_group=column_group,
        block_indptr=block_indptr,
        block_indices=block_indices,
        column_indptr=column_indptr,
        column_indices=column_indices,
        sink=sink,
        window=window,
        q_order=q_order,
        k_order=k_order,
        pruned_mean=bool(means),
        skip=skip,
    )
