"""What benchmarks/gpu.py measures: a function a section, which yields cells, whose rows are plain numbers."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from decoder import Layer, Width
from gpu_report import Row
from gpu_setting import (
    Attempt,
    Cell,
    Setting,
    dense_contenders,
    flex,
    flops,
    full_plan,
    on_triton,
    ours,
    torch_contenders,
)
from gpu_timing import COMPILING_SECONDS, Series, alternate
from gpu_training import training
from gpu_tune import tune
from torch import Tensor
from workloads import random_blocks_of

from gossamer import Policy, SparsePlan
from gossamer.cli.specs import parse_method

Cells = Iterator[Cell]
Rows = Iterator[Row]
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02)
# Of dense attention's arithmetic: max_relative compares each row with one key of 128, by one of the two products.
ENERGY_SHARE = 1 / 256


def roofline(setting: Setting) -> Cells:
    """What the device can do: a large product in bf16, and copying memory."""

    def rows() -> Rows:
        size = 512 if setting.quick else 8192
        a, b = (torch.randn(size, size, device=setting.device, dtype=torch.bfloat16) for _ in range(2))
        seconds = statistics.median(setting.timer(lambda: a @ b) for _ in range(10))
        yield {"what": "bf16 product", "tflops": round(2 * size**3 / seconds / 1e12, 2)}
        source = torch.empty((1 << 20) if setting.quick else (2 << 30), dtype=torch.uint8, device=setting.device)
        target = torch.empty_like(source)
        seconds = statistics.median(setting.timer(lambda: target.copy_(source)) for _ in range(10))
        yield {"what": "copy", "gb_per_s": round(2 * source.numel() / seconds / 1e9, 1)}

    yield Cell("device", rows)


def whole(setting: Setting) -> Cells:
    """Plan and kernel together, on drifting inputs, against the faster of torch's dense kernels."""
    for length in setting.lengths(32768, 131072, 524288, 1048576):
        yield Cell(str(length), functools.partial(_whole, setting, length))


def _whole(setting: Setting, length: int) -> Rows:
    attempts = [Attempt(spec) for spec in setting.methods]
    contenders = torch_contenders(setting)
    powers: dict[str, float] = {}
    for attempt in attempts:
        contenders |= {f"plan {attempt.spec}": attempt.plan, attempt.spec: attempt.attend}
        if not attempt.spec.startswith("max_relative"):  # fixed budgets
            powers |= {f"plan {attempt.spec}": 1, attempt.spec: 1}
    series = alternate(
        setting.timer,
        contenders,
        setting.draw_like_prompts(length),
        **setting.rounds(3 if length > 200_000 else 5),
        budget=setting.budget,
        length=length,
        scope="whole",
        powers=powers,
    )
    best, base = _best_sdpa(series)
    backends = {name: series[name].to_dict() for name in torch_contenders(setting)}
    yield {"what": "sdpa", "length": length, "best_sdpa": best, "backends": backends} | _base(series, best)
    for attempt in attempts:
        own, planning = series[attempt.spec].median, series[f"plan {attempt.spec}"].median
        plan = attempt.made
        density = None if plan is None else plan.to("cpu").density()
        energies = ENERGY_SHARE / density if density and attempt.spec.startswith("max_relative") else None
        yield {
            "what": attempt.spec,
            "length": length,
            "density": _rounded(density, 5),
            "best_sdpa": None,
            "against": best,
            "speedup_over_sdpa": round(base / own, 3) if base and own else None,
            "planning_share": round(planning / own, 3) if planning and own else None,
            "energies_over_attention": _rounded(energies, 3),
            "plan_mib": None if plan is None else round(plan.memory_bytes() / 2**20, 1),
            **series[attempt.spec].to_dict(),
            "plan": series[f"plan {attempt.spec}"].to_dict(),
        }


def _best_sdpa(series: Mapping[str, Series]) -> tuple[str | None, float | None]:
    """The faster of torch's kernels, and its seconds."""
    timed = {name: one.median for name, one in series.items() if name.startswith("sdpa") and one.median}
    best = min(timed, key=lambda name: timed[name], default=None)
    return best, None if best is None else timed[best]


def _base(series: Mapping[str, Series], best: str | None) -> Row:
    """The figures of the best, or why there is none."""
    if best is not None:
        return series[best].to_dict()
    reasons = [one.to_dict() for name, one in series.items() if name.startswith("sdpa")]
    return next((row for row in reasons if "skipped" in row), reasons[0])


def dense(setting: Setting) -> Cells:
    """Our kernel on dense plans against dense attention by others."""
    default = setting.shape[2]
    for length in setting.lengths(8192, 32768, 131072):
        for dim in (default,) if setting.quick or length != 32768 else (default, 64):
            yield Cell(f"{length}, D {dim}", functools.partial(_dense, setting, length, dim))


