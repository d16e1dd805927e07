"""Extends the context of a small model by sparse training, on a CPU within an hour, and compares four ways to do so.

    python examples/extend_context.py [--work FOLDER] [--only PARTS] [--quick]

The reference model gets the rotary base of short models, 10,000 in place of 5e8, and is trained on samples of 512
tokens to find numbers in text; far beyond that it finds few. Then its training goes on with samples of 2,048 tokens,
where attention is

    dense           every pair
    top_p           MTraining: the columns and diagonals that hold 95% of the last queries' attention
    longgen         LongGen: layers 2 and 3 are full, the others have 64 first and some 256 recent tokens
    longgen_early   likewise, with layers 1 and 2 full
    window          64 first and 256 recent tokens in all layers

at equal steps, and at equal time. Dense and top-p training run with three seeds, and all trained models are served
dense and sparse. Each part writes its figures to the folder as soon as it is done, and is left alone by a later call; a
part that was stopped goes on near where it was. When all are there, they become one file of results.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from extending import Stage, Text, Trainer, ask, load_text, new_model, policies
from reading import ROOT, machine
from safetensors.torch import load_file, save_file

import gossamer

BASE = Stage(length=512, rows=4, steps=24, rate=0.2)
LONG = Stage(length=2048, rows=1, steps=160, rate=0.2)
LENGTHS = (512, 1024, 2048)
SAMPLES = 12  # texts of each length that are asked about
CURVE = 6  # texts of the longest length, between steps
EVERY = 16  # steps between points of a curve
ROUNDS = 5  # of timing
SEEDS = {"dense": (0, 1, 2), "top_p": (0, 1, 2), "longgen": (0,), "longgen_early": (0,), "window": (0,)}
MOST = 2.0  # times the steps of dense training that others may take in its time


class Parts:
    """What is done lies in the folder, a file a part."""

    def __init__(self, folder: Path, stages: tuple[Stage, Stage], samples: int) -> None:
        self.folder, (self.base, self.long), self.samples = folder, stages, samples
        self.lengths = tuple(length for length in LENGTHS if length <= self.long.length)
        self.policies = policies()
        folder.mkdir(parents=True, exist_ok=True)

    def done(self, name: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """The figures of a part, which is worked on if it is not there."""
        path = self.folder / f"{name}.json"
        if not path.exists():
            started = time.process_time()
            figures = work() | {"process_seconds": round(time.process_time() - started, 1)}
            write(path, figures)
            print(f"{name}: {figures['process_seconds']:.0f} s", flush=True)
        return json.loads(path.read_text(encoding="utf-8"))

    def model(self, name: str, text: Text) -> Any:
        """A model as some training left it."""
        model = new_model()
        model.load_state_dict(load_file(self.folder / f"{name}.safetensors"))
        return model

    def train(self, name: str, text: Text, start: str | None, stage: Stage, seed: int, keep: tuple[int, ...]) -> Any:
        """A training's figures; its weights are kept after some steps, as ``name-STEPS``."""
        kind = name.split("-")[0] if start else "dense"
        model = self.model(start, text) if start else new_model()
        trainer, checkpoint = Trainer(model, text, stage, seed), self.folder / f"{name}.pt"
        curve: list[dict[str, Any]] = []
        if checkpoint.exists():
            state = torch.load(checkpoint)
            trainer.resume(state)
            curve = state["curve"]
        densities = []
        while True:
            steps = len(trainer.losses)
            if steps % EVERY == 0 or steps in keep:
                if start and (not curve or curve[-1]["step"] != steps):
                    found = ask(model, self.policies[kind], text, (stage.length,), min(CURVE, self.samples))
                    means = {n: statistics.fmean(x[n] for x in found) for n in ("loss", "answer_loss")}
                    curve.append({"step": steps, "right": sum(x["right"] for x in found), **rounded(means)})
                if steps in keep:
                    save_file({n: x.contiguous() for n, x in model.state_dict().items()}, self._weights(name, steps))
                begun = checkpoint.with_suffix(".begun")
                torch.save(trainer.state() | {"curve": curve}, begun)
                os.replace(begun, checkpoint)
            if steps >= stage.steps:
                break
            model.train()
            with gossamer.enable(model, self.policies[kind], training=True) as handle:
                trainer.step()
                densities.append(round(float(np.mean([layer.density for layer in handle.stats()])), 4))
            print(f"{name} {steps + 1}: {trainer.losses[-1]:.3f}, density {densities[-1]:.3f}", flush=True)
        checkpoint.unlink()
        return {"losses": [round(x, 4) for x in trainer.losses], "curve": curve, "densities": densities}

    def _weights(self, name: str, steps: int) -> Path:
        return self.folder / f"{name}-{steps}.safetensors"

    def ask(self, model: str, policy: str, text: Text) -> dict[str, Any]:
        found = ask(self.model(model, text), self.policies[policy], text, self.lengths, self.samples)
        return {"texts": found}


