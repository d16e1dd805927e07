"""A language model learns to grade reviews by forward passes only (P-RGE), with sparse prefill.

    python examples/adapt_forward_only.py                      # a tiny random model: a look at what it does
    python examples/adapt_forward_only.py MODEL --minutes 15   # a folder of transformers, or a GGUF file
    python examples/adapt_forward_only.py MODEL --memory --out adapted.json

Reviews are made up: some hundred tokens about the ordinary, and a few sentences that praise or complain. The model
reads one and is to answer ` good` or ` bad`. LoRA-FA's B matrices of the query and value projections learn; a step is
one forward pass of a batch that holds each review once for each perturbed copy. Loss and accuracy on reviews that were
not trained on, before and after; accuracy compares the two answers' first tokens. ``--memory`` also measures, each in a
process of its own, how far memory grows by a step, by reading the same rows, and by a step of backpropagation through
the same B matrices.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import random
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measured_on import measured_on
from torch import Tensor

import gossamer
from gossamer.cli.pretrained import model_folder
from gossamer.training import PRGE, target_loss

ANSWERS = (" bad", " good")
OPINIONS = (
    (
        "It broke after a week.",
        "I want my money back.",
        "The quality is awful.",
        "I regret buying it.",
        "It is a waste.",
    ),
    ("It works perfectly.", "I would buy it again.", "The quality is superb.", "I love it.", "It is worth every cent."),
)
ORDINARY = (
    "It came in a brown box.", "I ordered it on a Monday.", "My neighbour has one too.", "The manual has ten pages.",
    "It stands beside the door.", "The color is gray.", "I use it on most days.", "It weighs about two pounds.",
    "There are two buttons on the left.", "The cable is as long as my arm.", "I saw it first in a small shop.",
    "The label says where it was made.", "It was delivered in the afternoon.", "I keep it in the kitchen.",
)  # fmt: skip
HELD_OUT = 32
METHOD: dict[str, Any] = {"method": "tri_shape", "sink": 16, "window": 32, "last": 16, "block": 16, "min_tokens": 64}


@dataclass(frozen=True)
class Review:
    text: str
    good: bool


def review(number: int, sentences: int) -> Review:
    """One of endlessly many; half are good."""
    draw = random.Random(number)
    good = draw.random() < 0.5
    lines: list[str] = draw.choices(list[str](ORDINARY), k=sentences)
    for opinion in draw.sample(OPINIONS[good], 3):
        lines.insert(draw.randrange(len(lines) + 1), opinion)
    return Review("Review: " + " ".join(lines) + "\nQuestion: Is this review good or bad?\nAnswer:", good)


class Bytes:
    """A tokenizer for the tiny model."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [3 + byte for byte in text.encode()]}


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=260,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4096,
        )
    ).eval()


def load(model: str | None, dtype: str) -> tuple[Any, Any]:
    """A model and its tokenizer."""
    if model is None:
        return tiny_model(), Bytes()
    import transformers

    transformers.utils.logging.disable_progress_bar()
    folder = model_folder(Path(model))
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    return loaded.eval(), transformers.AutoTokenizer.from_pretrained(folder)


def encode(tokenizer: Any, reviews: list[Review]) -> dict[str, Tensor]:
    """A batch, padded on the left; the only targets are the answers."""
    rows = []
    for one in reviews:
        prompt = tokenizer(one.text)["input_ids"]
        answer = tokenizer(ANSWERS[one.good], add_special_tokens=False)["input_ids"]
        rows.append((prompt, answer))
    longest = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for n, (prompt, answer) in enumerate(rows):
        ids[n, longest - len(prompt) - len(answer) :] = torch.tensor(prompt + answer)
        mask[n, longest - len(prompt) - len(answer) :] = 1
        labels[n, longest - len(answer) :] = torch.tensor(answer)
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@torch.inference_mode()
def evaluate(model: Any, tokenizer: Any, reviews: list[Review], rows: int = 4) -> dict[str, float]:
    """Mean loss of the answers, and how often the right one is the likelier."""
    first = [tokenizer(answer, add_special_tokens=False)["input_ids"][0] for answer in ANSWERS]
    losses, right = [], 0
    for i in range(0, len(reviews), rows):
        batch = encode(tokenizer, reviews[i : i + rows])
        given = {name: value for name, value in batch.items() if name != "labels"}
        kept = int((batch["labels"] != -100).sum(1).max()) + 1
        out = model(**given, use_cache=False, logits_to_keep=kept)
        losses += target_loss(out, batch).tolist()
        for n, one in enumerate(reviews[i : i + rows]):
            asked = int((batch["labels"][n] != -100).sum())
            bad, good = (float(out.logits[n, -asked - 1, token]) for token in first)
            right += (good > bad) == one.good
    return {"loss": round(sum(losses) / len(losses), 4), "accuracy": round(right / len(reviews), 4)}


