"""Methods on captured attention: what each setting costs and loses, layer by layer, beside the best that plans can do.

A prompt is read once, with dense attention. At every layer each setting plans and attends on what that layer was
given, so that errors do not add up, and the seconds of plan and kernel are taken there: rounds in which all settings
take turns, of which the median counts. Memory: one layer's tensors.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends
from gossamer.backends.torch.dense import dense
from gossamer.call import AttentionCall
from gossamer.evaluate.fidelity import listed_lse, relative_l2
from gossamer.evaluate.subject import Subject
from gossamer.integrations.transformers import Observation
from gossamer.oracle import block_mass, exact_masses, log_sum_exp, oracle_blocks, visible_pairs
from gossamer.plan import Grid, SparsePlan
from gossamer.policy import Policy

__all__ = ["BOUNDS", "DENSITIES", "Bound", "Frontier", "Point", "measure"]

DENSITIES = (0.02, 0.05, 0.1, 0.2, 0.4)
BOUNDS = ("blocks", "columns")
_BLOCK = 64


@dataclass
class Point:
    """One setting on one prompt; of the layers that were looked at.

    Fields (a number a layer, or the sum of all):
        density, recall, error: means over the query heads: pairs computed over pairs allowed, the attention mass that
            they hold, and the relative L2 error of the output.
        plan_s, attend_s: seconds.
        dense_because: reasons of layers that ran dense, with how many.
    """

    density: list[float] = field(default_factory=list)
    recall: list[float] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    plan_s: list[float] = field(default_factory=list)
    attend_s: list[float] = field(default_factory=list)
    dense_because: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return sum(self.plan_s) + sum(self.attend_s)

    def to_dict(self) -> dict[str, Any]:
        layers = {name: [round(x, 6) for x in getattr(self, name)] for name in ("density", "recall", "error")}
        means = {name: sum(values) / len(values) for name, values in layers.items()}
        seconds = {"plan_s": sum(self.plan_s), "attend_s": sum(self.attend_s)}
        return means | seconds | {"layers": layers, "dense_because": self.dense_because}


@dataclass
class Bound:
    """The least error that plans of one kind have at each of `DENSITIES`, from exact masses; means as in `Point`."""

    density: list[list[float]] = field(default_factory=list)
    recall: list[list[float]] = field(default_factory=list)
    error: list[list[float]] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Lists of one number a density."""
        return {
            name: [round(sum(column) / len(column), 6) for column in zip(*getattr(self, name), strict=True)]
            for name in ("density", "recall", "error")
        }


@dataclass
class Frontier:
    """What `measure` found. ``dense_s`` and ``sdpa_s`` are seconds of our dense kernel and of torch's attention."""

    points: list[Point]
    bounds: dict[str, Bound]
    dense_s: float
    sdpa_s: float
    layers: list[int]


def measure(
    subject: Subject,
    tokens: Tensor,
    policies: Sequence[Policy],
    *,
    layers: Sequence[int] | None = None,
    rounds: int = 3,
    bounds: bool = True,
    progress: Callable[[int], None] = lambda layer: None,
) -> Frontier:
    """Measure each policy on the attention of one prompt.

    Args:
        tokens: ``[1, S]``.
        layers: look at these alone; None for all.
        rounds: of timing; the median counts.
        bounds: also find what plans of blocks and of columns can do at best.
        progress: called with each layer that is done.

    Raises:
        ValueError: no layer's attention could be observed.
    """
    points = [Point() for _ in policies]
    best = {name: Bound() for name in BOUNDS} if bounds else {}
    seconds: dict[str, list[float]] = {"dense": [], "sdpa": []}
    seen: list[int] = []

    def visit(observed: Observation) -> None:
        call = observed.call
        if call.layer is None or (layers is not None and call.layer not in layers):
            return
        seen.append(call.layer)
        lse = log_sum_exp(call)
        runs = [_Run(policy) for policy in policies]
        others = {"dense": _Run(Policy.of("dense")), "sdpa": _Run(Policy.of("dense"), by_torch=True)}
        for once in range(rounds):
            for run in (*runs, *others.values()):
                out, kept = run(call)
                if once == 0 and run.plan is not None:
                    run.figures = _figures(observed, run.plan, out, listed_lse(call, run.plan, kept) - lse)
                del out, kept
        for run, point in zip(runs, points, strict=True):
            run.add_to(point)
        for name, run in others.items():
            seconds[name].append(median(run.attend_s))
        for name, bound in best.items():
            _add_bound(name, bound, observed, lse)
        progress(call.layer)

    subject.hidden_states(tokens, Policy.of("dense"), visit)
    if not seen:
        raise ValueError(
            f"{type(subject.model).__name__} made no attention call that can be looked at"
            + ("" if layers is None else f" in layers {', '.join(map(str, layers))}")
        )
    return Frontier(points, best, sum(seconds["dense"]), sum(seconds["sdpa"]), seen)


