"""Seconds of dense attention and of methods by length on this machine, and the costs of its kernel."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends
from gossamer.calibrate.cost import count_terms
from gossamer.calibrate.fit import fit, held_out_errors
from gossamer.call import AttentionCall
from gossamer.methods import Method
from gossamer.plan import Grid, SparsePlan
from gossamer.profiles.costs import TERMS, BreakEven, Costs, Kernel, KernelCost, Planning
from gossamer.profiles.machine import Machine

__all__ = ["Row", "Shape", "bench", "break_even", "costs_of", "kernel_cost", "planning_costs"]

Clock = Callable[[], float]


@dataclass(frozen=True)
class Shape:
    """H query heads, G key/value heads, D, dtype and device of the calls that are timed."""

    heads: int
    groups: int
    head_dim: int
    dtype: torch.dtype = torch.float32
    device: str = "cpu"

    def draw(self, length: int, seed: int = 0) -> AttentionCall:
        """Keys and queries that drift with the position, so that near ones match, and some keys that all match."""
        generator = torch.Generator().manual_seed(seed)

        def drawn(heads: int) -> Tensor:
            return torch.randn(1, heads, length, self.head_dim, generator=generator, device="cpu")

        share = self.heads // self.groups
        topics = torch.randn(1, self.groups, length // 512 + 1, self.head_dim, generator=generator, device="cpu")
        topic = topics.repeat_interleave(512, 2)[:, :, :length]
        q, k, v = drawn(self.heads), drawn(self.groups) + topic, drawn(self.groups)
        q.unflatten(1, (self.groups, share)).add_(2 * topic[:, :, None])
        lines = torch.randint(length, (100,), generator=generator, device="cpu")
        k[:, :, lines] += 1.5 * q[:, ::share].mean(2, keepdim=True)
        q, k, v = (x.to(self.device, self.dtype) for x in (q, k, v))
        return AttentionCall(q, k, v)


@dataclass(frozen=True)
class Row:
    """One method at one length: medians of seconds. ``dense_s`` is our kernel's with every pair."""

    method: Method
    length: int
    plan_s: float
    attend_s: float
    dense_s: float
    density: float

    @property
    def seconds(self) -> float:
        return self.plan_s + self.attend_s

    @property
    def planning(self) -> float:
        """Its share of the seconds."""
        return self.plan_s / max(self.seconds, 1e-12)

    def to_dict(self) -> dict[str, Any]:
        numbers = {name: getattr(self, name) for name in ("length", "plan_s", "attend_s", "dense_s", "density")}
        return {"method": self.method.to_dict(), "planning": self.planning} | numbers


def bench(
    shape: Shape,
    methods: Sequence[Method],
    lengths: Sequence[int],
    *,
    rounds: int = 5,
    clock: Clock = time.perf_counter,
) -> Iterator[Row]:
    """Time each method at each length, the methods and dense attention in turns; a first round does not count."""
    for length in lengths:
        call = shape.draw(length)
        plans: dict[int, SparsePlan] = {}
        planned: dict[int, list[float]] = {i: [] for i in range(len(methods))}
        attended: dict[int, list[float]] = {i: [] for i in range(-1, len(methods))}
        for once in range(rounds + 1):
            for i in range(-1, len(methods)):
                started = _now(call, clock)
                plans[i] = methods[i].plan(call) if i >= 0 else _dense(call)
                ready = _now(call, clock)
                backends.attend(call, plans[i])
                if once:
                    planned.setdefault(i, []).append(ready - started)
                    attended[i].append(_now(call, clock) - ready)
        for i, method in enumerate(methods):
            density = plans[i].density()
            yield Row(method, length, median(planned[i]), median(attended[i]), median(attended[-1]), density)


def kernel_cost(
    shape: Shape, lengths: Sequence[int], *, rounds: int = 3, clock: Clock = time.perf_counter
) -> KernelCost:
    """Fit the seconds of this shape's kernel to plans of every kind."""
    counts: list[list[float]] = []
    seconds: list[float] = []
    for length in lengths:
        call = shape.draw(length)
        plans = list(_plans(call))
        taken: list[list[float]] = [[] for _ in plans]
        for once in range(rounds + 1):
            for series, plan in zip(taken, plans, strict=True):
                started = _now(call, clock)
                backends.attend(call, plan)
                if once:
                    series.append(_now(call, clock) - started)
        for series, plan in zip(taken, plans, strict=True):
            terms = {name: float(count.sum()) for name, count in count_terms(call, plan).items()}
            counts.append([1.0, *(terms[name] for name in TERMS[1:])])
            seconds.append(median(series))
    table, wanted = (torch.tensor(rows, dtype=torch.float64, device="cpu") for rows in (counts, seconds))
    errors = held_out_errors(table, wanted)
    each = dict(zip(TERMS, fit(table, wanted).tolist(), strict=True))
    kernel = Kernel.of(shape.draw(1))
    return KernelCost(kernel, each, float(errors.median()), float(errors.max()), len(seconds), tuple(lengths))


