"""Train the reference model from scratch on a CPU: `python models/train.py --out models/reference`.

The text is that of the installed Python packages (`corpus.py`), the tasks are generated (`tasks.py`). Steps,
not seconds, define the schedule, and each step draws its data from a generator seeded with (seed, step), so a
run can be resumed (--resume) and repeated.
"""

import argparse
import json
import os
import platform
import random
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from corpus import Corpus, load_corpus
from network import initialize, make_config, rotary, run_layers, token_losses
from optim import make_optimizers
from tasks import ANSWER, TEXT, Batch, SampleMaker
from tokenizer import BOS, EOS, PAD, encode_all, number_ids, train_tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

WARMUP = 30


@dataclass(frozen=True)
class Phase:
    """A stretch of training: `steps` of `rows` samples of `length` tokens.

    tail: tokens at the end through which gradients flow; the tokens before them are then a constant, run without
        gradient (all tokens where 0).
    skip: probability that the positions of a sample jump (PoSE).
    first, last: learning-rate multipliers at the phase's ends.
    """

    length: int
    rows: int
    steps: int
    skip: float
    first: float
    last: float
    tail: int = 0


SCHEDULE = (
    Phase(256, 32, 250, 0.0, 1.0, 1.0),
    Phase(1024, 8, 250, 0.3, 1.0, 0.9),
    Phase(2048, 4, 300, 0.5, 0.9, 0.4),
    Phase(8192, 2, 120, 0.5, 0.4, 0.2, tail=1024),
    Phase(16384, 1, 120, 0.5, 0.2, 0.1, tail=1024),
    Phase(32768, 1, 36, 0.5, 0.1, 0.03, tail=1024),
)


class Trainer:
    """One run: weights, optimisers, data and log."""

    def __init__(self, seed: int, schedule: tuple[Phase, ...], prepared: Path, compiled: bool):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        self.seed = seed
        self.schedule = schedule
        self.tokenizer, tokens, self.data = prepare(prepared)
        self.maker = SampleMaker(self.tokenizer, tokens)
        self.model = LlamaForCausalLM(make_config()).float()
        comma, verb = (self.tokenizer.encode(text, add_special_tokens=False)[0] for text in (",", " is"))
        initialize(self.model, seed, number_ids(self.tokenizer), comma, verb)
        self.optimizers = make_optimizers(self.model)
        self.step = 0
        self.tokens_seen = 0
        self.wall = 0.0
        self.cpu = 0.0
        self.log: list[dict[str, float]] = []
        wrap = (lambda f: torch.compile(f, dynamic=False)) if compiled else (lambda f: f)
        self.run_prefix = wrap(self._run_prefix)
        self.run_loss = wrap(self._run_loss)

    def _run_prefix(self, tokens, cos, sin):
        return run_layers(self.model, tokens, cos, sin)[1]

    def _run_loss(self, tokens, targets, weights, cos, sin, prefix):
        hidden, _ = run_layers(self.model, tokens, cos, sin, prefix)
        losses, right = token_losses(self.model, hidden, targets)
        loss = (losses * weights).sum() / weights.sum()
        return loss, losses.detach(), right

    def loss(self, batch: Batch, tail: int):
        """Weighted loss of one batch; see Phase.tail."""
        tokens = torch.from_numpy(batch.tokens)
        weights = torch.from_numpy(batch.weights)[:, 1:]
        inputs, targets = tokens[:, :-1], tokens[:, 1:]
        cos, sin = rotary(torch.from_numpy(batch.positions)[:, :-1])
        prefix = None
        if tail:
            cut = inputs.shape[1] - tail
            with torch.no_grad():
                prefix = self.run_prefix(inputs[:, :cut], cos[:, :, :cut], sin[:, :, :cut])
            inputs, targets, weights = inputs[:, cut:], targets[:, cut:], weights[:, cut:]
        loss, losses, right = self.run_loss(inputs, targets, weights, cos, sin, prefix)
        answer, text = weights >= ANSWER, weights == TEXT
        return loss, {
            "answer_loss": losses[answer].mean().item() if answer.any() else None,
            "answer_accuracy": right[answer].float().mean().item() if answer.any() else None,
            "text_loss": losses[text].mean().item() if text.any() else None,
        }

    def train_step(self, phase: Phase, multiplier: float) -> dict:
        """Draw a batch, update the weights, return what is logged."""
        rng = np.random.default_rng([self.seed, self.step])
        batch = self.maker.batch(phase.rows, phase.length + 1, phase.skip, rng)
        loss, record = self.loss(batch, phase.tail)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        warmup = min(1.0, (self.step + 1) / WARMUP)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * multiplier * warmup
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens_seen += phase.rows * phase.length
        return {"step": self.step, "length": phase.length, "loss": loss.item(), **record}

    def train(self, checkpoint: Path | None) -> None:
        """Run the schedule from the current step on."""
        wall, cpu = time.time() - self.wall, time.process_time() - self.cpu
        begin = 0
        for number, phase in enumerate(self.schedule):
            for i in range(max(0, self.step - begin), phase.steps):
                multiplier = phase.first + (phase.last - phase.first) * i / max(1, phase.steps)
                record = self.train_step(phase, multiplier)
                self.wall, self.cpu = time.time() - wall, time.process_time() - cpu
                record |= {"wall_s": self.wall, "cpu_s": self.cpu, "tokens": self.tokens_seen, "phase": number}
                self.log.append(record)
                if self.step % 5 == 0:
                    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in record.items()}
                    print(json.dumps(shown), flush=True)
                if checkpoint and (self.step % 50 == 0 or i + 1 == phase.steps):
                    self.save_checkpoint(checkpoint, f"phase{number}" if i + 1 == phase.steps else "latest")
            begin += phase.steps

    def save_checkpoint(self, folder: Path, name: str) -> None:
        """Everything that is needed to go on."""
        folder.mkdir(parents=True, exist_ok=True)
        state = {
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counts": (self.step, self.tokens_seen, self.wall, self.cpu),
            "log": self.log,
        }
        torch.save(state, folder / f"{name}.tmp")
        os.replace(folder / f"{name}.tmp", folder / f"{name}.pt")

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same seed and schedule."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.tokens_seen, self.wall, self.cpu = state["counts"]
        self.log = state["log"]

    def export(self, out: Path) -> None:
        """Write the model in the Hugging Face format, weights as bfloat16, and the training log."""
        out.mkdir(parents=True, exist_ok=True)
        shipped: Any = LlamaForCausalLM(make_config())
        shipped.to(torch.bfloat16)
        shipped.load_state_dict(self.model.state_dict())
        shipped.generation_config = GenerationConfig(
            do_sample=False, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD
        )
        shipped.save_pretrained(out)
        self.tokenizer.save_pretrained(out)
        summary = {
            "seed": self.seed,
            "corpus": self.data,
            "schedule": [asdict(phase) for phase in self.schedule],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "tokens": self.tokens_seen,
            "wall_s": round(self.wall, 1),
            "process_cpu_s": round(self.cpu, 1),
            "threads": torch.get_num_threads(),
            "machine": machine(),
        }
        rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in entry.items()} for entry in self.log]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(summary, indent=1).removesuffix("\n}")
        (out / "training_log.json").write_text(f'{head},\n "log": [\n{lines}\n ]\n}}\n')


