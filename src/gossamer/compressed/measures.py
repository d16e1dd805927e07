"""What compressing a model cost: its predictions, its answers, its bytes and its seconds beside the original's."""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.compressed.sequential import decoder_layers, linear_layers
from gossamer.evaluate.fidelity import compare_logits
from gossamer.evaluate.haystack import Haystack, load_haystack
from gossamer.evaluate.metrics import Interval, bootstrap_interval, difference_interval, score_interval
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.runner import Job
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks import Task
from gossamer.policy import Policy

__all__ = ["Measures", "Predictions", "Size", "TaskScore", "Time", "answers", "predictions", "size", "times"]

DENSE = Policy.of("dense")
Told = Callable[[str], None]


@dataclass(frozen=True)
class Measures:
    """What a card measures, and on what.

    Fields:
        text: held-out text for predictions, and for prompts that are timed; None is gossamer's own.
        windows, length: of that text, and tokens of each.
        tasks, samples, task_length: of `gossamer.evaluate.tasks`; prompts of each, and tokens of prompt and answer.
        lengths, rounds: tokens of prompts that are timed (none: nothing is timed), and how often each.
        seed: of the tasks' samples and of the prompts that are timed.

    Raises:
        ValueError: a number below its least.
    """

    text: Haystack | None = None
    windows: int = 16
    length: int = 1024
    tasks: tuple[Task, ...] = ()
    samples: int = 20
    task_length: int = 1024
    lengths: tuple[int, ...] = ()
    rounds: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least_of = {"windows": 1, "length": 2, "samples": 1, "task_length": 64, "rounds": 1}
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if any(length < 1 for length in self.lengths):
            raise ValueError(f"lengths must be at least 1 token, got {list(self.lengths)}")

    @cached_property
    def held_out(self) -> Haystack:
        return load_haystack() if self.text is None else self.text

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(self.length, *self.lengths, self.task_length if self.tasks else 0)

    @cached_property
    def job(self) -> Job | None:
        """Of the tasks, whose texts hide things in gossamer's own."""
        if not self.tasks:
            return None
        return Job((DENSE,), self.tasks, (self.task_length,), self.samples, load_haystack(), seed=self.seed)

    def check(self, subject: Subject) -> None:
        """Make the first of everything, so that what cannot be made shows before anything slow is done.

        Raises:
            ValueError: a text is too short, or a task does not fit.
        """
        if subject.max_length is not None and self.longest > subject.max_length:
            raise ValueError(f"this model takes {subject.max_length} tokens, got a length of {self.longest}")
        windows = Windows(subject, self.held_out, self.seed)
        windows.spread(self.length, self.windows)
        for length in self.lengths:
            windows.start(length, 0)
        if self.job is not None:
            for task in self.tasks:
                self.job.sample(subject, task, self.task_length, 0)


@dataclass(frozen=True)
class Predictions:
    """What both models predict on held-out text: means over its tokens, and 95% intervals over the windows.

    Fields:
        text, windows, tokens: the text, its windows, and the tokens predicted in all of them.
        nats: mean loss of a token: the original's, the compressed model's.
        more: the second less the first, with its interval.
        kl: divergence of the compressed model's predictions from the original's, nats, and its interval.
        agreement: share of positions at which both would say the same next, and its interval.
    """

    text: str
    windows: int
    tokens: int
    nats: tuple[float, float]
    more: tuple[float, Interval | None]
    kl: tuple[float, Interval | None]
    agreement: tuple[float, Interval | None]

    @property
    def perplexity(self) -> tuple[float, float]:
        """exp of the losses."""
        original, compressed = (math.exp(nats) if nats < 700 else math.inf for nats in self.nats)
        return original, compressed


def predictions(original: Subject, compressed: Subject, measures: Measures, told: Told) -> Predictions:
    """Both models on the same windows. In memory are the hidden states of one window, and 512 rows of logits of each.

    Raises:
        ValueError: too short a text, or models whose vocabularies differ.
    """
    sizes = [subject.config.vocab_size for subject in (original, compressed)]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"the models have vocabularies of {sizes[0]} and {sizes[1]} tokens: one was not made of the other"
        )
    text = measures.held_out
    found = []
    parts = Windows(original, text, measures.seed).spread(measures.length, measures.windows)
    for number, tokens in enumerate(parts, 1):
        hidden = [subject.hidden_states(tokens, DENSE)[0] for subject in (original, compressed)]
        found += compare_logits(original, hidden[0], hidden[1:], tokens, readers=[compressed])
        told(f"predictions: window {number} of {len(parts)}")

    def mean(values: Sequence[float]) -> tuple[float, Interval | None]:
        return statistics.fmean(values), bootstrap_interval(values) if len(values) > 1 else None

    return Predictions(
        text=text.short_name,
        windows=len(parts),
        tokens=len(parts) * (measures.length - 1),
        nats=(statistics.fmean(row["dense_nats"] for row in found), statistics.fmean(row["nats"] for row in found)),
        more=mean([row["nats"] - row["dense_nats"] for row in found]),
        kl=mean([row["mean_kl"] for row in found]),
        agreement=mean([row["mean_top1"] for row in found]),
    )


@dataclass(frozen=True)
class TaskScore:
    """How many answers are right, 0 to 1, with 95% intervals over the prompts.

    Fields:
        original, compressed: the score of each model, and its interval.
        less: what the second is less than the first, prompt by prompt.
    """

    task: str
    length: int
    samples: int
    original: tuple[float, Interval]
    compressed: tuple[float, Interval]
    less: tuple[float, Interval]


