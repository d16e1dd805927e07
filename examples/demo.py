"""A model reads this repository's own files with needles hidden in them, and is asked for each: dense, then sparse.

    python examples/demo.py [--json figures.json]

How it is measured stands in `reading.py`.
"""

from __future__ import annotations

import argparse
import json
import random
from functools import partial
from pathlib import Path

from reading import ROOT, Row, Text, load, report, repository_text, run

from gossamer.cli.machine import fast_dtype
from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import first_number_matches
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks.needle import MultiKey

MODEL = ROOT / "models" / "reference"
TOKENS = 16_384
NEEDLES = 8
ANSWER_TOKENS = 8

# The second row computes every pair on gossamer's kernel: it tells the kernel's gain from that of leaving pairs out.
ROWS = (
    Row("dense", "dense"),
    Row("dense, gossamer's kernel", "dense", {"kernel": "gossamer"}),
    Row("minference", "minference"),
    Row("minference, small budget", "minference", {"vertical_size": 256, "slash_size": 1024}),
    Row("max_relative", "max_relative"),
)


def hide_needles(subject: Subject) -> list[Text]:
    """The repository's text with needles in it, once with the question for each: all of them are read whole.

    Raises:
        RuntimeError: a prompt is shorter than it should be.
    """
    task = MultiKey(keys=NEEDLES, turns=NEEDLES)
    # A little above the size aimed at: the length is that of the longest prompt.
    length = TOKENS + 128 + task.max_new_tokens
    sample = task.make(Haystack("repository", repository_text()), subject.tokenizer, length, random.Random(0))
    texts = []
    for i, turn in enumerate(sample.turns):
        prompt = subject.prompt_tokens(sample, i)
        if len(prompt) < TOKENS:
            raise RuntimeError(f"a prompt has {len(prompt)} tokens, fewer than {TOKENS}")
        score = partial(first_number_matches, references=turn.references)
        texts.append(Text(task.name, (prompt,), (score,), ANSWER_TOKENS, (turn.depth,)))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there")
    parser.add_argument("--model", type=Path, default=MODEL, help="another model of the reference model's form")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default=str(fast_dtype()[0]).removeprefix("torch."))
    arguments = parser.parse_args()
    if not (arguments.model / "config.json").is_file():
        parser.error(f"{arguments.model} is not a model: it has no config.json")
    print(
        f"reading {TOKENS} tokens of this repository {NEEDLES * len(ROWS)} times; this takes a few minutes", flush=True
    )
    subject = load(arguments.model, arguments.dtype)
    figures = run(subject, hide_needles(subject), ROWS)
    print(report(figures))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