def machine() -> str:
    """The processor's name, as far as the system tells."""
    try:
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        return f"{names[0].split(':')[1].strip()} ({len(names)} cores)"
    except (OSError, IndexError):
        return platform.processor()


def prepare(folder: Path) -> tuple[PreTrainedTokenizerFast, np.ndarray, dict]:
    """Tokenizer, training tokens and a description of the corpus; made once and kept in `folder`."""
    if not (folder / "corpus.json").exists():
        corpus: Corpus = load_corpus()
        folder.mkdir(parents=True, exist_ok=True)
        tokenizer = train_tokenizer(corpus.train)
        tokenizer.save_pretrained(folder)
        train = encode_all(tokenizer, corpus.train)
        np.save(folder / "train.npy", train)
        (folder / "held_out.txt").write_text("\n".join(corpus.held_out))
        description = {
            "sha256": corpus.sha256,
            "versions": corpus.versions,
            "train_documents": len(corpus.train),
            "train_characters": sum(map(len, corpus.train)),
            "train_tokens": len(train),
            "held_out_documents": len(corpus.held_out),
            "held_out_characters": sum(map(len, corpus.held_out)),
        }
        (folder / "corpus.json").write_text(json.dumps(description, indent=1))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    return tokenizer, np.load(folder / "train.npy"), json.loads((folder / "corpus.json").read_text())


def main() -> None:
    """Parse the arguments, train, export."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cache", type=Path, default=Path("build/reference-model"), help="prepared text; checkpoints")
    parser.add_argument("--smoke", action="store_true", help="three steps per phase on short samples, uncompiled")
    parser.add_argument("--steps-scale", type=float, default=1.0, help="multiplies the steps of every phase")
    parser.add_argument("--resume", type=Path, help="checkpoint to go on from")
    arguments = parser.parse_args()
    schedule = tuple(Phase(**{**asdict(p), "steps": max(1, round(p.steps * arguments.steps_scale))}) for p in SCHEDULE)
    if arguments.smoke:
        schedule = (Phase(256, 2, 3, 0.0, 1.0, 1.0), Phase(512, 1, 3, 0.5, 1.0, 0.5, tail=256))
    start = time.time()
    trainer = Trainer(arguments.seed, schedule, arguments.cache / "data", compiled=not arguments.smoke)
    print(f"prepared in {time.time() - start:.0f} s: {trainer.data}", flush=True)
    if arguments.resume:
        trainer.resume(arguments.resume)
    trainer.train(None if arguments.smoke else arguments.cache / "checkpoints")
    trainer.export(arguments.out)


if __name__ == "__main__":
    main()
