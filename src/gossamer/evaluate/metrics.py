"""Metrics of generated answers, and intervals of their means."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence

__all__ = ["bootstrap_interval", "first_number_matches", "first_word_matches", "string_match_all"]

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


def bootstrap_interval(values: Sequence[float], *, draws: int = 1000, level: float = 0.95) -> tuple[float, float]:
    """Percentile bootstrap interval of the mean; each value is one independent sample. Deterministic.

    Raises:
        ValueError: no values.
    """
    if not values:
        raise ValueError("an interval needs at least one value, got none")
    rng = random.Random(0)
    means = sorted(sum(rng.choices(values, k=len(values))) / len(values) for _ in range(draws))
    tail = (1 - level) / 2
    return means[int(tail * draws)], means[min(draws - 1, int((1 - tail) * draws))]
