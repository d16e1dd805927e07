"""Tensors, extents and plans as the kernels take them: addresses and sizes, by name.

A view keeps nothing alive: whoever makes one holds its tensors until the kernel is done. So these functions copy none,
and `dense_rows` and ``contiguous`` come first.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer.backends.cpu.native import kernels
from gossamer.call import AttentionCall
from gossamer.plan import Extent, Grid, SparsePlan

__all__ = [
    "address",
    "dense_rows",
    "extent_view",
    "grid_view",
    "part_view",
    "plan_parts",
    "plan_view",
    "score_view",
    "tensor_view",
]


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


def extent_view(extent: Extent) -> Any:
    return kernels().Extent(
        batch=extent.batch,
        query_start=extent.query_start.data_ptr(),
        query_count=extent.query_count.data_ptr(),
        key_start=extent.key_start.data_ptr(),
        key_count=extent.key_count.data_ptr(),
        causal=extent.causal,
        limit=extent.limit,
    )


def grid_view(grid: Grid) -> Any:
    return kernels().Grid(extent_view(grid.extent), block_q=grid.block_q, block_k=grid.block_k)


def part_view(part: range) -> Any:
    return kernels().Part(part.start, part.stop)


def score_view(q: Tensor, k: Tensor, call: AttentionCall) -> Any:
    """Of `dense_rows` in place of the call's own tensors."""
    return kernels().ScoreCall(
        q=tensor_view(q),
        k=tensor_view(k),
        extent=extent_view(call.extent),
        scale=call.scale,
        threads=torch.get_num_threads(),
    )


def plan_parts(plan: SparsePlan) -> tuple[list[Tensor], list[int]]:
    """A plan on the CPU as an operator can take it, for `plan_view`."""
    extent, absent = plan.extent, torch.empty(0, dtype=torch.int32, device="cpu")
    tensors = [
        extent.query_start,
        extent.query_count,
        extent.key_start,
        extent.key_count,
        plan.block_indptr,
        plan.block_indices,
        plan.column_indptr,
        plan.column_indices,
        torch.as_tensor(plan.sink, device=plan.device),
        torch.as_tensor(plan.window, device=plan.device),
        absent if plan.q_order is None else plan.q_order,
        absent if plan.k_order is None else plan.k_order,
    ]
    sizes = [plan.heads, plan.query_len, plan.key_len, plan.num_query_blocks, plan.column_group]
    limit = -1 if extent.limit is None else extent.limit
    return tensors, [*sizes, plan.block_q, plan.block_k, int(extent.causal), limit]


def plan_view(tensors: list[Tensor], sizes: list[int]) -> Any:
    """Of `plan_parts`, contiguous."""
    native = kernels()
    addresses = [x.data_ptr() for x in tensors]
    query_start, query_count, key_start, key_count, *lists, sink, window, q_order, k_order = addresses
    heads, query_len, key_len, query_blocks, column_group, block_q, block_k, causal, limit = sizes
    extent = native.Extent(
        batch=tensors[0].numel(),
        query_start=query_start,
        query_count=query_count,
        key_start=key_start,
        key_count=key_count,
        causal=bool(causal),
        limit=None if limit < 0 else limit,
    )
    return native.Plan(
        native.Grid(extent, block_q=block_q, block_k=block_k),
        heads=heads,
        query_len=query_len,
        key_len=key_len,
        query_blocks=query_blocks,
        column_group=column_group,
        block_indptr=lists[0],
        block_indices=lists[1],
        column_indptr=lists[2],
        column_indices=lists[3],
        sink=sink,
        window=window,
        q_order=q_order if tensors[-2].numel() else 0,
        k_order=k_order if tensors[-1].numel() else 0,
    )
