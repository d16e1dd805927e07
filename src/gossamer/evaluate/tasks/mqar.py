"""Multi-query associative recall: many key-value pairs, several keys asked for (Zoology, 2312.04927, 3.1).

Pairs fill the context; the pairs that are asked for lie a number of pairs before its end that follows a power law,
P(gap) ~ gap^(power - 1), with Zoology's power of 0.01: mostly near, sometimes far. Keys and values are compounds of
two words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import first_word_matches
from gossamer.evaluate.tasks.base import Sample, Task, Turn, count_tokens, fit, largest
from gossamer.evaluate.words import draw_compounds

__all__ = ["MultiQueryRecall", "power_law_gaps"]

_PAIR = "The pair of {key} is {value}."
_QUESTION = "\nThe pair of {key} is"
_CHAT_QUESTION = "\n\nWhat is the pair of {key}? The pair of {key} is"


@dataclass(frozen=True)
class MultiQueryRecall(Task):
    """The value of each of several keys; four turns by default, which is what the task is about."""

    name: ClassVar[str] = "mqar"
    turns: int = 4

    @property
    def max_new_tokens(self) -> int:
        return 14

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        budget = length - self.max_new_tokens
        limit = max(self.turns, length // 8)
        drawn = draw_compounds(2 * limit, rng)
        pairs = list(zip(drawn[::2], drawn[1::2], strict=True))

        def body(count: int) -> str:
            # The end is what the gaps are counted from, so it stays when pairs are left out.
            return "\n".join(_PAIR.format(key=key, value=value) for key, value in pairs[len(pairs) - count :])

        longest = _QUESTION.format(key=pairs[0][0])
        count = largest(lambda n: count_tokens(tokenizer, "\n\n" + body(n) + longest), budget - 12, limit)
        if count < self.turns:
            raise ValueError(
                f"{self.name}: {self.turns} pairs do not fit into {length} tokens; ask for a longer length"
            )
        asked = [pairs[-1 - gap] for gap in power_law_gaps(self.turns, count, rng)]
        questions = [_QUESTION.format(key=key) for key, _ in asked]
        made = body(count)

        def render(text: str) -> str:
            return f"{text}\n\n{made}"

        used, tokens = fit(render, questions, haystack, tokenizer, budget, rng)
        context = render(used)
        turns = [
            Turn(
                question,
                (value,),
                context.index(_PAIR.format(key=key, value=value)) / len(context),
                _CHAT_QUESTION.format(key=key),
            )
            for question, (key, value) in zip(questions, asked, strict=True)
        ]
        return Sample(context, tuple(turns), tokens)

    def score(self, generated: str, references: Sequence[str]) -> float:
        return first_word_matches(generated, references)


def power_law_gaps(count: int, limit: int, rng: random.Random, power: float = 0.01) -> list[int]:
    """`count` different gaps in 0 ... limit - 1, drawn in proportion to ``(gap + 1) ** (power - 1)``."""
    weights = {gap: (gap + 1) ** (power - 1) for gap in range(limit)}
    gaps = []
    for _ in range(count):
        gap = rng.choices(list(weights), weights=list(weights.values()))[0]
        del weights[gap]
        gaps.append(gap)
    return gaps
