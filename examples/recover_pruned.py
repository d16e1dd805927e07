"""Prunes the reference model, trains what is left with the dense model as its teacher, and says how much comes back.

    python examples/recover_pruned.py [--steps N] [--seeds N] [--only KINDS] [--work FOLDER] [--out FILE]

The linear layers of the reference model are pruned to 50% and 70% zeros by magnitude and by SparseGPT; then the weights
that were kept are trained with the mask fixed, on the predictions and hidden states of the dense model (Sparse Llama).
A seed draws the samples that SparseGPT calibrates on and those of the steps. Text is that of the installed Python
packages (`models/corpus.py`), held-out text from files that were neither trained on nor calibrated on. The table has
the loss of held-out text in nats a token, by steps, and its perplexity; ``--out`` is written after each training, and
those that it has from the same settings are left alone.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from extending import MODEL, load_text
from measured_on import measured_on
from reading import ROOT
from sparse_training import rows_of_file, write
from torch import Tensor
from transformers import AutoModelForCausalLM

import gossamer
from gossamer.cli.common import table
from gossamer.compressed import SparseLinear
from gossamer.training import recover

# Pruned how, and to which share of zeros.
KINDS: dict[str, tuple[str, str]] = {
    "magnitude-50": ("magnitude", "0.5"),
    "sparsegpt-50": ("sparsegpt", "0.5"),
    "magnitude-70": ("magnitude", "0.7"),
    "sparsegpt-70": ("sparsegpt", "0.7"),
}
STEPS, SEEDS, RATE = 20, 3, 1e-3
AT = (0, 5, 10, 20, 40, 80, 160)  # steps after which held-out text is read
LENGTH, ROWS, CALIBRATION, HELD_OUT = 256, 2, 16, 16


def dense_model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


def windows(tokens: np.ndarray, count: int, generator: np.random.Generator) -> Tensor:
    """Token ids ``[count, LENGTH]`` from anywhere in a text, each after the token that begins one."""
    starts = generator.integers(0, len(tokens) - LENGTH, count)
    cut = np.stack([tokens[start : start + LENGTH - 1] for start in starts]).astype(np.int64)
    return F.pad(torch.from_numpy(cut), (1, 0), value=0)  # <bos> is 0


@torch.inference_mode()
def predicted(model: Any, held_out: Tensor) -> Tensor:
    """Logarithms of what a model takes each next token for, ``[tokens, V]``."""
    logits = [model(input_ids=ids, use_cache=False).logits[:, :-1] for ids in held_out.split(4)]
    return torch.cat(logits).log_softmax(-1).flatten(0, 1)


@torch.inference_mode()
def read(model: Any, held_out: Tensor, wanted: Tensor) -> dict[str, float]:
    """Nats a token of held-out text, and of ``KL(teacher || model)``; ``wanted`` is what the teacher `predicted`."""
    found = predicted(model, held_out)
    loss = F.nll_loss(found, held_out[:, 1:].flatten())
    kl = F.kl_div(found, wanted, reduction="batchmean", log_target=True)
    return {"loss": round(float(loss), 5), "kl": round(float(kl), 5)}


def run(
    kind: str, seed: int, steps: int, train: np.ndarray, held_out: Tensor, teacher: Any, wanted: Tensor
) -> dict[str, Any]:
    """The curve of one training."""
    recipe, pattern = KINDS[kind]
    generator = np.random.default_rng(seed)
    calibration = list(windows(train, CALIBRATION, generator).split(1))
    batches = [windows(train, ROWS, generator) for _ in range(steps)]
    student = gossamer.compress(dense_model(), {"recipe": recipe, "pattern": pattern}, calibration)
    curve = [{"step": 0} | read(student, held_out, wanted)]
    schedule: Any = None

    def optimizer(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        nonlocal schedule
        made = torch.optim.AdamW(parameters, RATE, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(made, lambda n: min(1.0, (n + 1) / 5) * (1 - n / steps))
        return made

    def progress(step: int, loss: float) -> None:
        schedule.step()
        if step in AT or step == steps:
            curve.append({"step": step} | read(student, held_out, wanted))

    begun = time.perf_counter()
    recover(student, teacher, batches, optimizer=optimizer, progress=progress)
    layers = [module for module in student.modules() if isinstance(module, SparseLinear)]
    zeros = 1 - sum(len(layer.values) for layer in layers) / sum(x.in_features * x.out_features for x in layers)
    print(f"{kind}, seed {seed}: {curve[0]['loss']:.3f} to {curve[-1]['loss']:.3f} nats", file=sys.stderr, flush=True)
    return {
        "kind": kind,
        "seed": seed,
        "zeros": round(zeros, 4),
        "seconds": round(time.perf_counter() - begun, 1),
        "packed": read(student, held_out, wanted),
        "curve": curve,
    }


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """Loss and perplexity of each kind, before and after, in the mean over seeds."""
    steps = [point["step"] for point in found["rows"][0]["curve"]]
    rows = [["pruned", *(f"after {step}" for step in steps), "perplexity before", "and after"]]
    for kind in dict.fromkeys(row["kind"] for row in found["rows"]):
        curves = [row["curve"] for row in found["rows"] if row["kind"] == kind]
        losses = [sum(curve[n]["loss"] for curve in curves) / len(curves) for n in range(len(steps))]
        ends = (f"{math.exp(losses[n]):.1f}" for n in (0, -1))
        rows.append([kind, *(f"{loss:.3f}" for loss in losses), *ends])
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--only", default=",".join(KINDS), help="kinds")
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "recover-pruned", help="where the text is kept")
    parser.add_argument("--out", type=Path, help="a JSON file of all trainings")
    given = parser.parse_args(arguments)
    kinds = given.only.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"kinds are {', '.join(KINDS)}; got {unknown[0]}")
    text, teacher = load_text(given.work), dense_model()
    held_out = windows(text.held_out, HELD_OUT, np.random.default_rng(10_000))
    found: dict[str, Any] = {"machine": measured_on(), "steps": given.steps, "rate": RATE, "tokens": LENGTH}
    found |= {"rows_a_step": ROWS, "calibration": CALIBRATION, "held_out": HELD_OUT}
    wanted = predicted(teacher, held_out)
    found |= {"dense": read(teacher, held_out, wanted)}
    found |= {"rows": rows_of_file(given.out, found)}
    for seed, kind in [(seed, kind) for seed in range(given.seeds) for kind in kinds]:
        if any((row["seed"], row["kind"]) == (seed, kind) for row in found["rows"]):
            continue
        found["rows"].append(run(kind, seed, given.steps, text.train, held_out, teacher, wanted))
        if given.out is not None:
            write(given.out, found)
    print(f"dense: {found['dense']['loss']:.3f} nats a token, perplexity {math.exp(found['dense']['loss']):.1f}")
    print(table(rows_of(found)))


if __name__ == "__main__":
    main()