def time_steps(parts: Parts, text: Text) -> dict[str, Any]:
    """Processor seconds of a step of each training, the kinds in turn, from the same weights on the same samples.

    Other work on the machine adds little to these; to seconds on the clock it may add anything.
    """
    stage = Stage(parts.long.length, parts.long.rows, ROUNDS + 1, 0.0)
    trainers = {}
    for name in parts.policies:
        trainers[name] = Trainer(parts.model(f"base-{parts.base.steps}", text), text, stage, 0)
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for _ in range(ROUNDS + 1):  # the first of each is slower, and left out
        for name, trainer in trainers.items():
            with gossamer.enable(trainer.model, parts.policies[name], training=True):
                started = time.process_time()
                trainer.step()
                seconds[name].append(round(time.process_time() - started, 3))
    return {
        "seconds": {name: statistics.median(each[1:]) for name, each in seconds.items()},
        "rounds": {name: each[1:] for name, each in seconds.items()},
        "threads": torch.get_num_threads(),
    }


def equal_time(parts: Parts, seconds: dict[str, float]) -> dict[str, int]:
    """Steps of each kind in the time that dense training takes for its own."""
    most = int(parts.long.steps * MOST)
    return {name: min(most, int(parts.long.steps * seconds["dense"] / each)) for name, each in seconds.items()}


def work(parts: Parts, text: Text, only: set[str]) -> Iterator[tuple[str, Any]]:
    """All parts in their order, with their figures."""
    base = f"base-{parts.base.steps}"
    last = parts.base.steps
    yield "base", parts.done("base", lambda: parts.train("base", text, None, parts.base, 0, (last,)))
    yield "base.dense", parts.done("base.dense", lambda: parts.ask(base, "dense", text))
    equal, steps = parts.long.steps, {"dense": parts.long.steps}
    if not only or any(not name.startswith("dense") for name in only):
        figures = parts.done("time", lambda: time_steps(parts, text))
        yield "time", figures
        steps = equal_time(parts, figures["seconds"])
    for kind, seeds in SEEDS.items():
        for seed in seeds:
            if only and not only & {kind, f"{kind}-{seed}"}:
                continue
            name, longest = f"{kind}-{seed}", max(equal, steps[kind]) if seed == 0 else equal
            stage = Stage(parts.long.length, parts.long.rows, longest, parts.long.rate)
            keep = tuple({equal, longest})
            training = parts.done(name, lambda n=name, s=stage, k=keep, d=seed: parts.train(n, text, base, s, d + 1, k))
            yield name, training
            served = ["dense", kind if kind != "dense" else "top_p"]
            if name == "dense-0":
                served += [other for other in parts.policies if other not in served]
            asked = [(equal, policy) for policy in served] + ([(longest, kind)] if longest != equal else [])
            for count, policy in asked:
                part = f"{name}-{count}.{policy}"
                yield part, parts.done(part, lambda n=f"{name}-{count}", p=policy: parts.ask(n, p, text))


def write(path: Path, data: dict[str, Any]) -> None:
    begun = path.with_suffix(f".{os.getpid()}.begun")
    begun.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    os.replace(begun, path)


def rounded(numbers: dict[str, float]) -> dict[str, float]:
    return {name: round(number, 5) for name, number in numbers.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "build" / "extend-context", help="folder of what is done")
    parser.add_argument("--only", default="", help="trainings such as dense,top_p-1: for several processes")
    parser.add_argument("--until", help="stop after this part, such as base")
    parser.add_argument("--quick", action="store_true", help="a few steps, in a minute: nothing is learnt")
    parser.add_argument("--out", type=Path, help="file of the results (default: extend_context.json in the folder)")
    arguments = parser.parse_args()
    stages, samples = (BASE, LONG), SAMPLES
    if arguments.quick:
        stages, samples = (Stage(256, 2, 3, 1.0), Stage(1024, 1, 3, 0.5)), 1
    parts = Parts(arguments.work, stages, samples)
    text = load_text(arguments.work)
    found = {}
    for name, figures in work(parts, text, set(filter(None, arguments.only.split(",")))):
        found[name] = figures
        if name == arguments.until:
            return
    if arguments.only:
        return
    steps = equal_time(parts, found["time"]["seconds"])
    data = {"machine": machine(), "base_stage": vars(parts.base), "long_stage": vars(parts.long), "steps": steps}
    write(arguments.out or arguments.work / "extend_context.json", data | {"parts": found})
    print(f"wrote {arguments.out or arguments.work / 'extend_context.json'}", file=sys.stderr)


if __name__ == "__main__":
    main()
