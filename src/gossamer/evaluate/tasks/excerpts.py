"""Questions about the text itself, in which nothing is hidden: repeating a passage, and naming a function of code.

Every task that hides a fact has the fact stand out from its surroundings; here nothing does.
"""

from __future__ import annotations

import random
import re
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import first_word_matches, words_in_order
from gossamer.evaluate.tasks.base import Sample, Task, Turn, characters_needed, count_tokens, fill

__all__ = ["CodeFunction", "RepeatPassage"]

# Passages of a haystack that are looked at before it counts as having nothing to ask.
_PASSAGES = 30
_WORD = re.compile(r"\w+")
_FUNCTION = re.compile(r'^[ \t]*def (\w+)\([^)]*\)[^\n]*:\n\s+"""([^\n"?]{24,120})', re.MULTILINE)


@dataclass(frozen=True)
class _Excerpt:
    """A question about a part of a text that ends at ``end``, with what answers it, at ``start``. See `Turn`."""

    question: str
    reference: str
    start: int
    end: int
    for_chat: str = ""


@dataclass(frozen=True)
class _AboutText(Task):
    """A task whose questions are made of the text that is read; ``what`` says what of it they are about."""

    what: ClassVar[str]

    @abstractmethod
    def find(self, text: str, rng: random.Random) -> list[_Excerpt]:
        """What may be asked, in random order."""

    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        budget = length - self.max_new_tokens
        needed = min(characters_needed(haystack, tokenizer, budget), len(haystack.text))
        for _ in range(_PASSAGES):
            passage = haystack.passage(needed, rng)[: 2 * needed]
            asked = self._choose(passage, tokenizer, budget, rng)
            if len(asked) == self.turns:
                break
        else:
            raise ValueError(
                f"passages of {length} tokens of the haystack {haystack.name!r} give fewer than {self.turns} questions "
                f"({self.what}); ask for a longer length or give another text"
            )
        questions = [excerpt.question for excerpt in asked]
        used = fill(str, questions, tokenizer, budget, passage)
        turns = [Turn(e.question, (e.reference,), e.start / len(used), e.for_chat) for e in asked]
        return Sample(used, tuple(turns), max(count_tokens(tokenizer, used + question) for question in questions))

    def _choose(self, passage: str, tokenizer: Any, budget: int, rng: random.Random) -> list[_Excerpt]:
        """What is asked of the start of a passage, as far as there is something.

        Questions decide how much text there is room for, and that text what may be asked: the longest goes first.
        """
        found = self.find(passage, rng)
        sizes = {excerpt.question: count_tokens(tokenizer, excerpt.question) for excerpt in found}
        longest = max(sizes, key=lambda question: sizes[question], default="")
        room = len(fill(str, [longest], tokenizer, budget, passage))
        return [excerpt for excerpt in found if excerpt.end <= room][: self.turns]


@dataclass(frozen=True)
class RepeatPassage(_AboutText):
    """What follows some words of the text, word for word. The score is the share of words before the first wrong one.

    Fields:
        words: words to be repeated.
        given: words before them that the question quotes; they occur once in the text.
    """

    name: ClassVar[str] = "repeat_passage"
    what: ClassVar[str] = "about passages that begin with words that occur once"
    words: int = 24
    given: int = 10

    @property
    def max_new_tokens(self) -> int:
        return 4 * self.words

    @property
    def one_line(self) -> bool:
        return False

    def find(self, text: str, rng: random.Random) -> list[_Excerpt]:
        lines = [match.end() for match in re.finditer(r"\n(?=[A-Za-z])", text)]
        rng.shuffle(lines)
        found: list[_Excerpt] = []
        taken: list[int] = []
        for start in lines:
            words = [match.end() for match in islice(_WORD.finditer(text, start), self.given + self.words)]
            if len(words) < self.given + self.words or any(abs(start - other) < 2000 for other in taken):
                continue
            first, last = words[self.given - 1], words[-1]
            given = text[start:first]
            if "?" in given or text.count(given) > 1:
                continue
            # A model goes on as it did where it saw the words last: the question must not quote them first.
            question = f"\n\nThe text above, word for word:\n{given}"
            for_chat = f"\n\nWhat does a part of the text above say, word for word? {given}"
            found.append(_Excerpt(question, text[first:last], first, last, for_chat))
            taken.append(start)
            if len(found) == 8 + 8 * self.turns:
                break
        return found

    def score(self, generated: str, references: Sequence[str]) -> float:
        return words_in_order(generated, references[0])


@dataclass(frozen=True)
class CodeFunction(_AboutText):
    """The name of the Python function that has a certain docstring. The haystack must be Python's source."""

    name: ClassVar[str] = "code_function"
    what: ClassVar[str] = "about Python functions with docstrings"

    @property
    def max_new_tokens(self) -> int:
        return 24

    def find(self, text: str, rng: random.Random) -> list[_Excerpt]:
        found = []
        for match in _FUNCTION.finditer(text):
            name, says = match[1], match[2].strip().rstrip(".")
            once = text.count(says) == 1 and len(re.findall(rf"\bdef {name}\(", text)) == 1
            if once and name.lower() not in says.lower():
                question = f'\n\nWhich function has the docstring "{says}"? The name of that function is'
                found.append(_Excerpt(question, name, match.start(1), match.end()))
        rng.shuffle(found)
        return found

    def score(self, generated: str, references: Sequence[str]) -> float:
        return first_word_matches(generated, references)