def answers(original: Subject, compressed: Subject, measures: Measures, told: Told) -> list[TaskScore]:
    """Greedy answers of both models to the same prompts."""
    job = measures.job
    if job is None:
        return []
    found = []
    for task in measures.tasks:
        scores: list[list[float]] = [[], []]
        for index in range(measures.samples):
            sample = job.sample(original, task, measures.task_length, index)
            for subject, own in zip((original, compressed), scores, strict=True):
                (answer,) = subject.answer([sample], DENSE, task.max_new_tokens, one_line=task.one_line)
                turns = zip(sample.turns, answer.texts, strict=True)
                own.append(statistics.fmean(task.score(text, turn.references) for turn, text in turns))
            told(f"{task.label()}: prompt {index + 1} of {measures.samples}")
        less = [a - b for a, b in zip(*scores, strict=True)]
        found.append(
            TaskScore(
                task.label(),
                measures.task_length,
                measures.samples,
                (statistics.fmean(scores[0]), score_interval(scores[0])),
                (statistics.fmean(scores[1]), score_interval(scores[1])),
                (statistics.fmean(less), difference_interval(less)),
            )
        )
    return found


@dataclass(frozen=True)
class Size:
    """Bytes. Those of the original count as if its numbers were of the dtype that the compressed model has.

    Fields:
        layers, weights: the linear layers of the decoder, and how many numbers their weights have.
        linear: bytes of these weights, with what is stored beside them: of the original, of the compressed model.
        whole: bytes of all that both models hold.
        files: of the weights as they lie in folders, where both do; the original's in a dtype of their own.
    """

    layers: int
    weights: int
    linear: tuple[int, int]
    whole: tuple[int, int]
    files: tuple[int, int] | None = None

    @property
    def bits(self) -> tuple[float, float]:
        """Of a weight of the linear layers."""
        original, compressed = (8 * size / self.weights for size in self.linear)
        return original, compressed


def size(original: Any, compressed: Any, files: tuple[int, int] | None = None) -> Size:
    """Of two models, of which one was made of the other.

    Raises:
        ValueError: a linear layer of the original has no counterpart.
    """
    place, layers = decoder_layers(original)
    linears = {f"{place}.{name}": layer for name, layer in linear_layers(layers)}
    if not linears:
        raise ValueError(f"{type(original).__name__} has no linear layers in its decoder: is it compressed itself?")
    others = dict(compressed.named_modules())
    width, weights, stored = _bytes_of(compressed.dtype), 0, 0
    for name, layer in linears.items():
        other = others.get(name)
        shape = None if other is None else (getattr(other, "out_features", None), getattr(other, "in_features", None))
        if other is None or shape != (layer.out_features, layer.in_features):
            raise ValueError(f"the compressed model has no layer like {name}: it was not made of this one")
        weights += layer.weight.numel()
        stored += sum(_nbytes(x) for key, x in other.state_dict().items() if key != "bias")
    whole = _whole(original, width), _whole(compressed)
    return Size(len(linears), weights, (weights * width, stored), whole, files)


def _bytes_of(dtype: torch.dtype) -> int:
    return torch.empty(0, dtype=dtype, device="cpu").element_size()


def _nbytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _whole(model: nn.Module, width: int | None = None) -> int:
    """Bytes of what `state_dict` holds, tied weights once; numbers count as so wide where that is given."""
    kept = {id(x) for x in model.state_dict(keep_vars=True).values()}
    once = {id(x): x for x in (*model.parameters(), *model.buffers()) if id(x) in kept}
    return sum(x.numel() * (width if width and x.is_floating_point() else x.element_size()) for x in once.values())


@dataclass(frozen=True)
class Time:
    """Seconds to read a prompt of so many tokens, of each model in each round; the rounds took turns."""

    length: int
    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    @property
    def beside(self) -> str:
        """The faster original."""
        return min((name for name in self.seconds if name != COMPRESSED), key=self.median)

    @property
    def speedup(self) -> float:
        """Over the faster original: the median of the rounds' ratios."""
        pairs = zip(self.seconds[self.beside], self.seconds[COMPRESSED], strict=True)
        return statistics.median(original / compressed for original, compressed in pairs)


COMPRESSED = "compressed"


def times(original: Subject, compressed: Subject, measures: Measures, told: Told) -> list[Time]:
    """Prefills that take turns, each round on another window of the text, its cache made as for an answer.

    The original runs in its own dtype, and in that of the compressed model where it differs.
    """
    if not measures.lengths:
        return []
    windows = Windows(original, measures.held_out, measures.seed)
    found = []
    with _contenders(original.model, compressed.model) as models:
        for length in measures.lengths:
            seconds: dict[str, list[float]] = {name: [] for name in models}
            for number in range(measures.rounds + 1):
                tokens = windows.tokens(length, number % _different(windows, length))
                for name, model in models.items():
                    spent = _prefill(model, tokens, original)
                    if number:  # the first pages weights in
                        seconds[name].append(spent)
            found.append(Time(length, seconds))
            told(f"times: {length} tokens, {measures.rounds} rounds")
    return found


def _different(windows: Windows, length: int) -> int:
    """How many windows of a length there are, at most; short texts have few."""
    return max(1, windows.text_tokens - length + 1)


@torch.inference_mode()
def _prefill(model: Any, tokens: Tensor, subject: Subject) -> float:
    subject.wait()
    started = time.perf_counter()
    model(input_ids=tokens, use_cache=True, logits_to_keep=1)
    subject.wait()
    return time.perf_counter() - started


@contextmanager
def _contenders(original: Any, compressed: Any) -> Iterator[Mapping[str, Any]]:
    models = {_named("original", original): original}
    if original.dtype != compressed.dtype:
        other = copy.deepcopy(original).to(compressed.dtype)
        models[_named("original", other)] = other
    yield models | {COMPRESSED: compressed}


def _named(name: str, model: Any) -> str:
    return f"{name}, {str(model.dtype).removeprefix('torch.')}"
