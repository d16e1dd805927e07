"""Calls for a plan, and the comparison of the cpu backend with the definition."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
ISAS = cpu.supported_isas() or ["portable"]
BF16_ISAS = ("avx512_bf16", "amx", "amx_emulated")

needs_kernels = pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}")
poisoned = pytest.mark.usefixtures("poisoned_memory")
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# An instruction set for bf16 alone computes other dtypes on another one, which has a case of its own.
KERNELS = [
    (isa, dtype, f"{isa}-{name}")
    for isa in ISAS
    for name, dtype in DTYPES.items()
    if isa not in BF16_ISAS or name == "bf16"
]


def over_kernels(*, emulated: bool) -> pytest.MarkDecorator:
    """Every instruction set with each dtype that it computes in. The emulation is too slow for long inputs."""
    kept = [kernel for kernel in KERNELS if emulated or kernel[0] != "amx_emulated"]
    return pytest.mark.parametrize(("isa", "dtype"), [pytest.param(*one[:2], id=one[2]) for one in kept])


every_kernel = over_kernels(emulated=True)
every_native_kernel = over_kernels(emulated=False)


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def same_on_threads(compute: Callable[[], Any]) -> Any:
    """What it computes, which must not depend on the number of threads."""
    with threads(1):
        expected = compute()
    for count in (2, 5):
        with threads(count):
            again = compute()
        assert len(again) == len(expected)
        assert all(torch.equal(got, one) for got, one in zip(again, expected, strict=True)), f"{count} threads"
    return expected


def draw(
    plan: SparsePlan,
    *,
    heads: int,
    groups: int,
    dim: int,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> AttentionCall:
    """A call for a plan; whatever is dead holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(plan.batch, heads, plan.query_len, dim, generator=generator)
    k = torch.randn(plan.batch, groups, plan.key_len, dim, generator=generator)
    v = torch.randn(plan.batch, groups, plan.key_len, value_dim or dim, generator=generator)
    q.masked_fill_(~plan.extent.live_queries(plan.query_len)[:, None, :, None], math.nan)
    for x in (k, v):
        x.masked_fill_(~plan.extent.live_keys(plan.key_len)[:, None, :, None], math.nan)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, **fields)


def check(call: AttentionCall, plan: SparsePlan, *, tolerance: float | None = None) -> None:
    """`attend` against the definition in fp64."""
    out, lse = cpu.attend(call, plan)
    q, k, v = (x.double() for x in (call.q, call.k, call.values))
    expected, expected_lse = reference.attend(replace(call, q=q, k=k, v=v), plan)
    assert out.dtype == call.q.dtype
    assert lse.dtype == torch.float32
    # Of the largest output: fp32 rounding; an output in fp16; P and an output in bf16.
    size = float(expected.abs().max().clamp_min(1e-30)) if expected.numel() else 1.0
    tolerance = tolerance or {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[call.q.dtype]
    assert bool(out.isfinite().all())
    error = (out.double() - expected).abs() / size
    assert bool((error <= tolerance).all()), f"error {float(error.max()):.2e} of the largest output"
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool((out[empty] == 0).all())
    off = (lse.double() - expected_lse)[~empty].abs()
    allowed = 1e-3 if call.q.dtype == torch.bfloat16 else 2e-5
    if call.q.dtype == torch.bfloat16 and plan.pruned_mean:
        allowed = 1e-2  # means of keys are rounded too
    assert bool((off <= allowed).all()), float(off.max())
