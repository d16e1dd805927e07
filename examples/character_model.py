"""Trains small character models on this repository's own text, one for each kind of attention, and compares them.

    python examples/character_model.py [--quick] [--kinds dense,window(32),...] [--steps N] [--seeds N] [--out FILE]

Combiner stands beside the pattern that it completes (`fixed`: a span, and the last token of each span before it), the
Routing Transformer, with a local and a routing head, beside two local heads (`window_heads`), and SeqBoat beside itself
with every token active (`seqboat_local`); each pair reads as many keys. All models have two layers, of which the first
is a gated convolution over three characters; they see the same samples in the same order, and are asked for the same
held-out text, of files that they were not trained on. The table has means over the seeds, and the range from best to
worst. ``--quick`` takes a few steps of one seed. What ``--out`` names is written anew after each training.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from reading import machine, repository_text
from torch import Tensor, nn

from gossamer.cli.common import table
from gossamer.cli.specs import split_specs
from gossamer.evaluate.mqar.mixers import Mixer, parse_mixer

FIRST = "convolution(3)"  # finds the neighbours at once, for which attention over learned positions needs long
KINDS = ",".join(
    f"{FIRST}+{kind}"
    for kind in (
        "dense",
        "window_heads(32)",
        "routing(32)",
        "fixed(16)",
        "combiner(16)",
        "seqboat_local(32)",
        "seqboat(32)",
    )
)
WIDTH, LAYERS, TOKENS, BATCH = 64, 2, 256, 16
STEPS, SEEDS, RATE = 1500, 3, 3e-3
HELD_OUT = 32  # samples of a test
CHARACTERS = 128  # all others are one


class CharacterModel(nn.Module):
    """Pre-norm layers of a mixer and an MLP, learned positions, tied embeddings; ids ``[B, T]`` to logits."""

    def __init__(self, mixer: Mixer) -> None:
        super().__init__()
        self.embedding = nn.Embedding(CHARACTERS, WIDTH)
        self.places = nn.Embedding(TOKENS, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2 * LAYERS + 1))
        self.mixers = nn.ModuleList(mixer.build(index, WIDTH, TOKENS) for index in range(LAYERS))
        self.whole = [mixer.whole(index) for index in range(LAYERS)]
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(LAYERS)
        )
        for module in (self.embedding, self.places):
            nn.init.normal_(module.weight, std=0.1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids) + self.places.weight[: ids.shape[1]]
        for index, (mixer, mlp) in enumerate(zip(self.mixers, self.mlps, strict=True)):
            x = mixer(x) if self.whole[index] else x + mixer(self.norms[2 * index](x))
            x = x + mlp(self.norms[2 * index + 1](x))
        return self.norms[-1](x) @ self.embedding.weight.T


def characters() -> Tensor:
    """The repository's text, int64; what is no ASCII is one character."""
    return torch.tensor([min(ord(letter), CHARACTERS - 1) for letter in repository_text()])


def samples(text: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Characters ``[count, T]``, and those that follow them."""
    starts = torch.randint(len(text) - TOKENS, (count, 1), generator=generator)
    places = starts + torch.arange(TOKENS + 1)
    return text[places[:, :-1]], text[places[:, 1:]]


def loss_of(model: CharacterModel, given: tuple[Tensor, Tensor]) -> Tensor:
    """Nats a character."""
    ids, following = given
    return F.cross_entropy(model(ids).flatten(0, 1), following.flatten())


def trained(kind: str, text: Tensor, held_out: Tensor, steps: int, seed: int) -> dict[str, Any]:
    """Bits a character of held-out text, and seconds of training."""
    torch.manual_seed(seed)
    model = CharacterModel(parse_mixer(kind))
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.1)
    generator = torch.Generator().manual_seed(seed)
    begun = time.perf_counter()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(model, samples(text, BATCH, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"{kind}, seed {seed}: step {step + 1}/{steps}, loss {float(loss):.3f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - begun
    model.eval()
    with torch.no_grad():
        nats = float(loss_of(model, samples(held_out, HELD_OUT, torch.Generator().manual_seed(0))))
    reads = parse_mixer(kind).reads(LAYERS, WIDTH, TOKENS)
    figures = {"bits": nats / math.log(2), "seconds": seconds, "steps": steps, "reads": reads}
    return {"kind": kind, "seed": seed} | figures


def rows_of(found: list[dict[str, Any]]) -> list[list[str]]:
    """What each kind reaches, and what it reads."""
    dense = parse_mixer("dense").reads(LAYERS, WIDTH, TOKENS)
    rows = [["attention", "bits a character", "best to worst", "keys a query", "of dense", "seconds"]]
    for kind in dict.fromkeys(one["kind"] for one in found):
        mine = [one for one in found if one["kind"] == kind]
        bits, seconds = [one["bits"] for one in mine], [one["seconds"] for one in mine]
        reads = mine[0]["reads"]
        cells = [f"{sum(bits) / len(bits):.3f}", f"{min(bits):.3f}-{max(bits):.3f}", f"{reads:.0f}"]
        rows.append([kind, *cells, f"{reads / dense:.0%}", f"{sum(seconds) / len(seconds):.0f}"])
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", default=KINDS, help="as `gossamer mqar --mixers` takes them")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=SEEDS, help="how many")
    parser.add_argument("--quick", action="store_true", help="10 steps, one seed")
    parser.add_argument("--out", type=Path, help="a JSON file of all trainings")
    arguments = parser.parse_args()
    steps, seeds = (10, 1) if arguments.quick else (arguments.steps, arguments.seeds)
    text = characters()
    border = len(text) * 9 // 10
    found: list[dict[str, Any]] = []
    for seed in range(seeds):
        for kind in split_specs(arguments.kinds):
            found.append(trained(kind, text[:border], text[border:], steps, seed))
            if arguments.out is not None:
                about = {"machine": machine(), "threads": torch.get_num_threads(), "rows": found}
                temporary = arguments.out.with_name(f"{arguments.out.name}.part")
                temporary.write_text(json.dumps(about, indent=1) + "\n")
                temporary.replace(arguments.out)
    print(table(rows_of(found)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