def _dense(setting: Setting, length: int, dim: int) -> Rows:
    heads, groups, _ = setting.shape
    tiles = -(-length // 128)
    lower = torch.ones(1, groups, tiles, tiles, dtype=torch.bool).tril()
    blocks = SparsePlan.from_block_mask(lower, length, length, block_q=128, block_k=128)
    contenders = {"gossamer": ours(full_plan(setting, length)), **dense_contenders(setting)}
    contenders["flex"] = flex(setting, blocks.to(setting.device), heads)
    series = alternate(
        setting.timer,
        contenders,
        setting.draw(length, dim),
        **setting.rounds(),
        budget=setting.budget,
        length=length,
        scope=f"dense D {dim}",
    )
    own = series["gossamer"].median
    best, base = _best_sdpa(series)
    work = flops(length, heads, dim)
    yield {
        "what": "dense",
        "length": length,
        "dim": dim,
        "best_sdpa": best,
        "share_of_best_sdpa": round(base / own, 3) if base and own else None,
        "rates": {name: round(work / one.median / 1e12, 2) for name, one in series.items() if one.median},
        "series": {name: one.to_dict() for name, one in series.items()},
        **{name: value for name, value in series["gossamer"].to_dict().items() if name in ("failure", "skipped")},
    }


def blocks(setting: Setting) -> Cells:
    """Random block plans: rate on the computed pairs, efficiency against our own dense run, FlexAttention beside."""
    for length in setting.lengths(32768, 131072):
        for block in (64,) if setting.interpreted else (128,) if setting.quick or length > 32768 else (128, 64):
            yield Cell(f"{length} in {block}x{block}", functools.partial(_blocks, setting, length, block))


def _blocks(setting: Setting, length: int, block: int) -> Rows:
    heads, groups, dim = setting.shape
    plans = {"dense": full_plan(setting, length).to("cpu")} | {
        f"{share:.0%}": random_blocks_of(groups, length, share, block_q=block, block_k=block) for share in DENSITIES
    }
    densities = {name: plan.density() for name, plan in plans.items()}
    plans = {name: plan.to(setting.device) for name, plan in plans.items()}
    contenders = {name: ours(plan) for name, plan in plans.items()}
    contenders |= {f"flex {name}": flex(setting, plan, heads) for name, plan in plans.items() if name != "dense"}
    series = alternate(
        setting.timer,
        contenders,
        setting.draw(length),
        **setting.rounds(),
        budget=setting.budget,
        length=length,
        scope=f"blocks {block}",
    )
    base = series["dense"].median
    for name, density in densities.items():
        own = series[name].median
        peer = series.get(f"flex {name}")
        theirs = peer.median if peer is not None else None
        yield {
            "what": f"{name} in {block}x{block}",
            "length": length,
            "density": round(density, 5),
            "tflops": round(density * flops(length, heads, dim) / own / 1e12, 2) if own else None,
            "efficiency": round(base / own * density, 3) if own and base else None,
            "speedup_over_flex": round(theirs / own, 3) if theirs and own else None,
            **series[name].to_dict(),
            **({"flex": peer.to_dict()} if peer is not None else {}),
        }


def model(setting: Setting) -> Cells:
    """Prefill of a Llama-3-8B-shaped model with random weights, to the logits of the last token."""
    width = Width(64, 4, 1, 16, 128) if setting.interpreted else Width(256, 4, 1, 64, 512) if setting.quick else Width()
    vocabulary, depth = (512, 2) if setting.quick else (128256, 32)

    @functools.cache
    def weights() -> tuple[list[Layer], Tensor]:
        head = torch.randn(vocabulary, width.hidden, dtype=torch.bfloat16, device=setting.device)
        return [Layer(width, setting.device) for _ in range(depth)], head

    for length in setting.lengths(131072, 524288, 1048576):
        yield Cell(str(length), functools.partial(_model, setting, width, weights, length))


def _model(setting: Setting, width: Width, weights: Callable[[], tuple[list[Layer], Tensor]], length: int) -> Rows:
    layers, head = weights()
    base = None
    for spec in ("dense", setting.methods[0]):
        if spec == "dense" and length > 200_000:
            continue  # minutes
        policy = Policy(parse_method(spec), min_tokens=0)

        def draw() -> Tensor:
            generator = torch.Generator(setting.device).manual_seed(0)
            return torch.randn(length, width.hidden, dtype=torch.bfloat16, device=setting.device, generator=generator)

        def prefill(policy: Policy = policy, draw: Callable[[], Tensor] = draw) -> Tensor:
            x = draw()
            for layer in layers:
                x = layer.run(x, policy)
            return F.linear(F.rms_norm(x[-1:], (width.hidden,)), head)

        row: Row = {"what": spec, "length": length, "layers": len(layers)}
        with on_triton(setting):
            refusal = setting.budget.refusal(COMPILING_SECONDS)
            if refusal is None and not setting.interpreted:
                layers[0].run(draw(), policy)  # compiles
                one = setting.timer(lambda policy=policy, draw=draw: layers[0].run(draw(), policy))
                refusal = setting.budget.refusal(1.1 * len(layers) * one)
            if refusal is not None:
                yield row | {"skipped": refusal}
                continue
            for layer in layers:
                layer.reset()
            seconds = setting.timer(prefill)
        parts = [layer.watch.seconds() for layer in layers]
        records = [record for layer in layers for record in layer.records]
        base = seconds if spec == "dense" else base
        yield row | {
            "seconds_whole": round(seconds, 3),
            "speedup_over_dense": round(base / seconds, 3) if base and spec != "dense" else None,
            "density": _rounded(statistics.mean(r.density for r in records), 4),
            "executor": sorted({r.executor for r in records}),
            "dense_because": sorted({r.reason for r in records if r.reason}),
            **{f"{part}_s": round(sum(one[part] for one in parts), 3) for part in parts[0]},
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None or math.isnan(value) else round(value, digits)


SECTIONS: dict[str, Callable[[Setting], Cells]] = {
    "roofline": roofline,
    "whole": whole,
    "dense": dense,
    "blocks": blocks,
    "training": training,
    "model": model,
    "tune": tune,
}
