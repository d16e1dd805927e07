"""What a task is: a frozen dataclass that makes samples of an exact length and scores answers."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.metrics import string_match_all

__all__ = ["Sample", "Task", "Turn", "characters_needed", "count_tokens", "fill", "fit", "largest"]


@dataclass(frozen=True)
class Turn:
    """One question about a context.

    Fields:
        question: what follows the context, up to where the model goes on.
        references: what a right answer holds.
        depth: where in the context the answer lies, 0 (start) to 1; None where it lies in many places.
        for_chat: the question in other words for a model that was trained on chats, where it needs others.
    """

    question: str
    references: tuple[str, ...]
    depth: float | None = None
    for_chat: str = ""

    @property
    def cue(self) -> str:
        """In a chat the part after the question mark, with which the assistant begins the answer."""
        _, mark, after = (self.for_chat or self.question).rpartition("?")
        return after.lstrip() if mark else ""

    @property
    def asked(self) -> str:
        """In a chat the question without its `cue`."""
        question = self.for_chat or self.question
        return question[: question.rfind("?") + 1] if self.cue else question


@dataclass(frozen=True)
class Sample:
    """One context with its questions.

    Fields:
        context: the text before the questions.
        turns: at least one; each question is asked after the context alone, not after the other questions.
        prompt_tokens: tokens of the context with the longest question, the tokenizer's special tokens included.
    """

    context: str
    turns: tuple[Turn, ...]
    prompt_tokens: int

    def prompt(self, turn: int = 0) -> str:
        return self.context + self.turns[turn].question


@dataclass(frozen=True)
class Task(ABC):
    """Makes samples. Subclasses are frozen dataclasses; their fields are the task's parameters.

    Fields:
        turns: questions about one context. With one, the prompt is read whole, question included; with more, the
            context is read first and each question after it, against the same cache, so that a method cannot look at
            the question when it chooses what to read.
    """

    name: ClassVar[str]
    turns: int = 1

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in ("int", int) and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{self.name}.{field.name} must be an integer of at least 1, got {value!r}")

    @property
    @abstractmethod
    def max_new_tokens(self) -> int:
        """Tokens that an answer may take; they are part of a sample's length."""

    @property
    def one_line(self) -> bool:
        """Whether a right answer stands in one line, so that the first line end after some text ends it."""
        return True

    @abstractmethod
    def make(self, haystack: Haystack, tokenizer: Any, length: int, rng: random.Random) -> Sample:
        """A sample whose longest prompt and answer together have ``length`` tokens.

        Args:
            haystack: text to hide things in, or to fill up with.
            tokenizer: called as ``tokenizer(text)["input_ids"]``.
            length: tokens of the prompt, special tokens included, plus `max_new_tokens`. The prompt is brought to
                this length to the token; where the tokenizer jumps over it, to the next length below.
            rng: the only source of randomness.

        Raises:
            ValueError: too short a length, too short a haystack, or more names than there are.
        """

    def score(self, generated: str, references: Sequence[str]) -> float:
        """0 (wrong) to 1 (right)."""
        return string_match_all(generated, references)

    def to_dict(self) -> dict[str, Any]:
        """The parameters as plain JSON types, with the discriminator ``task``."""
        return {"task": self.name} | {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_fields(cls, values: dict[str, Any]) -> Task:
        """Build from field values.

        Raises:
            ValueError: an unknown field, with the known ones; or a value out of range.
        """
        known = [field.name for field in fields(cls)]
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ValueError(f"task {cls.name!r} has no field {unknown[0]!r}; its fields are: {', '.join(known)}")
        return cls(**values)

    def label(self) -> str:
        """The name and the fields that differ from their defaults: ``needle_multikey(turns=4)``."""
        changed = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if field.default is MISSING or getattr(self, field.name) != field.default
        ]
        return f"{self.name}({','.join(changed)})" if changed else self.name


def count_tokens(tokenizer: Any, text: str) -> int:
    """Tokens of a text, the tokenizer's special tokens included."""
    return len(tokenizer(text)["input_ids"])


def largest(measure: Callable[[int], int], budget: int, limit: int) -> int:
    """The largest n in 0 ... limit with ``measure(n) <= budget``, for a measure that grows with n.

    The first n that is measured to be exactly the budget is taken at once; a measure that grows in small jumps may
    leave a rest.

    Raises:
        ValueError: not even 0 fits.
    """
    low, low_size = 0, measure(0)
    if low_size > budget:
        raise ValueError(
            f"{low_size} tokens are needed before anything else, {budget} are there; ask for a longer length"
        )
    high, high_size = limit, 0
    guess = min(limit, max(1, budget))
    while high - low > 1 or not high_size:
        size = measure(guess)
        if size == budget:
            return guess
        if size < budget:
            low, low_size = guess, size
            if low == limit:
                return limit
        else:
            high, high_size = guess, size
        if not high_size:
            guess = min(limit, 2 * guess)
            continue
        # Interpolate, but leave a tenth at both ends, so that the interval shrinks.
        share = (budget - low_size) / max(1, high_size - low_size)
        guess = low + round((high - low) * min(0.9, max(0.1, share)))
        if high - low > 1:
            guess = min(high - 1, max(low + 1, guess))
    return low


def fill(render: Callable[[str], str], questions: Sequence[str], tokenizer: Any, budget: int, passage: str) -> str:
    """The start of ``passage`` with which the longest prompt has exactly ``budget`` tokens.

    Args:
        render: the context, given the text to use.
        questions: what may follow the context.

    Raises:
        ValueError: even without any text the prompt is too long, or even with all of it too short.
    """
    longest = max(questions, key=lambda question: count_tokens(tokenizer, question))

    def measure(size: int) -> int:
        return count_tokens(tokenizer, render(passage[:size]) + longest)

    size = largest(measure, budget, len(passage))
    if measure(size) != budget:
        # Tokens do not grow evenly with characters; a size nearby may hit.
        near = (size + step for step in (*range(-1, -25, -1), *range(1, 9)))
        size = next((n for n in near if 0 <= n <= len(passage) and measure(n) == budget), size)
    if size == len(passage) and measure(size) < budget:
        raise ValueError(
            f"the haystack gave {measure(size)} tokens, {budget} are needed; give a longer text or ask for a smaller "
            "length"
        )
    return passage[:size]


def characters_needed(haystack: Haystack, tokenizer: Any, budget: int) -> int:
    """Characters that are surely enough for ``budget`` tokens of a haystack."""
    sampled = haystack.text[: min(len(haystack.text), 20_000)]
    return int(1.2 * budget * len(sampled) / max(1, count_tokens(tokenizer, sampled))) + 400


def fit(
    render: Callable[[str], str],
    questions: Sequence[str],
    haystack: Haystack,
    tokenizer: Any,
    budget: int,
    rng: random.Random,
) -> tuple[str, int]:
    """`fill` with a random passage of the haystack: the passage used, and the tokens of the longest prompt."""
    needed = characters_needed(haystack, tokenizer, budget)
    passage = haystack.passage(min(needed, len(haystack.text)), rng)
    used = fill(render, questions, tokenizer, budget, passage[: 2 * needed])
    context = render(used)
    return used, max(count_tokens(tokenizer, context + question) for question in questions)
