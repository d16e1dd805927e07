"""What the small masked language model has learned: `python models/evaluate_masked.py models/masked --out FILE.json`.

With dense attention, on files of the corpus that were never trained on. Tokens are masked all at once, as in training,
and each is predicted once. Half of the texts say a passage twice: what is masked in one of both places and not in the
other can be copied.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from corpus import load_corpus
from torch import Tensor

import gossamer
from gossamer.evaluate.masked.subject import MaskedSubject, load_masked_model
from gossamer.evaluate.metrics import bootstrap_interval
from gossamer.profiles.machine import cpu_model

# Tokens, share that is masked, and texts of each kind.
CELLS = ((128, 0.5, 64), (512, 0.15, 32), (512, 0.5, 32), (512, 0.85, 32), (2048, 0.5, 16))


def drawn(text: Tensor, length: int, share: float, repeats: bool, generator: torch.Generator) -> tuple[Tensor, ...]:
    """Tokens, which are masked, and of each the place of the same token in the other saying (-1: there is none)."""

    def number(below: int) -> int:
        return int(torch.randint(below, (), generator=generator))

    start, size = number(len(text) - length), length // 4
    tokens, other = text[start : start + length].clone(), torch.full((length,), -1)
    if repeats:  # as in training
        first, second = number(size), length - size - number(size)
        tokens[second : second + size] = tokens[first : first + size].clone()
        other[second : second + size] = torch.arange(first, first + size)
        other[first : first + size] = torch.arange(second, second + size)
    return tokens, torch.rand(length, generator=generator) < share, other


def cell(subject: MaskedSubject, text: Tensor, length: int, share: float, texts: int) -> dict[str, Any]:
    """Means over texts with 95% intervals: accuracy of masked tokens by what else shows them, and nats."""
    generator = torch.Generator().manual_seed(length * 100 + round(share * 100))
    found: dict[str, list[float]] = {}
    visible, asked = 0, 0
    for repeats in (False, True):
        for _ in range(texts):
            tokens, masked, other = drawn(text, length, share, repeats, generator)
            logits = subject.predict(tokens.masked_fill(masked, subject.mask_token)[None])[0].float()
            logits[:, subject.mask_token] = float("-inf")
            right, said = logits.argmax(dim=-1) == tokens, other >= 0
            shown = said & ~masked[other.clamp(min=0)]
            visible, asked = visible + int((masked & shown).sum()), asked + int((masked & said).sum())
            parts = {"said_twice": masked & shown, "masked_twice": masked & said & ~shown} if repeats else {}
            for name, part in ({"said_once": masked} | parts).items():
                if name == "said_once":
                    part = part & ~said
                if bool(part.any()):
                    found.setdefault(name, []).append(float(right[part].float().mean()))
            if not repeats:
                found.setdefault("nats", []).append(float(F.cross_entropy(logits[masked], tokens[masked])))
    figures = {name: [round(x, 4) for x in (_mean(v), *bootstrap_interval(v))] for name, v in found.items()}
    return {"length": length, "share": share, "texts": texts, **figures, "copyable": round(visible / asked, 4)}


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def unigram(text: Tensor) -> dict[str, float]:
    """What the frequencies of the text itself give, without looking at any neighbour: the best such guess there is."""
    shares = text.bincount().double() / len(text)
    shares = shares[shares > 0]
    return {"accuracy": round(float(shares.max()), 4), "nats": round(float(-(shares * shares.log()).sum()), 4)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--text-out", type=Path, help="write the held-out text, for `gossamer eval-masked --text`")
    arguments = parser.parse_args()
    corpus = load_corpus()
    held_out = "\n".join(corpus.held_out)
    if arguments.text_out is not None:
        arguments.text_out.write_text(held_out, encoding="utf-8")
    subject = load_masked_model(arguments.model)
    text = subject.text_tokens(held_out)
    with gossamer.enable(subject.model, "dense", kernel="gossamer", min_tokens=0, bidirectional=True):
        cells = [cell(subject, text, *sizes) for sizes in CELLS]
    report = {
        "weights_sha256": hashlib.sha256((arguments.model / "model.safetensors").read_bytes()).hexdigest(),
        "model": subject.to_dict(),
        "machine": {"processor": cpu_model(), "threads": torch.get_num_threads()},
        "versions": {
            **{"python": platform.python_version(), "torch": torch.__version__},
            **{"transformers": transformers.__version__, "gossamer": gossamer.__version__},
        },
        "text": {
            **{"corpus_sha256": corpus.sha256, "sha256": hashlib.sha256(held_out.encode()).hexdigest()},
            "tokens": len(text),
        },
        "unigram": unigram(text),
        "cells": cells,
    }
    temporary = arguments.out.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    os.replace(temporary, arguments.out)


if __name__ == "__main__":
    main()
