"""The C++ executor: AMX, AVX-512, AVX2 and portable kernels, chosen at run time.

``GOSSAMER_CPU_ISA`` forces one of `supported_isas` (read at every call); without it each dtype gets the fastest that
this machine has. ``amx``, ``amx_emulated`` and ``avx512_bf16`` compute in bf16 and serve bf16 tensors; others then run
on the fp32 kernels of the same machine. ``amx_emulated`` is the AMX kernel over emulated tile operations, for tests:
the AMX path has so far been tested in this form only, every other one natively.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor

from gossamer.backends.gradient import refuse
from gossamer.backends.torch import check_inputs
from gossamer.plan import SparsePlan

__all__ = ["active_isa", "execute", "has_openmp", "is_available", "supported_isas", "why_unavailable"]

try:
    import gossamer.backends.cpu._kernels as _kernels  # pyright: ignore[reportMissingModuleSource]

    _failure: str | None = None
except ImportError as error:
    _kernels = None
    _failure = f"the C++ kernels are not built ({error}); install a C++17 compiler and reinstall gossamer"

ENVIRONMENT = "GOSSAMER_CPU_ISA"
MAX_HEAD_DIM = 256
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Instruction sets whose tiles are pairs of bf16; other dtypes run on the fp32 set given here.
_BF16_ONLY = {"avx512_bf16": "avx512", "amx": "avx512", "amx_emulated": "portable"}


def is_available() -> bool:
    """Whether the C++ kernels are built and load."""
    return _kernels is not None


def why_unavailable() -> str | None:
    """Why `is_available` is False, or None."""
    return _failure


def supported_isas() -> list[str]:
    """Instruction sets that this build has and this machine runs; any of them can be forced."""
    return list(_kernels.supported()) if _kernels is not None else []


def has_openmp() -> bool:
    """Whether the kernels run on OpenMP's threads, shared with torch; without it they start threads of their own."""
    return _kernels is not None and bool(_kernels.has_openmp())


def active_isa(dtype: torch.dtype) -> str:
    """The instruction set that a call with this dtype uses.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError: ``GOSSAMER_CPU_ISA`` names none of `supported_isas`.
    """
    if _kernels is None:
        raise RuntimeError(_failure)
    known = supported_isas()
    forced = os.environ.get(ENVIRONMENT, "")
    if forced:
        if forced not in known:
            raise ValueError(f"{ENVIRONMENT}={forced!r} is not supported here; use one of: {', '.join(known)}")
        return forced if dtype == torch.bfloat16 else _BF16_ONLY.get(forced, forced)
    if dtype == torch.bfloat16 and "amx" in known:
        return "amx"
    if dtype == torch.bfloat16 and _kernels.prefers_bf16_dot():
        return "avx512_bf16"
    return next(isa for isa in ("avx512", "avx2", "portable") if isa in known)


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
    if q.dtype not in _DTYPES:
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
    isa = active_isa(q.dtype)
    if _kernels is None:
        raise RuntimeError(_failure)
    heads, block_q, block_k, column_group = shape
    batch, query_heads, query_len, dim = q.shape
    q, k, v = (dense_rows(t) for t in (q, k, v))
    out = torch.empty(batch, query_heads, query_len, v.shape[-1], dtype=q.dtype)
    lse = torch.empty(batch, query_heads, query_len, dtype=torch.float32)
    _kernels.prefer_huge_pages(out.data_ptr(), out.nbytes)
    # Held by name until the kernel is done: only their addresses are handed over.
    arrays = [
        t.contiguous()
        for t in (
            block_indptr,
            block_indices,
            column_indptr,
            column_indices,
            sink,
            window,
            q_order,
            k_order,
            query_start,
            key_start,
            key_count,
        )
    ]
    sinks = sinks.contiguous()
    optional = {6, 7}
    _kernels.attend(
        isa,
        _DTYPES[q.dtype],
        *pointer_and_strides(q),
        *pointer_and_strides(k),
        *pointer_and_strides(v),
        *pointer_and_strides(out),
        lse.data_ptr(),
        sinks.data_ptr() if sinks.numel() else 0,
        [
            batch,
            heads,
            query_len,
            k.shape[2],
            block_q,
            block_k,
            column_group,
            query_heads,
            k.shape[1],
            dim,
            v.shape[-1],
        ],
        [0 if n in optional and not t.numel() else t.data_ptr() for n, t in enumerate(arrays)],
        limit,
        causal,
        scale,
        softcap,
        torch.get_num_threads(),
    )
    return out, lse


def dense_rows(x: Tensor) -> Tensor:
    """The tensor as it is where its last dimension is contiguous, else a copy."""
    return x if x.stride(-1) == 1 else x.contiguous()


def pointer_and_strides(x: Tensor) -> tuple[int, list[int]]:
    """Of `dense_rows`, as the kernels take them: the last stride is 1, whatever a dimension of size 1 says."""
    return x.data_ptr(), [*x.stride()[:3], 1]


@torch.library.register_fake("gossamer::cpu_execute", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


torch.library.register_autograd("gossamer::cpu_execute", refuse, lib=_library)
