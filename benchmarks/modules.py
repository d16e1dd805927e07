"""What the trainable layers of papers cost by length, forward and backward, beside a layer of dense attention.

    python benchmarks/modules.py [--lengths 1k,2k,...,32k] [--modules combiner,...] [--rounds N] [--quick] [--out FILE]

Whole layers, projections included, of one width on one sequence of fp32, in turns with dense attention by torch on the
same fresh inputs; medians of the rounds after one that does not count. ``forward`` is without gradients, ``step`` a
forward and a backward pass down to input and parameters, ``decode`` 16 tokens, one by one, after a cache of that
length, for layers that have one. The rows of a length are printed as JSON once it is done; ``--out`` also writes all of
them with the machine, and what follows from them: the exponent of time by length between all lengths and between the
last two, and the length from which a layer is faster than dense attention. A layer without causality stands beside a
dense one without it, of twice the pairs (`BESIDE`). Rows of SeqBoat say what share of the tokens its router, not
trained, activates.

Layers that are masked and dense by definition stop at the length in `LONGEST`: their logits, and the sorts that choose
among them, are of all pairs.

Lengths are multiples of Combiner's spans: decoding begins with an open span that is empty.

A new layer is one line in `MODULES`.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from machines import machine, results
from timing import ROUNDS, Bystanders, alternate, write
from torch import Tensor, nn

from gossamer import AttentionCall, SparsePlan, backends
from gossamer.evaluate.runner import parse_lengths
from gossamer.modules import (
    Axial,
    CombinerAttention,
    CombinerCache,
    DynamicMaskAttention,
    Fixed,
    KeysAndValues,
    Learnable,
    LogSparse,
    Mixture,
    RoutingAttention,
    RowInteraction,
    SeqBoatCache,
    SeqBoatLayer,
    SparsifinerAttention,
)
from gossamer.modules.tokens import Heads

WIDTH, HEADS = 256, 4
LENGTHS = "1k,2k,4k,8k,16k,32k"
BUDGET = 128  # keys of a window, of a cluster; published defaults


class Dense(nn.Module):
    """Attention over all keys, by torch."""

    def __init__(self, causal: bool = True) -> None:
        super().__init__()
        self.projections, self.causal = Heads(WIDTH, HEADS), causal

    def forward(self, x: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(*self.projections.split(x), is_causal=self.causal)
        return self.projections.merge(out)


class Planned(nn.Module):
    """Attention over a plan, on gossamer's kernels: a window, or with None all keys."""

    def __init__(self, window: int | None) -> None:
        super().__init__()
        self.projections, self.window = Heads(WIDTH, HEADS), window

    def forward(self, x: Tensor) -> Tensor:
        call = AttentionCall(*self.projections.split(x))
        size = call.query_len, call.key_len
        if self.window is None:
            plan = SparsePlan.dense(HEADS, *size, call.extent)
        else:
            plan = SparsePlan(HEADS, *size, call.extent, window=self.window)
        return self.projections.merge(backends.attend(call, plan)[0])


class DynamicMask(nn.Module):
    """With one key/value head for each query head, and no rotary embedding; with eight times the budget, 1,024 keys.

    A begins at 0, where all keys are equally good and the choice is a window: it is drawn, so that keys lie anywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS}
        config = SimpleNamespace(hidden_size=WIDTH, **heads, keep_window_size=8 * BUDGET)
        self.layer = DynamicMaskAttention(config)
        nn.init.normal_(self.layer.A)

    def forward(self, x: Tensor) -> Tensor:
        still = x.new_ones(1, x.shape[1], WIDTH // HEADS)
        return self.layer(x, (still, torch.zeros_like(still)))[0]


class Columns(nn.Module):
    """Orion-MSP's rows, as meant: here one row, whose columns are the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.row = RowInteraction(WIDTH, HEADS, 3, classes=1, group="mean")

    def forward(self, x: Tensor) -> Tensor:
        return x + self.row(x[:, None])


def root(length: int) -> int:
    """The power of two nearest to the root of a length: the span that the paper's cost is least with."""
    return 1 << round(math.log2(length) / 2)


