"""A training run of a small model: steps that repeat, averaged weights, checkpoints to go on from, a log."""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from optim import Muon
from torch import Tensor

import gossamer

__all__ = ["Phase", "Run", "asked", "trained"]

WARMUP = 50
DECAY = 0.01  # of matrices
LAYERS = ("layers.", "blocks.")
MUON_RATE = 0.01


class Phase(Protocol):
    """A stretch of training: ``steps`` steps, between two multipliers of the learning rate; a dataclass."""

    @property
    def steps(self) -> int: ...
    @property
    def first(self) -> float: ...
    @property
    def last(self) -> float: ...
    @property
    def tokens(self) -> int:
        """Of one sequence."""
        ...


class Run(ABC):
    """Weights, optimiser and log. Each step draws its data from a generator seeded with (seed, step).

    Args:
        bfloat16: multiply in bfloat16; weights, sums and the optimiser stay in fp32.
    """

    def __init__(self, seed: int, schedule: Sequence[Phase], model: Any, rate: float, bfloat16: bool) -> None:
        self.seed, self.schedule, self.rate, self.bfloat16 = seed, schedule, rate, bfloat16
        self.model = model.float().train()
        # Muon for the matrices of the layers, AdamW for the rest.
        matrices, others, vectors = [], [], []
        for name, parameter in self.model.named_parameters():
            inner = any(part in name for part in LAYERS)
            (matrices if inner and parameter.ndim == 2 else others if parameter.ndim > 1 else vectors).append(parameter)
        groups = [{"params": others, "weight_decay": DECAY}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizers = [Muon(matrices, MUON_RATE), torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.97))]
        # What is shipped.
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step, self.wall = 0, 0.0
        self.log: list[dict[str, float]] = []

    @abstractmethod
    def loss(self, phase: Any) -> Tensor:
        """Of the current step's batch."""

    def generator(self) -> torch.Generator:
        """Of the current step."""
        return torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)

    def products(self) -> AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext()

    def train_step(self, phase: Phase, multiplier: float) -> dict[str, float]:
        """Update the weights; what is logged."""
        loss = self.loss(phase)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer, rate in zip(self.optimizers, (MUON_RATE, self.rate), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = rate * multiplier * min(1.0, (self.step + 1) / WARMUP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        kept = min(0.99, self.step / (self.step + 10))
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                self.average[name].lerp_(parameter, 1 - kept)
        return {"step": self.step, "tokens": phase.tokens, "loss": loss.item()}

    def train(self, checkpoint: Path | None, until: float) -> bool:
        """Run the schedule from the current step on; False where ``until`` seconds of all runs were over before."""
        wall, begin = time.time() - self.wall, 0
        for phase in self.schedule:
            for i in range(max(0, self.step - begin), phase.steps):
                record = self.train_step(phase, phase.first + (phase.last - phase.first) * i / max(1, phase.steps))
                self.wall = time.time() - wall
                self.log.append(record | {"wall_s": round(self.wall, 1)})
                if self.step % 10 == 0:
                    print(json.dumps(self.log[-1] | {"loss": round(record["loss"], 4)}), flush=True)
                over = self.wall > until
                if checkpoint and (over or self.step % 100 == 0 or i + 1 == phase.steps):
                    self.save(checkpoint)
                if over:
                    return False
            begin += phase.steps
        return True

    def save(self, path: Path) -> None:
        """Everything that is needed to go on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "average": self.average}
        state["optimizers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        state |= {"counts": (self.step, self.wall), "log": self.log}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same seed and schedule."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.average, self.log = state["average"], state["log"]
        self.step, self.wall = state["counts"]

    def take_average(self) -> None:
        """The averaged weights become the model's."""
        self.model.load_state_dict(self.average, strict=False)

    def write_log(self, out: Path, **more: Any) -> None:
        """``training_log.json``: what was run, and every tenth step."""
        summary = {
            "seed": self.seed,
            "schedule": [asdict(phase) | {"tokens": phase.tokens} for phase in self.schedule],  # type: ignore[call-overload]
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "wall_s": round(self.wall, 1),
            "threads": torch.get_num_threads(),
            "bfloat16": self.bfloat16,
            **more,
        }
        rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in self.log[::10]]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(summary, indent=1).removesuffix("\n}")
        (out / "training_log.json").write_text(f'{head},\n "log": [\n{lines}\n ]\n}}\n')


def asked(about: str | None, out: Path) -> argparse.Namespace:
    """The command line of a training script; ``out`` is the folder to write to unless another is named."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=out)
    parser.add_argument("--checkpoint", type=Path, help="file to write every 100 steps, and to go on from")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=math.inf, help="seconds of all runs, after which it stops")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: where a processor multiplies it slowly")
    arguments = parser.parse_args()
    if arguments.resume and (arguments.checkpoint is None or not arguments.checkpoint.is_file()):
        parser.error(f"--resume needs the file of a run, --checkpoint FILE; got {arguments.checkpoint}")
    return arguments


def trained(run: Run, arguments: argparse.Namespace, **fields: Any) -> bool:
    """Train as `asked`; False where it stopped before the end.

    Dense attention, forward and backward, by gossamer's kernels: torch's in bfloat16 is slow on CPUs.

    Args:
        fields: further ones of `gossamer.enable`.
    """
    if arguments.resume:
        run.resume(arguments.checkpoint)
    with gossamer.enable(run.model, "dense", kernel="gossamer", min_tokens=0, training=True, **fields):
        done = run.train(arguments.checkpoint, arguments.until)
    if not done:
        print(f"stopped at step {run.step}: --resume goes on from {arguments.checkpoint}", file=sys.stderr)
    return done
