"""Attention over the pairs of a plan, in C++."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import Parameter

from gossamer.backends.cpu.bias import takes_bias, with_bias_as_dimensions
from gossamer.backends.cpu.native import active_isa, check_tensors, kernels
from gossamer.backends.cpu.views import arrays, dense_rows, plan_view, tensor_view, tokens_view
from gossamer.backends.gradient import refuse
from gossamer.backends.torch.attend import attend_rows as definition
from gossamer.backends.torch.attend import refuse_bias_beside
from gossamer.call import AttentionCall
from gossamer.encoded import EncodedTokens
from gossamer.plan import SparsePlan
from gossamer.plan.parts import plan_parts

__all__ = ["attend", "attend_rows"]

# Rows of a key/value head that read what is encoded as it is: kReaders of csrc/attend/streamed.cpp.
READERS = 16


def attend(call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
    """Attention over exactly the pairs that the plan names. See `gossamer.backends.torch.attend`, the definition.

    fp32, bf16 or fp16 in, fp32 accumulation; head dimensions up to 256. Runs on ``torch.get_num_threads()`` threads
    without the GIL. On each instruction set a batch row's result depends, bit for bit, on nothing but its own live
    tokens and lists: not on padding, the rest of the batch or the number of threads. Few queries (one block of them, as
    in decoding) run split over the keys. A value that is not finite also spoils rows that do not attend it, where they
    attend another key of the same 64 (0 * inf; torch's SDPA does so for all keys), or the mean of one of 64 key blocks
    that have means of their own; dead tokens are never read.
    A bias is computed as dimensions of queries and keys, which are copied for it: in fp32 and bf16, without a soft-cap.
    Plans that are ``quantised`` get the ordinary product.
    The gradient is `attend_backward`'s.

    On ``avx512_bf16`` and ``amx`` the hardware takes bf16 values below the smallest normal number (1.2e-38) as 0, and
    sums below it.

    Returns:
        out ``[B, H, S, Dv]`` in q's dtype and lse fp32 ``[B, H, S]``, both contiguous.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError, TypeError: a plan of another call or device, or one whose tensors were written; another device,
            dtype or head dimension.
        NotImplementedError: from ``backward()``, where an input requires a gradient.
    """
    call.check_plan(plan)
    refuse_bias_beside(call, plan)
    if not takes_bias(call):
        call.refuse_bias("the cpu backend, beside a soft-cap, in fp16 or at this head dimension or scale,")
    if plan.device.type != "cpu":
        raise ValueError(f"the cpu backend takes plans on the CPU, got one on {plan.device}; move it")
    tensors, sizes = plan_parts(plan)
    softcap = 0.0 if call.softcap is None else float(call.softcap)
    # An operator's dispatch would take as long as all the rest of a short call.
    plain = not call.needs_gradient and not torch.compiler.is_compiling() and type(call.q) in (Tensor, Parameter)
    operator = _cpu_attend if plain else torch.ops.gossamer.cpu_attend
    call = with_bias_as_dimensions(call)
    return operator(call.q, call.k, call.values, _sinks(call), tensors, sizes, call.scale, softcap, plan.skip)


def _sinks(call: AttentionCall) -> Tensor:
    return torch.empty(0, device="cpu") if call.sinks is None else call.sinks.float()


# Defined by schema, not by torch.library.custom_op: that imports the whole of torch._dynamo on the first call.
_library = torch.library.Library("gossamer", "FRAGMENT")
_library.define(
    "cpu_attend(Tensor q, Tensor k, Tensor v, Tensor sinks, Tensor[] plan, int[] sizes, float scale, float softcap, "
    "float? skip=None) -> (Tensor, Tensor)"
)


@torch.library.impl(_library, "cpu_attend", "CPU")
def _cpu_attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sinks: Tensor,
    plan: list[Tensor],
    sizes: list[int],
    scale: float,
    softcap: float,
    skip: float | None = None,
) -> tuple[Tensor, Tensor]:
    check_tensors(q, k, v)
    out = torch.empty(*q.shape[:3], v.shape[-1], dtype=q.dtype, device="cpu")
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device="cpu")
    kernels().prefer_huge_pages(out.data_ptr(), out.nbytes)
    _fill(out, lse, (q, k, v), sinks, plan, sizes, scale, softcap, skip)
    return out, lse


def attend_rows(call: AttentionCall, plan: SparsePlan, rows: Tensor) -> tuple[Tensor, Tensor]:
    """See `gossamer.backends.torch.attend_rows`, which runs plans with an order or attributes, and calls with a bias or
    a gradient.

    It costs what dense attention costs for so many rows, less the tiles of 64 keys that none of them attends; where the
    kernels are of bf16, weights are rounded to it, as in `attend`. A row's result depends neither on padding, the rest
    of the batch nor the number of threads.

    Raises:
        RuntimeError: the kernels are not built.
        ValueError, TypeError: as `attend`.
    """
    special = plan.permuted or plan.pruned_mean or plan.skip is not None
    if special or call.needs_gradient or call.bias is not None:
        return definition(call, plan, rows)
    call.check_plan(plan)
    q, k, v = call.q, call.k, call.values
    check_tensors(q, k, v)
    if plan.device.type != "cpu":
        raise ValueError(f"the cpu backend takes plans on the CPU, got one on {plan.device}; move it")
    rows = rows.to("cpu", torch.int64).expand(call.batch, -1).contiguous()
    tensors, sizes = plan_parts(plan)
    out = torch.empty(*q.shape[:2], rows.shape[1], v.shape[-1], dtype=torch.float32, device="cpu")
    lse = torch.empty(out.shape[:3], dtype=torch.float32, device="cpu")
    if out.numel():
        softcap = 0.0 if call.softcap is None else float(call.softcap)
        _fill(out, lse, (q, k, v), _sinks(call), tensors, sizes, call.scale, softcap, rows=rows)
    return out, lse


def _fill(
    out: Tensor,
    lse: Tensor,
    tensors: tuple[Tensor, Tensor, Tensor],
    sinks: Tensor,
    plan: list[Tensor],
    sizes: list[int],
    scale: float,
    softcap: float,
    skip: float | None = None,
    rows: Tensor | None = None,
) -> None:
    """Attend and write; of all queries, or of some ``rows`` ``[B, R]``."""
    native = kernels()
    # Held by name until the kernel is done: only their addresses are handed over.
    q, k, v = (dense_rows(x) for x in tensors)
    plan, sinks = [x.contiguous() for x in plan], sinks.contiguous()
    lse_array, sinks_array = arrays((lse, sinks), (torch.float32, torch.float32))
    call = native.AttentionCall(
        q=tensor_view(q),
        k=tokens_view(k),
        v=tokens_view(v),
        out=tensor_view(out),
        lse=lse_array,
        sinks=sinks_array,
        scale=scale,
        softcap=softcap,
        threads=torch.get_num_threads(),
        rows=(0, 0) if rows is None else (rows.data_ptr(), rows.numel()),
    )
    native.attend(active_isa(_dtype_of_kernel(q, k, v)), plan_view(plan, sizes, skip), call)


def _dtype_of_kernel(q: Tensor, k: Tensor, v: Tensor) -> torch.dtype:
    """That of the tensors; but few queries read encoded tokens in fp32, into which they are decoded."""
    encoded = isinstance(k, EncodedTokens) or isinstance(v, EncodedTokens)
    few = q.shape[2] * (q.shape[1] // max(1, k.shape[1])) <= READERS
    return torch.float32 if encoded and few else q.dtype


@torch.library.register_fake("gossamer::cpu_attend", lib=_library)
def _(q: Tensor, k: Tensor, v: Tensor, *_args: object) -> tuple[Tensor, Tensor]:
    shape = (*q.shape[:3], v.shape[-1])
    return q.new_empty(shape), q.new_empty(q.shape[:3], dtype=torch.float32)


torch.library.register_autograd("gossamer::cpu_attend", refuse, lib=_library)
