"""Prompts to calibrate on, and others that the choice must hold on: windows of texts, or generated ones."""

from __future__ import annotations

import hashlib
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
        held_out: as many other prompts of each source; or prompts of ``others``, if there are any.
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
        self._job = Job((Policy.of("dense"),), tasks, tuple(lengths), every, haystack, text, seed=seed)
        self._windows = {
            n: Windows(subject, source, seed) for n, source in enumerate(self._sources) if isinstance(source, Haystack)
        }
        # Prompts of a source that is held out alone begin with the first.
        kept = range(len(sources), len(self._sources)) if others else range(len(sources))
        begin = 0 if others else count
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
            return self._windows[sample.source].tokens(sample.length, sample.index)
        return self._job.prompt(self._subject, source.label(), sample.length, sample.index)

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
