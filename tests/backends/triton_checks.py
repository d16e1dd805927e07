"""Calls and plans by chance, and the comparison of the Triton backend's attention with the definition."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from triton_support import moved

from gossamer import SparsePlan
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.triton import config, forward
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div

launch: Any = pytest.importorskip("gossamer.backends.triton.launch", reason="Triton is not installed")


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
    """A call for a plan; what is dead holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(plan.batch, heads, plan.query_len, dim, generator=generator)
    k = torch.randn(plan.batch, groups, plan.key_len, dim, generator=generator)
    v = torch.randn(plan.batch, groups, plan.key_len, value_dim or dim, generator=generator)
    q.masked_fill_(~plan.extent.live_queries(plan.query_len)[:, None, :, None], math.nan)
    for tensor in (k, v):
        tensor.masked_fill_(~plan.extent.live_keys(plan.key_len)[:, None, :, None], math.nan)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, **fields)


def plan_for(
    call: AttentionCall, seed: int, *, heads: int, block_q: int = 32, block_k: int = 32, orders: str = ""
) -> SparsePlan:
    """Blocks, columns and bands of a call by chance, rows without any, and overlaps; ``orders`` may have q and k."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(call.extent, block_q, block_k)
    rows = ceil_div(call.query_len, block_q) if "q" in orders else grid.query_blocks
    width = ceil_div(call.key_len, block_k) if "k" in orders else grid.key_blocks
    group = [1, 2, max(1, rows)][seed % 3]

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(call.batch, heads, *shape, generator=generator) < share

    def order(length: int) -> Tensor:
        return torch.rand(call.batch, heads, length, generator=generator).argsort(-1).int()

    listed = chance(0.2, ceil_div(rows, group), call.extent.longest) & chance(0.8, ceil_div(rows, group), 1)
    return SparsePlan.from_block_mask(
        chance(0.5, rows, width) & chance(0.8, rows, 1),
        call.query_len,
        call.key_len,
        extent=call.extent,
        block_q=block_q,
        block_k=block_k,
        column_group=group,
        column_indptr=F.pad(listed.sum(-1).flatten().cumsum(0), (1, 0)),
        column_indices=listed.flatten(0, 2).nonzero()[:, 1].int(),
        sink=[5, 0, 40, 0, 1, 2][:heads],
        window=[20, 0, 3, 45, 1, 0][:heads],
        q_order=order(call.query_len) if "q" in orders else None,
        k_order=order(call.key_len) if "k" in orders else None,
    )


def given(call: AttentionCall, plan: SparsePlan) -> Any:
    return launch.Arguments(*forward._arguments(call, plan))


def run(call: AttentionCall, plan: SparsePlan, chosen: config.Config | None = None) -> tuple[Tensor, Tensor]:
    """``chosen`` overrides the table's configuration."""
    call = moved(call)
    out, lse = triton.attend(call, plan) if chosen is None else launch.launch(given(call, plan), config=chosen)
    return out.cpu(), lse.cpu()


def check(call: AttentionCall, plan: SparsePlan, chosen: config.Config | None = None) -> None:
    out, lse = run(call, plan, chosen)
    own = torch.float32 if plan.quantised else torch.float64  # in which numbers next to a half round alike
    q, k, v = (torch.where(t.isnan(), 0.0, t.to(own)) for t in (call.q, call.k, call.values))
    expected, expected_lse = definition.attend(replace(call, q=q, k=k, v=v), plan)
    assert out.dtype == call.q.dtype
    assert lse.dtype == torch.float32
    # Of the largest output: fp32 rounding; P and an output in fp16, in bf16.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[call.q.dtype]
    assert bool(out.isfinite().all())
    worst = float((out.double() - expected).abs().max()) / float(expected.abs().max().clamp_min(1e-30))
    assert worst <= tolerance, f"error {worst:.2e} of the largest output"
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    allowed = 2e-5
    if plan.pruned_mean:  # means of keys are rounded
        allowed = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[call.q.dtype]
    assert bool(((lse.double() - expected_lse)[~empty].abs() <= allowed).all())
