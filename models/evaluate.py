"""Retrieval accuracy of the reference model by length, dense: `python models/evaluate.py models/reference`.

Every sample is fresh: keys are made of words that were never keys in training, haystacks are text that was
never trained on. A prompt is its context and then one question; the context is run once and the questions of
its needles are asked separately after it, each continued greedily for eight tokens with the key/value cache:
the same as `model.generate(do_sample=False)`, which --check verifies. A sample counts when the first number
generated is exactly right.
"""

import argparse
import hashlib
import json
import math
import platform
import random
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from tasks import HELD_OUT_WORDS
from train import machine, prepare
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

from gossamer.evaluate.needle import NeedleSample, exact_match, make_sample

NEW_TOKENS = 8


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The 95% Wilson score interval of a proportion."""
    share = right / total
    centre = share + z * z / (2 * total)
    spread = z * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


@torch.inference_mode()
def answer(model: Any, tokenizer: Any, sample: NeedleSample) -> list[str]:
    """The greedy continuation of each question of a sample; the context is run once."""
    context = tokenizer(sample.context)["input_ids"]
    cache = DynamicCache(config=model.config)
    model(torch.tensor([context]), past_key_values=cache, logits_to_keep=1)
    answers = []
    for i in range(len(sample.questions)):
        prompt = tokenizer(sample.prompt(i))["input_ids"]
        if prompt[: len(context)] != context:
            raise ValueError("the tokenizer merges the context with the question; run each prompt on its own")
        fed = prompt[len(context) :]
        new: list[int] = []
        while len(new) < NEW_TOKENS:
            logits = model(torch.tensor([fed]), past_key_values=cache, logits_to_keep=1).logits
            fed = [int(logits[0, -1].argmax())]
            new += fed
            if fed[0] == tokenizer.eos_token_id:
                break
        answers.append(tokenizer.decode(new))
        cache.crop(len(context) - cache.get_seq_length())
    return answers


def evaluate(model: Any, tokenizer: Any, haystack: str, length: int, needles: int, samples: int, seed: int) -> dict:
    """Exact match over `samples` haystacks of `needles` needles, each asked for."""
    rng = random.Random(f"{seed}/{length}/{needles}")
    right, by_depth, misses = [], [], []
    started = time.time()
    for _ in range(samples):
        sample = make_sample(haystack, tokenizer, length, needles, rng, words=HELD_OUT_WORDS)
        generated = answer(model, tokenizer, sample)
        for text, value, depth in zip(generated, sample.answers, sample.depths, strict=True):
            right.append(exact_match(text, value))
            by_depth.append((depth, right[-1]))
            if not right[-1]:
                misses.append({"expected": value, "generated": text, "depth": round(depth, 3)})
    low, high = wilson(sum(right), len(right))
    fifths = [[ok for depth, ok in by_depth if min(4, int(depth * 5)) == fifth] for fifth in range(5)]
    return {
        "length": length,
        "needles": needles,
        "haystacks": samples,
        "questions": len(right),
        "right": sum(right),
        "exact_match": sum(right) / len(right),
        "interval_95": [round(low, 4), round(high, 4)],
        "by_depth_fifth": [[sum(part), len(part)] for part in fifths],
        "misses": misses[:10],
        "seconds": round(time.time() - started, 1),
    }


@torch.inference_mode()
def first_token_mass(folder: Path, tokenizer: Any, haystack: str, length: int = 4096) -> list[list[float]]:
    """Mean attention mass on token 0 for each layer and head, queries from 1024 on, one sample."""
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    sample = make_sample(haystack, tokenizer, length, 8, random.Random(7), words=HELD_OUT_WORDS)
    out = model(torch.tensor([tokenizer(sample.prompt(0))["input_ids"]]), output_attentions=True)
    return [[round(float(head[1024:, 0].mean()), 4) for head in layer[0]] for layer in out.attentions]


@torch.inference_mode()
def text_loss(model: Any, tokenizer: Any, haystack: str, length: int, windows: int) -> dict:
    """Mean next-token loss in nats on windows of held-out text, <bos> first; and in bits per byte of that text."""
    ids = tokenizer(haystack, add_special_tokens=False)["input_ids"]
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


def repository_text() -> str:
    """gossamer's own Markdown, Python and C++ files, by path."""
    root = Path(__file__).resolve().parent.parent
    kinds = {".md", ".py", ".hpp", ".cpp", ".h"}
    folders = ("src", "csrc", "docs", "examples", "tests", "benchmarks", "models")
    paths = [p for folder in folders for p in sorted((root / folder).rglob("*")) if p.suffix in kinds]
    paths = [p for p in [*sorted(root.glob("*.md")), *paths] if "gossamer/evaluate/needle" not in p.as_posix()]
    return "\n".join(p.read_text(encoding="utf-8") for p in paths)


def main() -> None:
    """Parse the arguments, evaluate, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, help="JSON file for the results")
    parser.add_argument("--cache", type=Path, default=Path("build/reference-model"), help="as for train.py")
    parser.add_argument("--seed", type=int, default=1234)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--check", type=int, default=0, help="compare this many 2K samples with model.generate")
    parser.add_argument(
        "--plan",
        nargs="+",
        default=[
            *("held_out:8192:1:200", "held_out:8192:8:25", "repository:16384:8:8", "held_out:16384:8:8"),
            *("held_out:2048:1:200", "held_out:4096:1:100", "held_out:16384:1:40", "repository:8192:1:30"),
            *("held_out:32768:8:4", "held_out:32768:1:16"),
        ],
        help="haystack:length:needles:samples, each",
    )
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model: Any = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, arguments.dtype))
    prepare(arguments.cache / "data")
    texts = {"held_out": (arguments.cache / "data" / "held_out.txt").read_text(), "repository": repository_text()}
    report: dict[str, Any] = {
        "model": arguments.model.name,
        "weights_sha256": hashlib.sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest(),
        "attention": "sdpa, dense",
        "dtype": arguments.dtype,
        "seed": arguments.seed,
        "decoding": f"greedy, {NEW_TOKENS} new tokens, each question after the cached context",
        "keys": "two words, neither ever a key in training",
        "machine": machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "haystacks": {
            name: {"characters": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
            for name, text in texts.items()
        },
        "results": [],
    }
    for i in range(arguments.check):
        sample = make_sample(texts["held_out"], tokenizer, 2048, 4, random.Random(i), words=HELD_OUT_WORDS)
        prompt = tokenizer(sample.prompt(0), return_tensors="pt")
        whole = model.generate(**prompt, max_new_tokens=NEW_TOKENS, do_sample=False)
        text = tokenizer.decode(whole[0, prompt["input_ids"].shape[1] :])
        if text != answer(model, tokenizer, sample)[0]:
            raise SystemExit(f"generate continues with {text!r}, the cached path does not")
    report["checked_against_generate"] = arguments.check
    for entry in arguments.plan:
        name, length, needles, samples = entry.split(":")
        result = evaluate(model, tokenizer, texts[name], int(length), int(needles), int(samples), arguments.seed)
        report["results"].append({"haystack": name, **result})
        shown = {k: v for k, v in result.items() if k not in ("misses",)}
        print(json.dumps({"haystack": name, **shown}), flush=True)
        if arguments.out:
            arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    report["text_loss"] = [text_loss(model, tokenizer, texts["held_out"], 2048, 20)]
    report["first_token_attention_mass_4096"] = first_token_mass(arguments.model, tokenizer, texts["held_out"])
    print(json.dumps(report["text_loss"]), report["first_token_attention_mass_4096"])
    if arguments.out:
        arguments.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
