"""The Triton executor, for CUDA devices; on a CPU under Triton's interpreter. Not yet measured on a GPU.

Triton is optional and imported by the first call. With ``TRITON_INTERPRET=1`` in the environment before Triton is
imported, the same code runs on CPU tensors, slowly: that is how it is tested.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gossamer.backends.gradient import refuse
from gossamer.backends.torch import check_inputs
from gossamer.backends.triton.availability import (
    DTYPES,
    MAX_HEAD_DIM,
    interprets,
    is_available,
    why_unavailable,
)
from gossamer.backends.triton.config import Config, Problem, tune
from gossamer.plan import SparsePlan, on_device

__all__ = ["DTYPES", "MAX_HEAD_DIM", "autotune", "execute", "interprets", "is_available", "why_unavailable"]

# Coordinates, bands and their sums are 32-bit.
_MOST_TOKENS = 1 << 29
_WARM_UP, _REPEAT = 10, 30  # milliseconds of a candidate's measurement


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

    fp32, bf16 or fp16 in, fp32 accumulation; head dimensions up to 256. The plan's tensors may lie on another device
    than q; they are moved. Nothing here waits for the device.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype and lse fp32 ``[B, H, S]``, both contiguous.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError, TypeError: as `gossamer.backends.torch.check_inputs`; another device, dtype or head dimension.
    """
    _check(q, k, v, plan, sinks, softcap)
    return torch.ops.gossamer.triton_execute(*_arguments(q, k, v, plan, scale, sinks, softcap))


def autotune(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SparsePlan,
    *,
    scale: float,
    sinks: Tensor | None = None,
    softcap: float | None = None,
) -> None:
    """Measure tile shapes for calls like this one; later calls of the same bucket of lengths use the fastest.

    At most twelve are compiled and measured. The outcome depends on head dimension, dtype, blocks, whether there are
    columns, architecture and the bucket (the number of bits of the key count), and lasts as long as the process.

    Raises:
        RuntimeError, ValueError, TypeError: as `execute`; a CPU tensor, which cannot be timed; no shape runs.
    """
    _check(q, k, v, plan, sinks, softcap)
    if not q.is_cuda:
        raise ValueError(f"autotune measures on a CUDA device, got tensors on {q.device}")
    arguments = _arguments(q, k, v, plan, scale, sinks, softcap)
    parts = {"blocks": plan.block_indices.numel() > 0, "columns": plan.column_indices.numel() > 0}
    problem = Problem.of(q, v, plan.heads, plan.block_q, plan.block_k, plan.key_len, **parts)
    with torch.cuda.device_of(q):
        _tune(problem, arguments)


def _tune(problem: Problem, arguments: tuple) -> None:
    taken: list[float] = []

    def seconds(config: Config) -> float:
        taken.append(_seconds(arguments, config))
        return taken[-1]

    tune(problem, seconds)
    if min(taken) == math.inf:
        raise RuntimeError(f"none of {len(taken)} tile shapes runs for {problem}; the table's choice stays")


def _seconds(arguments: tuple, config: Config) -> float:
    """Of one launch, the median; infinity where the kernel does not compile or does not fit the device."""
    from triton.errors import TritonError
    from triton.testing import do_bench

    from gossamer.backends.triton.launch import Arguments, launch

    given = Arguments(*arguments)
    try:
        launch(given, config=config)
    except TritonError:
        return math.inf
    except RuntimeError as error:
        if "PassManager" in str(error):  # a pass of the compiler that gave up
            return math.inf
        raise
    milliseconds = do_bench(lambda: launch(given, config=config), warmup=_WARM_UP, rep=_REPEAT, return_mode="median")
    return float(milliseconds) / 1e3  # pyright: ignore[reportArgumentType]


def _check(q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, sinks: Tensor | None, softcap: float | None) -> None:
    failure = why_unavailable()
    if failure is not None:
        raise RuntimeError(failure)
    check_inputs(q, k, v, plan, sinks)
    if q.device.type != "cuda" and not (q.device.type == "cpu" and interprets()):
        raise ValueError(
            f"the Triton executor takes CUDA tensors, got {q.device}; move them, or set TRITON_INTERPRET=1 before "
            "Triton is imported to interpret it on a CPU"
        )
    if q.dtype not in DTYPES:
        raise TypeError(f"the Triton executor takes float32, bfloat16 or float16, got {q.dtype}; convert q, k and v")
    if max(q.shape[-1], v.shape[-1]) > MAX_HEAD_DIM or min(q.shape[-1], v.shape[-1]) < 1:
        raise ValueError(
            f"the Triton executor takes head dimensions 1 to {MAX_HEAD_DIM}, got {q.shape[-1]} and {v.shape[-1]}; "
            "use gossamer.backends.torch.execute"
        )
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0 or None, got {softcap}")
    if max(plan.query_len, plan.key_len) >= _MOST_TOKENS:
        raise ValueError(f"the Triton executor takes fewer than {_MOST_TOKENS} tokens, got {plan.key_len}")


def _arguments(
    q: Tensor, k: Tensor, v: Tensor, plan: SparsePlan, scale: float, sinks: Tensor | None, softcap: float | None
) -> tuple:
    """Of the operator ``gossamer::triton_execute``."""
    device = q.device
    empty = torch.empty(0, dtype=torch.int32, device=device)
    extent = torch.stack([plan.extent.query_start, plan.extent.key_start, plan.extent.key_count]).to(torch.int32)
    return (
        q,
        k,
        v,
        on_device(plan.block_indptr, device),
        on_device(plan.block_indices, device),
        on_device(plan.column_indptr, device),
        on_device(plan.column_indices, device),
        on_device(torch.as_tensor(plan.sink), device),
        on_device(torch.as_tensor(plan.window), device),
        empty if plan.q_order is None else on_device(plan.q_order, device),
        empty if plan.k_order is None else on_device(plan.k_order, device),
        on_device(extent, device),
        torch.empty(0, device=device) if sinks is None else sinks.float(),
        [plan.heads, plan.block_q, plan.block_k, plan.column_group],
        -1 if plan.limit is None else min(plan.limit, _MOST_TOKENS),
        plan.causal,
        float(scale),
        0.0 if softcap is None else float(softcap),
    )


_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define(
    "triton_execute(Tensor q, Tensor k, Tensor v, Tensor block_indptr, Tensor block_indices, Tensor column_indptr, "
    "Tensor column_indices, Tensor sink, Tensor window, Tensor q_order, Tensor k_order, Tensor extent, Tensor sinks, "
    "int[] shape, int limit, bool causal, float scale, float softcap) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "triton_execute", "CUDA")
@torch.library.impl(_library, "triton_execute", "CPU")
def _triton_execute(*arguments) -> tuple[Tensor, Tensor]:
    from gossamer.backends.triton.launch import Arguments, launch

    return launch(Arguments(*arguments))


@torch.library.register_fake("gossamer::triton_execute", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


torch.library.register_autograd("gossamer::triton_execute", refuse, lib=_library)
