"""Attention over a plan in Triton, as an operator of torch, and the tuning of its tiles."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from gossamer.backends.gradient import refuse
from gossamer.backends.torch.attend import codes_of, refuse_bias_beside
from gossamer.backends.triton.config import Config, Problem, tune
from gossamer.backends.triton.device import check_call, extent_on
from gossamer.call import AttentionCall
from gossamer.encoded import EncodedTokens
from gossamer.plan import SparsePlan, on_device
from gossamer.unread import Unread

if TYPE_CHECKING:
    from gossamer.backends.triton.launch import Arguments

__all__ = ["arguments_of", "attend", "autotune"]

# Rows of a key/value head that read what is encoded as it is: one tile, so that each token is decoded once.
READERS = 16
_WARM_UP, _REPEAT = 10, 30  # milliseconds of a candidate's measurement


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names. See `gossamer.backends.torch.attend`, the definition.

    fp32, bf16 or fp16 in, fp32 accumulation; head dimensions up to 256. The plan's tensors may lie on another device
    than q; they are moved. Nothing here waits for the device. Few queries, as in decoding, read encoded keys and values
    as they are stored; for others they are decoded first. Queries and keys of a plan that is `SparsePlan.quantised` are
    rounded in torch, once a call, and multiplied by the kernel in int8; this has run under Triton's interpreter alone,
    on no GPU.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype and lse fp32 ``[B, H, S]``, both contiguous.

    Raises:
        RuntimeError: Triton is not installed.
        ValueError, TypeError: the plan is for another call; another device, dtype or head dimension; a bias beside
            `SparsePlan.pruned_mean` or ``skip``.
    """
    refuse_bias_beside(call, plan)
    call = _as_read(call, plan)
    arguments = _arguments(call, plan)
    if isinstance(call.k, Unread) or isinstance(call.values, Unread):  # of which an operator would see the rows
        return _triton_attend(*arguments)
    return torch.ops.gossamer.triton_attend(*arguments)


def _as_read(call: AttentionCall, plan: SparsePlan) -> AttentionCall:
    """With rows in place of keys and values that the kernel does not read as they are."""
    few = call.query_len * call.share <= READERS and not plan.pruned_mean and not plan.quantised
    few = few and not call.needs_gradient and not torch.compiler.is_compiling()

    def read(x: Tensor) -> Tensor:
        if not isinstance(x, Unread):
            return x
        return x.at_hand() if few and isinstance(x, EncodedTokens) else x.rows()

    k, v = read(call.k), read(call.values)
    return call if k is call.k and v is call.values else replace(call, k=k, v=v)


def autotune(call: AttentionCall, plan: SparsePlan) -> None:
    """Measure tile shapes for calls like this one; later calls of the same bucket of lengths use the fastest.

    At most twelve are compiled and measured. The outcome depends on head dimension, dtype, blocks, whether there are
    columns, architecture and the bucket (the number of bits of the key count), and lasts as long as the process.

    Raises:
        RuntimeError, ValueError, TypeError: as `attend`; a CPU tensor, which cannot be timed; no shape runs.
    """
    call = _as_read(call, plan)
    arguments = _arguments(call, plan)
    if not call.q.is_cuda:
        raise ValueError(f"autotune measures on a CUDA device, got tensors on {call.device}")
    parts = {"blocks": plan.block_indices.numel() > 0, "columns": plan.column_indices.numel() > 0}
    problem = Problem.of(call.q, call.values, plan.heads, plan.block_q, plan.block_k, plan.key_len, **parts)
    with torch.cuda.device_of(call.q):
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


def arguments_of(call: AttentionCall, plan: SparsePlan) -> Arguments:
    """Of the operator, by name. Imports Triton."""
    from gossamer.backends.triton.launch import Arguments

    return Arguments(*_arguments(call, plan))


def _arguments(call: AttentionCall, plan: SparsePlan) -> tuple:
    """Of the operator ``gossamer::triton_attend``; see `gossamer.backends.triton.launch.Arguments`."""
    check_call(call)
    call.check_plan(plan)
    plan.extent.check(plan.query_len, plan.key_len)
    plan.check_sizes()
    device = call.device
    empty = torch.empty(0, dtype=torch.int32, device=device)
    shape = [plan.heads, plan.block_q, plan.block_k, plan.column_group, plan.num_query_blocks, plan.num_key_blocks]
    shape.append(int(plan.pruned_mean))
    return (
        call.q,
        call.k,
        call.values,
        on_device(plan.block_indptr, device),
        on_device(plan.block_indices, device),
        on_device(plan.column_indptr, device),
        on_device(plan.column_indices, device),
        on_device(torch.as_tensor(plan.sink, device=plan.device), device),
        on_device(torch.as_tensor(plan.window, device=plan.device), device),
        empty if plan.q_order is None else on_device(plan.q_order, device),
        empty if plan.k_order is None else on_device(plan.k_order, device),
        extent_on(plan.extent, device),
        torch.empty(0, device=device) if call.sinks is None else call.sinks.float(),
        torch.empty(0, device=device) if call.bias is None else call.bias,
        shape,
        bool((plan.extent.query_count == plan.query_len).all()),
        call.scale,
        0.0 if call.softcap is None else float(call.softcap),
        plan.skip,
        list(codes_of(call)) if plan.quantised else [],
    )


_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define(
    "triton_attend(Tensor q, Tensor k, Tensor v, Tensor block_indptr, Tensor block_indices, Tensor column_indptr, "
    "Tensor column_indices, Tensor sink, Tensor window, Tensor q_order, Tensor k_order, Tensor extent, Tensor sinks, "
    "Tensor bias, int[] shape, bool all_live, float scale, float softcap, float? skip, "
    "Tensor[] codes) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "triton_attend", "CUDA")
@torch.library.impl(_library, "triton_attend", "CPU")
def _triton_attend(*arguments) -> tuple[Tensor, Tensor]:
    from gossamer.backends.triton.launch import Arguments, launch

    return launch(Arguments(*arguments))


@torch.library.register_fake("gossamer::triton_attend", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


torch.library.register_autograd("gossamer::triton_attend", refuse, lib=_library)
