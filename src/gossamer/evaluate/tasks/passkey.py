"""Passkey and number string: a number in repeated noise (InfiniteBench, Retrieve.PassKey and .Number, 2402.13718).

As there: the noise is one repeated line, a pass key has 5 digits, a number string 10 with repeated digits, each is
said twice in one sentence. With several turns there are numbered keys, and each is asked for.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack, noise
from gossamer.evaluate.metrics import first_number_matches
from gossamer.evaluate.tasks.base import Sample, Task, Turn, fit
from gossamer.evaluate.tasks.placement import draw_depths, place

__all__ = ["NumberString", "PassKey"]

_FACT = "The {what}{which} is {value}. Remember it. {value} is the {what}{which}."
_QUESTION = "\n\nWhat is the {what}{which}? The {what}{which} is"
# Without the word number, models that talk explain what a pass key is.
_CHAT_QUESTION = "\n\nWhich number is the {what}{which} in the text? The {what}{which} is the number"


@dataclass(frozen=True)
class PassKey(Task):
    """A number of 5 digits in noise."""

    name: ClassVar[str] = "passkey"
    what: ClassVar[str] = "pass key"

    @property
    def max_new_tokens(self) -> int:
        return 16

    def draw(self, rng: random.Random) -> str:
        return str(rng.randrange(10_000, 100_000))

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        values: list[str] = []
        while len(values) < self.turns:
            value = self.draw(rng)
            if value not in values:
                values.append(value)
        which = [f" number {i + 1}" if self.turns > 1 else "" for i in range(self.turns)]
        facts = [_FACT.format(what=self.what, which=w, value=v) for w, v in zip(which, values, strict=True)]
        questions = [_QUESTION.format(what=self.what, which=w) for w in which]
        depths = draw_depths(len(facts), rng)
        rng.shuffle(depths)
        filler = noise(8 * length)

        def render(text: str) -> str:
            return place(text, facts, depths)[0]

        used, tokens = fit(render, questions, filler, tokenizer, length - self.max_new_tokens, rng)
        context, starts = place(used, facts, depths)
        for_chat = [_CHAT_QUESTION.format(what=self.what, which=w) for w in which]
        turns = [Turn(q, (v,), s, c) for q, v, s, c in zip(questions, values, starts, for_chat, strict=True)]
        return Sample(context, tuple(turns), tokens)

    def score(self, generated: str, references: Sequence[str]) -> float:
        return first_number_matches(generated, references)


@dataclass(frozen=True)
class NumberString(PassKey):
    """A number of 10 digits, each digit of which is repeated at once, in noise."""

    name: ClassVar[str] = "number_string"
    what: ClassVar[str] = "sequence of digits"

    def draw(self, rng: random.Random) -> str:
        # Five digits, each twice: 1100554422.
        return "".join(digit * 2 for digit in f"{rng.randrange(1, 10)}{rng.randrange(10_000):04d}")
