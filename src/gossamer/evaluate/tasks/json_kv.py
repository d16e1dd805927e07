"""JSON key-value: the value of one key of a large object of UUIDs (Liu et al., 2307.03172, 3; HELMET, 2410.02694).

One isolated key among uniform distractors: hard for estimators that look at blocks.
"""

from __future__ import annotations

import random
import uuid
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.tasks.base import Sample, Task, Turn, count_tokens, fit, largest

__all__ = ["JsonKeyValue"]

_QUESTION = '\n\nWhat is the value of the key "{key}"? "{key}": "'


@dataclass(frozen=True)
class JsonKeyValue(Task):
    """The UUID that belongs to a UUID. Which pairs are asked for is uniform."""

    name: ClassVar[str] = "json_kv"

    @property
    def max_new_tokens(self) -> int:
        return 48

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        budget = length - self.max_new_tokens
        pairs = [(_uuid(rng), _uuid(rng)) for _ in range(max(self.turns, length // 20))]

        def body(count: int) -> str:
            return "{\n" + ",\n".join(f'"{key}": "{value}"' for key, value in pairs[:count]) + "\n}"

        longest = _QUESTION.format(key=pairs[0][0])
        # Keys have different numbers of tokens; what the longest question takes more is left free.
        count = largest(lambda n: count_tokens(tokenizer, "\n\n" + body(n) + longest), budget - 12, len(pairs))
        if count < self.turns:
            raise ValueError(
                f"{self.name}: {self.turns} pairs do not fit into {length} tokens; ask for a longer length"
            )
        asked = rng.sample(range(count), self.turns)
        questions = [_QUESTION.format(key=pairs[i][0]) for i in asked]
        made = body(count)

        def render(text: str) -> str:
            return f"{text}\n\n{made}"

        used, tokens = fit(render, questions, haystack, tokenizer, budget, rng)
        context = render(used)
        turns = [
            Turn(question, (pairs[i][1],), context.index(f'"{pairs[i][0]}"') / len(context))
            for question, i in zip(questions, asked, strict=True)
        ]
        return Sample(context, tuple(turns), tokens)


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
