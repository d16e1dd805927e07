"""Trains small character models with N:M-sparse weights, forward alone or backward too, beside dense ones.

    python examples/sparse_training.py [--steps N] [--seeds N] [--kinds NAMES] [--pattern N:M] [--out FILE]

The model is that of `character_model.py`, on this repository's own text, where attention reads a span and the last
token of each span before it. All of its linear layers are replaced, the tied embedding stays dense. Of a seed all kinds
begin with the same weights and see the same samples.

    dense             every product whole
    forward           y by the N largest of M along the inputs, dx by the dense weight
    shared            y and dx by the mask along the inputs
    shared+decay      and SR-STE's decay of what is left out: SR-STE (2102.04010)
    bdwp              y by the mask along the inputs, dx by the mask along the outputs

Held-out text is read with the weights that the forward product has. The table has means over the seeds, from the best
to the worst, and the multiply-adds of the linear layers in a step; nothing is faster here, products are computed whole.
``--out`` is written after each training, with its curve; trainings that it has from the same settings are left alone.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
import time
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from character_model import RATE, TOKENS, CharacterModel, characters, loss_of, samples
from measured_on import measured_on

from gossamer.cli.common import table
from gossamer.evaluate.mqar.mixers import parse_mixer
from gossamer.training import bdwp, count_macs

KINDS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "forward": {"backward": "dense"},
    "shared": {"backward": "shared"},
    "shared+decay": {"backward": "shared", "decay": 2e-4},
    "bdwp": {"backward": "bdwp"},
}
# What hardware that skips zeros in groups computes: a shared mask has none along the outputs, over which dx sums.
COUNTED = {kind: "forward" for kind in KINDS} | {"dense": "dense", "bdwp": "bdwp"}
STEPS, SEEDS, BATCH, EVERY, HELD_OUT = 400, 3, 4, 40, 16
MIXER = "fixed(16)"  # of what character_model.py trains this learns most in few steps


def built(kind: str, pattern: str, seed: int) -> CharacterModel:
    torch.manual_seed(seed)
    model = CharacterModel(parse_mixer(MIXER))
    options = KINDS[kind]
    if options is not None:
        bdwp(model, pattern, **options)
    return model


def trained(
    kind: str, pattern: str, seed: int, steps: int, text: torch.Tensor, held_out: torch.Tensor
) -> dict[str, Any]:
    """The curve of a training, in bits a character of held-out text."""
    model = built(kind, pattern, seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    asked = samples(held_out, HELD_OUT, torch.Generator().manual_seed(0))
    curve: list[tuple[int, float]] = []
    begun = time.perf_counter()
    for step in range(steps + 1):
        if step % EVERY == 0 or step == steps:
            with torch.no_grad():
                curve.append((step, round(float(loss_of(model, asked)) / math.log(2), 4)))
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(model, samples(text, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    seconds = round(time.perf_counter() - begun, 1)
    print(f"{kind}, seed {seed}: {curve[-1][1]:.3f} bits, {seconds:.0f} s", file=sys.stderr, flush=True)
    return {"kind": kind, "seed": seed, "bits": curve[-1][1], "seconds": seconds, "curve": curve}


def macs_of(pattern: str) -> dict[str, dict[str, int]]:
    """Of a step of each kind: multiply-adds of its three products."""
    rows = BATCH * TOKENS
    found = {kind: count_macs(built(kind, pattern, 0), rows)[COUNTED[kind]] for kind in KINDS}
    return {kind: dataclasses.asdict(macs) | {"total": macs.total} for kind, macs in found.items()}


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """What each kind reaches, and what it multiplies."""
    rows = [["training", "bits a character", "best to worst", "multiply-adds of dense", "sparse products"]]
    for kind in dict.fromkeys(row["kind"] for row in found["rows"]):
        bits = [row["bits"] for row in found["rows"] if row["kind"] == kind]
        macs, whole = found["macs"][kind], found["macs"]["dense"]
        sparse = sum(macs[name] < whole[name] for name in ("forward", "to_inputs", "to_weights"))
        cells = [f"{sum(bits) / len(bits):.3f}", f"{min(bits):.3f}-{max(bits):.3f}"]
        rows.append([kind, *cells, f"{macs['total'] / whole['total']:.0%}", f"{sparse} of 3"])
    return rows


def rows_of_file(path: Path | None, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a file of the same settings, if it is there; a file of others ends the program."""
    if path is None or not path.exists():
        return []
    found = json.loads(path.read_text())
    if other := [name for name, value in settings.items() if found.get(name) != value]:
        raise SystemExit(f"{path} has trainings of another {other[0]}: give another file")
    return found["rows"]


def write(path: Path, data: dict[str, Any]) -> None:
    begun = path.with_suffix(".begun")
    begun.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(begun, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--kinds", default=",".join(KINDS))
    parser.add_argument("--pattern", default="2:8")
    parser.add_argument("--out", type=Path, help="a JSON file of all trainings")
    given = parser.parse_args(arguments)
    kinds = given.kinds.split(",")
    if unknown := [kind for kind in kinds if kind not in KINDS]:
        parser.error(f"kinds are {', '.join(KINDS)}; got {unknown[0]}")
    text = characters()
    border = len(text) * 9 // 10
    found: dict[str, Any] = {"machine": measured_on(), "steps": given.steps, "batch": BATCH, "tokens": TOKENS}
    found |= {"pattern": given.pattern, "text": sha256(text.numpy().tobytes()).hexdigest()[:16]}
    found |= {"macs": macs_of(given.pattern), "rows": rows_of_file(given.out, found)}
    for seed, kind in [(seed, kind) for seed in range(given.seeds) for kind in kinds]:
        if any((row["seed"], row["kind"]) == (seed, kind) for row in found["rows"]):
            continue
        found["rows"].append(trained(kind, given.pattern, seed, given.steps, text[:border], text[border:]))
        if given.out is not None:
            write(given.out, found)
    print(table(rows_of(found)))


if __name__ == "__main__":
    main()