def planning_costs(
    shape: Shape,
    methods: Sequence[Method],
    lengths: Sequence[int],
    *,
    rounds: int = 3,
    clock: Clock = time.perf_counter,
) -> list[Planning]:
    """Seconds of each method's plan at each length, the methods in turns; a first round does not count."""
    seconds: dict[Method, list[float]] = {method: [] for method in methods}
    for length in lengths:
        call = shape.draw(length)
        taken: dict[Method, list[float]] = {method: [] for method in methods}
        for once in range(rounds + 1):
            for method, series in taken.items():
                started = _now(call, clock)
                method.plan(call)
                if once:
                    series.append(_now(call, clock) - started)
        for method, series in taken.items():
            seconds[method].append(median(series))
    kernel, heads = Kernel.of(shape.draw(1)), (shape.heads, shape.groups)
    return [Planning(kernel, m.to_dict(), *heads, tuple(lengths), tuple(found)) for m, found in seconds.items()]


def break_even(lengths: Sequence[int], dense: Sequence[float], sparse: Sequence[float]) -> float | None:
    """The length from which sparse is faster than dense up to the longest one, interpolated in logarithms.

    None if it is not faster at the longest length. The shortest length if it is faster everywhere.
    """
    gains = [math.log(d / s) for d, s in zip(dense, sparse, strict=True)]
    if not gains or gains[-1] <= 0:
        return None
    for i in range(len(gains) - 1, 0, -1):
        if gains[i - 1] <= 0:
            share = -gains[i - 1] / (gains[i] - gains[i - 1])
            return math.exp(math.log(lengths[i - 1]) + share * math.log(lengths[i] / lengths[i - 1]))
    return float(lengths[0])


def costs_of(
    shape: Shape, rows: Sequence[Row], kernels: Sequence[KernelCost] = (), planning: Sequence[Planning] = ()
) -> Costs:
    """What was measured, as a file of costs."""
    kernel = Kernel.of(shape.draw(1))
    by_method: dict[Method, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.length):
        by_method.setdefault(row.method, []).append(row)
    points = []
    for method, some in by_method.items():
        lengths = [row.length for row in some]
        tokens = break_even(lengths, [row.dense_s for row in some], [row.seconds for row in some])
        given = kernel, method.to_dict(), shape.heads, shape.groups, tokens, lengths[0], lengths[-1]
        points.append(BreakEven(*given))
    return Costs(Machine.here(), tuple(kernels), tuple(points), tuple(planning))


def _now(call: AttentionCall, clock: Clock) -> float:
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)
    return clock()


def _dense(call: AttentionCall) -> SparsePlan:
    return SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)


def _plans(call: AttentionCall) -> Iterator[SparsePlan]:
    """Dense, bands, random blocks for a group and for a head, columns for all rows and for some, and both."""
    n, extent = call.key_len, call.extent
    sizes: Mapping[str, Any] = {"query_len": n, "key_len": n, "extent": extent}
    generator = torch.Generator().manual_seed(0)
    yield _dense(call)
    for window in (64, max(1, n // 8), max(1, n // 2)):
        yield SparsePlan(heads=call.groups, sink=64, window=window, **sizes).to(call.device)
    grid = Grid(extent, 64, 64)
    distance = torch.arange(grid.query_blocks, device="cpu")[:, None] - torch.arange(grid.key_blocks, device="cpu")
    for heads in {call.groups, call.heads}:
        for density in (0.05, 0.2, 0.5):
            chosen = torch.rand(1, heads, *distance.shape, generator=generator, device="cpu") < density
            mask = (chosen & (distance > 0)) | (distance == 0)
            yield SparsePlan.from_block_mask(mask, n, n, extent=extent).to(call.device)
    for group in (8, max(1, grid.query_blocks)):
        for share in (0.02, 0.1):
            lists = -(-grid.query_blocks // group)
            columns = torch.rand(call.heads, lists, n, generator=generator, device="cpu") < share
            indptr = F.pad(columns.sum(-1).flatten().cumsum(0), (1, 0))
            indices = columns.nonzero()[:, 2].to(torch.int32)
            lists_of = {"column_group": group, "column_indptr": indptr, "column_indices": indices}
            yield SparsePlan(heads=call.heads, window=64, **lists_of, **sizes).to(call.device)
