"""What recipes of compressed linear layers do to a model: perplexity, KL divergence and bits a weight.

    python benchmarks/compressed_quality.py MODEL [--recipes LIST] [--samples 16] [--length 1024] [--windows 8]
        [--out FILE]

Recipes are calibrated on windows of the first half of the package's text, and asked for windows of the second. All are
compressed from float32 weights and computed in float32: what is compared is weights. KL is to the model as it is, per
token, with the mean's 95% interval over windows. Lines are added to `compressed_<model>.jsonl` in the folder of this
machine, the first one with what all have in common; a recipe that is there is left out.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from machines import machine, results
from torch import Tensor

import gossamer
from gossamer.cli.pretrained import file_hash, model_folder
from gossamer.compressed.model import described
from gossamer.compressed.recipes import recipe_of
from gossamer.evaluate.haystack import load_haystack

RECIPES: list[dict[str, Any]] = [
    {"recipe": "sparsegpt", "pattern": "0.5"},
    {"recipe": "magnitude", "pattern": "0.5"},
    {"recipe": "sparsegpt", "pattern": "2:4"},
    {"recipe": "magnitude", "pattern": "2:4"},
    {"recipe": "sparsegpt", "pattern": "0.7"},
    {"recipe": "magnitude", "pattern": "0.7"},
    {"recipe": "billm"},
    {"recipe": "billm", "search": "saliency"},
    {"recipe": "billm", "salient": False},
    {"recipe": "billm", "split": False},
    {"recipe": "billm", "compensate": False},
    {"recipe": "billm", "salient": False, "split": False, "compensate": False},
    {"recipe": "sign_and_scale"},
    {"recipe": "rounded"},
    {"recipe": "int8"},
    {"recipe": "int8", "outliers": 0.15},
    {"recipe": "int8", "outliers": 0.0},
    {"recipe": "int8", "share": 1.0},
]
CHUNK = 256  # positions whose logits are compared at once


def student(count: int) -> float:
    """What a mean's standard error is multiplied by for its 95% interval."""
    known = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26, 16: 2.13, 32: 2.04}
    return known[max(n for n in known if n <= count)]


def windows_of(ids: Tensor, count: int, length: int) -> list[Tensor]:
    """Windows ``[1, length]`` at equal distances."""
    step = (len(ids) - length) // max(1, count - 1) if count > 1 else 0
    return [ids[n * step : n * step + length][None] for n in range(count)]


def logits_of(model: Any, ids: Tensor) -> Tensor:
    """float32 ``[T, vocabulary]``."""
    return model(input_ids=ids, use_cache=False).logits[0].float()


def judged(model: Any, windows: list[Tensor], expected: list[Tensor]) -> dict[str, Any]:
    """Perplexity, KL and agreement over all windows."""
    losses, kls, same = [], [], []
    for ids, own in zip(windows, expected, strict=True):
        found = logits_of(model, ids)
        losses.append(float(F.cross_entropy(found[:-1], ids[0, 1:])))
        parts = zip(found.split(CHUNK), own.split(CHUNK), strict=True)
        each = [
            F.kl_div(a.log_softmax(-1), b.log_softmax(-1), reduction="none", log_target=True).sum(-1) for a, b in parts
        ]
        kls.append(float(torch.cat(each).mean()))
        same.append(float((found.argmax(-1) == own.argmax(-1)).float().mean()))
    spread = student(len(kls)) * statistics.stdev(kls) / len(kls) ** 0.5 if len(kls) > 1 else math.nan
    return {
        "perplexity": round(math.exp(statistics.fmean(losses)), 4),
        "losses": [round(loss, 5) for loss in losses],
        "kl": round(statistics.fmean(kls), 6),
        "kl_interval": round(spread, 6),
        "top1": round(statistics.fmean(same), 4),
    }


def bits_a_weight(model: Any) -> float:
    """Of layers that are stored in another form, all that they store, numbers as in bfloat16; 16 where none is."""
    stored, numbers = 0, 0
    for layer in model.modules():
        if described(layer) is not None:
            own = {name: x for name, x in layer.state_dict().items() if name != "bias"}
            stored += sum(
                x.numel() * (2 if name == "values" and x.is_floating_point() else x.element_size())
                for name, x in own.items()
            )
            numbers += layer.in_features * layer.out_features
    return round(8 * stored / numbers, 3) if numbers else 16.0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--name", help="of the model in the results (default: the file's)")
    parser.add_argument("--recipes", type=json.loads, default=RECIPES, help="a JSON list")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(arguments.model)
    name = arguments.name or arguments.model.stem
    out = arguments.out or results(f"compressed_{name}.jsonl")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = load_haystack().text
    halves = (text[: len(text) // 2], text[len(text) // 2 :])
    first, second = (torch.tensor(tokenizer(half)["input_ids"]) for half in halves)
    samples = windows_of(first, arguments.samples, arguments.length)
    windows = windows_of(second, arguments.windows, arguments.length)
    original = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    expected = [logits_of(original, ids) for ids in windows]
    known = {"name": name} | ({"sha256": file_hash(arguments.model)} if arguments.model.is_file() else {})
    about = {"samples": arguments.samples, "length": arguments.length, "windows": arguments.windows}
    lines: list[dict[str, Any]] = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    if lines and lines[0]["settings"] != about | {"model": known}:
        raise SystemExit(f"{out} was measured with other settings, {lines[0]['settings']}; move it away")
    if not lines:
        top = {"kind": "about", "machine": machine(), "date": date.today().isoformat(), "torch": torch.__version__}
        lines = [top | {"settings": about | {"model": known}}]
        lines.append({"kind": "original", **judged(original, windows, expected)})
    done = [line.get("recipe") for line in lines]
    for given in arguments.recipes:
        recipe = recipe_of(given)
        if recipe.to_dict() in done:
            continue
        begun = time.perf_counter()
        with torch.inference_mode(False):
            made = gossamer.compress(copy.deepcopy(original), recipe, samples)
        seconds = time.perf_counter() - begun
        row = {
            "kind": "compressed",
            "recipe": recipe.to_dict(),
            "bits": bits_a_weight(made),
            "seconds": round(seconds, 1),
        }
        lines.append(row | judged(made, windows, expected))
        temporary = out.with_name(f"{out.name}.part")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        temporary.replace(out)
        print(json.dumps({key: value for key, value in lines[-1].items() if key != "losses"}), flush=True)
        del made
    return 0


if __name__ == "__main__":
    with torch.inference_mode():
        sys.exit(main())
