"""Math find: the largest, smallest or middle number of a long list (InfiniteBench's Math.Find, 2402.13718, 3.3)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import first_number_matches
from gossamer.evaluate.tasks.base import Sample, Task, Turn, count_tokens, fit, largest

__all__ = ["MathFind"]

_ASKED = ("largest", "smallest", "second largest", "second smallest", "median")
_LIST = "A list of numbers: "
_QUESTION = "\n\nWhat is the {which} number of the list? The {which} number of the list is"


@dataclass(frozen=True)
class MathFind(Task):
    """One number of a list of different numbers; what is asked for is drawn, and differs between the turns."""

    name: ClassVar[str] = "math_find"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.turns > len(_ASKED):
            raise ValueError(f"{self.name}.turns must be at most {len(_ASKED)}, got {self.turns}: {', '.join(_ASKED)}")

    @property
    def max_new_tokens(self) -> int:
        return 12

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        budget = length - self.max_new_tokens
        numbers = rng.sample(range(max(100_000, 10 * length)), max(5, length))
        which = rng.sample(_ASKED, self.turns)
        questions = [_QUESTION.format(which=kind) for kind in which]

        def body(count: int) -> str:
            return _LIST + ", ".join(map(str, numbers[:count])) + "."

        longest = max(questions, key=len)
        count = largest(lambda n: count_tokens(tokenizer, "\n\n" + body(n) + longest), budget, len(numbers))
        # The median of an odd number of numbers is one of them.
        count -= count % 2 == 0
        if count < 5:
            raise ValueError(
                f"{self.name}: a list of 5 numbers does not fit into {length} tokens; ask for a longer length"
            )
        made, ordered = body(count), sorted(numbers[:count])
        answers = dict(
            zip(_ASKED, (ordered[-1], ordered[0], ordered[-2], ordered[1], ordered[count // 2]), strict=True)
        )

        def render(text: str) -> str:
            return f"{text}\n\n{made}"

        used, tokens = fit(render, questions, haystack, tokenizer, budget, rng)
        context = render(used)
        turns = []
        # Not by searching for the number: it may be the start of another one.
        starts = accumulate((len(f"{number}, ") for number in numbers[:count]), initial=len(used) + len("\n\n" + _LIST))
        where = dict(zip(numbers, starts, strict=False))
        for question, kind in zip(questions, which, strict=True):
            answer = answers[kind]
            turns.append(Turn(question, (str(answer),), where[answer] / len(context)))
        return Sample(context, tuple(turns), tokens)

    def score(self, generated: str, references: Sequence[str]) -> float:
        return first_number_matches(generated, references)
