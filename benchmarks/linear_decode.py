"""What packed weights cost where a model decodes: linear layers of one token, beside torch's in bf16 and float32.

    python benchmarks/linear_decode.py [--only layers,steps,prompts] [--rounds 9] [--quick] [--out [FILE]]

*layers*: one linear layer of a shape; so many copies take turns that none is found in a cache, as in a model.
*steps*: all linear layers of a decode step, one after the other, in the shapes of a model: those of Qwen2.5-Coder-0.5B,
all 24 layers, and of Mistral-7B, two of its 32. Tokens a second count linear layers alone: no attention, no head.
*prompts*: one layer and 512 tokens: tiles of the weight made whole in turn, or all of it, beside one that is whole.

Weights are random. Contenders take turns in one process; ``speedup`` is the median over rounds of the bf16 layer's
seconds over a contender's in the same round. Bytes are of the weights as stored: what a product has to read.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from machines import machine, results
from timing import Bystanders, Series, alternate, write
from torch import Tensor, nn

from gossamer.backends import cpu
from gossamer.compressed.int8 import row_scale
from gossamer.compressed.packed import OneBitLinear, SparseLinear

Shape = tuple[int, int]  # [out, in]
Row = dict[str, Any]

BASE = "bf16"
SHAPES: dict[str, list[Shape]] = {
    "SmolLM2-135M": [(576, 576), (1536, 576), (576, 1536)],
    "Qwen2.5-Coder-0.5B": [(896, 896), (128, 896), (4864, 896), (896, 4864)],
    "larger": [(4096, 4096), (14336, 4096)],
}
# Layers of a model, hidden width, width of keys and of values, width inside.
MODELS = {"Qwen2.5-Coder-0.5B": (24, 896, 128, 4864), "Mistral-7B, 2 of 32 layers": (2, 4096, 1024, 14336)}
PROMPTS = [(4864, 896), (4096, 4096)]
TOKENS = 512


@dataclass(frozen=True)
class Setting:
    """How thoroughly to measure.

    Args:
        cache_bytes: of all copies of a layer: three times the largest cache of the machines that were measured.
        seconds: of a call, at least: many layers are faster than a clock is fine.
        quick: few shapes, no steps.
    """

    rounds: int = 9
    cache_bytes: int = 96 << 20
    seconds: float = 0.05
    quick: bool = False


FULL, QUICK = Setting(), Setting(rounds=2, cache_bytes=1 << 20, seconds=0.001, quick=True)


def random_weight(shape: Shape, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) / shape[1] ** 0.5


def dense(dtype: torch.dtype) -> Callable[[Shape], nn.Module]:
    def make(shape: Shape) -> nn.Module:
        layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype)
        layer.weight = nn.Parameter(random_weight(shape).to(dtype), requires_grad=False)
        return layer

    return make


def sparse(share: float, *, int8: bool = False) -> Callable[[Shape], nn.Module]:
    def make(shape: Shape) -> nn.Module:
        weight = random_weight(shape)
        weight = weight.masked_fill(torch.rand(shape, generator=torch.Generator().manual_seed(1)) < share, 0.0)
        return SparseLinear.of(weight, None, row_scale(weight) if int8 else None, torch.bfloat16)

    return make


def one_bit(shape: Shape) -> nn.Module:
    """With a tenth of the columns salient; `binarise` would take minutes to choose them."""
    out, features = shape
    layer = OneBitLinear.empty(nn.Linear(features, out, bias=False, dtype=torch.bfloat16), 128)
    draw = torch.Generator().manual_seed(0)
    layer.codes.random_(0, 256, generator=draw)
    layer.levels.normal_(0, features**-0.5, generator=draw)
    bits = torch.rand(len(layer.salient), 8, generator=draw) < 0.1
    layer.salient.copy_((bits * 2 ** torch.arange(8)).sum(1))
    return layer


CONTENDERS: dict[str, Callable[[Shape], nn.Module]] = {
    BASE: dense(torch.bfloat16),
    "fp32": dense(torch.float32),
    "50% zeros": sparse(0.5),
    "70% zeros": sparse(0.7),
    "70% zeros, int8": sparse(0.7, int8=True),
    "1 bit": one_bit,
}


def stored_bytes(layer: nn.Module) -> int:
    """Of a layer's weight."""
    tensors = layer.state_dict(keep_vars=True).values()
    return sum(x.nbytes for x in tensors)


def copied(layer: nn.Module, number: int) -> list[nn.Module]:
    """Layers with memory of their own."""
    return [layer, *(copy.deepcopy(layer) for _ in range(number - 1))]


def dtype_of(name: str) -> torch.dtype:
    return torch.float32 if name == "fp32" else torch.bfloat16


def in_turn(layers: Iterable[tuple[nn.Module, Tensor]], times: int) -> Callable[[Any], None]:
    known = list(layers)

    def call(_: Any) -> None:
        for _ in range(times):
            for layer, x in known:
                layer(x)

    return call


def timed(calls: dict[str, list[tuple[nn.Module, Tensor]]], setting: Setting) -> dict[str, tuple[Series, int]]:
    """Seconds of all layers of each contender, and how often a call goes through them."""
    times = {}
    for name, layers in calls.items():
        found = alternate({name: in_turn(layers, 1)}, lambda seed: None, rounds=1)[name].median
        times[name] = max(1, round(setting.seconds / found))
    contenders = {name: in_turn(layers, times[name]) for name, layers in calls.items()}
    found = alternate(contenders, lambda seed: None, rounds=setting.rounds)
    return {name: (series, times[name]) for name, series in found.items()}


