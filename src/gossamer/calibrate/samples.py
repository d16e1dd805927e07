"""Prompts to calibrate on, and others that the choice must hold on: windows of texts, or generated ones."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.runner import Job
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks import Task
from gossamer.policy import Policy

__all__ = ["Sample", "Samples"]


# Passages to hold out that are looked at, beyond those that are needed, for some that share nothing with others.
_MORE_WINDOWS = 200


@dataclass(frozen=True)
class Sample:
    """What identifies a prompt.

    Fields:
        source: of which text or task, by its place in `Samples`.
        held_out: not chosen by; the choice is judged on it.
    """

    source: int
    length: int
    index: int
    held_out: bool

    @property
    def key(self) -> str:
        return f"{'held out' if self.held_out else 'calibration'} {self.source}, {self.length} tokens, {self.index}"


class Samples:
    """Several prompts of each source at each length, each made from the seed and what identifies it alone.

    Args:
        sources: texts of the user's, or tasks that are generated from ``haystack``.
        held_out: as many other prompts of each source; or prompts of ``others``, if there are any. Of a text that also
            chooses, passages that share no token with those that choose, as far as the text has them.
        others: texts or tasks of another kind, to hold out.
    """

    def __init__(
        self,
        subject: Subject,
        sources: Sequence[Haystack | Task],
        lengths: Sequence[int],
        *,
        count: int,
        held_out: int,
        others: Sequence[Haystack | Task] = (),
        haystack: Haystack,
        seed: int = 0,
    ) -> None:
        self._subject, self._sources = subject, [*sources, *others]
        tasks = tuple(dict.fromkeys(source for source in self._sources if isinstance(source, Task)))
        text = next((source for source in self._sources if isinstance(source, Haystack)), None)
        every = count + held_out
        self._wanted = held_out
        self._apart: dict[tuple[int, int], list[int]] = {}
        self._job = Job((Policy.of("dense"),), tasks, tuple(lengths), every, haystack, text, seed=seed)
        self._windows = {
            n: Windows(subject, source, seed) for n, source in enumerate(self._sources) if isinstance(source, Haystack)
        }
        # Prompts of a source that is held out alone begin with the first.
        kept = range(len(sources), len(self._sources)) if others else range(len(sources))
        begin = self._begin = 0 if others else count
        self.listed = [
            Sample(source, length, index, out)
            for length in sorted(lengths)
            for out, where, indices in (
                (False, range(len(sources)), range(count)),
                (True, kept, range(begin, begin + held_out)),
            )
            for source in where
            for index in indices
        ]

    def tokens(self, sample: Sample) -> Tensor:
        """``[1, S]``.

        Raises:
            ValueError: the text is too short, or the task does not fit into the length.
        """
        source = self._sources[sample.source]
        if isinstance(source, Haystack):
            return self._windows[sample.source].tokens(sample.length, self._window(sample))
        return self._job.prompt(self._subject, source.label(), sample.length, sample.index)

    def _window(self, sample: Sample) -> int:
        """Which of its text's windows."""
        if not sample.held_out:
            return sample.index
        key = sample.source, sample.length
        if key not in self._apart:
            self._apart[key] = self._held_out_windows(*key)
        found, at = self._apart[key], sample.index - self._begin
        return found[at] if at < len(found) else sys.maxsize  # more than the text has, which is refused there

    def _held_out_windows(self, source: int, length: int) -> list[int]:
        """As many as are wanted, first those that no prompt that chooses has a token of; none twice."""
        windows, text = self._windows[source], self._sources[source]
        choosing = [one for one in self.listed if not one.held_out and _same_text(self._sources[one.source], text)]
        taken = [(windows.start(one.length, one.index), one.length) for one in choosing]
        own = {one.index for one in choosing if one.length == length}
        clear: list[int] = []
        others: list[int] = []
        for index in range(len(own) + self._wanted + _MORE_WINDOWS):
            if index in own:
                continue
            try:
                start = windows.start(length, index)
            except ValueError:  # it has no more
                break
            apart = all(start + length <= at or at + size <= start for at, size in taken)
            (clear if apart else others).append(index)
            if len(clear) == self._wanted:
                break
        return [*clear, *others][: self._wanted]

    def name(self, source: int) -> str:
        """Of a source: its task, or the last part of its path."""
        one = self._sources[source]
        return one.label() if isinstance(one, Task) else one.short_name

    def to_dict(self) -> dict[str, Any]:
        """What was read, with hashes of all tokens."""
        return {
            "sources": [self.name(n) for n in range(len(self._sources))],
            "calibration_sha256": self._digest(False),
            "held_out_sha256": self._digest(True),
        }

    def _digest(self, held_out: bool) -> str:
        digest = hashlib.sha256()
        for sample in self.listed:
            if sample.held_out == held_out:
                digest.update(self.tokens(sample).cpu().numpy().tobytes())
        return digest.hexdigest()


def _same_text(one: Haystack | Task, other: Haystack | Task) -> bool:
    return isinstance(one, Haystack) and isinstance(other, Haystack) and one.text == other.text
