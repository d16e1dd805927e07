"""What the reference model can do with dense attention: `python models/evaluate.py models/reference --out FILE.jsonl`.

The tasks are those of gossamer.evaluate, with text that was never trained on; each cell has its own fresh samples.
Results go to a JSONL file, sample by sample, so that an interrupted run goes on; the figures of the card to a JSON.
Every pair is computed, on gossamer's own kernel, because it is the fastest on a CPU.
"""

import argparse
import hashlib
import json
import math
import os
import random
from pathlib import Path
from typing import Any

import torch
from train import prepare
from transformers import AutoModelForCausalLM, AutoTokenizer

from gossamer import Policy, methods
from gossamer.cli.specs import parse_task, split_specs
from gossamer.evaluate import runner
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import bootstrap_interval
from gossamer.evaluate.subject import Subject

TASKS = "needle_single,needle_multikey(keys=8),needle_multivalue,needle_multiquery,variable_tracking,passkey"
# tasks @ lengths @ samples
PLAN = (f"{TASKS}@2k,8k@200", f"{TASKS}@16k@200", "needle_single@32k@200")


@torch.inference_mode()
def first_token_mass(folder: Path, tokenizer: Any, text: str, length: int = 4096) -> list[list[float]]:
    """Mean attention mass on token 0 for each layer and head, queries from 1024 on, one passage."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    out = model(torch.tensor([tokenizer(text[: 8 * length])["input_ids"][:length]]), output_attentions=True)
    return [[round(float(head[1024:, 0].mean()), 4) for head in layer[0]] for layer in out.attentions]


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, text: str, length: int, windows: int) -> dict[str, float]:
    """Mean next-token loss in nats on windows of held-out text, <bos> first; and in bits per byte of that text."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    rng = random.Random(11)
    nats, size = 0.0, 0
    for _ in range(windows):
        start = rng.randrange(len(ids) - length)
        window = torch.tensor([[tokenizer.bos_token_id, *ids[start : start + length - 1]]])
        logits = model(window).logits[0, :-1].float()
        nats += float(torch.nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum"))
        size += len(tokenizer.decode(window[0, 1:]).encode())
    per_token = nats / (windows * (length - 1))
    return {
        "length": length,
        "windows": windows,
        "nats_per_token": round(per_token, 4),
        "bits_per_byte": round(nats / size / math.log(2), 4),
    }


def cells(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each task at each length: samples, mean score and share of samples where all is right, with 95% intervals."""
    scores: dict[tuple[str, int], list[float]] = {}
    for record in records:
        scores.setdefault((record["task"], record["length"]), []).append(record["score"])
    found = []
    for (task, length), values in sorted(scores.items(), key=lambda item: (item[0][1], item[0][0])):
        exact = sum(value == 1.0 for value in values)
        found.append(
            {
                "task": task,
                "length": length,
                "samples": len(values),
                "score": sum(values) / len(values),
                "score_interval": bootstrap_interval(values),
                "exact": exact / len(values),
                "exact_interval": wilson(exact, len(values)),
            }
        )
    return found


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion; unlike the bootstrap's, it has a width where all is right."""
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def main() -> None:
    """Parse the arguments, evaluate, write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True, help="JSONL; the figures go beside it as .json")
    parser.add_argument("--cache", type=Path, default=Path("build/reference-model"), help="as for train.py")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--plan", nargs="*", default=PLAN, help="tasks@lengths@samples, each")
    arguments = parser.parse_args()
    prepare(arguments.cache / "data")
    text = (arguments.cache / "data" / "held_out.txt").read_text()
    tokenizer: Any = AutoTokenizer.from_pretrained(arguments.model)
    tokenizer.model_max_length = 1 << 30
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    subject = Subject(model, tokenizer, "gossamer reference model")
    dense = Policy(methods.create("dense", kernel="gossamer"))
    records: list[dict[str, Any]] = []
    header: dict[str, Any] = {}
    for entry in arguments.plan:
        tasks, lengths, samples = entry.split("@")
        job = runner.Job(
            methods=(dense,),
            tasks=tuple(parse_task(name) for name in split_specs(tasks)),
            lengths=runner.parse_lengths(lengths),
            samples=int(samples),
            haystack=Haystack("held-out files of the training corpus", text),
            seed=arguments.seed,
        )
        with runner.ResultsFile(arguments.out, runner.make_header(subject, job)) as results:
            for record in runner.run(subject, job, results):
                print(record["length"], record["task"], record["index"], record["score"], flush=True)
            records, header = results.records, results.header
    report = {
        "weights_sha256": hashlib.sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest(),
        "attention": "dense, gossamer's kernel",
        "cells": cells(records),
        "text_loss": text_loss(model, tokenizer, text, 2048, 20),
        "first_token_attention_mass_4096": first_token_mass(arguments.model, tokenizer, text),
        **{name: header[name] for name in ("model", "machine", "versions", "haystack", "seed")},
    }
    target = arguments.out.with_suffix(".json")
    target.with_suffix(".tmp").write_text(json.dumps(report, indent=1) + "\n")
    os.replace(target.with_suffix(".tmp"), target)


if __name__ == "__main__":
    main()