def adapt(model: Any, tokenizer: Any, given: argparse.Namespace) -> dict[str, Any]:
    held_out = [review(10**6 + n, given.sentences) for n in range(HELD_OUT)]
    tuner = PRGE(model, rank=given.rank, queries=given.queries, eps=given.eps, lr=given.lr, seed=given.seed)
    losses, seconds, curve = [], [], []
    with gossamer.enable(model, **METHOD) as handle:
        curve.append({"step": 0, **evaluate(model, tokenizer, held_out)})
        print(f"before: {curve[0]}", flush=True)
        started = time.monotonic()
        while tuner.steps < given.steps and time.monotonic() - started < 60 * given.minutes:
            numbers = range(tuner.steps * given.rows, (tuner.steps + 1) * given.rows)
            batch = encode(tokenizer, [review(given.seed * 10**7 + n, given.sentences) for n in numbers])
            begun = time.monotonic()
            losses.append(round(tuner.step(batch), 4))
            seconds.append(round(time.monotonic() - begun, 2))
            print(f"step {tuner.steps}: {losses[-1]:.3f}", flush=True)
            if tuner.steps % given.every == 0:
                curve.append({"step": tuner.steps, **evaluate(model, tokenizer, held_out)})
                print(f"{tuner.steps} steps, {sum(seconds):.0f} s: {curve[-1]}", flush=True)
        if curve[-1]["step"] != tuner.steps:
            curve.append({"step": tuner.steps, **evaluate(model, tokenizer, held_out)})
            print(f"after {tuner.steps} steps, {sum(seconds):.0f} s: {curve[-1]}", flush=True)
        layers = handle.stats()
    numbers = sum(adapter.b.numel() for adapter in tuner.adapters.values())
    tuner.merge()
    merged = evaluate(model, tokenizer, held_out)
    figures = {"curve": curve, "losses": losses, "step_seconds": seconds, "merged_dense": merged}
    return figures | {
        "trained_numbers": numbers,
        "tokens": int(encode(tokenizer, held_out[:1])["input_ids"].numel()),
        "density": round(sum(layer.density for layer in layers) / len(layers), 4),
        "dense_calls": sum(layer.dense_calls for layer in layers),
        "sparse_calls": sum(layer.sparse_calls for layer in layers),
    }


KINDS = ("step", "reading", "reading one copy", "backpropagation", "backpropagation of as many rows")


def grown(kind: str, model: Any, tokenizer: Any, given: argparse.Namespace) -> int:
    """Bytes that memory grows by at most, beyond the model and what one small call leaves."""
    copies = 1 if kind in ("reading one copy", "backpropagation") else 2 * given.queries
    tuner = PRGE(model, rank=given.rank, queries=given.queries, eps=given.eps, seed=given.seed)
    batch = encode(
        tokenizer, [review(n, given.sentences) for n in range(given.rows)] * (1 if kind == "step" else copies)
    )
    short = encode(tokenizer, [review(0, 4)])

    def run(batch: dict[str, Tensor]) -> None:
        if kind == "step":
            tuner.step(batch)
            return
        with torch.set_grad_enabled("backpropagation" in kind):
            rows = {name: value for name, value in batch.items() if name != "labels"}
            loss = target_loss(model(**rows, use_cache=False, logits_to_keep=2), batch).mean()
        if loss.requires_grad:
            loss.backward()

    if "backpropagation" in kind:
        model.requires_grad_(False)
        for adapter in tuner.adapters.values():
            adapter.b.requires_grad_()
    with gossamer.enable(model, **METHOD, training="backpropagation" in kind):
        run(short)
        gc.collect()
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc: freed pages would hide what is taken
        if trim is not None:
            trim(0)
        before = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
        run(batch)
        return resident("VmHWM") - before


def resident(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def memory(given: argparse.Namespace, arguments: list[str]) -> dict[str, int]:
    """Of each kind, in a process of its own."""
    found = {}
    for kind in KINDS:
        command = [sys.executable, str(Path(__file__).resolve()), *arguments, "--grown", kind]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        found[kind] = int(done.stdout.splitlines()[-1])
        print(f"{kind}: {found[kind] / 2**20:.0f} MiB", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", nargs="?", help="folder or GGUF file; a tiny random model without")
    parser.add_argument("--steps", type=int, default=20, help="0 to measure memory alone")
    parser.add_argument("--minutes", type=float, default=60.0, help="stop before, whatever the steps")
    parser.add_argument("--every", type=int, default=50, help="steps between looks at what was held out")
    parser.add_argument("--sentences", type=int, default=14, help="ordinary ones of a review")
    parser.add_argument("--rows", type=int, default=2, help="reviews of a step")
    parser.add_argument("--queries", type=int, default=1)
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--eps", type=float, default=0.02)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--memory", action="store_true", help="also measure memory")
    parser.add_argument("--grown", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="a JSON file of the figures")
    given = parser.parse_args(arguments)
    model, tokenizer = load(given.model, given.dtype)
    if given.grown:
        print(grown(given.grown, model, tokenizer, given))
        return
    settings = {name: value for name, value in vars(given).items() if name not in ("model", "out", "memory", "grown")}
    name = Path(given.model).name if given.model else "tiny, random"
    found = {"machine": measured_on(), "torch": torch.__version__, "model": name, **settings, "method": METHOD}
    if given.steps:
        found |= adapt(model, tokenizer, given)
    if given.memory:
        del model
        found["memory_bytes"] = memory(given, arguments)
        found["tokens"] = int(encode(tokenizer, [review(0, given.sentences)])["input_ids"].numel())
    if given.out is not None:
        given.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
