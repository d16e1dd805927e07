"""What the sections of benchmarks/cpu.py share: plans against SDPA and others in turn, a row a plan."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peak import peak_flops
from timing import LONG_ROUNDS, ROUNDS, alternate, wake_threads
from workloads import DTYPES, Shape

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu

Row = dict[str, Any]
Rows = Iterator[Row]
Plans = Mapping[str, Callable[[], SparsePlan]]
# What tells a row of a section from the others.
IDENTITY = ("what", "length", "dtype", "dim", "heads", "groups", "isa")


def identity(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(name) for name in IDENTITY)


@dataclass(frozen=True)
class Request:
    """What a section is asked for: small sizes or all, and without the rows that are held already."""

    quick: bool = False
    held: tuple[Mapping[str, Any], ...] = ()

    def lacks(self, **wanted: Any) -> bool:
        """Whether no row that is held has these values."""
        return not any(all(row.get(name) == value for name, value in wanted.items()) for row in self.held)

    def lacks_of(self, shape: Shape, *names: str) -> list[str]:
        """Those of the rows so named that are not held for a shape and the instruction set of this moment."""
        where = {"length": shape.length, "dtype": shape.dtype, "dim": shape.dim}
        isa = cpu.active_isa(DTYPES[shape.dtype])
        return [name for name in names if self.lacks(what=name, isa=isa, **where)]


@functools.cache
def gemm_rate(dtype: str, quick: bool) -> float:
    """FLOP/s of torch's matrix product, the best of several; of a small one where a large one would take minutes."""
    wake_threads()
    small = product_rate(dtype, 512, 2)
    if small < 5e9:
        return small
    return product_rate(dtype, 1024, 4) if quick else product_rate(dtype, 4096, 8)


def product_rate(dtype: str, size: int, times: int) -> float:
    a, b = (torch.randn(size, size).to(DTYPES[dtype]) for _ in range(2))
    best = math.inf
    for _ in range(times):
        started = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


@functools.cache
def register_rate(isa: str, threads: int) -> float | None:
    """FLOP/s of multiply-adds on registers, which no kernel of the instruction set can pass; the best of several.

    None where there is no compiler for the loop (see `peak`); then torch's matrix product is the scale.
    """
    wake_threads()
    rates = [peak_flops(isa, threads, 0.05) for _ in range(12)]
    return max((rate for rate in rates if rate is not None), default=None)


def about(shape: Shape, plan: SparsePlan, name: str) -> Row:
    return {
        "what": name,
        "length": shape.length,
        "dtype": shape.dtype,
        "dim": shape.dim,
        "heads": shape.heads,
        "groups": shape.groups,
        "block_k": plan.block_k,
        "density": round(plan.density(), 5),
        "isa": cpu.active_isa(DTYPES[shape.dtype]),
    }


def rounds_of(length: int) -> int:
    """Fewer at lengths where a call of SDPA takes half a minute and more."""
    return ROUNDS if length <= 32768 else 5 if length <= 65536 else LONG_ROUNDS


def compare(
    request: Request,
    shape: Shape,
    plans: Plans,
    prepare: Callable[[AttentionCall], None] | None = None,
    label: str = "",
    **others: Callable[[AttentionCall], object],
) -> Rows:
    """SDPA, the plans and other contenders in turn; a row a plan that is not held yet, with what the others took.

    Args:
        plans: makers by name. "dense" runs with any of the others, for their efficiency.
        prepare: is given each round's inputs before they are timed.
        label: in front of the names in the rows.
    """
    wanted = [name for name in plans if request.lacks_of(shape, label + name)]
    if not wanted:
        return

    def inputs(seed: int) -> AttentionCall:
        call = shape.draw(seed)
        if prepare is not None:
            prepare(call)
        return call

    made = {name: make() for name, make in plans.items() if name in wanted or name == "dense"}
    contenders = {"sdpa": shape.sdpa, **others, **{name: shape.run(plan) for name, plan in made.items()}}
    series = alternate(contenders, inputs, rounds=rounds_of(shape.length), warm_up=shape.length <= 32768, long_rounds=2)
    base = series["sdpa"].median
    dense = series["dense"].median if "dense" in series else None
    gemm = gemm_rate(shape.dtype, request.quick)
    registers = register_rate(cpu.active_isa(DTYPES[shape.dtype]), torch.get_num_threads())
    for name in wanted:
        plan, seconds = made[name], series[name].median
        density = plan.density()
        rate = density * shape.flops() / seconds
        yield {
            **about(shape, plan, label + name),
            "speedup": round(base / seconds, 3),
            "gflops": round(rate / 1e9, 1),
            "share_of_peak": None if registers is None else round(rate / registers, 3),
            "share_of_gemm": round(rate / gemm, 3),
            "efficiency": None if dense is None else round(dense / seconds * density, 3),
            **series[name].to_dict(),
            "sdpa": series["sdpa"].to_dict(),
            **{other: series[other].to_dict() for other in others},
        }
