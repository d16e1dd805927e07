"""Seconds of planning by stage, torch against C++, and planning's share of a sparse attention call.

    python benchmarks/planning.py [--lengths 16384 65536] [--methods minference | all] [--topics N] [--threads N]
        [--rounds N] [--no-torch] [--quick] [--out FILE]

One process, the planners alternating, medians of seven rounds after one that does not count (three where a round of
planning takes over a second). The plans of both are compared first. Rows replace those of the file for the same method,
length and topics. Inputs are drawn with a few keys that many queries look for and with neighbours alike, so that plans
are sparse; H 32, G 8, D 128, bf16. Neighbours are 512 tokens of one topic. All topics differ, so that plans get sparser
as prompts get longer; ``--topics N`` has N of them, which recur in turn, so that the density stays about what it is at
512 N tokens. Stages are timed inside whole plans, by wrapping the functions that make them up: what is left over is
"rest". "finish" chooses what is forced where no scores decide, builds the lists and counts the pairs. Beside each plan
stands the time of attending it. The file stands in a folder of this machine, beside those of others.

``--methods all`` takes every method with its default settings, in the last of 32 layers. Methods that need numbers by
layer and head get random ones (`TABLES`); SeerAttention's gate is the untrained one. Not among them are ``dense``, with
no plan, and ``per_head``, which is what others make it.

``antidiagonal_8`` and ``antidiagonal_16`` are XAttention's scores and selection with that stride, without what it keeps
beside; on one thread the torch version takes minutes at 64K.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

import torch
from machines import machine, results
from timing import LONG_ROUNDS, ROUNDS, Bystanders, environment, wake_threads, write
from torch import Tensor

from gossamer import AttentionCall, SparsePlan, methods, scores
from gossamer.backends import cpu
from gossamer.blocks import Blocks
from gossamer.methods import Method, pbs, vertical_slash
from gossamer.plan.count import count_pairs
from gossamer.rotary import Rotary
from gossamer.rules import TopP

HEADS, GROUPS, DIM = 32, 8, 128
LAYERS = 32
NAME = "planning.json"
LONG_SECONDS = 1.0  # of planning in a round
METHODS = ("minference", "max_relative", "block_sparse")
STRIDES = {"antidiagonal_8": 8, "antidiagonal_16": 16}
PLANLESS = ("dense", "per_head")


def table(heads: int, low: float, high: float) -> list[list[float]]:
    """Numbers for each layer and head, spread evenly over a range."""
    generator = torch.Generator().manual_seed(0)
    return (low + (high - low) * torch.rand(LAYERS, heads, generator=generator)).tolist()


# MoA's spans are a quarter of the prompt in the mean, at most half of it.
TABLES: dict[str, dict[str, list[list[float]]]] = {
    "duo_attention": {"gates": table(GROUPS, 0.0, 1.0)},
    "lserve": {"gates": table(GROUPS, 0.0, 1.0)},
    "moa": {"alphas": table(HEADS, 0.0, 1024.0), "betas": table(HEADS, 0.0, 0.5)},
}


def create(name: str) -> Method:
    return methods.create(name, **TABLES.get(name, {}))


@functools.lru_cache(maxsize=2)
def inputs(length: int, seed: int, dtype: torch.dtype = torch.bfloat16, topics: int | None = None) -> AttentionCall:
    """Keys and queries that drift with the position, so that near ones match, and a hundred keys that all match.

    Args:
        topics: so many, which recur in turn; None: all differ.
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(heads: int) -> Tensor:
        return torch.randn(1, heads, length, DIM, generator=generator)

    stretches = length // 512 + 1
    topic = torch.randn(1, GROUPS, stretches if topics is None else topics, DIM, generator=generator)
    topic = topic[:, :, torch.arange(stretches) % topic.shape[2]].repeat_interleave(512, 2)[:, :, :length]
    k = draw(GROUPS) + topic
    q = draw(HEADS) + 2 * topic.repeat_interleave(HEADS // GROUPS, 1)
    lines = torch.randint(length, (100,), generator=generator)
    k[:, :, lines] += 1.5 * q[:, :: HEADS // GROUPS].mean(2, keepdim=True)
    q, k, v = (x.to(dtype) for x in (q, k, draw(GROUPS)))
    return AttentionCall(q, k, v, layer=LAYERS - 1, rotary=Rotary.of_base(DIM))


# What a plan spends its time on: (stage, module, name). Generators are timed by the item.
_NAMED = {
    "last_query_probe": "probe",
    "pool_keys": "pooling",
    "pool_queries": "pooling",
    "row_block_energy": "energies",
    "antidiagonal_scores": "antidiagonals",
}
STAGES: tuple[tuple[str, Any, str], ...] = (
    *((_NAMED.get(name, name.replace("_", " ")), scores, name) for name in scores.__all__),
    ("select bands", vertical_slash, "band_mass"),
    ("select bands", vertical_slash, "top_k"),
    ("order of keys", pbs, "order_in_segments"),
    ("order of keys", pbs, "reorder_keys"),
    ("columns", Blocks, "columns"),
    ("columns", Blocks, "group_columns"),
    ("choose blocks", Blocks, "choose"),
    ("finish", Blocks, "plan"),
)


@contextlib.contextmanager
def timed_stages(seconds: dict[str, float]) -> Iterator[None]:
    """Adds to ``seconds`` what each stage takes. Stages that contain another one count without it."""
    nested = [0.0]

    def spent(stage: str, call: Callable[[], Any]) -> Any:
        outer, nested[0] = nested[0], 0.0
        started = time.perf_counter()
        try:
            return call()
        finally:
            taken = time.perf_counter() - started
            seconds[stage] = seconds.get(stage, 0.0) + taken - nested[0]
            nested[0] = outer + taken

    def wrap(stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **kwargs: Any) -> Any:
            result = spent(stage, lambda: function(*args, **kwargs))
            if not isinstance(result, Iterator):
                return result
            return iter(lambda: spent(stage, lambda: next(result, None)), None)

        return wrapped

    originals = [(owner, name, getattr(owner, name)) for _, owner, name in STAGES]
    for (stage, owner, name), (_, _, function) in zip(STAGES, originals, strict=True):
        setattr(owner, name, wrap(stage, function))
    try:
        yield
    finally:
        for owner, name, function in originals:
            setattr(owner, name, function)


def antidiagonal_plan(call: AttentionCall, stride: int, block: int = 128) -> SparsePlan:
    """XAttention's selection: nine tenths of each row's mass, the first block and the diagonal before the others."""
    blocks = Blocks(call, block, block)
    blocks.keep(first=1)
    for part, found in scores.antidiagonal_scores(call, blocks.grid, stride):
        blocks.choose(part, found, TopP(0.9, forced_first=True))
    return blocks.plan()


def plan_once(name: str, planner: str, call: AttentionCall) -> tuple[SparsePlan, dict[str, float]]:
    stages: dict[str, float] = {}
    with environment("GOSSAMER_PLANNER", planner):
        started = time.perf_counter()
        with timed_stages(stages):
            plan = antidiagonal_plan(call, STRIDES[name]) if name in STRIDES else create(name).plan(call)
        taken = time.perf_counter() - started
    stages["rest"] = taken - sum(stages.values())
    stages["total"] = taken
    return plan, stages


def differing_pairs(one: SparsePlan, other: SparsePlan) -> float:
    """Share of the entries of two plans, blocks and columns, that only one of them holds."""

    def keys(indptr: Tensor, indices: Tensor) -> Tensor:
        row = torch.repeat_interleave(torch.arange(indptr.numel() - 1), indptr.diff())
        return (row << 32) + indices.long()

    only = both = 0
    for name in ("block", "column"):
        mine, theirs = (keys(getattr(p, f"{name}_indptr"), getattr(p, f"{name}_indices")) for p in (one, other))
        common = int(torch.isin(mine, theirs, assume_unique=True).sum())
        only += mine.numel() + theirs.numel() - 2 * common
        both += mine.numel() + theirs.numel()
    return only / max(1, both)


def verify(names: list[str], length: int = 4096) -> None:
    """Raises AssertionError unless both planners make the same plans from fp32 inputs, near-ties aside."""
    call = inputs(length, seed=0, dtype=torch.float32)
    for name in names:
        ours, torchs = (plan_once(name, planner, call)[0] for planner in ("", "torch"))
        share = differing_pairs(ours, torchs)
        assert share < 1e-4, f"{name}: {share:.1e} of the choices differ"
        assert torch.equal(ours.count_pairs(), count_pairs(ours)), f"{name}: pairs are counted differently"


def measure(
    name: str, length: int, planners: list[str], rounds: int | None, topics: int | None = None
) -> dict[str, Any]:
    """A row; as many rounds as their seconds allow where none are given."""
    samples: dict[str, list[dict[str, float]]] = {planner: [] for planner in planners}
    executed: list[float] = []
    density = differing = 0.0
    for n in itertools.count():
        call = inputs(length, seed=n, topics=topics)
        plans = {}
        for planner in planners[n % len(planners) :] + planners[: n % len(planners)]:
            wake_threads()
            plans[planner], stages = plan_once(name, planner, call)
            if n:
                samples[planner].append(stages)
        wake_threads()
        started = time.perf_counter()
        cpu.attend(call, plans[""])
        if n:  # the first of anything is slower
            executed.append(time.perf_counter() - started)
        density = plans[""].density()
        if "torch" in plans and n == 1:
            differing = differing_pairs(plans[""], plans["torch"])
        if n:
            slow = sum(statistics.median(one["total"] for one in taken) for taken in samples.values()) > LONG_SECONDS
            if n >= (rounds or (LONG_ROUNDS if slow else ROUNDS)):
                break
    execute = statistics.median(executed)
    row: dict[str, Any] = {
        "method": name,
        "length": length,
        "topics": topics,
        "density": round(density, 4),
        "execute_s": round(execute, 4),
        "execute_each_s": [round(seconds, 4) for seconds in executed],
        "rounds": len(executed),
    }
    for planner in planners:
        label = planner or "cpp"
        stages = {s: round(statistics.median(x.get(s, 0.0) for x in samples[planner]), 4) for s in samples[planner][0]}
        row[f"{label}_s"] = stages
        row[f"{label}_each_s"] = [round(x["total"], 4) for x in samples[planner]]
        row[f"{label}_share"] = round(stages["total"] / (stages["total"] + execute), 4)
        row[f"{label}_of_attending"] = round(stages["total"] / execute, 4)
    row["differing"] = round(differing, 6)
    return row


def what(row: dict[str, Any]) -> tuple[str, int, int | None]:
    """Of what a row is: another one of it replaces it."""
    return row["method"], row["length"], row.get("topics")


def print_row(row: dict[str, Any]) -> None:
    print(f"{row['method']} {row['length']}: density {row['density']:.3f}, attending {row['execute_s']:.2f} s")
    for label in ("torch", "cpp"):
        if f"{label}_s" in row:
            stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in row[f"{label}_s"].items())
            shares = f"{row[f'{label}_share']:.1%} of the call, {row[f'{label}_of_attending']:.1%} of attending"
            print(f"  {label:>5}: {shares}; {stages}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[16384, 65536])
    every = [name for name in methods.available() if name not in PLANLESS]
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=["all", *every, *STRIDES])
    parser.add_argument("--topics", type=int, help="so many, which recur in turn; default: all differ")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, help="default: 7, and 3 where one takes over a second")
    parser.add_argument("--no-torch", action="store_true", help="leave the torch planner out")
    parser.add_argument("--quick", action="store_true", help="2K; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the folder of this machine in results/")
    arguments = parser.parse_args()
    if not cpu.is_available():
        print(cpu.why_unavailable(), file=sys.stderr)
        return 1
    torch.set_num_threads(arguments.threads)
    names = every if "all" in arguments.methods else arguments.methods
    try:
        verify(names)
    except AssertionError as error:
        print(f"nothing timed: {error}", file=sys.stderr)
        return 1
    out = arguments.out or (None if arguments.quick else results(NAME))
    kept = json.loads(out.read_text())["rows"] if out is not None and out.exists() else []
    started, bystanders = time.perf_counter(), Bystanders()
    for length in [2048] if arguments.quick else arguments.lengths:
        for name in names:
            row = measure(
                name, length, [""] if arguments.no_torch else ["torch", ""], arguments.rounds, arguments.topics
            )
            print_row(row)
            kept = [old for old in kept if what(old) != what(row)]
            kept.append({**row, "date": date.today().isoformat()})
            report = {
                "machine": machine(),
                "date": date.today().isoformat(),
                "threads": arguments.threads,
                "rounds": arguments.rounds or ROUNDS,
                "rows": sorted(kept, key=lambda row: row["length"]),
                "seconds": round(time.perf_counter() - started, 1),
                "used_by_others": bystanders.share(),
            }
            if out is not None:
                write(out, report)
    share = bystanders.share()
    if share:
        print(f"other programs used {share:.0%} of the machine")
    if out is not None:
        print(f"wrote {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
