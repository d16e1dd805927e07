"""Run methods on tasks and write one line of results for each sample; go on where an earlier run stopped.

A cell is one method on one sample; what is in the file already is not run again, and since samples depend on the
seed, the task, the length and their number alone, a run that was interrupted ends with the same lines as one that was
not.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from gossamer.evaluate.fidelity import compare
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.records import label_of, policy_fields
from gossamer.evaluate.results import ResultsFile, make_header
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks import Sample, Task
from gossamer.evaluate.tasks.base import characters_needed
from gossamer.plan.integers import MOST
from gossamer.policy import Policy

__all__ = [
    "FIDELITY",
    "PERPLEXITY",
    "Cell",
    "Job",
    "ResultsFile",
    "all_cells",
    "check",
    "label_of",
    "make_header",
    "parse_lengths",
    "pending",
    "relative_cost",
    "run",
]

PERPLEXITY = "perplexity"
FIDELITY = "fidelity"
Record = dict[str, Any]

# So many lines take a computer days, and their description a gigabyte of memory.
MOST_CELLS = 1_000_000
# A prefill that nobody times is as long as this at most: enough for every method to plan.
_WARM_UP = 2048


@dataclass(frozen=True)
class Job:
    """What to run: every method on every sample.

    Fields:
        methods: policies; their labels must differ. `on` puts in what they stand for on a subject's kernel.
        tasks: generated tasks.
        lengths: tokens of prompt and answer.
        samples: samples of each task at each length; 0 for fidelity alone.
        haystack: text to hide things in.
        perplexity: text to measure perplexity on, or None; windows of each length from it, as many as `samples`.
        fidelity: prompts at each length on which to compare with dense attention inside the model.
        fidelity_of: of each of these, labels of tasks or ``perplexity`` for windows of its text, so many; of the first
            task, if none is named.
        seed: of the samples.
        batch: samples of one turn that run together.
    """

    methods: tuple[Policy, ...]
    tasks: tuple[Task, ...]
    lengths: tuple[int, ...]
    samples: int
    haystack: Haystack
    perplexity: Haystack | None = None
    fidelity: int = 0
    fidelity_of: tuple[str, ...] = ()
    seed: int = 0
    batch: int = 1
    labels: tuple[str, ...] = field(init=False)

    def __post_init__(self) -> None:
        labels = tuple(map(label_of, self.methods))
        object.__setattr__(self, "labels", labels)
        for what, names in (("method", labels), ("task", [task.label() for task in self.tasks])):
            twice = sorted({name for name in names if list(names).count(name) > 1})
            if twice:
                raise ValueError(f"the {what} {twice[0]} is given twice; leave one out")
        if not self.methods:
            raise ValueError("no method to run; name at least one, such as dense")
        if not self.tasks and self.perplexity is None:
            raise ValueError("no task to run; name at least one, such as needle_single, or perplexity")
        self._check_fidelity()
        least_of = {"samples": 0 if self.fidelity else 1, "fidelity": 0, "batch": 1}
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.lengths or min(self.lengths) < 64 or max(self.lengths) > MOST:
            raise ValueError(f"lengths must be at least 64 tokens and at most {MOST}, got {list(self.lengths)}")
        samples = self.samples * (len(self.tasks) + (self.perplexity is not None))
        samples += self.fidelity * len(self.compared)
        count = samples * len(self.methods) * len(self.lengths)
        if count > MOST_CELLS:
            raise ValueError(
                f"these samples, methods and lengths make {count:,} results, more than {MOST_CELLS:,}; ask for fewer "
                "samples (--limit)"
            )

    def _check_fidelity(self) -> None:
        if self.fidelity and not self.compared:
            raise ValueError("fidelity needs a task to take its prompts from; name one beside perplexity")
        known = [task.label() for task in self.tasks] + [PERPLEXITY] * (self.perplexity is not None)
        if unknown := [name for name in self.fidelity_of if name not in known]:
            raise ValueError(f"fidelity takes prompts of {', '.join(known)}, got {unknown[0]!r}; name it as a task too")

    @property
    def compared(self) -> tuple[str, ...]:
        """Whose prompts are compared with dense attention inside the model."""
        return self.fidelity_of or tuple(task.label() for task in self.tasks[:1])

    def on(self, subject: Subject) -> Job:
        """With the thresholds as numbers, where they depend on the kernel that runs."""
        return replace(self, methods=tuple(policy.resolved(subject.query()) for policy in self.methods))

    def sample(self, subject: Subject, task: Task, length: int, index: int) -> Sample:
        """The sample, the same for every method and every run.

        Raises:
            ValueError: the task does not fit into the length, or the haystack does not fill it.
        """
        room = length - subject.chat_tokens
        while True:
            rng = random.Random(f"{self.seed}/{task.label()}/{length}/{index}")
            try:
                sample = task.make(self.haystack, subject.tokenizer, room, rng)
            except ValueError as error:
                raise ValueError(f"{task.label()} at {length} tokens: {error}, or leave the task out") from error
            if not subject.chat:
                return sample
            # Other words for a chat, and another place for the answer's first ones, may take a few tokens more.
            longest = max(len(subject.prompt_tokens(sample, turn)) for turn in range(len(sample.turns)))
            if longest <= length - task.max_new_tokens:
                return replace(sample, prompt_tokens=longest)
            room -= longest - (length - task.max_new_tokens)

    def prompt(self, subject: Subject, what: str, length: int, index: int, windows: Windows | None = None) -> Tensor:
        """Tokens of a sample's first prompt, or of a window, ``[1, S]``.

        Args:
            what: a task's label, or ``perplexity``, for which ``windows`` are needed.

        Raises:
            ValueError: as `sample`.
        """
        if what == PERPLEXITY and windows is not None:
            return windows.tokens(length, index)
        task = next(task for task in self.tasks if task.label() == what)
        return torch.tensor([subject.prompt_tokens(self.sample(subject, task, length, index))], device=subject.device)

    def describe(self, what: str, length: int, index: int, windows: Windows | None) -> Record:
        """What a line says of its sample or window, beside length and number.

        Raises:
            ValueError: the text for perplexity is too short.
        """
        if what == PERPLEXITY and windows is not None and self.perplexity is not None:
            start, text = windows.start(length, index), self.perplexity
            return {"task": PERPLEXITY, "text": text.short_name, "text_sha256": text.sha256, "start": start}
        task = next(task for task in self.tasks if task.label() == what)
        return {"task": what, "task_fields": task.to_dict()}

    def windows(self, subject: Subject) -> Windows | None:
        """Of the text for perplexity."""
        return None if self.perplexity is None else Windows(subject, self.perplexity, self.seed)


@dataclass(frozen=True)
class Cell:
    """One method on one sample, window or prompt.

    Fields:
        what: a task's label, ``perplexity`` or ``fidelity``.
        head: what identifies its line in the results.
    """

    length: int
    what: str
    index: int
    policy: Policy
    head: Record


def pending(job: Job, results: ResultsFile, windows: Windows | None) -> list[Cell]:
    """What the file lacks, in the order in which it is run.

    Raises:
        ValueError: the text for perplexity is too short.
    """
    return [cell for cell in all_cells(job, windows) if not results.has(cell.head)]


def all_cells(job: Job, windows: Windows | None) -> Iterator[Cell]:
    """What the job is made of, in the order in which it is run: by length, task, sample, method.

    Raises:
        ValueError: the text for perplexity is too short.
    """
    for length in job.lengths:
        for task in job.tasks:
            for index in range(job.samples):
                more = job.describe(task.label(), length, index, windows)
                yield from _row(job, length, task.label(), index, {"kind": "sample"} | more)
        if windows is not None:
            for index in range(job.samples):
                more = job.describe(PERPLEXITY, length, index, windows)
                yield from _row(job, length, PERPLEXITY, index, {"kind": PERPLEXITY} | more)
        for index in range(job.fidelity):
            for what in job.compared:
                more = {"kind": FIDELITY} | job.describe(what, length, index, windows)
                row = _row(job, length, FIDELITY, index, more)
                yield from (cell for cell in row if cell.policy.method.name != "dense")


def _row(job: Job, length: int, what: str, index: int, more: Record) -> Iterator[Cell]:
    for policy in job.methods:
        head = {"kind": more["kind"], **policy_fields(policy), "task": more["task"], "length": length, "index": index}
        yield Cell(length, what, index, policy, head | more)


def check(subject: Subject, job: Job, cells: Sequence[Cell], windows: Windows | None) -> list[str]:
    """Make one sample of each task and length that is about to run, so that what cannot be made shows at once.

    Returns:
        what one should know of the samples, a sentence each.

    Raises:
        ValueError: a task does not fit, or a text is too short.
    """
    notes = []
    for length, here in groupby(cells, key=lambda cell: cell.length):
        names = {cell.head["task"] for cell in here}
        tasks = [task for task in job.tasks if task.label() in names]
        for task in tasks:
            job.sample(subject, task, length, 0)
        from_text = [task.label() for task in tasks if getattr(task, "haystack", None) == "text"]
        if from_text and characters_needed(job.haystack, subject.tokenizer, length) >= len(job.haystack.text):
            notes.append(
                f"the haystack is only just long enough for {length:,} tokens: all samples of "
                f"{', '.join(from_text)} hide things in the same passage; a longer one has more"
            )
        count = max(job.samples, job.fidelity * (PERPLEXITY in job.compared))
        if PERPLEXITY in names and windows is not None and count * length > windows.text_tokens:
            notes.append(
                f"{count} windows of {length:,} tokens from a text of {windows.text_tokens:,} overlap: the "
                "interval of the loss is narrower than it should be"
            )
    return notes


def relative_cost(subject: Subject, length: int) -> float:
    """Of a dense prefill, in tokens through the linear layers: attention adds a term that grows with the square.

    A token takes two operations for each parameter, and four for each channel of each key that it sees.
    """
    shape = subject.shape()
    channels = shape["layers"] * shape["heads"] * shape["head_dim"]
    return length * (1 + length * channels / max(1, shape["parameters"]))


def run(
    subject: Subject, job: Job, results: ResultsFile, progress: Callable[[Cell], None] = lambda cell: None
) -> Iterator[Record]:
    """Run what the file lacks, in order of length, and yield each new line.

    Each method reads a short prompt first whenever a new length begins, so that the first one's seconds do not hold
    what the process does only once.

    Args:
        progress: called after each cell.

    Raises:
        ValueError: a sample cannot be made.
    """
    windows = job.windows(subject)
    tasks = {task.label(): task for task in job.tasks}
    for length, here in groupby(pending(job, results, windows), key=lambda cell: cell.length):
        cells = list(here)
        _warm_up(subject, job, length, list({cell.head["method"]: cell.policy for cell in cells}.values()))
        for what, these in groupby(cells, key=lambda cell: cell.what):
            if what == PERPLEXITY and windows is not None:
                made = _run_perplexity(subject, windows, list(these))
            elif what == FIDELITY:
                made = _run_fidelity(subject, job, windows, list(these))
            else:
                made = _run_task(subject, job, tasks[what], list(these))
            for cell, measured in made:
                yield results.append(cell.head | measured)
                progress(cell)


def _warm_up(subject: Subject, job: Job, length: int, policies: Sequence[Policy]) -> None:
    size = min(length, _WARM_UP)
    tokens = subject.tokens(job.haystack.text[: 12 * size])[:size]
    for policy in policies:
        subject.warm_up(tokens, policy)


Measured = Iterator[tuple[Cell, Record]]


def _run_task(subject: Subject, job: Job, task: Task, cells: Sequence[Cell]) -> Measured:
    rows = job.batch if task.turns == 1 else 1
    for _, batch in groupby(cells, key=lambda cell: cell.index // rows):
        together = list(batch)
        length = together[0].length
        samples = {i: job.sample(subject, task, length, i) for i in sorted({cell.index for cell in together})}
        for label in dict.fromkeys(cell.head["method"] for cell in together):
            mine = [cell for cell in together if cell.head["method"] == label]
            prompts = [samples[cell.index] for cell in mine]
            answers = subject.answer(prompts, mine[0].policy, task.max_new_tokens, one_line=task.one_line)
            for cell, sample, answer in zip(mine, prompts, answers, strict=True):
                turns = []
                for turn, text in zip(sample.turns, answer.texts, strict=True):
                    score = task.score(text, turn.references)
                    turns.append(
                        {"generated": text, "references": turn.references, "score": score, "depth": turn.depth}
                    )
                yield (
                    cell,
                    {
                        "prompt_tokens": sample.prompt_tokens,
                        "one_line": task.one_line,
                        "turns": turns,
                        "score": sum(turn["score"] for turn in turns) / len(turns),
                        "decode_s": answer.decode_s,
                    }
                    | ({} if answer.decode_tokens is None else {"decode_tokens": answer.decode_tokens})
                    | ({} if answer.read is None else {"read": answer.read})
                    | ({} if answer.cache_bytes is None else {"cache_bytes": answer.cache_bytes})
                    | ({} if answer.cache_peak_bytes is None else {"cache_peak_bytes": answer.cache_peak_bytes})
                    | answer.cost.to_dict(),
                )


def _run_perplexity(subject: Subject, windows: Windows, cells: Sequence[Cell]) -> Measured:
    for index, row in groupby(cells, key=lambda cell: cell.index):
        tokens = None
        for cell in row:
            tokens = windows.tokens(cell.length, index) if tokens is None else tokens
            hidden, cost = subject.hidden_states(tokens, cell.policy)
            nats = 0.0
            for start, logits in subject.logits(hidden[:-1]):
                target = tokens[0, start + 1 : start + 1 + logits.shape[0]]
                nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
            count = tokens.shape[1] - 1
            yield cell, {"tokens": count, "nats": nats / count} | cost.to_dict()


def _run_fidelity(subject: Subject, job: Job, windows: Windows | None, cells: Sequence[Cell]) -> Measured:
    for (index, what), row in groupby(cells, key=lambda cell: (cell.index, cell.head["task"])):
        together = list(row)
        tokens = job.prompt(subject, what, together[0].length, index, windows)
        compared = compare(subject, tokens, [cell.policy for cell in together], maps=index == 0)
        for cell, measured in zip(together, compared, strict=True):
            yield cell, {"prompt_tokens": tokens.shape[1]} | measured


def parse_lengths(text: str) -> tuple[int, ...]:
    """``4k,16k,32768`` as tokens; k is 1,024.

    Raises:
        ValueError: not a list of lengths.
    """
    lengths = []
    for part in text.split(","):
        number = part.strip().lower()
        factor = {"k": 1024, "m": 1 << 20}.get(number[-1:], 1)
        digits = number[:-1] if factor > 1 else number
        if not digits.isdecimal() or int(digits) == 0:
            raise ValueError(f"lengths are given as 4k,16k,32k or in tokens, got {part!r}")
        lengths.append(int(digits) * factor)
    return tuple(sorted(set(lengths)))
