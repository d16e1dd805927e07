"""Train the small video model from scratch on a CPU: `python models/train_video.py --out models/video`.

A text-conditioned diffusion transformer (diffusers' Wan, pixels for latents) on clips of moving shapes (`clips.py`), by
rectified flow: between a clip and noise the model predicts their difference. Steps, not seconds, define the schedule,
and each step draws its data from a generator seeded with (seed, step), so that a run can be resumed (--resume) and
repeated. Most steps see small clips; the last ones have the 4,096 tokens of the model's size.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import clips
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanTransformer3DModel
from torch import Tensor

import gossamer

WARMUP = 50
TIMES = 1000  # of a schedule's timesteps
WITHOUT_TEXT = 0.1  # share of the clips whose sentence is left out, for guidance
GUIDANCE = 3.0
PROMPTS = 8  # that its folder names
SHIFT = 3.0  # towards noise, in training and in sampling
PATCH = (1, 2, 2)
CONFIG: dict[str, Any] = dict(
    patch_size=PATCH,
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=3,
    out_channels=3,
    text_dim=clips.TEXT_DIM,
    freq_dim=64,
    ffn_dim=768,
    num_layers=6,
    rope_max_seq_len=64,
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``steps`` of ``rows`` clips of ``frames`` frames of ``size`` by ``size`` pixels.

    first, last: learning-rate multipliers at its ends.
    """

    frames: int
    size: int
    rows: int
    steps: int
    first: float
    last: float

    @property
    def tokens(self) -> int:
        """Of one clip."""
        return self.frames // PATCH[0] * (self.size // PATCH[1]) * (self.size // PATCH[2])


SCHEDULE = (
    Phase(4, 16, 16, 1500, 1.0, 1.0),
    Phase(8, 24, 4, 900, 1.0, 0.7),
    Phase(16, 32, 1, 700, 0.7, 0.02),
)


class Trainer:
    """One run: weights, optimiser and log."""

    def __init__(self, seed: int, schedule: tuple[Phase, ...], config: dict[str, Any], bfloat16: bool) -> None:
        torch.manual_seed(seed)
        self.seed, self.schedule, self.bfloat16 = seed, schedule, bfloat16
        self.model: Any = WanTransformer3DModel(**config).float().train()
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        others = [p for p in self.model.parameters() if p.ndim <= 1]
        groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1.5e-3, betas=(0.9, 0.97))
        # What is shipped: weights averaged over the last steps.
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        self.step, self.wall = 0, 0.0
        self.log: list[dict[str, float]] = []

    def batch(self, phase: Phase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips ``[B, 3, F, H, W]``, noise, sentences ``[B, words, D]`` and times in 0 .. 1, of the current step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        shapes = [clips.draw_shapes(generator) for _ in range(phase.rows)]
        x = torch.stack([clips.render(some, phase.frames, phase.size, phase.size) for some in shapes])
        text = clips.embed([clips.describe(some) for some in shapes])
        text[torch.rand(phase.rows, generator=generator) < WITHOUT_TEXT] = 0.0
        noise = torch.randn(x.shape, generator=generator)
        # One of each part of the range, so that batches differ less.
        even = (torch.arange(phase.rows) + torch.rand(phase.rows, generator=generator)) / phase.rows
        normal = torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4))
        return x, noise, text, shifted(torch.sigmoid(normal))

    def loss(self, phase: Phase) -> Tensor:
        x, noise, text, times = self.batch(phase)
        share = times[:, None, None, None, None]
        with torch.autocast("cpu", torch.bfloat16) if self.bfloat16 else nullcontext():
            found = self.model((1 - share) * x + share * noise, times * TIMES, text, return_dict=False)[0]
        return (found.float() - (noise - x)).square().mean()

    def train_step(self, phase: Phase, multiplier: float) -> dict[str, float]:
        """Update the weights; what is logged."""
        loss = self.loss(phase)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = 1.5e-3 * multiplier * min(1.0, (self.step + 1) / WARMUP)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
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
                if checkpoint and (self.step % 100 == 0 or i + 1 == phase.steps):
                    self.save(checkpoint)
                if self.wall > until:
                    if checkpoint:
                        self.save(checkpoint)
                    return False
            begin += phase.steps
        return True

    def save(self, path: Path) -> None:
        """Everything that is needed to go on."""
        path.parent.mkdir(parents=True, exist_ok=True)
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict(), "average": self.average}
        state |= {"counts": (self.step, self.wall), "log": self.log}
        torch.save(state, path.with_suffix(".tmp"))
        os.replace(path.with_suffix(".tmp"), path)

    def resume(self, path: Path) -> None:
        """Go on from a checkpoint of the same seed and schedule."""
        state = torch.load(path)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.average, self.log = state["average"], state["log"]
        self.step, self.wall = state["counts"]

    def export(self, out: Path) -> None:
        """Write the averaged weights in bfloat16 and the scheduler in diffusers' format, and the training log."""
        self.model.load_state_dict(self.average, strict=False)
        shipped: Any = WanTransformer3DModel(**self.model.config).to(torch.bfloat16)
        shipped.load_state_dict(self.model.state_dict())
        shipped.save_pretrained(out / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(out / "scheduler")
        last = self.schedule[-1]
        generator = torch.Generator().manual_seed(self.seed + 1)
        words = {
            "words": clips.WORDS,
            "codes": clips.word_codes().tolist(),
            "prompts": [" ".join(clips.describe(clips.draw_shapes(generator))) for _ in range(PROMPTS)],
            "size": [self.model.config.in_channels, last.frames, last.size, last.size],
            "guidance": GUIDANCE,
        }
        (out / "words.json").write_text(json.dumps(words) + "\n")
        summary = {
            "seed": self.seed,
            "schedule": [asdict(phase) | {"tokens": phase.tokens} for phase in self.schedule],
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "steps": self.step,
            "wall_s": round(self.wall, 1),
            "threads": torch.get_num_threads(),
            "bfloat16": self.bfloat16,
        }
        rows = [{k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()} for row in self.log[::10]]
        lines = ",\n".join(f"  {json.dumps(row)}" for row in rows)
        head = json.dumps(summary, indent=1).removesuffix("\n}")
        (out / "training_log.json").write_text(f'{head},\n "log": [\n{lines}\n ]\n}}\n')


def shifted(times: Tensor) -> Tensor:
    """Times moved towards noise, as the scheduler does it (Esser et al., 2403.03206, section 5.3.2)."""
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "video")
    parser.add_argument("--checkpoint", type=Path, help="file to write every 100 steps, and to go on from")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--until", type=float, default=math.inf, help="seconds of all runs, after which it stops")
    parser.add_argument("--float32", action="store_true", help="no bfloat16: where a processor multiplies it slowly")
    arguments = parser.parse_args()
    trainer = Trainer(arguments.seed, SCHEDULE, CONFIG, not arguments.float32)
    if arguments.resume:
        trainer.resume(arguments.checkpoint)
    # Dense attention, forward and backward, by gossamer's kernels: torch's in bfloat16 is slow on CPUs.
    policy = gossamer.Policy(gossamer.methods.create("dense", kernel="gossamer"), min_tokens=0, training=True)
    with gossamer.enable(trainer.model, policy):
        done = trainer.train(arguments.checkpoint, arguments.until)
    if not done:
        print(f"stopped at step {trainer.step}: --resume goes on from {arguments.checkpoint}", file=sys.stderr)
        return 1
    trainer.export(arguments.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
