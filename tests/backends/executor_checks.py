"""Inputs for a plan, and the comparison of the C++ executor with the definition."""

import math

import torch
from torch import Tensor

from gossamer import SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Inputs = tuple[Tensor, Tensor, Tensor]


def draw(
    plan: SparsePlan,
    *,
    heads: int,
    groups: int,
    dim: int,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Inputs:
    """Inputs for a plan; dead slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(plan.batch, heads, plan.query_len, dim, generator=generator)
    k = torch.randn(plan.batch, groups, plan.key_len, dim, generator=generator)
    v = torch.randn(plan.batch, groups, plan.key_len, value_dim or dim, generator=generator)
    kpos = plan.extent.key_positions(plan.key_len)
    dead = ((kpos < 0) | (kpos >= plan.extent.key_count[:, None]))[:, None, :, None]
    return q.to(dtype), k.masked_fill(dead, math.nan).to(dtype), v.masked_fill(dead, math.nan).to(dtype)


def check(plan, q, k, v, *, scale=None, sinks=None, softcap=None, tolerance=None) -> None:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = cpu.execute(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
    expected, expected_lse = reference.execute(
        q.double(), k.double(), v.double(), plan, scale=scale, sinks=sinks, softcap=softcap
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    # Of the largest output: fp32 rounding; an output in fp16; P and an output in bf16.
    size = float(expected.abs().max().clamp_min(1e-30))
    tolerance = tolerance or {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[q.dtype]
    assert bool(out.isfinite().all())
    worst = float((out.double() - expected).abs().max()) / size
    assert worst <= tolerance, f"error {worst:.2e} of the largest output"
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    error = (lse.double() - expected_lse)[~empty].abs()
    assert bool((error <= (1e-3 if q.dtype == torch.bfloat16 else 2e-5)).all()), float(error.max())
