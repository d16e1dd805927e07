"""A step of training in one attention layer, forward and backward: processes in a ring beside one process.

    python benchmarks/ring.py [--length N] [--rounds N] [--dtypes fp32,bf16] [--quick] [--out FILE]

One process computes with as many threads as there are processes in the ring, which have one each; they take turns on
fresh inputs, medians of the rounds after one that does not count. ``ratio`` is its seconds over the ring's: 1 where
nothing is lost. Plans are made before: ``dense``, and ``planted``, columns and block diagonals by chance. The ring is
striped, over gloo on this machine.

``predicted`` is what `gossamer.distributed.simulate` says of the same ring, from the speed of the kernel that all ranks
measured at once, on a shorter plan of the kind, and from the bandwidth between them. Rings of more processes than cores
are there for that alone.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date, timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from machines import machine
from timing import ROUNDS, cpu_seconds, wake_threads, write
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, backends
from gossamer.distributed import (
    Layer,
    Layout,
    Machine,
    RingPlan,
    Selection,
    pieces_of,
    planted,
    ring_attention,
    selection_of,
    simulate,
)
from gossamer.distributed.speed import pairs_per_second

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
UNIT = 128
TIMED = 8192  # tokens of the plan by which the kernel's speed is measured
SENT_BYTES = 1 << 24


class Spec(NamedTuple):
    """What is computed: query heads, key/value heads, head dimension."""

    plan: str
    dtype: str
    length: int
    heads: int = 2
    groups: int = 1
    dim: int = 64

    def selection(self, length: int) -> Selection:
        if self.plan == "planted":
            return planted(length, self.heads, verticals=length // 64, slashes=24)
        plan = SparsePlan.dense(self.groups, length, length, Extent.full(1, length, length))
        return selection_of(plan, UNIT)

    def draw(self, length: int, seed: int) -> tuple[Tensor, ...]:
        """q, k, v, and what reaches the output."""
        draw = torch.Generator().manual_seed(seed)
        heads = (self.heads, self.groups, self.groups, self.heads)
        return tuple(torch.randn(1, n, length, self.dim, generator=draw).to(DTYPES[self.dtype]) for n in heads)


def step(attend: Any, given: tuple[Tensor, ...]) -> tuple[float, float]:
    """Seconds forward and backward."""
    q, k, v, reaching = (x.detach().requires_grad_(n < 3) for n, x in enumerate(given))
    started = time.perf_counter()
    out = attend(q, k, v)
    attended = time.perf_counter()
    torch.autograd.grad(out, (q, k, v), reaching)
    return attended - started, time.perf_counter() - attended


@cache
def one_plan(spec: Spec) -> SparsePlan:
    """Of a single process."""
    (piece,) = pieces_of(spec.selection(spec.length), Layout("contiguous", spec.length, 1, UNIT), 0, 0)
    return piece.plan


def by_one(spec: Spec, seed: int) -> tuple[float, float]:
    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return backends.attend(AttentionCall(q, k, v), one_plan(spec))[0]

    return step(attend, spec.draw(spec.length, seed))


@cache
def ring_plan(spec: Spec, rank: int, ranks: int) -> RingPlan:
    return RingPlan(spec.selection(spec.length), Layout("striped", spec.length, ranks, UNIT), rank)


def by_rank(spec: Spec, seed: int) -> tuple[float, float]:
    plan = ring_plan(spec, dist.get_rank(), dist.get_world_size())
    given = tuple(plan.layout.split(x, plan.rank) for x in spec.draw(spec.length, seed))
    dist.barrier()
    return step(lambda q, k, v: ring_attention(q, k, v, plan)[0], given)


def speed(spec: Spec) -> tuple[float, float]:
    """Pairs a second of this rank, forward and backward, while the others measure theirs."""
    length = min(TIMED, spec.length)
    selection, (q, k, v, _) = spec.selection(length), spec.draw(length, 0)
    dist.barrier()
    return pairs_per_second(selection, AttentionCall(q, k, v))


def bandwidth() -> float:
    """Bytes a second from this rank to the next, while all send."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    sent, came, seconds = torch.zeros(SENT_BYTES // 4), torch.zeros(SENT_BYTES // 4), []
    for _ in range(6):
        dist.barrier()
        started = time.perf_counter()
        pair = (dist.P2POp(dist.isend, sent, (rank + 1) % ranks), dist.P2POp(dist.irecv, came, (rank - 1) % ranks))
        for work in dist.batch_isend_irecv(list(pair)):
            work.wait()
        seconds.append(time.perf_counter() - started)
    return SENT_BYTES / median(seconds[1:])


