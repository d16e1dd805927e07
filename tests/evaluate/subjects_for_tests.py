"""Tiny random models to evaluate, and jobs for them."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers_for_tests import HAYSTACK, WordTokenizer
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from gossamer import Policy, methods
from gossamer.evaluate import runner, tasks
from gossamer.evaluate.runner import Job, ResultsFile, make_header
from gossamer.evaluate.subject import Subject

SPARSE = Policy(methods.create("a_shape", sink=4, window=64), min_tokens=0, max_density=2.0)
DENSE = Policy.of("dense")
TINY: dict[str, Any] = {
    "vocab_size": 3000,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


def subject(kind: str = "llama") -> Subject:
    torch.manual_seed(0)
    config, model = {"llama": (LlamaConfig, LlamaForCausalLM), "qwen3": (Qwen3Config, Qwen3ForCausalLM)}[kind]
    return Subject(model(config(**TINY)).eval(), WordTokenizer(), kind)


def job(**changes: Any) -> Job:
    settings: dict[str, Any] = {
        "methods": (DENSE, SPARSE),
        "tasks": (tasks.create("needle_single"), tasks.create("needle_multikey", turns=2)),
        "lengths": (300, 400),
        "samples": 3,
        "haystack": HAYSTACK,
        "perplexity": HAYSTACK,
        "fidelity": 1,
    }
    return Job(**settings | changes)


def run(
    path: Path, work: Job, stop_after: int | None = None, of: Subject | None = None, pause: float = 0.0
) -> list[dict[str, Any]]:
    of = of or subject()
    new = []
    with ResultsFile(path, make_header(of, work)) as results:
        for record in runner.run(of, work, results, lambda cell: time.sleep(pause)):
            new.append(record)
            if stop_after is not None and len(new) == stop_after:
                break
    return new


def without_circumstances(path: Path) -> list[dict[str, Any]]:
    """What must not depend on when and how often a run was started: all but names, times and seconds."""
    kept = []
    for line in path.read_text().splitlines():
        record = json.loads(line)
        if record["kind"] != "run":
            kept.append({k: v for k, v in record.items() if k != "run" and not k.endswith("_s")})
    return kept


class Chat(WordTokenizer):
    """Five tokens around a prompt."""

    chat_template = "some"

    def apply_chat_template(self, turns: list[dict[str, str]], **more: Any) -> dict[str, list[int]]:
        assert [turn["role"] for turn in turns] == ["user"]
        return {"input_ids": [2, 5, 6, *self(turns[0]["content"])["input_ids"][1:], 7, 8, 9]}
