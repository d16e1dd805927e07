"""Tables of a context that was extended by dense and by sparse training, from `examples/extend_context.py`."""

import statistics
from collections.abc import Iterable, Iterator
from typing import Any

from gossamer.evaluate.metrics import bootstrap_interval

Table = tuple[str, tuple[str, ...], list[tuple[Any, ...]]]
NAMES = {
    "dense": "dense",
    "top_p": "MTraining, top-p 0.95",
    "longgen": "LongGen, layers 2 and 3 full",
    "longgen_early": "LongGen, layers 1 and 2 full",
    "window": "window of 256 and 64 first",
}
TRAINED = ("training", "steps", "processor seconds a step", "density", "text loss", "answer loss")
COMPARED = (
    ("each served as it was trained", ("top_p", "top_p"), ("dense", "dense")),
    ("both served dense", ("top_p", "dense"), ("dense", "dense")),
    ("both served top-p", ("top_p", "top_p"), ("dense", "top_p")),
)
SERVED = ("trained", "served", "models", "text loss", "answer loss", "right", "right, 95% interval")


def texts_of(found: dict[str, Any], trained: str, steps: int, served: str, length: int) -> list[list[dict[str, Any]]]:
    """What each seed's model, trained so long, answered about the texts of a length."""
    parts = [found["parts"].get(f"{trained}-{seed}-{steps}.{served}") for seed in range(3)]
    return [[text for text in part["texts"] if text["length"] == length] for part in parts if part]


def mean(texts: Iterable[Iterable[dict[str, Any]]], name: str) -> float:
    return statistics.fmean(text[name] for part in texts for text in part)


def right(texts: list[list[dict[str, Any]]]) -> tuple[int, int]:
    """Right answers, and all."""
    return tuple(sum(text[name] for part in texts for text in part) for name in ("right", "asked"))  # pyright: ignore


def interval(texts: list[list[dict[str, Any]]]) -> tuple[float, float]:
    """95% of the share of right answers, over texts: a text's questions, and its seeds, are no samples of their own."""
    same = zip(*texts, strict=True)
    return bootstrap_interval([statistics.fmean(text["right"] / text["asked"] for text in each) for each in same])


def moments(found: dict[str, Any], kind: str) -> Iterator[tuple[str, int]]:
    """The names and steps at which a training is looked at."""
    equal = found["long_stage"]["steps"]
    yield "equal steps", equal
    longer = max(equal, found["steps"][kind])
    if longer != equal:
        yield "equal time", longer


def extend_table(found: dict[str, Any]) -> Table:
    """Each kind as it was trained, on its own attention."""
    lengths = sorted({text["length"] for text in found["parts"]["base.dense"]["texts"]})
    longest, seconds = lengths[-1], found["parts"]["time"]["seconds"]
    base = [[text for text in found["parts"]["base.dense"]["texts"] if text["length"] == n] for n in lengths]
    rows: list[tuple[Any, ...]] = [
        ("before", 0, "", "1.00", *_losses([base[-1]]), *(f"{_share([texts]):.2f}" for texts in base))
    ]
    for kind, name in NAMES.items():
        for moment, steps in moments(found, kind):
            texts = {n: texts_of(found, kind, steps, kind, n) for n in lengths}
            if not texts[longest]:
                continue
            shares = tuple(f"{_share(texts[n]):.2f}" for n in lengths)
            density = f"{mean(texts[longest], 'density'):.2f}"
            rows.append(
                (f"{name}, {moment}", steps, f"{seconds[kind]:.2f}", density, *_losses(texts[longest]), *shares)
            )
    asked = right(texts_of(found, "window", found["long_stage"]["steps"], "window", longest))[1]
    above = (
        f"Losses in nats a token of held-out texts of {longest:,} tokens; of answers the share that is right, {asked} "
        "of each length and model; dense and top-p training at equal steps are means over three seeds."
    )
    return above, (*TRAINED, *(f"right at {n:,}" for n in lengths)), rows


def seeds_table(found: dict[str, Any]) -> Table:
    """Dense and top-p training at equal tokens, a row a seed, each served as it was trained."""
    longest, steps = found["long_stage"]["length"], found["long_stage"]["steps"]
    kinds = [texts_of(found, kind, steps, kind, longest) for kind in ("dense", "top_p")]
    rows = [
        (seed, *(f"{mean([texts], name):.3f}" for name in ("loss", "answer_loss") for texts in pair))
        for seed, pair in enumerate(zip(*kinds, strict=True))
    ]
    header = ("seed", "text loss, dense", "text loss, top-p", "answer loss, dense", "answer loss, top-p")
    return f"{longest:,} tokens, {steps} steps; losses in nats a token.", header, rows


def differences_table(found: dict[str, Any]) -> Table:
    """Top-p training less dense training at equal tokens, by seed, with intervals over texts."""
    longest, steps = found["long_stage"]["length"], found["long_stage"]["steps"]
    rows = []
    for what, mine, other in COMPARED:
        one, two = (texts_of(found, trained, steps, served, longest) for trained, served in (mine, other))
        for name in ("loss", "answer_loss"):
            each = [[a[name] - b[name] for a, b in zip(*pair, strict=True)] for pair in zip(one, two, strict=True)]
            seeds = ", ".join(f"{statistics.fmean(values):+.3f}" for values in each)
            of_texts = [statistics.fmean(values) for values in zip(*each, strict=True)]
            low, high = bootstrap_interval(of_texts)
            words = {"loss": "text", "answer_loss": "answers"}[name]
            rows.append((what, words, f"{statistics.fmean(of_texts):+.3f}", f"{low:+.3f} to {high:+.3f}", seeds))
    header = ("top-p training less dense training", "loss of", "difference", "95% interval", "by seed")
    return "Nats a token; intervals are over texts, each a mean over the seeds.", header, rows


def served_table(found: dict[str, Any]) -> Table:
    """Each training at equal steps, served dense and sparse, at the longest length."""
    longest, steps = found["long_stage"]["length"], found["long_stage"]["steps"]
    rows = []
    for trained, name in NAMES.items():
        for served, how in NAMES.items():
            texts = texts_of(found, trained, steps, served, longest)
            if texts:
                low, high = interval(texts)
                good, asked = right(texts)
                figures = (*_losses(texts), f"{good} of {asked}", f"{low:.2f} to {high:.2f}")
                rows.append((name, how, len(texts), *figures))
    return f"{longest:,} tokens, {steps} steps.", SERVED, rows


def _losses(texts: list[list[dict[str, Any]]]) -> tuple[str, str]:
    return f"{mean(texts, 'loss'):.3f}", f"{mean(texts, 'answer_loss'):.3f}"


def _share(texts: list[list[dict[str, Any]]]) -> float:
    good, asked = right(texts)
    return good / asked
