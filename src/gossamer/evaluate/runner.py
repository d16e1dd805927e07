"""Run methods on tasks and write one line of results for each sample; go on where an earlier run stopped.

The documentation describes the file format (``results-format``). A cell is one method on one sample; what is in the
file already is not run again, and since samples depend on the seed, the task, the length and their number alone, a
run that was interrupted ends with the same lines as one that was not.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import random
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from gossamer import __version__
from gossamer.attention import Policy
from gossamer.evaluate.fidelity import compare
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks import Sample, Task
from gossamer.ops import cpu

__all__ = ["FORMAT", "PERPLEXITY", "Job", "ResultsFile", "label_of", "run"]

FORMAT = 1
PERPLEXITY = "perplexity"
Record = dict[str, Any]
Progress = Callable[[int, str, bool], None]


def label_of(policy: Policy) -> str:
    """A method's name and the fields that differ from their defaults: ``max_relative(alpha=0.02)``."""
    method = policy.method
    default = type(method)().to_dict()
    changed = []
    for name, value in method.to_dict().items():
        if value != default[name]:
            changed.append(f"{name}={value}" if not isinstance(value, dict) else name)
    return f"{method.name}({','.join(changed)})" if changed else method.name


@dataclass(frozen=True)
class Job:
    """What to run: every method on every sample.

    Fields:
        methods: policies; their labels must differ.
        tasks: generated tasks.
        lengths: tokens of prompt and answer.
        samples: samples of each task at each length.
        haystack: text to hide things in.
        perplexity: text to measure perplexity on, or None; windows of each length from it, as many as `samples`.
        fidelity: prompts of the first task at each length on which to compare with dense attention inside the model.
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
        if self.fidelity and not self.tasks:
            raise ValueError("fidelity needs a task to take its prompts from; name one beside perplexity")
        least_of = {"samples": 1, "fidelity": 0, "batch": 1}
        for name, least in least_of.items():
            if (value := getattr(self, name)) < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if not self.lengths or min(self.lengths) < 64:
            raise ValueError(f"lengths must be at least 64 tokens, got {list(self.lengths)}")

    def sample(self, subject: Subject, task: Task, length: int, index: int) -> Sample:
        """The sample, the same for every method and every run."""
        rng = random.Random(f"{self.seed}/{task.label()}/{length}/{index}")
        return task.make(self.haystack, subject.tokenizer, length, rng)


class ResultsFile:
    """A JSONL file that is only ever appended to, one line at a time.

    Raises:
        ValueError: the file is of another model, haystack or seed, or is no results file.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self.header = header
        self.records: list[Record] = []
        if path.exists():
            self._read()
        self.done = {_cell(record) for record in self.records}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self._header_written = False

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        for number, line in enumerate(content[:whole].decode().splitlines(), 1):
            try:
                record = json.loads(line)
                kind = record["kind"]
            except (ValueError, TypeError, KeyError):
                raise ValueError(
                    f"{self.path} is not a results file: line {number} is not a JSON object with a kind; "
                    "choose another --out"
                ) from None
            if kind == "run":
                self._check(record)
            else:
                self.records.append(record)
        if whole < len(content):
            # A run was cut off within a line.
            with self.path.open("r+b") as file:
                file.truncate(whole)

    def _check(self, record: Record) -> None:
        for name, mine, theirs in (
            ("format", self.header["format"], record.get("format")),
            ("model", self.header["model"]["fingerprint"], record.get("model", {}).get("fingerprint")),
            ("haystack", self.header["haystack"]["sha256"], record.get("haystack", {}).get("sha256")),
            ("seed", self.header["seed"], record.get("seed")),
        ):
            if mine != theirs:
                raise ValueError(
                    f"{self.path} holds results of another {name} ({theirs}, now {mine}); choose another --out"
                )

    def has(self, record: Record) -> bool:
        return _cell(record) in self.done

    def append(self, record: Record) -> Record:
        """Write one line; the circumstances go before the first."""
        lines = [] if self._header_written else [self.header]
        self._header_written = True
        record = {"kind": record["kind"], "run": self.header["run"]} | record
        data = "".join(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n" for line in [*lines, record])
        encoded = data.encode()
        if os.write(self._file, encoded) != len(encoded):
            raise OSError(f"could not write a whole line to {self.path}: is the disk full?")
        os.fsync(self._file)
        self.records.append(record)
        self.done.add(_cell(record))
        return record

    def close(self) -> None:
        os.close(self._file)

    def __enter__(self) -> ResultsFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _cell(record: Record) -> tuple[Any, ...]:
    """What a line is the result of."""
    fields = json.dumps(record.get("method_fields"), sort_keys=True)
    length = record.get("length") or str(record.get("lengths"))
    return record["kind"], fields, record.get("policy"), record.get("task"), length, record.get("index")


def make_header(subject: Subject, job: Job) -> Record:
    """The ``run`` line."""
    return {
        "kind": "run",
        "format": FORMAT,
        "run": uuid.uuid4().hex[:8],
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": subject.to_dict(),
        "machine": _machine(subject.device),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "gossamer": __version__,
        },
        "haystack": job.haystack.to_dict(),
        "seed": job.seed,
    }


def _machine(device: torch.device) -> Record:
    if device.type == "cuda":
        return {"processor": torch.cuda.get_device_name(device)}
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    isas = {str(dtype).removeprefix("torch."): cpu.active_isa(dtype) for dtype in (torch.float32, torch.bfloat16)}
    return {"processor": name, "threads": torch.get_num_threads(), "kernels": isas if cpu.is_available() else None}


