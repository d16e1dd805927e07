"""How far an evaluation is: a bar on a terminal, else a line for each task and length that is done, or a minute."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

__all__ = ["Progress"]

_QUIET = 60.0  # seconds without a line, at most, where cells take less


class Progress:
    """Counts cells by what they cost, so that the time left holds when longer prompts come last.

    Args:
        cells: length, task and cost of each cell that will be run, in order.
    """

    def __init__(self, cells: Sequence[tuple[int, str, float]]) -> None:
        from tqdm import tqdm

        self._costs = {(length, what): cost for length, what, cost in cells}
        self._left = Counter((length, what) for length, what, _ in cells)
        self._groups = len(self._left)
        self._begun = self._said = time.monotonic()
        self._all, self._done = sum(cost for *_, cost in cells), 0.0
        self._bar = tqdm(
            total=self._all,
            file=sys.stderr,
            disable=not sys.stderr.isatty(),
            smoothing=0.1,
            bar_format="{desc}: {percentage:3.0f}% |{bar}| {elapsed}, {remaining} left",
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, length: int, what: str) -> None:
        """One cell is done."""
        group = length, what
        self._left[group] -= 1
        self._done += self._costs[group]
        self._bar.update(self._costs[group])
        self._bar.set_description(f"{length} {what}")
        if not self._bar.disable:
            return
        now = time.monotonic()
        if self._left[group] == 0:
            finished = sum(count == 0 for count in self._left.values())
            self._say(f"{finished}/{self._groups}: {what} at {length} tokens is done", now)
        elif now - self._said >= _QUIET:
            self._say(f"{self._done / self._all:.0%}: {what} at {length} tokens goes on", now)

    def _say(self, line: str, now: float) -> None:
        self._said, spent = now, now - self._begun
        left = spent * (self._all - self._done) / self._done
        print(f"{line}; {spent:.0f} s so far, about {left:.0f} s left", file=sys.stderr, flush=True)
