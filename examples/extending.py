"""What `extend_context.py` trains and asks: the reference model's network, its recipe and needles in text."""

from __future__ import annotations

import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from reading import ROOT
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import gossamer
from gossamer import Policy, methods
from gossamer.evaluate.tasks.needle import NEEDLE
from gossamer.methods import LongGen, PerHead
from gossamer.profiles.hybrid import hybrid_profile

sys.path.insert(0, str(ROOT / "models"))
_CORPUS, _OPTIM, _TASKS, _TOKENIZER = map(importlib.import_module, ("corpus", "optim", "tasks", "tokenizer"))
ANSWER, CHOICE, TEXT = _TASKS.ANSWER, _TASKS.CHOICE, _TASKS.TEXT

MODEL = ROOT / "models" / "reference"
THETA = 1e4  # in place of 5e8
WARMUP = 5
NEEDLES, QUESTIONS = 8, 4  # of a text that is asked about
EVERY = 3  # so-manieth document of the training text


@dataclass(frozen=True)
class Stage:
    """A stretch of training.

    Fields:
        length, rows: of a step's samples; steps: at most; rate: multiplies the recipe's learning rates.
    """

    length: int
    rows: int
    steps: int
    rate: float


@dataclass(frozen=True)
class Text:
    """Tokens to train on and to ask about, from different files."""

    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray


class Needles(_TASKS.SampleMaker):
    """The recipe's samples, with numbers of single keys alone: lists and chains take it longer to learn."""

    def items(self, count: int, rng: np.random.Generator) -> list[Any]:
        drawn = iter([self.words[i] for i in rng.permutation(len(self.words))])
        made = []
        for _ in range(count):
            key, value = self._name(drawn), self._number(rng)
            fact = self.fill(NEEDLE, _TASKS.IGNORE, key=key, value=value)
            made.append(_TASKS.Item("needle", key, [value], [fact]))
        return made


def policies() -> dict[str, Policy]:
    """How attention is computed in training and in serving, by name; short prompts too."""
    patterns = {
        "dense": methods.create("dense", kernel="gossamer"),
        "top_p": methods.create("mtraining", p=0.95),
        "longgen": hybrid_profile(6, 4, (2, 3), LongGen(recent=4)).method,
        "longgen_early": hybrid_profile(6, 4, (1, 2), LongGen(recent=4)).method,
        "window": methods.create("a_shape", sink=64, window=256),
    }
    # A hybrid's full layers are to run dense, whatever else does.
    return {name: Policy(method, 0, 0.9 if isinstance(method, PerHead) else 1.0) for name, method in patterns.items()}


def load_text(folder: Path) -> Text:
    """Docstrings and comments of the installed packages (`models/corpus.py`), as tokens; kept in the folder."""
    tokenizer: Any = AutoTokenizer.from_pretrained(MODEL)
    kept = folder / "text.npz"
    if not kept.exists():
        corpus = _CORPUS.load_corpus()
        folder.mkdir(parents=True, exist_ok=True)
        begun = folder / f"text.{os.getpid()}.npz"
        parts = {"train": corpus.train[::EVERY], "held_out": corpus.held_out}
        np.savez(begun, **{name: _TOKENIZER.encode_all(tokenizer, texts) for name, texts in parts.items()})
        os.replace(begun, kept)
    with np.load(kept) as arrays:
        return Text(tokenizer, arrays["train"], arrays["held_out"])


def new_model() -> Any:
    """The reference model in float32 with the rotary base of short models, under which it finds nothing far away."""
    config = AutoConfig.from_pretrained(MODEL)
    config.rope_parameters = {"rope_type": "default", "rope_theta": THETA}
    return AutoModelForCausalLM.from_pretrained(MODEL, config=config, dtype=torch.float32)


class Trainer:
    """A model in training: each step draws its samples by (seed, step), so that a run can be stopped and repeated."""

    def __init__(self, model: Any, text: Text, stage: Stage, seed: int) -> None:
        self.model, self.stage, self.seed = model.train(), stage, seed
        self.maker = Needles(text.tokenizer, text.train)
        # bfloat16, as the recipe has it, is slow on processors without it.
        self.optimizers = _OPTIM.make_optimizers(model, torch.float32)
        self.losses: list[float] = []

    def step(self) -> None:
        stage, number = self.stage, len(self.losses)
        rng = np.random.default_rng([self.seed, number, stage.length])
        batch = self.maker.batch(stage.rows, stage.length + 1, 0.0, rng)
        tokens, weights = torch.from_numpy(batch.tokens), torch.from_numpy(batch.weights)[:, 1:]
        logits = self.model(input_ids=tokens[:, :-1], use_cache=False).logits
        losses = F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten(), reduction="none").view(weights.shape)
        loss = (losses * weights).sum() / weights.sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * stage.rate * min(1.0, (number + 1) / WARMUP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.losses.append(float(loss.detach()))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "losses": self.losses,
        }

    def resume(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.losses = list(state["losses"])


def questions(text: Text, length: int, index: int) -> tuple[Tensor, Tensor]:
    """A held-out text with needles and questions at its end, with their answers: tokens ``[S]``, and their weights."""
    rng = np.random.default_rng([20_000, length, index])
    maker = Needles(text.tokenizer, text.held_out)
    tokens, weights = maker.retrieval(length, NEEDLES, QUESTIONS, False, rng)
    return torch.tensor(tokens), torch.tensor(weights)


@torch.inference_mode()
def ask(model: Any, policy: Policy, text: Text, lengths: tuple[int, ...], samples: int) -> list[dict[str, Any]]:
    """Each text's loss, in nats a token of its text, and how many of its questions are answered.

    An answer is right when each of its tokens is the likeliest one after those before it.
    """
    model.eval()
    found = []
    with gossamer.enable(model, policy) as handle:
        for length in lengths:
            for index in range(samples):
                tokens, weights = questions(text, length, index)
                handle.reset()
                logits = model(input_ids=tokens[None, :-1], use_cache=False).logits[0]
                density = [layer.density for layer in handle.stats()]
                entry = score(logits, tokens, weights)
                found.append({"length": length, "index": index, **entry, "density": round(float(np.mean(density)), 4)})
    return found


def score(logits: Tensor, tokens: Tensor, weights: Tensor) -> dict[str, Any]:
    """The loss of a text and its answers, and which answers are right; logits ``[S - 1, V]`` of tokens ``[S]``."""
    losses = F.cross_entropy(logits, tokens[1:], reduction="none")
    right, weights = (logits.argmax(-1) == tokens[1:]).tolist(), weights[1:]
    asked = weights >= ANSWER
    starts = torch.nonzero(weights == CHOICE).flatten().tolist()
    ends = [next((i for i in range(start, len(right)) if not asked[i]), len(right)) for start in starts]
    return {
        "loss": round(float(losses[weights == TEXT].mean()), 5),
        "answer_loss": round(float(losses[asked].mean()), 5),
        "right": sum(all(right[start:end]) for start, end in zip(starts, ends, strict=True)),
        "asked": len(starts),
    }
