"""Variable tracking: a value is handed from name to name, and all names that had it are asked for (RULER, 3.3).

    The value 48213 goes to amber falcon.
    ... text ...
    The value of amber falcon goes to river stone.

    Where does the value 48213 go? The value 48213 goes to amber falcon goes to river stone ...

As in RULER: one chain of 4 hops in the order of the text, a short worked example before it, every name must be found.
Names are two words instead of five letters, and hops are sentences instead of assignments. With several turns there
are as many chains, and each is asked for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack, noise
from gossamer.evaluate.tasks.base import Sample, Task, Turn, fit
from gossamer.evaluate.tasks.placement import draw_depths, place
from gossamer.evaluate.words import draw_names, draw_numbers

__all__ = ["CHAIN_QUESTION", "CHAIN_START", "CHAIN_STEP", "VariableTracking"]

CHAIN_START = "The value {value} goes to {name}."
CHAIN_STEP = "The value of {source} goes to {name}."
CHAIN_QUESTION = "\n\nWhere does the value {value} go? The value {value} goes to"
_TOKENS_PER_NAME = 14


@dataclass(frozen=True)
class VariableTracking(Task):
    """All names of a chain.

    Fields:
        chains: chains in the text, at least as many as are asked for.
        hops: times that a value is handed on; a chain has one name more.
        digits: digits of a value.
        haystack: ``text`` or ``noise`` (one line, repeated, as in RULER).
        example: put a worked example of two hops before the text.
    """

    name: ClassVar[str] = "variable_tracking"
    chains: int = 1
    hops: int = 4
    digits: int = 5
    haystack: str = "text"
    example: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.haystack not in ("text", "noise"):
            raise ValueError(f"{self.name}.haystack must be text or noise, got {self.haystack!r}")
        if self.digits < 4:
            raise ValueError(f"{self.name}.digits must be at least 4, got {self.digits}: short numbers occur in texts")

    @property
    def max_new_tokens(self) -> int:
        return _TOKENS_PER_NAME * (self.hops + 1)

    @property
    def one_line(self) -> bool:
        return False

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        if self.haystack == "noise":
            haystack = noise(8 * length)
        chains = max(self.chains, self.turns)
        each = self.hops + 1
        shown = 3 if self.example else 0
        names = draw_names(haystack.lowered, chains * each + shown, rng)
        values = draw_numbers(haystack.text, chains + 1, self.digits, rng)
        members = [names[i * each : (i + 1) * each] for i in range(chains)]
        head = _example(values[-1], names[chains * each :]) if self.example else ""
        facts: list[str] = []
        depths: list[float] = []
        for value, chain in zip(values, members, strict=False):
            facts += _facts(value, chain)
            depths += draw_depths(each, rng)
        questions = [CHAIN_QUESTION.format(value=value) for value in values[: self.turns]]

        def render(text: str) -> str:
            return head + place(text, facts, depths)[0]

        used, tokens = fit(render, questions, haystack, tokenizer, length - self.max_new_tokens, rng)
        turns = [Turn(question, tuple(members[i])) for i, question in enumerate(questions)]
        return Sample(render(used), tuple(turns), tokens)


def _facts(value: str, names: list[str]) -> list[str]:
    steps = [CHAIN_STEP.format(source=source, name=name) for source, name in pairwise(names)]
    return [CHAIN_START.format(value=value, name=names[0]), *steps]


def _example(value: str, names: list[str]) -> str:
    question = CHAIN_QUESTION.format(value=value).lstrip("\n")
    return "\n".join(_facts(value, names)) + f"\n{question} {' goes to '.join(names)}.\n\n"
