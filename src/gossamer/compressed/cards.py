"""A card of a compressed model: what it cost, beside the model that it was made of."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import transformers

import gossamer
from gossamer.compressed.measures import (
    COMPRESSED,
    Measures,
    Predictions,
    Size,
    TaskScore,
    Time,
    answers,
    predictions,
    size,
    times,
)
from gossamer.evaluate.metrics import shown_interval
from gossamer.evaluate.subject import Subject
from gossamer.profiles.machine import cpu_model, device_name

__all__ = ["SCHEMA", "Card", "card"]

SCHEMA = 1  # of `Card.to_dict`
_SPECIAL = re.compile(r"([\\`*_{}\[\]<>#|~])")
Rows = list[tuple[str, ...]]


@dataclass(frozen=True)
class Card:
    """What a compressed model cost.

    Fields:
        name: of the original.
        recipe: what it was compressed by, as `Recipe.to_dict` has it; empty where nobody said.
        dtypes: of the original and of the compressed model, while they were measured.
        size, predictions, tasks, times: see `gossamer.compressed.measures`.
        made: what else is known of how it was made.
        machine: what the times were measured on, and versions.
    """

    name: str
    recipe: dict[str, Any]
    dtypes: tuple[str, str]
    size: Size
    predictions: Predictions
    tasks: list[TaskScore] = field(default_factory=list)
    times: list[Time] = field(default_factory=list)
    made: dict[str, Any] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; what is beyond all numbers, or none, is None."""
        data: dict[str, Any] = {"schema": SCHEMA, **asdict(self)}
        data["size"]["bits"] = self.size.bits
        data["predictions"]["perplexity"] = list(self.predictions.perplexity)
        for row, time in zip(data["times"], self.times, strict=True):
            row |= {"medians": {name: time.median(name) for name in time.seconds}, "speedup": time.speedup}
        return _finite(data)

    def to_markdown(self) -> str:
        """A page with the tables, as ``README.md`` of a folder."""
        parts = [
            _front(self.recipe),
            f"# {_plain(self.name)}, compressed",
            self._what(),
            _LOADING,
            "## What it costs",
            _table(("", *(f"{what}, {dtype}" for what, dtype in zip(_BOTH, self.dtypes, strict=True))), self.costs()),
            self._how_measured(),
            "## Size",
            _table(("", *_BOTH), self.sizes()),
            f"Numbers of the original are counted as {self.dtypes[1]} here, so that a change of dtype saves nothing; "
            "files are as they lie in the folders.",
        ]
        made = [*self.recipe.items(), *self.made.items(), *self.machine.items()]
        if self.times:
            parts += ["## Time", self._how_timed(), _table(*self._seconds())]
        parts += [
            "## How it was made",
            _table(("", ""), [(name, _said(value)) for name, value in made]),
        ]
        return "\n\n".join(parts) + "\n"

    def _what(self) -> str:
        fields = ", ".join(
            f"`{name}={value}`" for name, value in self.recipe.items() if name != "recipe" and value is not None
        )
        by = f" by `{self.recipe['recipe']}`" + (f" ({fields})" if fields else "") if self.recipe else ""
        return (
            f"The {self.size.layers} linear layers in the decoder of {_plain(self.name)} were replaced{by} with "
            f"gossamer: {self.size.weights:,} weights of {self.size.bits[1]:.2f} bits "
            "each, all that is stored beside them counted. Embeddings, norms and the head are as they were."
        )

    def costs(self) -> Rows:
        """What it is, the original's and the compressed model's, in words."""
        found = self.predictions
        before, after = (f"{value:.3f}" if value < 1e5 else f"{value:.3g}" for value in found.perplexity)
        rows: Rows = [
            ("perplexity", before, after),
            ("loss of a token, nats", f"{found.nats[0]:.4f}", f"{found.nats[1]:.4f}"),
            ("the same, more than the original", "", _mean(found.more, "{:+.4f}")),
            ("KL divergence from the original, nats", "", _mean(found.kl, "{:.3g}")),
            ("greedy next tokens equal to the original's", "", _mean(found.agreement, "{:.1%}")),
        ]
        for task in self.tasks:
            name = f"right answers, {task.task}, {task.samples} prompts of {task.length:,} tokens"
            rows.append((name, _mean(task.original, "{:.1%}"), _mean(task.compressed, "{:.1%}")))
        return rows

    def _how_measured(self) -> str:
        found = self.predictions
        said = (
            f"Predictions are of {found.tokens:,} tokens of {_plain(found.text)}, {found.windows} windows that share "
            "none, on which nothing was calibrated. In brackets are 95% intervals: over the windows for predictions, "
            "over the prompts for answers. They say nothing of other texts."
        )
        if any(task.original[0] < 0.5 for task in self.tasks):
            said += " Where the original itself is seldom right, a task says little of what was lost."
        return said

    def sizes(self) -> Rows:
        """Likewise."""
        found = self.size
        rows = [
            ("linear layers", *map(_bytes, found.linear)),
            ("bits of one of their weights", *(f"{bits:.2f}" for bits in found.bits)),
            ("all that the model holds", *map(_bytes, found.whole)),
        ]
        return rows if found.files is None else [*rows, ("files of weights", *map(_bytes, found.files))]

    def _how_timed(self) -> str:
        rounds = len(self.times[0].seconds[COMPRESSED])
        threads = self.machine["threads"]
        machine = ", ".join(f"{_said(self.machine[name])}" for name in ("device", "cpu") if name in self.machine)
        return (
            f"Seconds until a prompt is read, transformers' own attention, one prompt at a time: medians of {rounds} "
            f"rounds in which the models took turns, each round on another passage; {machine}, "
            f"{threads} thread{'s' * (threads != 1)}. The last column is the median of the rounds' ratios to the "
            "faster original."
        )

    def _seconds(self) -> tuple[tuple[str, ...], Rows]:
        names = list(self.times[0].seconds)
        rows = [
            (f"{time.length:,}", *(f"{time.median(name):.3f}" for name in names), f"{time.speedup:.2f}")
            for time in self.times
        ]
        return ("tokens", *names, "times as fast"), rows


