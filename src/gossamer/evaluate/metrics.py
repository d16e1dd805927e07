"""Metrics of generated answers, and intervals of their means."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Sequence

__all__ = [
    "Interval",
    "bootstrap_interval",
    "difference_interval",
    "first_number_matches",
    "first_word_matches",
    "pooled_interval",
    "score_interval",
    "shown_interval",
    "string_match_all",
    "wilson_interval",
    "words_in_order",
]

Interval = tuple[float, float]
_Z = 1.959964

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"[\w-]+")


def string_match_all(generated: str, references: Sequence[str]) -> float:
    """Share of the references that the text contains, whatever their case (RULER, 2404.06654, for all tasks but QA)."""
    if not references:
        raise ValueError("a score needs at least one reference, got none")
    lowered = generated.lower()
    return sum(reference.lower() in lowered for reference in references) / len(references)


def first_number_matches(generated: str, references: Sequence[str]) -> float:
    """1.0 if the first number of the text is one of the references, else 0.0 (InfiniteBench, 2402.13718)."""
    found = _NUMBER.search(generated)
    return float(found is not None and found.group() in references)


def first_word_matches(generated: str, references: Sequence[str]) -> float:
    """1.0 if the first word of the text is one of the references, else 0.0."""
    found = _WORD.search(generated)
    return float(found is not None and found.group().lower() in {reference.lower() for reference in references})


def words_in_order(generated: str, reference: str) -> float:
    """Share of the reference's words that the text begins with, up to the first that differs."""
    expected, found = _WORD.findall(reference), _WORD.findall(generated)
    if not expected:
        raise ValueError("a score needs a reference of at least one word, got none")
    same = 0
    while same < min(len(expected), len(found)) and expected[same] == found[same]:
        same += 1
    return same / len(expected)


def bootstrap_interval(values: Sequence[float], *, draws: int = 1000, level: float = 0.95) -> Interval:
    """Percentile bootstrap interval of the mean; each value is one independent sample. Deterministic.

    Where all values are equal it has no width, which says nothing of the next sample: see `score_interval` and
    `difference_interval`.

    Raises:
        ValueError: no values.
    """
    _require_values(values)
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    tail = (1 - level) / 2
    return means[int(tail * draws)], means[min(draws - 1, int((1 - tail) * draws))]


def wilson_interval(mean: float, count: int) -> Interval:
    """95% score interval of a share (E. B. Wilson, 1927): it has a width where all or none of the samples are right.

    Of a mean of values between 0 and 1 it is an upper bound of the width: no such values vary more than 0 and 1 do.
    """
    centre = mean + _Z * _Z / (2 * count)
    spread = _Z * math.sqrt(mean * (1 - mean) / count + _Z * _Z / (4 * count * count))
    scale = 1 + _Z * _Z / count
    # The ends touch 0 and 1 exactly where the mean does; rounding must not leave them a hair inside.
    low = 0.0 if mean == 0.0 else (centre - spread) / scale
    high = 1.0 if mean == 1.0 else (centre + spread) / scale
    return max(0.0, low), min(1.0, high)


def score_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of scores between 0 and 1.

    Wilson's where all scores are 0 or 1, or all are equal; else the bootstrap's.

    Raises:
        ValueError: no values.
    """
    _require_values(values)
    if len(set(values)) == 1 or set(values) <= {0.0, 1.0}:
        return wilson_interval(sum(values) / len(values), len(values))
    return bootstrap_interval(values)


def difference_interval(values: Sequence[float]) -> Interval:
    """95% interval of the mean of paired differences between scores, each from -1 to 1.

    The bootstrap's where the differences vary. Where n are equal, other differences have a share of at most
    ``1 - 0.05 ** (1 / n)`` with 95% confidence, about 3/n (the rule of three: Hanley and Lippman-Hand, JAMA 249:1743,
    1983); the mean is then no further away than if that share were at -1 or at 1.

    Raises:
        ValueError: no values.
    """
    _require_values(values)
    if len(set(values)) > 1:
        return bootstrap_interval(values)
    others = 1 - 0.05 ** (1 / len(values))
    return values[0] * (1 - others) - others, values[0] * (1 - others) + others


def pooled_interval(groups: Sequence[Sequence[float]], of: Callable[[Sequence[float]], Interval]) -> Interval:
    """95% interval of the mean of all values of several tasks, from the interval of each task's own mean.

    What is added up are the squared distances of each end from its mean (the method of variance estimates recovery:
    Zou and Donner, Statistics in Medicine 27:1693, 2008), weighted as the values are. Tasks are strata: how much they
    differ from one another does not widen the interval, and a task where all samples are alike still counts.

    Args:
        of: interval of one group.

    Raises:
        ValueError: no groups, or an empty one.
    """
    if len(groups) == 1:
        return of(groups[0])
    total = sum(map(len, groups))
    _require_values(range(total))
    mean = sum(map(sum, groups)) / total
    below = above = 0.0
    for values in groups:
        own, weight = sum(values) / len(values), len(values) / total
        low, high = of(values)
        below += (weight * (own - low)) ** 2
        above += (weight * (high - own)) ** 2
    return mean - math.sqrt(below), mean + math.sqrt(above)


def shown_interval(interval: Sequence[float] | None, form: str = "{:.3f}") -> str:
    """What follows a figure in a table: its interval in brackets, or nothing."""
    return "" if interval is None else f" [{form.format(interval[0])}, {form.format(interval[1])}]"


def _require_values(values: Sequence[float]) -> None:
    if not values:
        raise ValueError("an interval needs at least one value, got none")
