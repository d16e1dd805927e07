"""Needles in a haystack: facts with a two-word key and a number, hidden in any text (RULER's NIAH, 2404.06654, 3.2).

    ... some text.
    The number for amber falcon is 4837261.
    more text ...

    What is the number for amber falcon? The number for amber falcon is

The question repeats the needle up to the number, so that the words right before the answer are the same in both
places. RULER's definitions, in words of our own: numbers have 7 digits, depths are drawn from 40 levels, all
references must be found. RULER's keys are one word or a UUID; its haystack of essays is any text here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack, noise
from gossamer.evaluate.tasks.base import Sample, Task, Turn, fit
from gossamer.evaluate.tasks.placement import draw_depths, place
from gossamer.evaluate.words import draw_names, draw_numbers

__all__ = [
    "LIST_QUESTION",
    "NEEDLE",
    "QUESTION",
    "VALUES_QUESTION",
    "MultiKey",
    "MultiQuery",
    "MultiValue",
    "SingleNeedle",
]

NEEDLE = "The number for {key} is {value}."
QUESTION = "\n\nWhat is the number for {key}? The number for {key} is"
VALUES_QUESTION = "\n\nWhat are all the numbers for {key}? In a list, {key} is"
LIST_QUESTION = "\n\nWhat are the numbers for these, {keys}? In a list, {key} is"

HAYSTACKS = ("text", "noise", "needles")
# What one value and the words before the next one may take, with a tokenizer that splits numbers into digits.
_TOKENS_PER_VALUE = 24


@dataclass(frozen=True)
class SingleNeedle(Task):
    """One number to find. With several turns, as many needles are hidden and each is asked for.

    Fields:
        keys: keys in the text, at least as many as are asked for.
        values: numbers of each key that is asked for.
        queries: keys asked for in one question.
        digits: digits of a number.
        haystack: ``text``, ``noise`` (one line, repeated) or ``needles`` (nothing but other needles).
    """

    name: ClassVar[str] = "needle_single"
    keys: int = 1
    values: int = 1
    queries: int = 1
    digits: int = 7
    haystack: str = "text"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.haystack not in HAYSTACKS:
            raise ValueError(f"{self.name}.haystack must be one of {', '.join(HAYSTACKS)}, got {self.haystack!r}")
        if self.values > 1 and self.queries > 1:
            raise ValueError(f"{self.name}: either values or queries can be above 1, got {self.values}, {self.queries}")
        if self.digits < 4:
            raise ValueError(f"{self.name}.digits must be at least 4, got {self.digits}: short numbers occur in texts")

    @property
    def max_new_tokens(self) -> int:
        return _TOKENS_PER_VALUE * max(self.values, self.queries)

    @property
    def one_line(self) -> bool:
        return max(self.values, self.queries) == 1

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        if self.haystack == "noise":
            haystack = noise(8 * length)
        asked = self.turns * self.queries
        keys = draw_names(haystack.lowered, max(self.keys, asked), rng)
        counts = [self.values if i < asked else 1 for i in range(len(keys))]
        numbers = iter(draw_numbers(haystack.text, sum(counts), self.digits, rng))
        values = [[next(numbers) for _ in range(count)] for count in counts]
        facts = [NEEDLE.format(key=key, value=v) for key, group in zip(keys, values, strict=True) for v in group]
        depths = draw_depths(len(facts), rng)
        rng.shuffle(depths)
        groups = [list(range(i, i + self.queries)) for i in range(0, asked, self.queries)]
        questions = [self._question([keys[i] for i in group]) for group in groups]
        budget = length - self.max_new_tokens

        if self.haystack == "needles":
            facts, depths = self._bury(facts, depths, keys, haystack, tokenizer, budget, questions, rng)
        used, tokens = fit(lambda text: place(text, facts, depths)[0], questions, haystack, tokenizer, budget, rng)
        context, starts = place(used, facts, depths)
        firsts = [sum(counts[:i]) for i in range(len(keys))]
        turns = []
        for question, group in zip(questions, groups, strict=True):
            lone = len(group) == 1 and self.values == 1
            references = tuple(value for i in group for value in values[i])
            turns.append(Turn(question, references, starts[firsts[group[0]]] if lone else None))
        return Sample(context, tuple(turns), tokens)

    def _question(self, keys: Sequence[str]) -> str:
        if len(keys) > 1:
            return LIST_QUESTION.format(keys=", ".join(keys), key=keys[0])
        return (VALUES_QUESTION if self.values > 1 else QUESTION).format(key=keys[0])

    def _bury(
        self,
        facts: list[str],
        depths: list[float],
        keys: Sequence[str],
        haystack: Haystack,
        tokenizer: Any,
        budget: int,
        questions: Sequence[str],
        rng: random.Random,
    ) -> tuple[list[str], list[float]]:
        """The facts among as many others as fit; the little text that is left over comes first."""
        from gossamer.evaluate.tasks.base import count_tokens, largest
        from gossamer.evaluate.words import KEY_WORDS

        longest = max(questions, key=len)
        taken = set(keys)

        def others(count: int) -> list[str]:
            draw = random.Random(seed)
            made: dict[str, None] = {}
            while len(made) < count:
                key = f"{draw.choice(KEY_WORDS)} {draw.choice(KEY_WORDS)}"
                if key not in taken:
                    value = draw.randrange(10 ** (self.digits - 1), 10**self.digits)
                    made[NEEDLE.format(key=key, value=value)] = None
            return list(made)

        def buried(count: int) -> list[str]:
            lines = others(count)
            for fact, depth in sorted(zip(facts, depths, strict=True), key=lambda pair: -pair[1]):
                lines.insert(round(depth * count), fact)
            return lines

        seed = rng.getrandbits(64)
        room = budget - 8
        count = largest(lambda n: count_tokens(tokenizer, "\n".join(buried(n)) + longest), room, budget)
        lines = buried(count)
        where = {fact: i for i, fact in enumerate(lines)}
        rest = [line for line in lines if line not in set(facts)]
        ordered = facts + rest
        return ordered, [1.0 + where[fact] for fact in ordered]


@dataclass(frozen=True)
class MultiKey(SingleNeedle):
    """One number to find among those of other keys."""

    name: ClassVar[str] = "needle_multikey"
    keys: int = 4


@dataclass(frozen=True)
class MultiValue(SingleNeedle):
    """All numbers of one key, in any order."""

    name: ClassVar[str] = "needle_multivalue"
    values: int = 4


@dataclass(frozen=True)
class MultiQuery(SingleNeedle):
    """The numbers of several keys, asked for in one question."""

    name: ClassVar[str] = "needle_multiquery"
    keys: int = 4
    queries: int = 4
