"""How far an evaluation is: a bar on a terminal, else a line for each task and length that is done."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Sequence

__all__ = ["Progress"]


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
        self._begun = time.monotonic()
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
        if self._bar.disable and self._left[group] == 0:
            finished = sum(count == 0 for count in self._left.values())
            spent = time.monotonic() - self._begun
            left = spent * (self._all - self._done) / self._done
            print(
                f"{finished}/{self._groups}: {what} at {length} tokens is done; {spent:.0f} s so far, about "
                f"{left:.0f} s left",
                file=sys.stderr,
                flush=True,
            )
