"""What a plan's attributes buy: output error against seconds, on queries, keys and values of a model's layers.

    python benchmarks/attributes.py [--model PATH] [--length 16k] [--layers 2,9] [--alphas 0.05,0.2,0.5] [--skips 4,8]
        [--base "max_relative(alpha={alpha})"] [--rounds N] [--quick] [--out FILE]

The calls of the chosen layers are captured from one dense prefill of a prompt, by default of the reference model on the
repository's own text. On each, a method's knob is swept; its plan is attended as it is, with pruned means, with each
skip, and with both, in turns, medians of the rounds after one that does not count. Every row has the density (which
means and skipped tiles do not change), the seconds of planning and of attending, and the error of the output relative
to dense attention on the same kernel, in the L2 norm over all live rows. Compare errors at equal seconds, not at equal
knobs: `frontier` keeps the rows that no other beats in both.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from machines import machine
from timing import alternate, write
from torch import Tensor

from gossamer import AttentionCall, SparsePlan
from gossamer.backends import cpu
from gossamer.cli.specs import parse_method
from gossamer.evaluate.runner import parse_lengths

ROOT = Path(__file__).resolve().parent.parent
ROUNDS = 5
Rows = Iterator[dict[str, Any]]


def capture(path: Path, length: int, layers: Sequence[int], dtype: torch.dtype = torch.bfloat16) -> list[AttentionCall]:
    """The calls of some layers in one dense prefill."""
    import transformers

    from gossamer.integrations.transformers import Observation, enable

    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()
    files = [*sorted(ROOT.glob("src/gossamer/**/*.py")), *sorted(ROOT.glob("docs/**/*.md"))]
    text = "\n".join(file.read_text() for file in files)[: 6 * length]
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    ids = ids.repeat(1, -(-length // ids.shape[1]))[:, :length]
    calls: list[AttentionCall] = []

    def keep(observed: Observation) -> None:
        if observed.call.layer in layers:
            calls.append(observed.call)

    with enable(model, "dense") as handle:
        handle.observe(keep)
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return calls


def variants(skips: Sequence[float]) -> dict[str, dict[str, Any]]:
    """Attributes by name."""
    named: dict[str, dict[str, Any]] = {"plain": {}, "means": {"pruned_mean": True}}
    for skip in skips:
        named |= {f"skip {skip:g}": {"skip": skip}, f"means, skip {skip:g}": {"pruned_mean": True, "skip": skip}}
    return named


def error(out: Tensor, dense: Tensor) -> float:
    """Relative, in the L2 norm: rows of padding are 0 in both."""
    return float((out.float() - dense.float()).norm() / dense.float().norm())


def attend(plan: SparsePlan, call: AttentionCall) -> Tensor:
    return cpu.attend(call, plan)[0]


def sweep(call: AttentionCall, base: str, alphas: Sequence[float], skips: Sequence[float], rounds: int) -> Rows:
    """One call under every knob and attribute."""
    dense_plan = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    dense = attend(dense_plan, call)
    for alpha in alphas:
        method = parse_method(base.format(alpha=alpha))
        plan = method.plan(call)
        plans = {name: plan.with_attributes(**attributes) for name, attributes in variants(skips).items()}
        timed = {name: partial(attend, one) for name, one in (plans | {"dense": dense_plan}).items()}
        series = alternate({"planning": method.plan, **timed}, lambda _: call, rounds=rounds)
        for name, one in plans.items():
            yield {
                "layer": call.layer,
                "length": call.key_len,
                "method": base.format(alpha=alpha),
                "attributes": name,
                "density": round(plan.density(), 5),
                "plan_s": round(series["planning"].median, 6),
                "attend_s": round(series[name].median, 6),
                "dense_s": round(series["dense"].median, 6),
                "error": round(error(attend(one, call), dense), 6),
            }


def frontier(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of the rows of one call, those that no other row beats in seconds and in error; by seconds."""
    best: list[dict[str, Any]] = []
    for row in sorted(rows, key=lambda row: (row["plan_s"] + row["attend_s"], row["error"])):
        if not best or row["error"] < best[-1]["error"]:
            best.append(row)
    return best


def numbers(text: str) -> list[float]:
    return [float(part) for part in text.split(",") if part]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ROOT / "models" / "reference")
    parser.add_argument("--length", default="16k")
    parser.add_argument("--layers", default="1,4", help="the model's numbers of layers")
    parser.add_argument("--base", default="max_relative(alpha={alpha})", help="a method with its knob")
    parser.add_argument("--alphas", default="0.02,0.05,0.1,0.2,0.4,0.7", help="values of the knob")
    parser.add_argument("--skips", default="4,8", help="nats")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="2K, one round, two values")
    parser.add_argument("--out", type=Path, help="a JSON file; without it rows are printed alone")
    arguments = parser.parse_args()
    length = 2048 if arguments.quick else parse_lengths(arguments.length)[0]
    alphas = numbers(arguments.alphas)[:: -1 if arguments.quick else 1][: 2 if arguments.quick else None]
    report: list[dict[str, Any]] = []
    for call in capture(arguments.model, length, [int(n) for n in numbers(arguments.layers)]):
        rows = []
        for row in sweep(
            call, arguments.base, alphas, numbers(arguments.skips), 1 if arguments.quick else arguments.rounds
        ):
            rows.append(row)
            print(json.dumps(row), flush=True)
        for row in frontier(rows):
            print(f"frontier: layer {row['layer']}, {row['method']}, {row['attributes']}")
        report += rows
    if arguments.out is not None:
        header = {"machine": machine(), "date": date.today().isoformat(), "threads": torch.get_num_threads()}
        write(arguments.out, {**header, "model": str(arguments.model), "rows": report})
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