def summary(found: dict[str, tuple[Series, int]], base: str, products: dict[str, int]) -> dict[str, Row]:
    """Of each contender the seconds of a product (or of a step), and how many times as fast it is."""
    series, times = found[base]
    first = [wall / times / products[base] for wall in series.wall]
    rows = {}
    for name, (own, often) in found.items():
        seconds = [wall / often / products[name] for wall in own.wall]
        rows[name] = {
            "seconds": statistics.median(seconds),
            "rounds_s": [round(s, 9) for s in seconds],
            "speedup": round(statistics.median(a / b for a, b in zip(first, seconds, strict=True)), 3),
            "threads_used": own.to_dict()["threads_used"],
        }
    return rows


def layer_row(model: str, shape: Shape, setting: Setting) -> Row:
    made = {name: make(shape) for name, make in CONTENDERS.items()}
    sizes = {name: stored_bytes(layer) for name, layer in made.items()}
    copies = {name: max(2, -(-setting.cache_bytes // size)) for name, size in sizes.items()}
    x = torch.randn(1, shape[1], generator=torch.Generator().manual_seed(0))
    calls = {name: [(one, x.to(dtype_of(name))) for one in copied(layer, copies[name])] for name, layer in made.items()}
    rows = summary(timed(calls, setting), BASE, copies)
    for name, row in rows.items():
        row |= {"bytes": sizes[name], "copies": copies[name], "gb_s": round(sizes[name] / row["seconds"] / 1e9, 2)}
    return {"model": model, "shape": list(shape), "tokens": 1, "contenders": rows}


def shapes_of(model: str) -> list[Shape]:
    layers, hidden, kv, inner = MODELS[model]
    one = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    return layers * [*one, (inner, hidden), (inner, hidden), (hidden, inner)]


def step_row(model: str, setting: Setting) -> Row:
    shapes = shapes_of(model)
    inputs = {n: torch.randn(1, n, generator=torch.Generator().manual_seed(n)) for n in {shape[1] for shape in shapes}}
    calls: dict[str, list[tuple[nn.Module, Tensor]]] = {}
    sizes = {}
    for name, make in CONTENDERS.items():
        drawn = {shape: iter(copied(make(shape), shapes.count(shape))) for shape in set(shapes)}
        layers = [next(drawn[shape]) for shape in shapes]
        calls[name] = [
            (layer, inputs[shape[1]].to(dtype_of(name))) for layer, shape in zip(layers, shapes, strict=True)
        ]
        sizes[name] = sum(map(stored_bytes, layers))
    rows = summary(timed(calls, setting), BASE, dict.fromkeys(calls, 1))
    for name, row in rows.items():
        row |= {"bytes": sizes[name], "gb_s": round(sizes[name] / row["seconds"] / 1e9, 2)}
        row["tokens_per_s"] = round(1 / row["seconds"], 2)
    return {"model": model, "products": len(shapes), "contenders": rows}


class MadeWhole(nn.Module):
    """A packed layer whose whole weight is made in each call."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.layer.weight)


def prompt_row(shape: Shape, setting: Setting) -> Row:
    made = {name: make(shape) for name, make in CONTENDERS.items() if name != "fp32"}
    for name in [name for name in made if name != BASE]:
        made[f"{name}, made whole"] = MadeWhole(made[name])
    x = torch.randn(TOKENS, shape[1], generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found = timed({name: [(layer, x)] for name, layer in made.items()}, setting)
    return {"shape": list(shape), "tokens": TOKENS, "contenders": summary(found, BASE, dict.fromkeys(made, 1))}


def layers(setting: Setting) -> Iterator[Row]:
    for model, shapes in SHAPES.items():
        for shape in shapes[:1] if setting.quick else shapes:
            if not (setting.quick and model == "larger"):
                yield layer_row(model, shape, setting)


def steps(setting: Setting) -> Iterator[Row]:
    for model in MODELS:
        if not setting.quick:
            yield step_row(model, setting)


def prompts(setting: Setting) -> Iterator[Row]:
    for shape in PROMPTS[:1] if setting.quick else PROMPTS:
        yield prompt_row(shape, setting)


SECTIONS: dict[str, Callable[[Setting], Iterator[Row]]] = {"layers": layers, "steps": steps, "prompts": prompts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(SECTIONS))
    parser.add_argument("--rounds", type=int, default=FULL.rounds)
    parser.add_argument("--quick", action="store_true", help="few shapes and two rounds, to see that it runs")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path, nargs="?", const=results("linear_decode.json"), help="a JSON file")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    setting = QUICK if arguments.quick else replace(FULL, rounds=arguments.rounds)
    out: Path | None = arguments.out
    report: Row = json.loads(out.read_text()) if out is not None and out.exists() else {}
    isas = {name: cpu.active_isa(getattr(torch, name)) for name in ("float32", "bfloat16")}
    report |= {"machine": machine(), "date": date.today().isoformat(), "threads": arguments.threads, "isas": isas}
    for section in arguments.only.split(","):
        report[section] = []
        bystanders = Bystanders()
        for row in SECTIONS[section](setting):
            report[section].append(row | {"rounds": setting.rounds, "used_by_others": bystanders.share()})
            bystanders = Bystanders()
            brief = {name: (one["seconds"], one["speedup"]) for name, one in row["contenders"].items()}
            print(json.dumps(row | {"contenders": brief}), flush=True)
            if out is not None:
                write(out, report)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
