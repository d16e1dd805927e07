"""A plan as operators of torch take it: tensors and integers, and the plan that they make again."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.plan.extent import Extent
from gossamer.plan.plan import SparsePlan

__all__ = ["plan_of", "plan_parts"]


def plan_parts(plan: SparsePlan) -> tuple[list[Tensor], list[int]]:
    """Tensors and sizes of a plan, without its ``skip`` and ``quantised``. The extent's tensors lie on the CPU."""
    extent, absent = plan.extent, torch.empty(0, dtype=torch.int32, device=plan.device)
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
    return tensors, [*sizes, plan.block_q, plan.block_k, int(extent.causal), limit, int(plan.pruned_mean)]


def plan_of(tensors: list[Tensor], sizes: list[int], skip: float | None = None) -> SparsePlan:
    """The plan of some `plan_parts`."""
    heads, query_len, key_len, _, column_group, block_q, block_k, causal, limit, pruned_mean = sizes
    q_order, k_order = (None if order.numel() == 0 else order for order in tensors[10:])
    names = ("block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window")
    return SparsePlan.unchecked(
        heads=heads,
        query_len=query_len,
        key_len=key_len,
        extent=Extent(*tensors[:4], causal=bool(causal), limit=None if limit < 0 else limit),
        block_q=block_q,
        block_k=block_k,
        column_group=column_group,
        q_order=q_order,
        k_order=k_order,
        pruned_mean=bool(pruned_mean),
        skip=skip,
        **dict(zip(names, tensors[4:10], strict=True)),
    )
