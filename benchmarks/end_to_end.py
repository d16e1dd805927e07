"""Prefill end to end: decoder layers with the shape of an 8B Llama, and the reference model at its longest length.

    python benchmarks/end_to_end.py [--only layers,reference] [--lengths 32k,64k] [--methods ...] [--inputs ...]
        [--layers N] [--rounds N] [--quick] [--out FILE]

Layers: hidden size 4096, 32 query heads on 8 key/value heads of 128, MLP 14336, random weights, bfloat16. One layer by
default: a stack takes as many times as long. "random" inputs make attention nearly uniform: a method whose plan follows
the data (max_relative) then finds little to leave out, while one with a fixed budget (minference) computes what it
always does. "drifting" inputs keep to a topic for 512 tokens, and queries look for keys of their kind, so that
attention is mostly within the topic. Times say what a layer costs, never what is lost. The reference model reads the
repository's own text. Methods take turns, in an order that moves on by one a round, after a warm-up each; seconds are
medians, of three rounds up to 32K and of one beyond unless --rounds says otherwise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from decoder import Layer, Width
from machines import machine, results
from timing import Bystanders, wake_threads, write

from gossamer import Policy, methods
from gossamer.attention import CallRecord
from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.runner import parse_lengths

ROOT = Path(__file__).resolve().parent.parent
NAME = "end_to_end.json"
MODEL_TOKENS, MODEL_ROUNDS = 32768, 3
WARM_UP_TOKENS, MOST_TOKENS_OF_ROUNDS = 2048, 32768
INPUTS = ("random", "drifting")
Rows = Iterator[dict[str, Any]]


def turns(names: list[str], rounds: int) -> Iterator[tuple[int, str]]:
    """Each round has every name once, in an order that moves on by one a round."""
    for n in range(rounds):
        for name in names[n % len(names) :] + names[: n % len(names)]:
            yield n, name


def hidden_states(kind: str, length: int, hidden: int, seed: int) -> torch.Tensor:
    """Inputs of a layer ``[length, hidden]``: noise, or noise about a topic that changes every 512 tokens."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(length, hidden, generator=generator)
    if kind == "drifting":
        topics = torch.randn(length // 512 + 1, hidden, generator=generator)
        x = 0.7 * x + topics.repeat_interleave(512, 0)[:length]
    return x.bfloat16()


@dataclass
class Samples:
    """Runs of one method, a figure a round."""

    parts: list[dict[str, float]] = field(default_factory=list)
    records: Sequence[Any] = ()

    def add(self, total: float, parts: dict[str, float], records: Sequence[Any]) -> None:
        plan = sum(r.plan_seconds for r in records)
        self.parts.append({"total": total, **parts, "rest": total - parts["attention"], "plan": plan})
        self.records = records

    def to_dict(self) -> dict[str, Any]:
        """Medians of all parts, and each round's seconds of the whole, of attention and of the rest."""
        median = {part: statistics.median(run[part] for run in self.parts) for part in self.parts[0]}
        each = {"each_s": "total", "attention_each_s": "attention", "rest_each_s": "rest"}
        return {
            **{f"{part}_s": round(seconds, 3) for part, seconds in median.items()},
            **{name: [round(run[part], 3) for run in self.parts] for name, part in each.items()},
            "density": round(statistics.mean(r.density for r in self.records), 4),
        }


def layers(arguments: argparse.Namespace) -> Rows:
    """Prefills for each kind of inputs, length and method."""
    width = Width(256, 4, 2, 64, 512) if arguments.quick else Width()
    for inputs in arguments.inputs.split(","):
        torch.manual_seed(0)
        stack = [Layer(width, akin=inputs == "drifting") for _ in range(arguments.layers)]
        for length in (2048,) if arguments.quick else parse_lengths(arguments.lengths):
            names = split_specs(arguments.methods)
            if length > parse_lengths(arguments.longest_sdpa)[0]:
                names = [name for name in names if not is_sdpa(name)]
            rounds = arguments.rounds or (3 if length <= MOST_TOKENS_OF_ROUNDS else 1)
            bystanders = Bystanders()
            found = {name: Samples() for name in names}
            for name in names:
                prefill(stack, parse_method(name), hidden_states(inputs, WARM_UP_TOKENS, width.hidden, 0))
            for n, name in turns(names, rounds):
                found[name].add(*prefill(stack, parse_method(name), hidden_states(inputs, length, width.hidden, n)))
            share = bystanders.share()
            for name, samples in found.items():
                yield {
                    "method": name,
                    "length": length,
                    "inputs": inputs,
                    "layers": len(stack),
                    **asdict(width),
                    **samples.to_dict(),
                    "dense_because": [r.reason for r in samples.records if r.reason],
                    "used_by_others": share,
                }


def is_sdpa(name: str) -> bool:
    method = parse_method(name)
    return isinstance(method, methods.Dense) and method.kernel == "torch"


def prefill(
    stack: list[Layer], method: methods.Method, x: torch.Tensor
) -> tuple[float, dict[str, float], list[CallRecord]]:
    """Seconds of the whole and of its parts, and what attention did."""
    for layer in stack:
        layer.reset()
    wake_threads()
    started = time.perf_counter()
    for layer in stack:
        x = layer.run(x, Policy(method))
    total = time.perf_counter() - started
    seconds = [layer.watch.seconds() for layer in stack]
    return (
        total,
        {part: sum(one[part] for one in seconds) for part in seconds[0]},
        [r for layer in stack for r in layer.records],
    )


def reference(arguments: argparse.Namespace) -> Rows:
    """The reference model's prefill, the methods in turn."""
    import transformers

    import gossamer.integrations.transformers as integration

    path = ROOT / "models" / "reference"
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
    files = [*sorted(ROOT.glob("src/gossamer/**/*.py")), *sorted(ROOT.glob("docs/**/*.md"))]
    length = 2048 if arguments.quick else MODEL_TOKENS
    text = "\n".join(file.read_text() for file in files)[: 6 * length]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    names = split_specs(arguments.methods)
    found = {name: Samples() for name in names}
    bystanders = Bystanders()
    rounds = arguments.rounds or MODEL_ROUNDS
    for turn, name in turns(names, rounds + 1):
        with integration.enable(model, parse_method(name)) as handle:
            wake_threads()
            started = time.perf_counter()
            model(input_ids=ids, use_cache=True, logits_to_keep=1)
            seconds = time.perf_counter() - started
            if turn:  # the first of anything is slower
                records = list(handle.stats())
                attention = sum(r.plan_seconds + r.attention_seconds for r in records)
                found[name].add(seconds, {"attention": attention}, records)
    share = bystanders.share()
    for name, samples in found.items():
        layers = len(samples.records)
        yield {"method": name, "length": length, "layers": layers, **samples.to_dict(), "used_by_others": share}


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    """Older rows are of random inputs, and do not say so."""
    return row.get("inputs", "random"), row["layers"], row["length"], row["method"]


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {"layers": layers, "reference": reference}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; the file keeps other rows")
    parser.add_argument("--lengths", default="32k,64k,128k", help="of the layers")
    parser.add_argument("--layers", type=int, default=1, help="in a stack, as many as fit; time grows by their number")
    parser.add_argument("--inputs", default=",".join(INPUTS), help=f"of the layers: {', '.join(INPUTS)}")
    parser.add_argument("--rounds", type=int, help="default: 3, and 1 of layers beyond 32K")
    parser.add_argument("--methods", default="dense,dense(kernel=gossamer),minference,max_relative")
    parser.add_argument("--longest-sdpa", default="64k", help="torch's dense attention is left out beyond this length")
    parser.add_argument("--quick", action="store_true", help="2K, narrow layers; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"default: {NAME} in the folder of this machine in results/")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only takes {', '.join(PARTS)}; got {unknown[0]!r}")
    if unknown := sorted(set(arguments.inputs.split(",")) - set(INPUTS)):
        parser.error(f"--inputs takes {', '.join(INPUTS)}; got {unknown[0]!r}")
    out = arguments.out or (None if arguments.quick else results(NAME))
    report: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for name in chosen:
        kept = report.get(name, {}).get("rows", [])
        for row in PARTS[name](arguments):
            print(json.dumps(row), flush=True)
            kept = [old for old in kept if identity(old) != identity(row)] + [row]
            kept.sort(key=lambda row: identity(row)[:3])
            part = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
            report[name] = {**part, "rows": kept}
            if out is not None:
                write(out, {part: report[part] for part in PARTS if part in report})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
