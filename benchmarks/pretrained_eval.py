"""What a pretrained model loses under every method, in pieces that go on where the last one stopped.

    python benchmarks/pretrained_eval.py MODEL --out smollm2.jsonl --heads smollm2_heads.jsonl --minutes 10

MODEL is a folder or a GGUF file. The lines are those of `gossamer eval` and `gossamer inspect`: first what heads do,
then predictions beside dense runs (prompts of prose, of code and with a needle, at all positions), of a few settings
and then of every method at three budgets, then answers. Prompts come one by one, kinds and lengths in turns, so that
whatever was done when time is up is of all settings alike. Seconds in the lines are those of a machine that may have
done other things as well.

Prose is the language reference that comes with Python (`pydoc_data.topics`), code are modules of its library; both are
of the interpreter's version, and the lines carry their hashes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import sys
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput
from gossamer.cli.generation import load_checked, load_tokenizer
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.evaluate import tasks
from gossamer.evaluate.haystack import Haystack, load_haystack
from gossamer.evaluate.heads import heads_record, inspect_model
from gossamer.evaluate.records import read_lines
from gossamer.evaluate.runner import PERPLEXITY, Job, ResultsFile, make_header, parse_lengths, run
from gossamer.evaluate.subject import Subject
from gossamer.methods import Method
from gossamer.methods.registry import available, class_of
from gossamer.policy import Policy

PROSE = "python-reference"
CODE = "python-library"
_MODULES = ("argparse", "ast", "dataclasses", "datetime", "inspect", "pathlib", "statistics", "tarfile", "typing")
NEEDLE = "needle_single"
# Prompts of each kind and length, and samples of each task, after which the next length has its turn.
STEPS = (1, 2, 4, 8)
SAMPLES = (5, 10, 20, 30)
# What no class lists as budgets to compare.
OTHERS = tuple(
    ("minference", {"vertical_size": vertical, "slash_size": slash})
    for vertical, slash in ((256, 1024), (512, 2048), (1000, 4096))
)
# What is compared first, on all prompts.
FIRST = ("minference", "max_relative", "xattention", "vec_attention")
ANSWERED: tuple[tuple[str, dict[str, Any]], ...] = (
    ("dense", {}),
    ("a_shape", {"sink": 64, "window": 1024}),
    ("minference", {"vertical_size": 256, "slash_size": 1024}),
    ("max_relative", {"alpha": 0.1}),
    ("xattention", {"threshold": 0.85}),
    ("vec_attention", {"threshold": 0.03}),
)
TASKS = (NEEDLE, "needle_multikey", "passkey", "mqar", "variable_tracking", "json_kv", "repeat_passage")


def prose() -> Haystack:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return Haystack(PROSE, "\n\n".join(topics[name] for name in sorted(topics)))


def code() -> Haystack:
    return Haystack(CODE, "\n\n".join(inspect.getsource(importlib.import_module(name)) for name in _MODULES))


def settings() -> list[Method]:
    """Three budgets of each method that has budgets: the sparsest, one in the middle, the densest."""
    made = []
    for name in available():
        listed = class_of(name).settings
        if listed:
            made += [class_of(name).from_fields(dict(listed[i])) for i in (0, len(listed) // 2, len(listed) - 1)]
    return made + [class_of(name).from_fields(dict(fields)) for name, fields in OTHERS]


def jobs(lengths: tuple[int, ...]) -> Iterator[Job]:
    """In the order in which they are run."""
    every = tuple(Policy(method) for method in settings())
    first = tuple(policy for policy in every if policy.method.name in FIRST)
    kinds = ((prose(), PERPLEXITY), (code(), PERPLEXITY), (None, NEEDLE))
    hidden = load_haystack()
    for methods, prompts, length, (text, kind) in product((first, every), STEPS, lengths, kinds):
        yield Job(
            methods=methods,
            tasks=(tasks.create(NEEDLE),),
            lengths=(length,),
            samples=0,
            haystack=hidden,
            perplexity=text,
            fidelity=prompts,
            fidelity_of=(kind,),
        )
    answered = tuple(Policy(class_of(name).from_fields(dict(fields))) for name, fields in ANSWERED)
    asked = tuple(tasks.create(name, turns=1) for name in TASKS)
    for samples in SAMPLES:
        for length in lengths:
            yield Job(methods=answered, tasks=asked, lengths=(length,), samples=samples, haystack=hidden)


def look_at_heads(subject: Subject, out: Path, lengths: tuple[int, ...], prompts: int = 2) -> None:
    """A line of kind ``heads`` for a few prompts of each kind, those that the file lacks."""
    known = read_lines(out.read_bytes(), out) if out.exists() else []
    done = {(record["task"], record["length"], record["index"]) for record in known if record["kind"] == "heads"}
    for job in jobs(lengths):
        if job.fidelity != prompts or job.methods[0].method.name not in FIRST:
            continue
        windows, length = job.windows(subject), job.lengths[0]
        for index in range(prompts):
            what = job.compared[0]
            name = job.describe(what, length, index, windows).get("text", what)
            if (name, length, index) in done:
                continue
            reports = inspect_model(subject.model, job.prompt(subject, what, length, index, windows), rows=1024)
            record = heads_record(reports, model=subject.to_dict(), task=name, length=length, index=index, rows=1024)
            with out.open("a") as file:
                file.write(json.dumps(_rounded(record), allow_nan=False) + "\n")


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model with a chat template")
    parser.add_argument("--out", type=Path, required=True, help="results; an existing file goes on")
    parser.add_argument("--heads", type=Path, help="what the heads do goes there")
    parser.add_argument("--lengths", type=parse_lengths, default=parse_lengths("4k,7680"))
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after them, between two prompts")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    add_dtype(parser)
    arguments = parser.parse_args()
    ends = time.monotonic() + 60 * arguments.minutes
    try:
        folder = model_folder(arguments.model)
        tokenizer = load_tokenizer(folder)
        tokenizer.model_max_length = sys.maxsize
        model = load_checked(folder, arguments.dtype, arguments.device)
    except BadInput as error:
        sys.exit(f"pretrained_eval.py: {error}")
    subject = Subject(model, tokenizer, arguments.model.stem, chat=True)
    if arguments.heads is not None:
        look_at_heads(subject, arguments.heads, arguments.lengths)
    for job in jobs(arguments.lengths):
        job = job.on(subject)
        with ResultsFile(arguments.out, make_header(subject, job)) as results:
            for record in run(subject, job, results):
                print(record["kind"], record["length"], record.get("text", record["task"]), record["index"], end=" ")
                print(record["method"], flush=True)
                if time.monotonic() > ends:
                    sys.exit(f"time is up; the same command goes on with {arguments.out}")


if __name__ == "__main__":
    main()
