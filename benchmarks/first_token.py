"""Time to the first token of a long prompt: sparse attention and int8 linear layers beside the whole model.

    python benchmarks/first_token.py MODEL [--lengths 8192,16384] [--methods LIST] [--rounds 3] [--recipe int8]
        [--against bfloat16,float32] [--reference sdpa] [--out FILE]

Contenders are transformers' own sdpa attention in the dtypes of ``--against``, and for each method the model in
bfloat16, and with its linear layers compressed by the recipe (calibrated on other prompts). They take turns on the same
prompts, each after a short one that does not count; seconds are medians, a ratio is that within a round. KL (nats) and
top-1 agreement are of the predictions at every 64th position of the first prompt, beside those of dense attention in
float32, by transformers' sdpa or by gossamer's kernel (``--reference``), whose seconds stand beside them, of that run.

With ``--memory kept`` glibc keeps what is freed, for all contenders alike (`gossamer.backends.cpu.keep_freed_memory`).

Results are `first_token_<model>.json` in the folder of this machine; rows of the same length, contender, recipe and
memory are replaced.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from contextlib import nullcontext
from datetime import date
from pathlib import Path
from typing import Any

import torch
import transformers
from contenders import Prompts, kept
from linear import Timed, beside, linear_layers, medians
from machines import machine, results
from timing import Bystanders, wake_threads, write
from torch import Tensor, nn

import gossamer
from gossamer.backends.cpu import keep_freed_memory
from gossamer.cli.pretrained import file_hash, model_folder
from gossamer.cli.specs import parse_method, split_specs
from gossamer.compressed.recipes import recipe_of
from gossamer.compressed.sequential import decoder_layers
from gossamer.integrations.transformers import enable

WARM_UP, EVERY, FAR = 512, 64, 10**6
METHODS = "minference(vertical_size=256,slash_size=1024)"
REFERENCES = {"sdpa": None, "gossamer": "dense(kernel=gossamer)"}
Row = dict[str, Any]
Contender = tuple[nn.Module, str | None]  # a model, and the method it attends by; None: sdpa


def timed(model: Any) -> Any:
    """The model, whose linear layers, compressed or not, count their seconds."""
    for parent, name, layer in linear_layers(model):
        setattr(parent, name, Timed(layer))
    _, layers = decoder_layers(model)
    for layer in layers:
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child).__module__.startswith("gossamer.compressed"):
                    setattr(parent, name, Timed(child))
    return model


def prefill(contender: Contender, ids: list[int], keep: Any = 1) -> tuple[Row, Tensor]:
    """Seconds, and the logits that are kept."""
    model, method = contender
    counters = [module for module in model.modules() if isinstance(module, Timed)]
    for module in counters:
        module.seconds = 0.0
    wake_threads()
    with nullcontext() if method is None else enable(model, parse_method(method)) as handle:
        started = time.perf_counter()
        logits = model(input_ids=torch.tensor([ids]), use_cache=True, logits_to_keep=keep).logits[0]
        row = {"total_s": time.perf_counter() - started, "linear_s": sum(module.seconds for module in counters)}
        if handle is not None:
            layers = list(handle.stats())
            row["planning_s"] = sum(layer.plan_seconds for layer in layers)
            row["attention_s"] = sum(layer.attention_seconds for layer in layers)
            row["density"] = statistics.fmean(layer.density for layer in layers)
    return row, logits


def loaded(folder: Path, dtype: torch.dtype) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def contenders(folder: Path, prompts: Prompts, arguments: argparse.Namespace) -> dict[str, Contender]:
    """By name, in turn."""

    made: dict[str, Contender] = {
        f"sdpa {name}": (timed(loaded(folder, getattr(torch, name))), None)
        for name in (split_specs(arguments.against) if arguments.against else [])
    }
    small = loaded(folder, torch.bfloat16)
    recipe = recipe_of(json.loads(arguments.recipe) if arguments.recipe.startswith("{") else arguments.recipe)
    samples = [torch.tensor([prompts.ids(arguments.calibrate, FAR + n)]) for n in range(arguments.samples)]
    begun = time.perf_counter()
    compressed = gossamer.compress(loaded(folder, torch.bfloat16), recipe, samples)
    print(f"compressed in {time.perf_counter() - begun:.0f} s", file=sys.stderr, flush=True)
    for model, name in ((timed(small), "bfloat16"), (timed(compressed), recipe.name)):
        made |= {f"{method} {name}": (model, method) for method in split_specs(arguments.methods)}
    return made


def measure(found: dict[str, Contender], prompts: Prompts, length: int, rounds: int) -> dict[str, Row]:
    """Rows by contender; the first one is what ratios are to."""
    runs: dict[str, list[Row]] = {name: [] for name in found}
    bystanders = Bystanders()
    for number in range(rounds):
        names = list(found)
        turned = number % len(names)
        for name in [*names[turned:], *names[:turned]]:
            prefill(found[name], prompts.ids(WARM_UP, FAR))
            runs[name].append(prefill(found[name], prompts.ids(length, number))[0])
            print(f"{length}, {name}: {runs[name][-1]['total_s']:.2f} s", file=sys.stderr, flush=True)
    share = bystanders.share()
    rows = {}
    for name, own in runs.items():
        rows[name] = medians(own) | {"rounds": rounds, "used_by_others": share}
        for other in found:
            if other.startswith("sdpa") and other != name:
                pairs = zip(runs[other], own, strict=True)
                ratio = statistics.median(a["total_s"] / b["total_s"] for a, b in pairs)
                rows[name][f"times_{other.replace(' ', '_')}"] = round(ratio, 3)
    return rows


def qualities(
    folder: Path, by: str | None, found: dict[str, Contender], prompts: Prompts, length: int
) -> tuple[Row, dict[str, Row]]:
    """The float32 model's own row, and KL and agreement by contender; of sdpa only beside sdpa, which takes long."""
    ids, positions = prompts.ids(length, 0), torch.tensor(kept(length, EVERY))
    exact = (loaded(folder, torch.float32), by)
    row, expected = prefill(exact, ids, positions)
    del exact
    asked = {name: one for name, one in found.items() if by is None or one[1] is not None}
    return row, {name: beside(expected, prefill(one, ids, positions)[1]) for name, one in asked.items()}