class _Run:
    """One setting on one layer, several times."""

    def __init__(self, policy: Policy, by_torch: bool = False) -> None:
        self.policy, self.by_torch = policy, by_torch
        self.plan_s: list[float] = []
        self.attend_s: list[float] = []
        self.plan: SparsePlan | None = None
        self.reason: str | None = None
        self.figures = (1.0, 1.0, 0.0)

    def __call__(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        started = _now(call)
        decision = self.policy.decide(call)
        planned = _now(call)
        self.plan, self.reason = decision.plan, decision.reason
        if self.by_torch:
            out = kept = dense(call)
        else:
            plan = self.plan or SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
            out, kept = backends.attend(call, plan)
        self.plan_s.append(planned - started)
        self.attend_s.append(_now(call) - planned)
        return out, kept

    def add_to(self, point: Point) -> None:
        for values, value in zip((point.density, point.recall, point.error), self.figures, strict=True):
            values.append(value)
        point.plan_s.append(median(self.plan_s))
        point.attend_s.append(median(self.attend_s))
        if self.reason is not None:
            point.dense_because[self.reason] = point.dense_because.get(self.reason, 0) + 1


def _now(call: AttentionCall) -> float:
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)
    return time.perf_counter()


def _figures(observed: Observation, plan: SparsePlan, out: Tensor, kept: Tensor) -> tuple[float, float, float]:
    """Density, recall and error of a plan: means over the query heads. ``kept`` is its lse less that of dense."""
    call = observed.call
    live = call.extent.live_queries(call.query_len, call.device)[0]
    recall = kept[0, :, live].exp().clamp(max=1.0).mean()
    return plan.density(), float(recall), float(relative_l2(out[0, :, live], observed.out[0, :, live]).mean())


def _add_bound(name: str, bound: Bound, observed: Observation, lse: Tensor) -> None:
    best = _best_blocks if name == "blocks" else _best_columns
    figures = []
    for plan in best(observed.call, lse):
        out, kept = backends.attend(observed.call, plan)
        figures.append(_figures(observed, plan, out, kept - lse))
    for values, of_layer in zip((bound.density, bound.recall, bound.error), zip(*figures, strict=True), strict=True):
        values.append(list(of_layer))


def _best_blocks(call: AttentionCall, lse: Tensor) -> Iterator[SparsePlan]:
    """Of blocks of 64 for each query head: those with the most mass, wherever in the head they lie."""
    grid = Grid(call.extent, _BLOCK, _BLOCK)
    mass = block_mass(call, lse, grid)
    visible = (visible_pairs(grid) > 0).sum(dim=(1, 2))
    for density in DENSITIES:
        counts = (visible * density).long()[:, None].expand(-1, call.heads)
        mask = oracle_blocks(mass, counts, grid)
        yield SparsePlan.from_block_mask(
            mask, call.query_len, call.key_len, extent=call.extent, block_q=_BLOCK, block_k=_BLOCK
        )


def _best_columns(call: AttentionCall, lse: Tensor) -> Iterator[SparsePlan]:
    """Of single keys for each query head beside a window of 64: those with the most mass for each of their pairs."""
    extent, grid = call.extent, Grid(call.extent, _BLOCK, _BLOCK)
    masses = exact_masses(call, lse=lse, block_q=_BLOCK, block_k=_BLOCK).columns[0, :, : int(extent.key_count[0])]
    live = extent.live_queries(call.query_len)[0]
    queries = extent.query_positions(call.query_len)[0][live]
    key, reach = torch.arange(masses.shape[-1], device="cpu"), extent.limit or extent.longest + call.query_len
    first = key if extent.causal else key - reach + 1
    # How many queries see each key: a column costs so many pairs.
    cost = (torch.searchsorted(queries, key + reach) - torch.searchsorted(queries, first)).to(masses.device)
    order = (masses / cost.clamp(min=1)).argsort(dim=-1, descending=True, stable=True)
    spent = cost[order].cumsum(dim=-1)
    for density in DENSITIES:
        budget = density * int(extent.count_allowed()[0])
        chosen = torch.zeros_like(order, dtype=torch.bool).scatter_(1, order, spent <= budget)
        yield SparsePlan(
            heads=call.heads,
            query_len=call.query_len,
            key_len=call.key_len,
            extent=extent,
            column_group=max(1, grid.query_blocks),
            column_indptr=F.pad(chosen.sum(dim=-1).cumsum(0), (1, 0)),
            column_indices=chosen.nonzero()[:, 1].to(torch.int32),
            window=_BLOCK,
        )