DOES = {"step": by_rank, "speed": speed, "bandwidth": bandwidth}


def serve(rank: int, ranks: int, store: str, asked: Connection) -> None:
    """A rank: does what it is asked for until it is asked for nothing."""
    torch.set_num_threads(1)
    time_out = timedelta(minutes=20)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks, timeout=time_out)
    while (question := asked.recv()) is not None:
        name, *given = question
        asked.send(DOES[name](*given))
    dist.destroy_process_group()


class Ring:
    """Processes that do the same at the same time."""

    def __init__(self, ranks: int) -> None:
        self.ranks, self._folder = ranks, tempfile.TemporaryDirectory()
        context = multiprocessing.get_context("spawn")
        self._lines = []
        for rank in range(ranks):
            ours, theirs = context.Pipe()
            store = str(Path(self._folder.name) / "store")
            context.Process(target=serve, args=(rank, ranks, store, theirs), daemon=True).start()
            self._lines.append(ours)

    def ask(self, *question: Any) -> list[Any]:
        for line in self._lines:
            line.send(question)
        return [line.recv() for line in self._lines]

    def end(self) -> None:
        for line in self._lines:
            line.send(None)


def measured(spec: Spec, ring: Ring, rounds: int, alone: bool) -> dict[str, Any]:
    """A row; ``alone`` beside one process."""
    seconds: dict[str, list[tuple[float, float]]] = {"one": [], "ring": []}
    used: list[float] = []
    for n in range(rounds + 1):
        for name in ("one", "ring") if n % 2 else ("ring", "one"):
            if name == "one" and not alone:
                continue
            if name == "one":
                wake_threads()
                before = cpu_seconds()
                taken = by_one(spec, n)
                used.append((cpu_seconds() - before) / sum(taken))
            else:
                taken = tuple(max(parts) for parts in zip(*ring.ask("step", spec, n), strict=True))
            if n:
                seconds[name].append((taken[0], taken[1]))
    row: dict[str, Any] = {**spec._asdict(), "layout": "striped", "ranks": ring.ranks}
    for name, series in seconds.items():
        if series:
            row[name] = {
                "median_s": round(median(map(sum, series)), 4),
                "forward_s": [round(forward, 4) for forward, _ in series],
                "backward_s": [round(backward, 4) for _, backward in series],
            }
    if alone:
        row["one"]["threads_used"] = [round(share, 2) for share in used[1:]]
        row["ratio"] = round(row["one"]["median_s"] / row["ring"]["median_s"], 3)
    return row | predicted(spec, ring, row["ring"]["median_s"])


def predicted(spec: Spec, ring: Ring, really: float) -> dict[str, Any]:
    forward, backward = (median(parts) for parts in zip(*ring.ask("speed", spec), strict=True))
    network = median(ring.ask("bandwidth"))
    layer = Layer(spec.heads, spec.groups, spec.dim, torch.empty(0, dtype=DTYPES[spec.dtype]).element_size())
    layout = Layout("striped", spec.length, ring.ranks, UNIT)
    found = simulate(spec.selection(spec.length), layout, layer, Machine(forward, backward, network))
    total = found.forward_s + found.backward_s
    return {
        "pairs_per_second": [round(forward), round(backward)],
        "bytes_per_second": round(network),
        "imbalance": round(found.mean_imbalance, 3),
        "predicted": {"forward_s": round(found.forward_s, 4), "backward_s": round(found.backward_s, 4)},
        "predicted_over_measured": round(total / really, 3),
    }


def rows(length: int, rounds: int, dtypes: list[str]) -> Iterator[dict[str, Any]]:
    for ranks in (2, 4):
        ring = Ring(ranks)
        for dtype in dtypes:
            for plan in ("dense", "planted"):
                long = ranks > 2 and length > 8192  # more processes than cores, only for the simulator
                spec = Spec(plan, dtype, 8192 if long else length)
                yield measured(spec, ring, rounds, alone=ranks == 2)
        ring.end()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--rounds", type=int, default=min(5, ROUNDS))
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="default: %(default)s")
    parser.add_argument("--quick", action="store_true", help="1K, one round")
    parser.add_argument("--out", type=Path, help="a JSON file; without it rows are printed alone")
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    report = []
    length, rounds = (1024, 1) if arguments.quick else (arguments.length, arguments.rounds)
    for row in rows(length, rounds, arguments.dtypes.split(",")):
        print(json.dumps(row), flush=True)
        report.append(row)
    if arguments.out is not None:
        header = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
        write(arguments.out, {**header, "rows": report})
    return 0


if __name__ == "__main__":
    sys.exit(main())
