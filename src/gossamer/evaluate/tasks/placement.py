"""Facts at chosen depths of a text, at ends of lines and sentences."""

from __future__ import annotations

import bisect
import random
import re
from collections.abc import Sequence

__all__ = ["draw_depths", "place"]

_BOUNDARY = re.compile(r"\n|[.!?](?= )")
_LEVELS = 40


def draw_depths(count: int, rng: random.Random) -> list[float]:
    """`count` ascending depths of 40 evenly spaced ones from 0 to 1 (RULER, 2404.06654), each once while they last."""
    levels = [i / (_LEVELS - 1) for i in range(_LEVELS)]
    chosen: list[float] = []
    while len(chosen) < count:
        chosen += rng.sample(levels, min(_LEVELS, count - len(chosen)))
    return sorted(chosen)


def place(passage: str, facts: Sequence[str], depths: Sequence[float]) -> tuple[str, list[float]]:
    """The passage with each fact at the line or sentence end at or before its depth.

    Facts at the same place keep their order.

    Returns:
        the text, and for each fact the depth at which it begins, as a fraction of the text.
    """
    ends = [0, *(match.end() for match in _BOUNDARY.finditer(passage))]
    order = sorted(range(len(facts)), key=lambda i: depths[i])
    pieces: list[str] = []
    starts = [0] * len(facts)
    previous = length = 0

    def add(piece: str) -> None:
        nonlocal length
        pieces.append(piece)
        length += len(piece)

    for i in order:
        position = ends[bisect.bisect_right(ends, depths[i] * len(passage)) - 1]
        add(passage[previous:position])
        at_line = position == 0 or passage[position - 1] == "\n"
        starts[i] = length + (not at_line)
        add(f"{facts[i]}\n" if at_line else f" {facts[i]}")
        previous = position
    add(passage[previous:])
    return "".join(pieces), [start / max(1, length) for start in starts]
