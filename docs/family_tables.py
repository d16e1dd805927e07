"""Tables for the page of model families, from what running them found; `tables.py` puts them in."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Cells = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
Record = dict[str, Any]

FILE = Path(__file__).resolve().parent.parent / "tests" / "integrations" / "families.json"

OUTCOMES = {
    "sparse": "the same as without gossamer in every situation, and the prompt runs sparse",
    "dense": "the same in every situation, but nothing runs sparse, for a reason that is counted",
    "refused": "`enable` raises a `ValueError` and leaves the model as it is",
    "unsupported": "the first forward pass raises a `NotImplementedError`",
    "wrong": "computes something else: do not use it",
    "model fails": "takes more than a prompt of tokens, so that nothing could be compared",
    "not built": "no tiny model could be made of it, so that nothing could be compared",
}
TASKS = {"text": "text", "image": "with images or video", "seq2seq": "encoder and decoder, or with sound"}
# Of dense layers: what the library counts, and what it means.
REASONS = {
    "keys chosen by the model": "the model was trained to choose the keys of each query by itself",
    "mask is not plain": "its mask is more than causality, a window and padding",
    "position bias": "it adds a bias to the logits by position",
    "not causal": "it is not causal in its encoder, its cross-attention or its prompt; see `bidirectional=True`",
}
# Of refusals: what the message holds, and what it means.
REFUSALS = {
    "declares that its attention can't be replaced": "its code computes attention by itself, or it has none",
    "does not let its attention implementation be changed": "its code chooses its attention by itself",
    "adds compressed keys": "it compresses keys, and joins their mask to a form that only eager attention has",
    "trained block indices": "it was trained to choose blocks of keys, and names them in a form of its own",
}


def read(path: Path = FILE) -> tuple[dict[str, Any], dict[str, Record]]:
    """The versions that were run, and the records by family."""
    found = json.loads(path.read_text(encoding="utf-8"))
    return found["about"], found["families"]


def counts_table() -> Cells:
    """How many families came to what."""
    about, families = read()
    rows = [
        (outcome, sum(found["outcome"] == outcome for found in families.values()), meaning)
        for outcome, meaning in OUTCOMES.items()
    ]
    above = f"transformers {about['transformers']}, torch {about['torch']}: {len(families)} classes of model types."
    return above, ("outcome", "classes", "what it means"), [row for row in rows if row[1]]


def sparse_table() -> Cells:
    """Families whose every attention layer runs sparse."""
    _, families = read()
    found = {name: record for name, record in families.items() if _is_sparse(record) and not record["dense_layers"]}
    rows = [(meaning, len(own), listed(own)) for task, meaning in TASKS.items() if (own := _of_task(found, task))]
    return "", ("models", "classes", "model types"), rows


def partly_table() -> Cells:
    """Families that run sparse in some layers, or in some attention of a layer."""
    _, families = read()
    return _by_reason(
        {name: record for name, record in families.items() if _is_sparse(record) and record["dense_layers"]}
    )


def dense_table() -> Cells:
    """Families of which nothing runs sparse."""
    _, families = read()
    return _by_reason({name: record for name, record in families.items() if record["outcome"] == "dense"})


def refused_table() -> Cells:
    """Families that gossamer does not run, and why."""
    return _grouped(("refused", "unsupported"), lambda record: worded(record["why"]))


def unverified_table() -> Cells:
    """Families of which nothing is known."""
    return _grouped(("model fails", "not built"), lambda record: OUTCOMES[record["outcome"]])


def cannot_table() -> Cells:
    """Families that could not be compared in every situation."""
    _, families = read()
    rows: dict[str, list[str]] = {}
    for name, record in families.items():
        if "model_cannot" in record:
            rows.setdefault(", ".join(record["model_cannot"]), []).append(name)
    return "", ("not compared", "classes", "model types"), _longest_first(rows)


def worded(message: str) -> str:
    """A refusal, in words for those who don't read its code."""
    return next((meaning for part, meaning in REFUSALS.items() if part in message), message.replace("|", "\\|"))


def listed(names: Iterable[str]) -> str:
    """Model types, each once, though several of its classes may be there."""
    return ", ".join(f"`{name}`" for name in sorted({name.partition("+")[0] for name in names}))


def _is_sparse(record: Record) -> bool:
    return record["outcome"] == "sparse"


def _of_task(families: dict[str, Record], task: str) -> list[str]:
    return [name for name, record in families.items() if record["task"] == task]


def _by_reason(families: dict[str, Record]) -> Cells:
    rows: dict[str, list[str]] = {}
    for name, record in families.items():
        reasons: list[str] = sorted({reason for layer in record["dense_layers"].values() for reason in layer})
        rows.setdefault("; ".join(REASONS.get(reason) or reason for reason in reasons), []).append(name)
    return "", ("why dense", "classes", "model types"), _longest_first(rows)


def _grouped(outcomes: tuple[str, ...], why: Callable[[Record], str]) -> Cells:
    _, families = read()
    rows: dict[str, list[str]] = {}
    for name, record in families.items():
        if record["outcome"] in outcomes:
            rows.setdefault(why(record), []).append(name)
    return "", ("why", "classes", "model types"), _longest_first(rows)


def _longest_first(rows: dict[str, list[str]]) -> list[tuple[str, int, str]]:
    return [(why, len(own), listed(own)) for why, own in sorted(rows.items(), key=lambda row: -len(row[1]))]


TABLES = {
    "sparse": sparse_table,
    "partly": partly_table,
    "dense": dense_table,
    "refused": refused_table,
    "cannot": cannot_table,
    "unverified": unverified_table,
}