def identity(row: Row) -> tuple[Any, ...]:
    return row["length"], row["contender"], row["recipe"], row["memory"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: the file's)")
    parser.add_argument("--lengths", type=lambda text: [int(n) for n in text.split(",")], default=[8192, 16384])
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--recipe", default="int8", help="its name, or its fields as JSON")
    parser.add_argument("--calibrate", type=int, default=2048, help="tokens of a calibration prompt")
    parser.add_argument("--samples", type=int, default=4, help="calibration prompts")
    parser.add_argument("--against", default="bfloat16")
    parser.add_argument("--reference", choices=REFERENCES, default="sdpa")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", choices=("kept", "system"), default="kept")
    parser.add_argument("--no-quality", action="store_true", help="seconds alone")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory == "kept" and not keep_freed_memory():
        raise SystemExit("this system's allocator has no option for it; give --memory system")
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(arguments.model)
    name = arguments.name or arguments.model.stem
    out = arguments.out or results(f"first_token_{name}.json")
    report: Row = json.loads(out.read_text()) if out.exists() else {}
    known = {"name": name} | ({"sha256": file_hash(arguments.model)} if arguments.model.is_file() else {})
    report |= {"machine": machine(), "date": date.today().isoformat(), "model": known, "threads": arguments.threads}
    prompts = Prompts(folder)
    found = contenders(folder, prompts, arguments)

    for length in arguments.lengths:
        rows = measure(found, prompts, length, arguments.rounds)
        if not arguments.no_quality:
            exact, quality = qualities(folder, REFERENCES[arguments.reference], found, prompts, length)
            rows = {key: row | quality.get(key, {}) for key, row in rows.items()}
            own = {"total_s": round(exact["total_s"], 4), "rounds": 1, "kl": 0.0, "top1": 1.0}
            rows.setdefault(f"{REFERENCES[arguments.reference] or 'sdpa'} float32", own)
        about = {"length": length, "recipe": arguments.recipe, "memory": arguments.memory}
        added = [about | {"contender": key} | row for key, row in rows.items()]
        same = {identity(row) for row in added}
        old = [row for row in report.get("rows", []) if identity(row) not in same]
        report["rows"] = sorted([*old, *added], key=lambda row: row["length"])
        write(out, report)
        for row in added:
            print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
