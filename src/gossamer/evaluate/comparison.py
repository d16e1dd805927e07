"""Methods and their settings side by side on one model: what each costs and loses, and which no other beats.

First the attention of every prompt is looked at once, for all settings (`gossamer.evaluate.frontier`). Then those that
no other beats in time and error, at each length, run through the whole model for the logits. Lines of results are as
those of `gossamer eval`, and an interrupted comparison goes on where it stopped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gossamer.evaluate.fidelity import compare_logits
from gossamer.evaluate.frontier import measure
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.records import policy_fields
from gossamer.evaluate.results import ResultsFile
from gossamer.evaluate.runner import PERPLEXITY, Job
from gossamer.evaluate.settings import comparison_rows
from gossamer.evaluate.subject import Subject
from gossamer.policy import Policy

__all__ = ["Prompt", "Setting", "compare", "prompts_of"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """What identifies a prompt in the results: the fields of its lines."""

    head: Record

    @property
    def length(self) -> int:
        return self.head["length"]

    def tokens(self, subject: Subject, job: Job, windows: Windows | None) -> Tensor:
        """``[1, S]``.

        Raises:
            ValueError: the sample cannot be made.
        """
        return job.prompt(subject, self.head["task"], self.length, self.head["index"], windows)


@dataclass(frozen=True)
class Setting:
    """A method with its fields, under a policy."""

    policy: Policy

    @property
    def head(self) -> Record:
        return policy_fields(self.policy)


def prompts_of(job: Job, windows: Windows | None) -> Iterator[Prompt]:
    """By length: samples of the tasks, then windows of the text.

    Raises:
        ValueError: the text is too short.
    """
    for length in job.lengths:
        for task in job.tasks:
            for index in range(job.samples):
                of_task = {"task": task.label(), "task_fields": task.to_dict()}
                yield Prompt(of_task | {"length": length, "index": index})
        if windows is not None and job.perplexity is not None:
            for index in range(job.samples):
                text = {"text_sha256": job.perplexity.sha256, "start": windows.start(length, index)}
                yield Prompt({"task": PERPLEXITY, "length": length, "index": index} | text)


def compare(
    subject: Subject,
    job: Job,
    results: ResultsFile,
    *,
    layers: Sequence[int] | None = None,
    rounds: int = 3,
    every_logits: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Iterator[Record]:
    """Measure what the file lacks and yield each new line: ``point`` and ``bounds``, then ``logits`` of the front.

    Args:
        layers, rounds: see `gossamer.evaluate.frontier.measure`.
        every_logits: ``logits`` of every setting, not of the front alone.
        progress: called with a word on what is done.

    Raises:
        ValueError: a prompt cannot be made, or the model's attention not be observed.
    """
    windows = job.windows(subject)
    settings = [Setting(policy) for policy in job.methods]
    prompts = list(prompts_of(job, windows))
    for prompt in prompts:
        yield from _points(subject, job, results, prompt, settings, windows, layers, rounds, progress)
    for length in job.lengths:
        here = [prompt for prompt in prompts if prompt.length == length]
        rows = comparison_rows([record for record in results.records if _is_of(record, here, settings)])
        front = {row.method for row in rows if row.front}
        chosen = [setting for setting in settings if every_logits or setting.head["method"] in front]
        for prompt in here:
            yield from _logits(subject, job, results, prompt, chosen, windows, progress)


def _is_of(record: Record, prompts: Sequence[Prompt], settings: Sequence[Setting]) -> bool:
    if record["kind"] != "point":
        return False
    ours = any(setting.head.items() <= record.items() for setting in settings)
    return ours and any(prompt.head.items() <= record.items() for prompt in prompts)


def _points(
    subject: Subject,
    job: Job,
    results: ResultsFile,
    prompt: Prompt,
    settings: Sequence[Setting],
    windows: Windows | None,
    layers: Sequence[int] | None,
    rounds: int,
    progress: Callable[[str], None],
) -> Iterator[Record]:
    heads = [{"kind": "point"} | setting.head | prompt.head for setting in settings]
    missing = [index for index, head in enumerate(heads) if not results.has(head)]
    bounds = {"kind": "bounds"} | prompt.head
    if not missing:
        return
    what = f"{prompt.head['task']} {prompt.head['index']} at {prompt.length:,} tokens"
    found = measure(
        subject,
        prompt.tokens(subject, job, windows),
        [settings[index].policy for index in missing],
        layers=layers,
        rounds=rounds,
        bounds=not results.has(bounds),
        progress=lambda layer: progress(f"{what}, layer {layer}"),
    )
    shared = {"dense_s": found.dense_s, "sdpa_s": found.sdpa_s, "observed": found.layers, "rounds": rounds}
    if found.bounds:
        yield results.append(bounds | {name: bound.to_dict() for name, bound in found.bounds.items()})
    for index, point in zip(missing, found.points, strict=True):
        yield results.append(heads[index] | point.to_dict() | shared)


def _logits(
    subject: Subject,
    job: Job,
    results: ResultsFile,
    prompt: Prompt,
    settings: Sequence[Setting],
    windows: Windows | None,
    progress: Callable[[str], None],
) -> Iterator[Record]:
    heads = [{"kind": "logits"} | setting.head | prompt.head for setting in settings]
    missing = [index for index, head in enumerate(heads) if not results.has(head)]
    if not missing:
        return
    tokens = prompt.tokens(subject, job, windows)
    dense, _ = subject.hidden_states(tokens, Policy.of("dense"))
    for index in missing:
        sparse, cost = subject.hidden_states(tokens, settings[index].policy)
        (logits,) = compare_logits(subject, dense, [sparse])
        progress(f"logits of {heads[index]['method']}, {prompt.head['task']} {prompt.head['index']}")
        kept = {"kl": logits["mean_kl"], "top1": logits["mean_top1"]}
        yield results.append(heads[index] | kept | cost.to_dict())
