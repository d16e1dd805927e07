"""Prefill end to end: decoder layers with the shape of an 8B Llama, and the reference model at its longest length.

    python benchmarks/end_to_end.py [--only layers,reference] [--lengths 32k,64k] [--methods ...] [--quick] [--out FILE]

Layers: hidden size 4096, 32 query heads on 8 key/value heads of 128, MLP 14336, random weights, bfloat16. With random
weights attention is nearly uniform: a method whose plan follows the data (max_relative) then finds little to leave out,
while one with a fixed budget (minference) computes what it always does. Times say what a layer costs, never what is
lost. The reference model reads the repository's own text; its methods take turns, and seconds are medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
from decoder import Layer, Width
from timing import Bystanders, machine, write

from gossamer import methods
from gossamer.attention import Policy
from gossamer.cli.specs import parse_method, split_specs
from gossamer.evaluate.runner import parse_lengths

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
MODEL_TOKENS, MODEL_ROUNDS = 32768, 3
Rows = Iterator[dict[str, Any]]


def layers(arguments: argparse.Namespace) -> Rows:
    """One prefill for each length and method."""
    width = Width(256, 4, 2, 64, 512) if arguments.quick else Width()
    stack = [Layer(width) for _ in range(arguments.layers)]
    for length in (2048,) if arguments.quick else parse_lengths(arguments.lengths):
        for name in split_specs(arguments.methods):
            method = parse_method(name)
            is_sdpa = isinstance(method, methods.Dense) and method.kernel == "torch"
            if is_sdpa and length > parse_lengths(arguments.longest_sdpa)[0]:
                continue
            x = torch.randn(length, width.hidden, generator=torch.Generator().manual_seed(0)).bfloat16()
            for layer in stack:
                layer.reset()
            started = time.perf_counter()
            for layer in stack:
                x = layer.run(x, Policy(method))
            total = time.perf_counter() - started
            parts = [layer.watch.seconds() for layer in stack]
            records = [record for layer in stack for record in layer.records]
            yield {
                "method": name,
                "length": length,
                "layers": len(stack),
                **asdict(width),
                "total_s": round(total, 3),
                "density": round(sum(r.density for r in records) / len(records), 4),
                "plan_s": round(sum(r.plan_seconds for r in records), 3),
                "dense_because": [r.reason for r in records if r.reason],
                **{f"{part}_s": round(sum(one[part] for one in parts), 3) for part in parts[0]},
            }


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
    found: dict[str, list[tuple[float, list[Any]]]] = {name: [] for name in names}
    for turn in range(MODEL_ROUNDS + 1):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            with integration.enable(model, parse_method(name)) as handle:
                started = time.perf_counter()
                model(input_ids=ids, use_cache=True, logits_to_keep=1)
                seconds = time.perf_counter() - started
                if turn:  # the first of anything is slower
                    found[name].append((seconds, list(handle.stats())))
    for name, runs in found.items():
        rows = runs[-1][1]
        yield {
            "method": name,
            "length": length,
            "layers": len(rows),
            "total_s": round(statistics.median(seconds for seconds, _ in runs), 3),
            "each_s": [round(seconds, 3) for seconds, _ in runs],
            "attention_s": round(
                statistics.median(sum(r.plan_seconds + r.attention_seconds for r in stats) for _, stats in runs), 3
            ),
            "plan_s": round(statistics.median(sum(r.plan_seconds for r in stats) for _, stats in runs), 3),
            "density": round(statistics.mean(row.density for row in rows), 4),
        }


def timed(rows: Rows) -> Rows:
    """Each row with the share of the machine that other programs took while it was measured."""
    while True:
        bystanders = Bystanders()
        row = next(rows, None)
        if row is None:
            return
        yield row | {"used_by_others": bystanders.share()}


PARTS: dict[str, Callable[[argparse.Namespace], Rows]] = {"layers": layers, "reference": reference}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help=f"of {', '.join(PARTS)}; the file keeps other rows")
    parser.add_argument("--lengths", default="32k,64k,128k", help="of the layers")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--methods", default="dense,dense(kernel=gossamer),minference,max_relative")
    parser.add_argument("--longest-sdpa", default="64k", help="torch's dense attention is left out beyond this length")
    parser.add_argument("--quick", action="store_true", help="2K, narrow layers; writes nothing without --out")
    parser.add_argument("--out", type=Path, help=f"default: {RESULTS.name} in results/")
    arguments = parser.parse_args()
    chosen = arguments.only.split(",")
    if unknown := sorted(set(chosen) - set(PARTS)):
        parser.error(f"--only takes {', '.join(PARTS)}; got {unknown[0]!r}")
    out = arguments.out or (None if arguments.quick else RESULTS)
    report: dict[str, Any] = json.loads(out.read_text()) if out is not None and out.exists() else {}
    for name in chosen:
        kept = report.get(name, {}).get("rows", [])
        for row in timed(PARTS[name](arguments)):
            print(json.dumps(row), flush=True)
            kept = [old for old in kept if (old["length"], old["method"]) != (row["length"], row["method"])] + [row]
            kept.sort(key=lambda row: row["length"])
            part = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
            report[name] = {**part, "rows": kept}
            if out is not None:
                write(out, {part: report[part] for part in PARTS if part in report})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
