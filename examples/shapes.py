"""Which two shapes are in an image: a small ViT with Sparsifiner's connections beside others of the same number.

    python examples/shapes.py                # a minute or two on one core
    python examples/shapes.py --steps 4      # a look at what it does
    python examples/shapes.py --seeds 3 --out shapes.json

A dense ViT is trained to name the two shapes of an image, 10 pairs of 4. Its attention is then masked: by what
Sparsifiner's predictor chooses (first stage: the predictor learns the dense attention), by the keys that have most of
it, which needs all of it (in the second layer the masked model's attention, which is no longer the dense one's), by the
nearest patches, and by chance; each with as many keys a row, the class token's row open. Then each is trained on with
its mask, and the dense one without (second stage, the same steps, images and loss). The table has the share of the
dense attention's mass that a choice keeps, and the accuracy before and after the second stage, on images that none has
seen; ``--out`` writes the rows of every seed as JSON.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from measured_on import measured_on
from torch import Tensor, nn

from gossamer.modules import (
    Connections,
    SparsifinerAttention,
    distillation_loss,
    reconstruction_loss,
    set_stage,
)

SIDE, PATCH, KINDS = 32, 4, 4
GRID = SIDE // PATCH
TOKENS = GRID * GRID + 1
PAIRS = [(a, b) for a in range(KINDS) for b in range(a, KINDS)]
BATCH, TEST = 32, 512
SECOND = 4  # the second stage has a quarter of the steps
Logits = tuple[Tensor, Tensor, list[Connections]]


def shapes(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy images ``[count, 1, 32, 32]`` of two shapes in opposite corners, and which pair each has."""
    y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    kinds = torch.randint(0, KINDS, (2, count), generator=generator)
    side = torch.randint(0, 2, (count,), generator=generator)
    images = 0.3 * torch.randn(count, SIDE, SIDE, generator=generator)
    for n in range(2):
        place = torch.randint(5, 10, (2, count), generator=generator)
        low, right = (n == 1), (side + n) % 2
        centre_y = place[0] + (SIDE // 2 if low else 0)
        centre_x = place[1] + right * (SIDE // 2)
        dy, dx = (y - centre_y[:, None, None]).abs(), (x - centre_x[:, None, None]).abs()
        far = torch.maximum(dy, dx)
        drawn = torch.stack(
            [far <= 4, (dy + dx) <= 5, (torch.minimum(dy, dx) <= 1) & (far <= 4), (far <= 4) & (far > 2)]
        )
        images = images + drawn[kinds[n], torch.arange(count)].float()
    low, high = kinds.min(0).values, kinds.max(0).values
    numbers = {pair: label for label, pair in enumerate(PAIRS)}
    labels = torch.tensor([numbers[pair] for pair in zip(low.tolist(), high.tolist(), strict=True)])
    return images[:, None], labels


class Block(nn.Module):
    """A layer of the ViT."""

    def __init__(self, width: int, heads: int, keep: float) -> None:
        super().__init__()
        self.attention = SparsifinerAttention(width, heads, TOKENS, keep=keep, rank=16, stage="dense")
        self.norm, self.feed_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x: Tensor, record: Callable[[Connections], object]) -> Tensor:
        x = x + self.attention(self.norm(x), record=record)
        return x + self.feed(self.feed_norm(x))


class Vit(nn.Module):
    """Patches, a class token, layers, and the pair of shapes."""

    def __init__(self, width: int = 64, heads: int = 4, depth: int = 2, keep: float = 0.25) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, PATCH, stride=PATCH)
        self.start = nn.Parameter(0.02 * torch.randn(1, TOKENS, width))
        self.blocks = nn.ModuleList(Block(width, heads, keep) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, len(PAIRS))

    def forward(self, images: Tensor) -> Logits:
        """Logits, last tokens without the class token, and what each layer attended."""
        x = self.start + F.pad(self.patches(images).flatten(2).transpose(1, 2), (0, 0, 1, 0))
        seen: list[Connections] = []
        for block in self.blocks:
            x = block(x, seen.append)
        x = self.norm(x)
        return self.head(x[:, 0]), x[:, 1:], seen