def run(
    subject: Subject, job: Job, results: ResultsFile, progress: Progress = lambda tokens, what, ran: None
) -> Iterator[Record]:
    """Run what the file lacks, in order of length, and yield each new line.

    Args:
        progress: called for each cell with the tokens that it stands for, its name, and whether it ran now or was
            there already.
    """
    for length in job.lengths:
        for task in job.tasks:
            yield from _run_task(subject, job, task, length, results, progress)
        if job.perplexity is not None:
            yield from _run_perplexity(subject, job, job.perplexity, length, results, progress)
        if job.fidelity:
            yield from _run_fidelity(subject, job, length, results, progress)


def total_tokens(job: Job) -> int:
    """What `run` reports to ``progress`` in all."""
    each = len(job.tasks) + (job.perplexity is not None)
    return sum(job.lengths) * len(job.methods) * (job.samples * each + job.fidelity)


def _run_task(
    subject: Subject,
    job: Job,
    task: Task,
    length: int,
    results: ResultsFile,
    progress: Progress,
) -> Iterator[Record]:
    rows = job.batch if task.turns == 1 else 1
    for start in range(0, job.samples, rows):
        indices = range(start, min(start + rows, job.samples))
        open_cells = {}
        for label, policy in zip(job.labels, job.methods, strict=True):
            heads = [_head(label, policy, task.label(), length, i) | {"task_fields": task.to_dict()} for i in indices]
            missing = [(i, head) for i, head in zip(indices, heads, strict=True) if not results.has(head)]
            progress(length * (len(indices) - len(missing)), f"{length} {task.label()} {label}", False)
            if missing:
                open_cells[label] = (policy, missing)
        needed = sorted({i for _, missing in open_cells.values() for i, _ in missing})
        samples = {i: job.sample(subject, task, length, i) for i in needed}
        for label, (policy, missing) in open_cells.items():
            answers = subject.answer([samples[i] for i, _ in missing], policy, task.max_new_tokens)
            for (i, head), answer in zip(missing, answers, strict=True):
                sample = samples[i]
                turns = []
                for turn, text in zip(sample.turns, answer.texts, strict=True):
                    score = task.score(text, turn.references)
                    turns.append(
                        {"generated": text, "references": turn.references, "score": score, "depth": turn.depth}
                    )
                yield results.append(
                    head
                    | {
                        "prompt_tokens": sample.prompt_tokens,
                        "turns": turns,
                        "score": sum(turn["score"] for turn in turns) / len(turns),
                        "decode_s": answer.decode_s,
                    }
                    | answer.cost.to_dict()
                )
                progress(length, f"{length} {task.label()} {label}", True)


def _run_perplexity(
    subject: Subject,
    job: Job,
    text: Haystack,
    length: int,
    results: ResultsFile,
    progress: Progress,
) -> Iterator[Record]:
    for index in range(job.samples):
        tokens = None
        for label, policy in zip(job.labels, job.methods, strict=True):
            head = _head(label, policy, PERPLEXITY, length, index) | {"kind": PERPLEXITY}
            missing = not results.has(head)
            if missing:
                if tokens is None:
                    tokens = text_window(subject, text, length, random.Random(f"{job.seed}/{length}/{index}"))
                hidden, cost = subject.hidden_states(tokens, policy)
                nats = 0.0
                for start, logits in subject.logits(hidden[:-1]):
                    target = tokens[0, start + 1 : start + 1 + logits.shape[0]]
                    nats += float(torch.nn.functional.cross_entropy(logits, target, reduction="sum"))
                count = tokens.shape[1] - 1
                measured = {"tokens": count, "nats": nats / count, "text_sha256": text.sha256}
                yield results.append(head | measured | cost.to_dict())
            progress(length, f"{length} {PERPLEXITY} {label}", missing)


def text_window(subject: Subject, text: Haystack, length: int, rng: random.Random) -> torch.Tensor:
    """``[1, length]`` tokens from a random line of the text on, with the tokenizer's special tokens in front.

    Raises:
        ValueError: the text is too short.
    """
    passage = text.passage(min(len(text.text), 12 * length), rng)[: 12 * length]
    tokens = subject.tokens(passage)
    if len(tokens) < length:
        tokens = subject.tokens(text.text)
    if len(tokens) < length:
        raise ValueError(
            f"the text {text.name!r} has {len(tokens):,} tokens, {length:,} are needed; give a longer text or "
            "ask for a smaller length"
        )
    return torch.tensor([tokens[:length]], device=subject.device)


def _run_fidelity(
    subject: Subject, job: Job, length: int, results: ResultsFile, progress: Progress
) -> Iterator[Record]:
    task = job.tasks[0]
    for index in range(job.fidelity):
        open_cells = []
        for label, policy in zip(job.labels, job.methods, strict=True):
            head = _head(label, policy, task.label(), length, index)
            head |= {"kind": "fidelity", "task_fields": task.to_dict()}
            if policy.method.name == "dense" or results.has(head):
                progress(length, f"{length} fidelity {label}", False)
            else:
                open_cells.append((label, policy, head))
        if not open_cells:
            continue
        sample = job.sample(subject, task, length, index)
        tokens = torch.tensor([subject.tokens(sample.prompt())], device=subject.device)
        compared = compare(subject, tokens, [policy for _, policy, _ in open_cells])
        for (label, _, head), measured in zip(open_cells, compared, strict=True):
            yield results.append(head | {"prompt_tokens": sample.prompt_tokens} | measured)
            progress(length, f"{length} fidelity {label}", True)


def _head(label: str, policy: Policy, task: str, length: int, index: int) -> Record:
    return {
        "kind": "sample",
        "method": label,
        "method_fields": policy.method.to_dict(),
        "policy": f"min_tokens={policy.min_tokens},max_density={policy.max_density:g}",
        "task": task,
        "length": length,
        "index": index,
    }


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
