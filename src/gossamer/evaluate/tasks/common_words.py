"""Common words: the ten words that occur most often in a numbered list (RULER's CWE, 2404.06654, 3.4).

As in RULER: ten words occur 30 times each and all others 3 times (6 and 1 below 4,096 tokens), in random order, and a
short list with its answer comes first. Words are compounds such as ``amber-falcon``, so that there are enough of
them. With several turns there are as many lists, and each is asked for.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.tasks.base import Sample, Task, Turn, count_tokens, fit, largest
from gossamer.evaluate.words import draw_compounds

__all__ = ["CommonWords"]

_SHORT = 4096
_QUESTION = "\n\nWhich {count} words occur most often in list {list}? The {count} most common words of list {list} are:"


@dataclass(frozen=True)
class CommonWords(Task):
    """The most common words of a list.

    Fields:
        common: words to be found in each list.
    """

    name: ClassVar[str] = "common_words"
    common: int = 10

    @property
    def max_new_tokens(self) -> int:
        return 12 * self.common

    @property
    def one_line(self) -> bool:
        return False

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        often, rarely, shown = (30, 3, (10, 3, 40)) if length // self.turns >= _SHORT else (6, 1, (3, 1, 20))
        budget = length - self.max_new_tokens
        pool = draw_compounds(min(60_000, length + 200), rng)
        few = min(self.common, 4)
        example_words, pool = pool[: few + shown[2]], pool[few + shown[2] :]
        entries = shown[2] - few
        example = _list("0", _repeat(example_words[:few], shown[0], example_words[few : few + entries], shown[1], rng))
        example += _QUESTION.format(count=few, list="0") + " " + ", ".join(example_words[:few]) + ".\n\n"
        names = [str(i + 1) for i in range(self.turns)]
        questions = [_QUESTION.format(count=self.common, list=name) for name in names]
        seed = rng.getrandbits(64)

        def lists(rare: int) -> tuple[str, list[list[str]]]:
            draw = random.Random(seed)
            texts, answers = [], []
            for i, name in enumerate(names):
                start = i * (self.common + rare)
                common = pool[start : start + self.common]
                others = pool[start + self.common : start + self.common + rare]
                texts.append(_list(name, _repeat(common, often, others, rarely, draw)))
                answers.append(common)
            return "\n\n".join(texts), answers

        longest = max(questions, key=len)
        limit = len(pool) // self.turns - self.common
        rare = largest(lambda n: count_tokens(tokenizer, "\n\n" + example + lists(n)[0] + longest), budget, limit)
        body, answers = lists(rare)

        def render(text: str) -> str:
            return f"{text}\n\n{example}{body}"

        used, tokens = fit(render, questions, haystack, tokenizer, budget, rng)
        turns = [Turn(question, tuple(words)) for question, words in zip(questions, answers, strict=True)]
        return Sample(render(used), tuple(turns), tokens)


def _repeat(common: list[str], often: int, others: list[str], rarely: int, rng: random.Random) -> list[str]:
    words = common * often + others * rarely
    rng.shuffle(words)
    return words


def _list(name: str, words: list[str]) -> str:
    return f"List {name}:\n" + " ".join(f"{i}. {word}" for i, word in enumerate(words, 1))
