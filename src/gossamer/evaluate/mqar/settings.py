"""What is trained: tasks, widths, rates, seeds, steps; the paper's Figure 2, and two that fit small machines."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

from gossamer.evaluate.mqar.data import Plain, Variant
from gossamer.evaluate.mqar.mixers import Mixer, parse_mixer

__all__ = ["FIGURE_2", "QUICK", "SETTINGS", "Cell", "Setting"]


@dataclass(frozen=True)
class Setting:
    """How models are trained, and on what. Its cells are all combinations of mixer, task, width, rate and seed.

    Fields:
        name: as results say it.
        about: what it is of the paper, and how it is scaled down; a sentence or two.
        tasks, widths, rates, seeds, mixers: what is combined.
        examples, test_examples: sequences of an epoch, and of a test after each.
        fresh: whether each epoch has sequences of its own; else all have the same, in the same order.
        epochs: at most.
        batch: sequences of a step where a length has no number of its own in ``batches``.
        enough: accuracy at which a training stops.
        first_enough: once a rate has reached ``enough``, the rates after it are left out.
        layers, mlp, dropout, spread: of the model (`gossamer.evaluate.mqar.network.RecallModel`).
        decay: weight decay of AdamW. Rates fall to 0 along a cosine, epoch by epoch.
    """

    name: str
    about: str
    tasks: tuple[Variant, ...]
    widths: tuple[int, ...]
    rates: tuple[float, ...]
    mixers: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2)
    examples: int = 100_000
    test_examples: int = 3_000
    fresh: bool = False
    epochs: int = 64
    batch: int = 512
    batches: tuple[tuple[int, int], ...] = ()
    enough: float = 0.99
    first_enough: bool = False
    layers: int = 2
    mlp: int = 0
    dropout: float = 0.1
    spread: float | None = 0.02
    decay: float = 0.1

    def __post_init__(self) -> None:
        for name in ("tasks", "widths", "rates", "mixers", "seeds"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for name in ("examples", "test_examples", "epochs", "batch", "layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be 1 or more, got {getattr(self, name)}")
        if bad := [rate for rate in self.rates if not 0 < rate <= 10]:
            raise ValueError(f"rates must be above 0 and at most 10, got {bad[0]}")
        if bad := [width for width in self.widths if width < 2 or width % 2]:
            raise ValueError(f"widths must be even, 2 or more, got {bad[0]}")
        if not 0 < self.enough <= 1:
            raise ValueError(f"enough must be above 0 and at most 1, got {self.enough}")
        if not 0 <= self.dropout < 1 or self.mlp < 0:
            raise ValueError(f"dropout must be in [0, 1) and mlp 0 or more, got dropout={self.dropout}, mlp={self.mlp}")

    def batch_of(self, length: int) -> int:
        return dict(self.batches).get(length, self.batch)

    def training(self) -> dict[str, Any]:
        """What a cell's result depends on beside the cell itself."""
        names = (
            "examples",
            "test_examples",
            "fresh",
            "epochs",
            "enough",
            "layers",
            "mlp",
            "dropout",
            "spread",
            "decay",
        )
        return {name: getattr(self, name) for name in names}

    def cells(self) -> Iterator[Cell]:
        """All of them: rates, then seeds outside, so that a sweep that was stopped has seen every mixer."""
        made = [parse_mixer(spec) for spec in self.mixers]
        for rate, seed, task, mixer, width in product(self.rates, self.seeds, self.tasks, made, self.widths):
            yield Cell(mixer, task, width, rate, seed)


@dataclass(frozen=True)
class Cell:
    """One training."""

    mixer: Mixer
    task: Variant
    width: int
    rate: float
    seed: int

    @property
    def group(self) -> tuple[str, str, int, int]:
        """What cells share that differ by their rate alone."""
        return self.mixer.label, self.task.label, self.width, self.seed

    def to_dict(self) -> dict[str, Any]:
        named = {"mixer": self.mixer.label, "task": self.task.label, "task_fields": self.task.to_dict()}
        return named | {"length": self.task.length, "width": self.width, "rate": self.rate, "seed": self.seed}

    def __str__(self) -> str:
        return f"{self.mixer.label}, width {self.width}, {self.task.label}, rate {self.rate:g}, seed {self.seed}"


