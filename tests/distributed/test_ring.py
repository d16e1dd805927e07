"""Attention of several processes is that of one, forward and backward."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import ranks
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, backends
from gossamer.distributed import KINDS, Layout, RingPlan, ring_attention
from gossamer.testing import random_plan


@dataclass(frozen=True)
class Case:
    """One call of all ranks; plans are made from it again by whoever needs one."""

    kind: str
    length: int = 90
    seed: int = 0
    plan: str = "random"
    heads: int = 4
    groups: int = 2
    batch: int = 1
    shared: bool = False  # a plan of the key/value heads
    dtype: torch.dtype = torch.float32
    softcap: float | None = None
    sinks: bool = False
    unit: int = 8
    lengths: tuple[int, ...] | None = None
    value_dim: int = 16

    def layout(self, count: int) -> Layout:
        inner = None if self.kind != "hierarchical" else 2 if count % 2 == 0 else 1
        return Layout(self.kind, self.length, count, self.unit, inner)

    def whole_plan(self) -> SparsePlan:
        heads = self.groups if self.shared else self.heads
        if self.plan == "random":
            return random_plan(
                self.seed,
                batch=self.batch,
                heads=heads,
                query_len=self.length,
                key_len=self.length,
                block_q=4,
                block_k=4 * (1 + self.seed % 2),
            )
        limit = 21 if self.plan == "limit" else None
        lengths = list(self.lengths or (self.length,) * self.batch)
        extent = Extent([0] * self.batch, lengths, [0] * self.batch, lengths, limit=limit)
        if self.plan == "band":
            return SparsePlan(heads, self.length, self.length, extent, block_q=4, block_k=4, sink=5, window=13)
        return SparsePlan.dense(heads, self.length, self.length, extent)

    def tensors(self) -> list[Tensor]:
        """q, k, v, what reaches out and lse, and sinks."""
        draw = torch.Generator().manual_seed(self.seed)
        shapes = [(self.heads, 16), (self.groups, 16), (self.groups, self.value_dim), (self.heads, self.value_dim)]
        q, k, v, reaching = (
            torch.randn(self.batch, heads, self.length, dim, generator=draw).to(self.dtype) for heads, dim in shapes
        )
        of_lse = torch.randn(self.batch, self.heads, self.length, generator=draw)
        return [q, k, v, reaching, of_lse, torch.randn(self.heads, generator=draw)]


def share(rank: int, cases: list[Case]) -> list[list[Tensor]]:
    """What a rank has of each case: out, lse and the gradients of its q, k and v, and of the sinks."""
    found = []
    for case in cases:
        layout = case.layout(torch.distributed.get_world_size())
        *whole, sinks = case.tensors()
        q, k, v, reaching, of_lse = (layout.split(x, rank) for x in whole)
        leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
        plan = RingPlan(case.whole_plan(), layout, rank)
        out, lse = ring_attention(q, k, v, plan, softcap=case.softcap, sinks=sinks if case.sinks else None, scale=0.3)
        level = lse.masked_fill(lse == float("-inf"), 0.0)
        loss = (out.float() * reaching.float()).sum() + (level * of_lse).sum()
        gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
        found.append([out.detach(), lse.detach(), *gradients])
    return found


@functools.cache
def of_one(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """The same by one process."""
    q, k, v, reaching, of_lse, sinks = (x.to(dtype) for x in case.tensors())
    leaves = [x.requires_grad_() for x in (q, k, v, sinks)]
    plan = case.whole_plan()
    call = AttentionCall(q, k, v, plan.extent, scale=0.3, softcap=case.softcap, sinks=sinks if case.sinks else None)
    out, lse = backends.attend(call, plan)
    level = lse.masked_fill(lse == float("-inf"), 0.0)
    loss = (out * reaching).sum() + (level * of_lse).sum()
    return [out.detach(), lse.detach(), *torch.autograd.grad(loss, leaves, allow_unused=True)]


def distance(x: Tensor, exact: Tensor) -> float:
    """Of the norm; rows that attend nothing must agree about it."""
    nothing = exact == float("-inf")
    assert torch.equal(x == float("-inf"), nothing)
    x, exact = (t.double().masked_fill(nothing, 0.0) for t in (x, exact))
    assert bool(x.isfinite().all())
    return float((x - exact).norm()) / max(float(exact.norm()), 1e-30)


NAMES = ("out", "lse", "dq", "dk", "dv", "dsinks")


def assert_equal_to_one(cases: list[Case], answers: list[str]) -> None:
    parts = [torch.load(path) for path in answers]
    for n, case in enumerate(cases):
        layout, exact, own = case.layout(len(parts)), of_one(case, torch.float64), of_one(case, case.dtype)
        for i, name in enumerate(NAMES):
            of_ranks = [part[n][i] for part in parts]
            if name == "dsinks" and not case.sinks:
                continue
            whole = torch.stack(of_ranks).sum(0) if name == "dsinks" else layout.join(of_ranks)
            error, theirs = distance(whole, exact[i]), distance(own[i], exact[i])
            # Beside one process's own error: what merging rounds, once a step.
            least = 1e-6 if case.dtype == torch.float32 else 4e-3
            assert error <= 2 * theirs + least, f"{case}: {name} is off by {error:.1e}, one process by {theirs:.1e}"


def cases(kinds: tuple[str, ...] = KINDS) -> list[Case]:
    found = []
    for n, kind in enumerate(kinds):
        found += [Case(kind, seed=seed, length=(90, 64, 13, 5)[(seed + n) % 4]) for seed in range(8)]
        found += [
            Case(kind, plan="dense", shared=True),
            Case(kind, plan="dense", shared=True, length=700, unit=128),
            Case(kind, plan="dense", heads=3, groups=3, length=37, value_dim=8),
            Case(kind, plan="band", seed=1, softcap=2.0),
            Case(kind, plan="limit", seed=2, shared=True, length=75),
            Case(kind, plan="dense", batch=3, lengths=(90, 41, 0), seed=3),
            Case(kind, plan="band", batch=2, lengths=(17, 90), seed=4, sinks=True),
            Case(kind, seed=5, shared=True, sinks=True),
            Case(kind, plan="dense", seed=6, dtype=torch.bfloat16),
        ]
    return found


@pytest.mark.parametrize("count", [2, 3, 4])
def test_a_ring_is_one_process(count: int, tmp_path: Path) -> None:
    every = cases()
    assert_equal_to_one(every, ranks.run(share, count, tmp_path, every))


def test_one_rank_is_a_ring(tmp_path: Path) -> None:
    every = [replace(case, seed=case.seed + 10) for case in cases(("striped",))]
    assert_equal_to_one(every, ranks.run(share, 1, tmp_path, every))