_BOTH = ("original", "compressed")
_LOADING = """```python
import gossamer.compressed  # tells transformers what these layers are
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("this folder", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("this folder")
```"""


def card(
    original: Any,
    compressed: Any,
    tokenizer: Any,
    measures: Measures | None = None,
    *,
    name: str = "",
    recipe: Mapping[str, Any] | None = None,
    made: Mapping[str, Any] | None = None,
    files: tuple[int, int] | None = None,
    chat: bool = False,
    progress: Callable[[str], None] | None = None,
) -> Card:
    """Measure a compressed model beside the one that it was made of; `gossamer compress` writes such a card.

    Both models are in memory, and beyond them the hidden states of one window of text and the logits of 512 positions.

    Args:
        original: a causal language model of transformers, in float32 for a divergence without rounding of its own.
        compressed: what `gossamer.compress` made of it, or `from_pretrained` loaded.
        tokenizer: of both.
        measures: what is measured; predictions alone unless given.
        name: of the original; else what its config calls it.
        recipe: what the model was compressed by, where its config does not say.
        made: what else the card says of how it was made.
        files: bytes of the weights in the original's folder and in the compressed model's.
        chat: put tasks into the tokenizer's chat template.
        progress: told what is done.

    Raises:
        ValueError: the models do not belong together, a text is too short, or a task does not fit.
        TypeError: no models of transformers.
    """
    measures = measures or Measures()
    name = name or str(getattr(original.config, "_name_or_path", "") or type(original).__name__)
    subjects = [Subject(model, tokenizer, name, chat=chat) for model in (original, compressed)]
    sizes = size(original, compressed, files)  # which says whether the models belong together
    measures.check(subjects[0])
    told = progress or _silent
    if recipe is None:
        recipe = getattr(getattr(compressed.config, "quantization_config", None), "recipe", {})
    return Card(
        name=name,
        recipe=dict(recipe or {}),
        dtypes=(_dtype(original), _dtype(compressed)),
        size=sizes,
        predictions=predictions(subjects[0], subjects[1], measures, told),
        tasks=answers(subjects[0], subjects[1], measures, told),
        times=times(subjects[0], subjects[1], measures, told),
        made=dict(made or {}),
        machine={
            "device": device_name(subjects[0].device),
            "cpu": cpu_model(),
            "threads": torch.get_num_threads(),
            "gossamer": gossamer.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    )


def _silent(_: str) -> None:
    pass


def _dtype(model: Any) -> str:
    return str(model.dtype).removeprefix("torch.")


def _front(recipe: Mapping[str, Any]) -> str:
    """What model hubs read."""
    tags = "\n".join(f"- {tag}" for tag in ("gossamer", *([recipe["recipe"]] if recipe else [])))
    return f"---\nlibrary_name: transformers\ntags:\n{tags}\n---"


def _plain(text: str) -> str:
    """A text that a page shows as it is."""
    shown = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return _SPECIAL.sub(r"\\\1", shown)


def _said(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_said, value))
    return f"{value:,}" if isinstance(value, int) else _plain(str(value))


def _mean(found: tuple[float, Sequence[float] | None], form: str) -> str:
    return form.format(found[0]) + shown_interval(found[1], form)


def _bytes(number: int) -> str:
    return f"{number / 1e6:,.1f} MB" if number >= 1e6 else f"{number:,} bytes"


def _table(header: tuple[str, ...], rows: Rows) -> str:
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    return "\n".join([*lines, *(f"| {' | '.join([_plain(row[0]), *row[1:]])} |" for row in rows)])


def _finite(x: Any) -> Any:
    """The same with None for numbers that are not finite, which JSON does not have."""
    if isinstance(x, dict):
        return {key: _finite(value) for key, value in x.items()}
    if isinstance(x, (list, tuple)):
        return [_finite(value) for value in x]
    return None if isinstance(x, float) and not math.isfinite(x) else x
