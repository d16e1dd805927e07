"""Frequent words: the three most frequent made-up words of a text with Zipfian counts (RULER's FWE, 2404.06654, 3.4).

As in RULER: words of six letters, one distinct word per 50 tokens of length, the k-th of them about N k^-alpha /
zeta(alpha) times in N words with alpha = 2. The most frequent one is noise (``...``) and does not count: ranks 2 to 4
are asked for. With several turns there are as many texts, and each is asked for.
"""

from __future__ import annotations

import random
import string
from dataclasses import dataclass
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.tasks.base import Sample, Task, Turn, count_tokens, fit, largest

__all__ = ["FrequentWords", "zipf_counts"]

_QUESTION = (
    "\n\nWhich three coded words occur most often in text {text}, dots left out? "
    "The three most frequent coded words of text {text} are:"
)
_ZETA_2 = 1.6449340668482264
NOISE = "..."


@dataclass(frozen=True)
class FrequentWords(Task):
    """Ranks 2 to 4 of a text of coded words."""

    name: ClassVar[str] = "frequent_words"

    @property
    def max_new_tokens(self) -> int:
        return 36

    @property
    def one_line(self) -> bool:
        return False

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        budget = length - self.max_new_tokens
        vocabulary = max(8, length // 50 // self.turns)
        names = [str(i + 1) for i in range(self.turns)]
        words = [_coded_words(vocabulary - 1, rng) for _ in names]
        questions = [_QUESTION.format(text=name) for name in names]
        seed = rng.getrandbits(64)

        def body(total: int) -> str:
            draw = random.Random(seed)
            texts = []
            for name, coded in zip(names, words, strict=True):
                counts = zipf_counts(total, vocabulary)
                drawn = [word for word, n in zip([NOISE, *coded], counts, strict=True) for _ in range(n)]
                draw.shuffle(drawn)
                texts.append(f"Text {name}: " + " ".join(drawn))
            return "\n\n".join(texts)

        longest = max(questions, key=len)
        total = largest(lambda n: count_tokens(tokenizer, "\n\n" + body(n) + longest), budget, length)
        made = body(total)

        def render(text: str) -> str:
            return f"{text}\n\n{made}"

        used, tokens = fit(render, questions, haystack, tokenizer, budget, rng)
        turns = [Turn(question, tuple(coded[:3])) for question, coded in zip(questions, words, strict=True)]
        return Sample(render(used), tuple(turns), tokens)


def zipf_counts(total: int, vocabulary: int) -> list[int]:
    """How often each rank occurs: ``total k^-2 / zeta(2)``, rounded down, at least once for the first four.

    Ranks 2 to 5 are kept apart by at least one, so that the answer is unique however short the text is.
    """
    counts = [int(total * k**-2.0 / _ZETA_2) for k in range(1, vocabulary + 1)]
    for k in range(min(4, vocabulary - 1), -1, -1):
        below = counts[k + 1] if k + 1 < vocabulary else 0
        counts[k] = max(counts[k], below + 1)
    return counts


def _coded_words(count: int, rng: random.Random) -> list[str]:
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(rng.choices(string.ascii_lowercase, k=6))] = None
    return list(words)
