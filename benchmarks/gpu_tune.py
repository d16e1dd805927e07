"""Tile shapes measured beside the table's, for the plans that benchmarks/gpu.py times. Runs last: `gpu.py --tune`."""

from __future__ import annotations

import dataclasses
import functools
import math
import statistics
from collections.abc import Callable, Iterator

from gpu_report import Row
from gpu_setting import Attempt, Cell, Setting, full_plan
from gpu_timing import COMPILING_SECONDS
from triton.runtime.errors import OutOfResources
from workloads import random_blocks_of

from gossamer import AttentionCall, SparsePlan
from gossamer.backends.triton.config import Config, Problem, candidates, choose, forget
from gossamer.backends.triton.config import tune as keep_fastest
from gossamer.backends.triton.forward import _arguments
from gossamer.backends.triton.launch import Arguments, launch

MOST = 12
_HOPELESS = 1.3  # a first call that much slower than the best is not repeated


def tune(setting: Setting) -> Iterator[Cell]:
    """A dozen tile shapes for each plan that is timed, one length for each bucket of lengths."""
    headline = [setting.methods[0], next(name for name in setting.methods if name.startswith("max_relative"))]
    # The longest lengths last: what is decided at 128K says most about them.
    for length in setting.lengths(131072, 32768, 524288, 1048576):
        names = [*headline, *(("dense", "10% in 128x128") if 2000 < length < 200_000 else ())]
        if length == 32768:
            names.append("10% in 64x64")
        for name in names:
            yield Cell(f"{name} at {length}", functools.partial(_tune, setting, name, length))


def _tune(setting: Setting, name: str, length: int) -> Iterator[Row]:
    call = setting.draw_like_prompts(length)(0)
    plan = _plan(setting, name, length, call)
    given = Arguments(*_arguments(call, plan))
    parts = {"blocks": plan.block_indices.numel() > 0, "columns": plan.column_indices.numel() > 0}
    problem = Problem.of(call.q, call.values, plan.heads, plan.block_q, plan.block_k, plan.key_len, **parts)
    forget()
    table = choose(problem)
    tried: dict[Config, float] = {}

    def seconds(config: Config) -> float:
        best = min(tried.values(), default=math.inf)
        if setting.budget.left() < COMPILING_SECONDS + (0 if math.isinf(best) else 3 * best):
            return math.inf
        taken = _seconds(setting, lambda: launch(given, config=config), best)
        tried[config] = taken
        return taken

    try:
        best = keep_fastest(problem, seconds, nearest(problem, 2 if setting.interpreted else MOST))
    finally:
        forget()  # the sections time the table
    finite = {config: taken for config, taken in tried.items() if not math.isinf(taken)}
    row: Row = {"what": f"tune {name}", "length": length, "table": describe(table)}
    if not finite:
        yield row | {"skipped": "no time left", "tried": len(tried)}
        return
    gain = tried[table] / finite[best] if table in finite else None
    yield row | {
        "config": describe(best),
        "speedup_over_table": None if gain is None else round(gain, 3),
        "median_s": finite[best],
        "tried": len(tried),
        "candidates": {describe(config): taken if taken < math.inf else None for config, taken in tried.items()},
    }


def _plan(setting: Setting, name: str, length: int, call: AttentionCall) -> SparsePlan:
    if name == "dense":
        return full_plan(setting, length)
    if name.startswith("10% in "):
        block = int(name.rpartition("x")[2])
        plan = random_blocks_of(setting.shape[1], length, 0.1, block_q=block, block_k=block)
        return plan.to(setting.device)
    return Attempt(name).plan(call)


def _seconds(setting: Setting, call: Callable[[], object], best: float) -> float:
    """Median of three after the one that compiles; the first one alone where there is nothing to gain."""
    try:
        if not setting.interpreted:
            call()
        first = setting.timer(call)
    except OutOfResources:
        return math.inf
    if first > _HOPELESS * best or setting.interpreted:
        return first
    return statistics.median([first, setting.timer(call), setting.timer(call)])


def nearest(problem: Problem, most: int) -> list[Config]:
    """The table's choice and those that differ from it least."""
    found = candidates(problem)

    def distance(config: Config) -> int:
        fields = dataclasses.fields(Config)
        return sum(getattr(config, field.name) != getattr(found[0], field.name) for field in fields)

    return sorted(found, key=distance)[:most]


def describe(config: Config) -> str:
    loads = ", descriptors" if config.descriptors else ""
    return f"{config.tile_m}x{config.tile_n}, {config.warps} warps, {config.stages} stages{loads}"
