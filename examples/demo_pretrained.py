"""A pretrained model reads this repository's own files and is asked about them: dense, then sparse.

    python examples/demo_pretrained.py [MODEL] [--json figures.json]

SmolLM2-135M-Instruct is fetched once (`models/pretrained.py`, 98 MB) and converted once into the cache of gossamer's
commands; another model for chats may be given, as a folder or a GGUF file. Two texts of 7,500 tokens with six questions
each: for numbers hidden among others, and for passages word for word. How it is measured stands in `reading.py`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from functools import partial
from pathlib import Path

from reading import ROOT, Row, Text, load, report, repository_text, run

from gossamer.cli.common import BadInput
from gossamer.cli.machine import fast_dtype
from gossamer.cli.pretrained import file_hash, model_folder
from gossamer.evaluate import tasks
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.runner import Job
from gossamer.evaluate.subject import Subject
from gossamer.policy import Policy

LENGTH = 7_500
QUESTIONS = 6
TASKS = (
    tasks.create("needle_multikey", keys=QUESTIONS, turns=QUESTIONS),
    tasks.create("repeat_passage", words=8, turns=QUESTIONS),
)
# Predictions are compared at each so-manieth position: at all, that would take as long as reading.
COMPARED = 8
ROWS = (
    Row("dense", "dense"),
    Row("dense, gossamer's kernel", "dense", {"kernel": "gossamer"}),
    Row("minference, small budget", "minference", {"vertical_size": 256, "slash_size": 1024}),
    Row("max_relative", "max_relative"),
    Row("xattention", "xattention"),
)


def fetched() -> Path:
    """The GGUF file of SmolLM2."""
    sys.path.insert(0, str(ROOT / "models"))
    pretrained = importlib.import_module("pretrained")
    return pretrained.fetch(ROOT / pretrained.FOLDER)


def ask(subject: Subject) -> list[Text]:
    """Parts of the repository's text, each with the questions of a task."""
    job = Job((Policy.of("dense"),), TASKS, (LENGTH,), 1, Haystack("repository", repository_text()))
    texts = []
    for task in TASKS:
        sample = job.sample(subject, task, LENGTH, 0)
        prompts = tuple(subject.prompt_tokens(sample, i) for i in range(QUESTIONS))
        scores = tuple(partial(task.score, references=turn.references) for turn in sample.turns)
        depths = tuple(turn.depth for turn in sample.turns)
        texts.append(Text(task.name, prompts, scores, task.max_new_tokens, depths))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, nargs="?", help="folder or GGUF file of another model for chats")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=str(fast_dtype()[0]).removeprefix("torch."))
    arguments = parser.parse_args()
    try:
        source = arguments.model or fetched()
        folder = model_folder(source)
    except (BadInput, RuntimeError, OSError) as error:
        sys.exit(f"demo_pretrained.py: {error}")
    print(f"reading {LENGTH} tokens of this repository {len(TASKS) * len(ROWS)} times; this takes minutes", flush=True)
    subject = load(folder, arguments.dtype, chat=True)
    figures = run(subject, ask(subject), ROWS, every=COMPARED)
    figures["model"] = {"name": source.name} | ({"sha256": file_hash(source)} if source.is_file() else {})
    print(report(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