def _logspace(low: float, high: float, count: int) -> tuple[float, ...]:
    step = (high - low) / (count - 1)
    return tuple(round(10 ** (low + step * i), 12 - math.floor(low)) for i in range(count))


FIGURE_2 = Setting(
    name="figure2",
    about=(
        "Figure 2 of Zoology as its repository configures it: 64 to 512 tokens with 4 to 64 pairs of a vocabulary of "
        "8,192, widths of 64 to 512, four rates from 1e-4 to 1e-2, 64 epochs of 100,000 sequences. Its snapshot leaves "
        "512 tokens out. A seed is one more dimension here."
    ),
    tasks=tuple(Plain(8192, tokens, pairs) for tokens, pairs in ((64, 4), (128, 8), (256, 16), (512, 64))),
    widths=(64, 128, 256, 512),
    rates=_logspace(-4, -2, 4),
    mixers=("dense", "window(16)", "combiner(16)", "convolution(3)+convolution", "convolution(3)+dense"),
    batches=((256, 256), (512, 128)),
)
_SMALL = Setting(
    name="small",
    about=(
        "Scaled down from Figure 2: 64 tokens with 8 pairs of a vocabulary of 256 in place of 8,192, a width of 32 in "
        "place of 64 to 512, two rates of which the second is tried where the first does not suffice, at most 2,000 "
        "steps of 64 new sequences each, no dropout, and linear maps that begin with a deviation of one over the root "
        "of their inputs in place of 0.02."
    ),
    tasks=(Plain(256, 64, 8),),
    widths=(32,),
    rates=(0.003, 0.01),
    mixers=(
        "dense",
        "window(16)",
        "window(16)+dense",
        "oracle_topk(8)",
        "random_topk(8)",
        "convolution(3)+convolution",
        "fixed(8)",
        "combiner(8)",
        "combiner(8)+window(16)",
        "routing(16)",
        "combiner_logsparse",
        "dynamic_mask(16)",
    ),
    examples=6_400,
    test_examples=500,
    fresh=True,
    epochs=20,
    batch=64,
    first_enough=True,
    dropout=0.0,
    spread=None,
)
QUICK = replace(
    _SMALL,
    name="quick",
    about=(
        "Scaled down from Figure 2 further than small: its task, width and rates, at most 800 steps, and in the first "
        "layer a convolution over 3 tokens in place of the kind that is compared, which stands in the second alone. "
        "The convolution joins each value to its key, as attention over learned positions would have to learn first; "
        "later configurations of the repository do so too."
    ),
    mixers=tuple(
        f"convolution(3)+{kind}"
        for kind in (
            "dense",
            "window(16)",
            "oracle_topk(8)",
            "random_topk(8)",
            "fixed(8)",
            "combiner(8)",
            "routing(16)",
            "convolution",
            "combiner_logsparse",
            "dynamic_mask(16)",
        )
    ),
    epochs=8,
)
_ROUTERS = replace(
    QUICK,
    name="routers",
    about=(
        "Easier and longer than quick, for routers that have to learn what to activate: 32 tokens with 4 pairs of a "
        "vocabulary of 32, at most 2,500 steps of 16 new sequences, and windows of 8 tokens, which hold the 4 values "
        "and the 4 queries, and not the 8 tokens of the pairs with them."
    ),
    tasks=(Plain(32, 32, 4),),
    rates=(0.01, 0.003),
    mixers=tuple(f"convolution(3)+{kind}" for kind in ("seqboat(8)", "seqboat_local(8)", "window(8)", "dense")),
    examples=1_600,
    epochs=25,
    batch=16,
)
SETTINGS: dict[str, Setting] = {setting.name: setting for setting in (QUICK, _SMALL, _ROUTERS, FIGURE_2)}


def describe(setting: Setting) -> dict[str, Any]:
    """All of a setting, as the line of a run holds it."""
    return asdict(setting) | {"tasks": [task.to_dict() for task in setting.tasks]}