# By name: a layer for sequences of so many tokens, ``[1, T, WIDTH]`` to the same.
MODULES: dict[str, Callable[[int], nn.Module]] = {
    "dense": lambda _: Dense(),
    "dense_bidirectional": lambda _: Dense(causal=False),
    "dense_gossamer": lambda _: Planned(None),
    "window": lambda _: Planned(BUDGET),
    "combiner": lambda length: CombinerAttention(WIDTH, HEADS, Fixed(root(length))),
    "combiner_axial": lambda length: CombinerAttention(WIDTH, HEADS, Axial(root(length))),
    "combiner_logsparse": lambda _: CombinerAttention(WIDTH, HEADS, LogSparse()),
    "combiner_mixture": lambda length: CombinerAttention(
        WIDTH, HEADS, Mixture((Fixed(root(length)), Axial(root(length))))
    ),
    "combiner_learnable": lambda length: CombinerAttention(WIDTH, HEADS, Learnable(max(1, length // BUDGET))),
    "routing": lambda length: RoutingAttention(WIDTH, HEADS, max(1, length // BUDGET), window=BUDGET),
    "routing_prefix": lambda length: RoutingAttention(
        WIDTH, HEADS, max(1, length // BUDGET), window=BUDGET, assign="prefix"
    ),
    "seqboat": lambda _: SeqBoatLayer(WIDTH, window=BUDGET),
    "seqboat_relu2": lambda _: SeqBoatLayer(WIDTH, window=BUDGET, activation="relu2", positions="relative"),
    "dynamic_mask": lambda _: DynamicMask(),
    "sparsifiner": lambda length: SparsifinerAttention(WIDTH, HEADS, length),
    "orion_columns": lambda _: Columns(),
}
LONGEST = {"combiner_learnable": 2048, "routing_prefix": 4096, "sparsifiner": 2048, "orion_columns": 2048}
# What a layer stands beside, where that is not causal dense attention.
BESIDE: dict[str, str] = dict.fromkeys(("dense_bidirectional", "sparsifiner", "orion_columns"), "dense_bidirectional")
TOKENS = 16  # that are decoded in a call


def decode_dense(layer: Dense, x: Tensor) -> Callable[[Tensor], object]:
    """With keys and values in one place for all tokens."""
    _, keys, values = layer.projections.split(F.pad(x, (0, 0, 0, 1)))

    def one(token: Tensor) -> object:
        q, k, v = layer.projections.split(token)
        keys[:, :, -1:], values[:, :, -1:] = k, v
        return layer.projections.merge(F.scaled_dot_product_attention(q, keys, values))

    return one


def decode_cached(layer: nn.Module, x: Tensor) -> Callable[[Tensor], object]:
    """With the layer's own cache."""
    cache: Any
    if isinstance(layer, RoutingAttention):
        cache = KeysAndValues()  # the whole call by the prefix would hold all pairs
        cache.append(*layer.projections.split(x)[1:])
    else:
        cache = SeqBoatCache() if isinstance(layer, SeqBoatLayer) else CombinerCache()
        layer(x, cache=cache)
    return lambda token: layer(token, cache=cache)


# By name, for a layer and the tokens before: what takes the next one.
DECODERS: dict[str, Callable[[Any, Tensor], Callable[[Tensor], object]]] = {
    "dense": decode_dense,
    "combiner": decode_cached,
    "routing_prefix": decode_cached,
    "seqboat": decode_cached,
    "seqboat_relu2": decode_cached,
}


def forward(layer: nn.Module, given: tuple[Tensor, Tensor]) -> None:
    with torch.no_grad():
        layer(given[0])


def step(layer: nn.Module, given: tuple[Tensor, Tensor]) -> None:
    x, reaching = given
    x = x.detach().requires_grad_()
    wanted = [x, *layer.parameters()]
    torch.autograd.grad(layer(x), wanted, reaching, allow_unused=True)


@torch.no_grad()
def decode(one: Callable[[Tensor], object], given: tuple[Tensor, Tensor]) -> None:
    for token in given[1][:, :TOKENS].split(1, 1):
        one(token)


def inputs(length: int, seed: int) -> tuple[Tensor, Tensor]:
    """What goes in, and what reaches the output."""
    generator = torch.Generator().manual_seed(seed)
    x, reaching = torch.randn(2, 1, length, WIDTH, generator=generator)
    return x, reaching


def measured(names: Sequence[str], length: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Rows of a length. Layers are in ``train()`` for a step alone: centroids move then, which is part of it.

    What a layer stands beside comes with it.
    """
    torch.manual_seed(0)
    short = [name for name in names if length <= LONGEST.get(name, length)]
    short = list(dict.fromkeys([*(BESIDE[name] for name in short if name in BESIDE), *short]))
    layers = {name: MODULES[name](length) for name in short}
    active = {name: share_of(layer, length) for name, layer in layers.items() if isinstance(layer, SeqBoatLayer)}
    for what, run in (("forward", forward), ("step", step)):
        for layer in layers.values():
            layer.train(what == "step")
        for row in _rows({name: partial(run, layer) for name, layer in layers.items()}, what, length, rounds):
            yield row | ({"active": active[row["module"]]} if row["module"] in active else {})
    decoded = {name: MODULES[name](length).eval() for name in names if name in DECODERS}
    if decoded.keys() - {"dense"}:
        with torch.no_grad():
            before, _ = inputs(length, rounds + 1)
            made = {name: DECODERS[name](layer, before) for name, layer in decoded.items()}
        yield from _rows({name: partial(decode, one) for name, one in made.items()}, "decode", length, rounds)


@torch.no_grad()
def share_of(layer: SeqBoatLayer, length: int) -> float:
    """Of the tokens that a router activates."""
    return round(float(layer.eval().active(inputs(length, 0)[0]).double().mean()), 4)


def _rows(
    contenders: dict[str, Callable[[Any], object]], what: str, length: int, rounds: int
) -> Iterator[dict[str, Any]]:
    others = Bystanders()
    series = alternate(contenders, partial(inputs, length), rounds=rounds)
    share = others.share()
    for name, one in series.items():
        beside = BESIDE.get(name, "dense")
        speed = round(series[beside].median / one.median, 3) if beside in series else None
        row = {"module": name, "what": what, "length": length, "times_dense": speed, "used_by_others": share}
        yield row | one.to_dict()


def exponent(points: Sequence[tuple[int, float]]) -> float | None:
    """Of seconds by length: the slope of their logarithms, by least squares. None of fewer than two lengths."""
    if len(points) < 2:
        return None
    xs, ys = ([math.log(value) for value in part] for part in zip(*points, strict=True))
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    spread = sum((a - x) ** 2 for a in xs)
    return round(sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True)) / spread, 3)


def break_even(mine: Sequence[tuple[int, float]], dense: Sequence[tuple[int, float]]) -> int | None:
    """The length from which a layer is faster than dense attention up to the longest, between lengths on a straight
    line of logarithms. The shortest where it always is; None where it is not at the longest."""
    gains = [(length, math.log(dict(dense)[length] / seconds)) for length, seconds in mine]
    if not gains or gains[-1][1] <= 0:
        return None
    last = next((i for i in reversed(range(len(gains))) if gains[i][1] <= 0), None)
    if last is None:
        return gains[0][0]
    (low, lost), (high, won) = gains[last], gains[last + 1]
    return round(low * (high / low) ** (-lost / (won - lost)))


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What follows from all rows, for each layer forward, in a step, and where it decodes.

    ``beside`` is the dense layer whose time ``break_even`` and ``times_dense`` are of; ``times_gossamer`` is of dense
    attention on gossamer's kernels, which is what a layer on those gains by computing less.
    """
    found: dict[tuple[str, str], list[tuple[int, float]]] = {}
    for row in rows:
        found.setdefault((row["module"], row["what"]), []).append((row["length"], row["median_s"]))
    made = []
    for (name, what), points in found.items():
        points.sort()
        beside = BESIDE.get(name, "dense")
        beside = beside if (beside, what) in found else "dense"
        dense, ours = (sorted(found.get((other, what), [])) for other in (beside, "dense_gossamer"))
        longest, seconds = points[-1]
        made.append(
            {
                "module": name,
                "what": what,
                "beside": beside,
                "lengths": len(points),
                "shortest": points[0][0],
                "longest": longest,
                "exponent": exponent(points),
                "last_exponent": exponent(points[-2:]),
                "break_even": None if name == beside or not dense else break_even(points, dense),
                "times_dense": round(dict(dense)[longest] / seconds, 3) if dense else None,
                "times_gossamer": round(dict(ours)[longest] / seconds, 3) if longest in dict(ours) else None,
            }
        )
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default=LENGTHS)
    parser.add_argument("--modules", default=",".join(MODULES), help="names; dense stands beside them")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="256 and 512 tokens, one round")
    parser.add_argument("--out", type=Path, nargs="?", const=results("modules.json"), help="a JSON file")
    arguments = parser.parse_args()
    lengths = (256, 512) if arguments.quick else parse_lengths(arguments.lengths)
    names = list(dict.fromkeys(["dense", *arguments.modules.split(",")]))
    if unknown := [name for name in names if name not in MODULES]:
        parser.error(f"unknown module {unknown[0]!r}; known: {', '.join(MODULES)}")
    rounds = 1 if arguments.quick else arguments.rounds
    header = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
    header |= {"rounds": rounds, "width": WIDTH, "heads": HEADS, "dtype": "fp32", "budget": BUDGET}
    header |= {"decoded_tokens": TOKENS}
    rows: list[dict[str, Any]] = []
    for length in lengths:
        for row in measured(names, length, rounds):
            print(json.dumps(row), flush=True)
            rows.append(row)
        if arguments.out is not None:  # after each length: the longest takes most of the time
            write(arguments.out, {**header, "summary": summary(rows), "rows": rows})
    for row in summary(rows):
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
