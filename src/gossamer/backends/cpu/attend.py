"""Attention over the pairs of a plan, in C++."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.backends.cpu.native import DTYPES, MAX_HEAD_DIM, active_isa, kernels
from gossamer.backends.cpu.views import dense_rows, extent_view, tensor_view
from gossamer.backends.gradient import refuse
from gossamer.backends.torch import check_inputs
from gossamer.plan import SparsePlan

__all__ = ["execute"]


def execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names. See `gossamer.backends.torch.execute`, the definition.

    fp32, bf16 or fp16 in, fp32 accumulation; head dimensions up to 256. Runs on ``torch.get_num_threads()`` threads;
    results do not depend on their number. The GIL is released. Few queries (one block of them, as in decoding) run
    split over the keys. A value that is not finite also spoils rows that do not attend it, where they attend another
    key of the same 64 (0 * inf; torch's SDPA does so for all keys); dead slots are never read. There is no backward.

    On ``avx512_bf16`` and ``amx`` the hardware takes bf16 values below the smallest normal number (1.2e-38) as 0, and
    sums below it.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype and lse fp32 ``[B, H, S]``, both contiguous.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError, TypeError: as `gossamer.backends.torch.check_inputs`; another device, dtype or head dimension.
        NotImplementedError: from ``backward()``, where an input requires a gradient.
    """
    check_inputs(q, k, v, plan, sinks)
    if q.device.type != "cpu" or plan.device.type != "cpu":
        raise ValueError(f"the CPU executor takes CPU tensors and plans, got {q.device} and {plan.device}; move them")
    if q.dtype not in DTYPES:
        raise TypeError(f"the CPU executor takes float32, bfloat16 or float16, got {q.dtype}; convert q, k and v")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM or min(q.shape[-1], v.shape[-1]) < 1:
        raise ValueError(
            f"the CPU executor takes head dimensions 1 to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}; "
            "use gossamer.backends.torch.execute"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    empty = torch.empty(0, dtype=torch.int32)
    return torch.ops.gossamer.cpu_execute(
        q,
        k,
        v,
        plan.block_indptr,
        plan.block_indices,
        plan.column_indptr,
        plan.column_indices,
        torch.as_tensor(plan.sink),
        torch.as_tensor(plan.window),
        empty if plan.q_order is None else plan.q_order,
        empty if plan.k_order is None else plan.k_order,
        plan.extent.query_start,
        plan.extent.key_start,
        plan.extent.key_count,
        torch.empty(0) if sinks is None else sinks.float(),
        [plan.heads, plan.block_q, plan.block_k, plan.column_group],
        -1 if plan.limit is None else plan.limit,
        plan.causal,
        float(scale),
        0.0 if softcap is None else float(softcap),
    )


# Defined by schema, not by torch.library.custom_op: that imports the whole of torch._dynamo on the first call.
_library = torch.library.Library("gossamer", "DEF")
_library.define(
    "cpu_execute(Tensor q, Tensor k, Tensor v, Tensor block_indptr, Tensor block_indices, Tensor column_indptr, "
    "Tensor column_indices, Tensor sink, Tensor window, Tensor q_order, Tensor k_order, Tensor query_start, "
    "Tensor key_start, Tensor key_count, Tensor sinks, int[] shape, int limit, bool causal, float scale, "
    "float softcap) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "cpu_execute", "CPU")
def _cpu_execute(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indptr: Tensor,
    block_indices: Tensor,
    column_indptr: Tensor,
    column_indices: Tensor,
    sink: Tensor,
    window: Tensor,
    q_order: Tensor,
    k_order: Tensor,
    query_start: Tensor,
    key_start: Tensor,
    key_count: Tensor,
    sinks: Tensor,
    shape: list[int],
    limit: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    native, isa = kernels(), active_isa(q.dtype)
    heads, block_q, block_k, column_group = shape
    q, k, v = (dense_rows(t) for t in (q, k, v))
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype)
    lse = torch.empty(q.shape[:3], dtype=torch.float32)
    native.prefer_huge_pages(out.data_ptr(), out.nbytes)
    # Held by name until the kernel is done: only their addresses are handed over.
    block_indptr, block_indices = block_indptr.contiguous(), block_indices.contiguous()
    column_indptr, column_indices = column_indptr.contiguous(), column_indices.contiguous()
    sink, window, sinks = sink.contiguous(), window.contiguous(), sinks.contiguous()
    q_order, k_order = q_order.contiguous(), k_order.contiguous()
    query_start, key_start, key_count = query_start.contiguous(), key_start.contiguous(), key_count.contiguous()
    extent = extent_view(query_start, key_start, key_count, causal=causal, limit=None if limit < 0 else limit)
    plan = native.Plan(
        extent=extent,
        heads=heads,
        query_len=q.shape[2],
        key_len=k.shape[2],
        block_q=block_q,
        block_k=block_k,
        block_indptr=block_indptr.data_ptr(),
        block_indices=block_indices.data_ptr(),
        column_group=column_group,
        column_indptr=column_indptr.data_ptr(),
        column_indices=column_indices.data_ptr(),
        sink=sink.data_ptr(),
        window=window.data_ptr(),
        q_order=q_order.data_ptr() if q_order.numel() else 0,
        k_order=k_order.data_ptr() if k_order.numel() else 0,
    )
    call = native.AttentionCall(
        q=tensor_view(q),
        k=tensor_view(k),
        v=tensor_view(v),
        out=tensor_view(out),
        lse=lse.data_ptr(),
        sinks=sinks.data_ptr() if sinks.numel() else 0,
        scale=scale,
        softcap=softcap,
        threads=torch.get_num_threads(),
    )
    native.attend(isa, plan, call)
    return out, lse


@torch.library.register_fake("gossamer::cpu_execute", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


torch.library.register_autograd("gossamer::cpu_execute", refuse, lib=_library)