def train(model: Vit, steps: int, rate: float, seed: int, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=max(2, steps), pct_start=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(*shapes(BATCH, generator)).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def measure(model: Vit, images: Tensor, labels: Tensor, dense: list[Tensor]) -> tuple[float, float]:
    """Share of dense attention ``[B, H, N, N]`` of each layer that the model's connections keep, but for the class
    token's row; and accuracy."""
    logits, _, own = model(images)
    kept = [
        1.0 if one.chosen is None else float((attention * one.chosen)[:, :, 1:].sum(-1).mean())
        for one, attention in zip(own, dense, strict=True)
    ]
    return sum(kept) / len(kept), float((logits.argmax(-1) == labels).float().mean())


def oracle(q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
    """In a predictor's place: the attention itself."""
    return (q[..., 1:, :] @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)


def near(q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
    """In a predictor's place: the nearest patches, and the class token."""
    spot = torch.stack(torch.meshgrid(torch.arange(GRID), torch.arange(GRID), indexing="ij"), -1).flatten(0, 1).float()
    return F.pad(-torch.cdist(spot, spot), (1, 0), value=1.0).expand(*q.shape[:2], -1, -1)


def chance(q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
    """In a predictor's place: any tokens, others at every call."""
    return torch.rand(*q.shape[:2], TOKENS - 1, TOKENS)


CHOICES = {"sparsifiner": None, "oracle top-k": oracle, "local window": near, "random": chance}


def masked(student: Vit, choice: Callable[..., Tensor] | None) -> Vit:
    """A copy whose attention is masked by a choice; by its own predictor where there is none."""
    model = copy.deepcopy(student)
    set_stage(model, "masked")
    for module in model.modules():
        if choice is not None and isinstance(module, SparsifinerAttention):
            module.predictor.predict = choice
    return model


def run(steps: int, seed: int, keep: float) -> list[tuple[str, float, float, float]]:
    """Rows of the table: choice, mass kept, accuracy before and after the second stage."""
    torch.manual_seed(seed)
    teacher = Vit(keep=keep)
    train(teacher, steps, 2e-3, seed, lambda images, labels: F.cross_entropy(teacher(images)[0], labels))
    teacher.requires_grad_(False)
    student = copy.deepcopy(teacher)
    set_stage(student, "reconstruct")
    for name, parameter in student.named_parameters():
        # What the loss would do to the backbone too is left to the second stage: all choices begin from one ViT. So
        # the student's own attention is the teacher's.
        parameter.requires_grad_("predictor" in name)

    def reconstruction(images: Tensor, _: Tensor) -> Tensor:
        seen = student(images)[2]
        return reconstruction_loss(seen, seen)

    train(student, steps, 5e-3, seed + 1, reconstruction)
    student.requires_grad_(True)
    images, labels = shapes(TEST, torch.Generator().manual_seed(10**6))
    with torch.no_grad():
        dense = [one.attention for one in teacher(images)[2]]
    rows = []
    for name in ("dense", *CHOICES):
        torch.manual_seed(seed)
        # The dense one is trained on as the others are: what the second stage alone gives is no gain of a mask.
        model = copy.deepcopy(teacher).requires_grad_(True) if name == "dense" else masked(student, CHOICES[name])
        mass, before = measure(model, images, labels, dense)

        def loss_of(images: Tensor, labels: Tensor, model: Vit = model) -> Tensor:
            with torch.no_grad():
                wanted, last, _ = teacher(images)
            logits, tokens, _ = model(images)
            return distillation_loss(logits, tokens, wanted, last, labels)

        train(model, steps // SECOND, 5e-4, seed + 2, loss_of)
        rows.append((name, mass, before, measure(model, images, labels, dense)[1]))
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=300, help="of training; the second stage has a quarter as many")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--keep", type=float, default=0.25, help="share of the tokens that a row attends")
    parser.add_argument("--out", type=Path, help="a JSON file of all rows")
    given = parser.parse_args(arguments)
    start = time.monotonic()
    found = [run(given.steps, seed, given.keep) for seed in range(given.seeds)]
    seconds = time.monotonic() - start
    print(f"{'connections':14} {'mass kept':>10} {'accuracy':>10} {'after':>8}   (mean of {given.seeds} seeds)")
    for rows in zip(*found, strict=True):
        mass, before, after = (sum(row[n] for row in rows) / len(rows) for n in (1, 2, 3))
        print(f"{rows[0][0]:14} {mass:10.3f} {before:10.3f} {after:8.3f}")
    print(f"{seconds:.0f} s")
    if given.out is not None:
        named = ("connections", "mass", "before", "after")
        about: dict[str, object] = {"machine": measured_on(), "torch": torch.__version__}
        about |= {"steps": given.steps, "second_steps": given.steps // SECOND, "keep": given.keep, "images": TEST}
        rows = [{"seed": seed} | dict(zip(named, row, strict=True)) for seed, one in enumerate(found) for row in one]
        given.out.write_text(json.dumps(about | {"seconds": round(seconds, 1), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
