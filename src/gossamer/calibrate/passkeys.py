"""DuoAttention's synthetic task (2410.10819, section 2.3): passkeys hidden in a text, and asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

__all__ = ["Passkeys"]

_ORDINALS = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth")
_HIDDEN = "\nRemember the {which} passkey: {words}\n"
_ASKED = "\nThe {which} passkey is:"
_EDGE = 0.05  # share of the text before the first and behind the last place


@dataclass(frozen=True)
class Passkeys:
    """Makes the samples: tokens, and which of them are answers.

    Fields:
        tokenizer: called as ``tokenizer(text)["input_ids"]``.
        texts: what passkeys are hidden in; their words are the passkeys', too.
        longest, shortest: tokens of the prompts, which are of ``intervals + 1`` lengths between them.
        keys: passkeys of a prompt, at most 10. words: of a passkey.

    Raises:
        ValueError: the texts are too short, or the shortest prompt is for its passkeys.
    """

    tokenizer: Any
    texts: Sequence[str]
    longest: int
    shortest: int = 1000
    keys: int = 10
    words: int = 32
    intervals: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.keys <= len(_ORDINALS):
            raise ValueError(f"a prompt has 1 to {len(_ORDINALS)} passkeys, got {self.keys}")
        if not self.shortest <= self.longest:
            raise ValueError(f"the shortest prompt must not be longer than the longest, {self.longest} tokens")
        if len(self.tokens) < self.longest or len(self.vocabulary) < 2:
            raise ValueError(
                f"the texts have {len(self.tokens)} tokens, fewer than {self.longest}; give more text, or ask for less"
            )

    @cached_property
    def tokens(self) -> list[int]:
        """Of all texts, one after the other."""
        return [token for text in self.texts for token in self._split(text)]

    @cached_property
    def vocabulary(self) -> list[str]:
        """The words of all texts."""
        return sorted({word for text in self.texts for word in text.split()})

    def sample(self, step: int) -> tuple[Tensor, Tensor]:
        """Token ids ``[1, S]``, and bool ``[S]``: the tokens of the answers."""
        rng = random.Random(f"{self.seed} {step}")
        length = self.shortest + (self.longest - self.shortest) * rng.randint(0, self.intervals) // self.intervals
        passkeys = [" ".join(rng.choices(self.vocabulary, k=self.words)) for _ in range(self.keys)]
        hidden = [self._split(_HIDDEN.format(which=w, words=p)) for w, p in zip(_ORDINALS, passkeys, strict=False)]
        end: list[int] = []
        answers: list[bool] = []
        for which, passkey in zip(_ORDINALS, passkeys, strict=False):
            asked, answer = self._split(_ASKED.format(which=which)), self._split(" " + passkey)
            end += asked + answer
            answers += [False] * len(asked) + [True] * len(answer)
        room = length - len(end) - sum(map(len, hidden))
        if room < 1:
            raise ValueError(
                f"{self.keys} passkeys of {self.words} words take {length - room} tokens, but a prompt has {length}; "
                "make prompts longer, or passkeys fewer or shorter"
            )
        start = rng.randrange(len(self.tokens) - room + 1)
        text = self.tokens[start : start + room]
        places = sorted(int(room * rng.uniform(_EDGE, 1 - _EDGE)) for _ in hidden)
        rng.shuffle(hidden)
        ids: list[int] = []
        for place, before, key in zip(places, [0, *places], hidden, strict=False):
            ids += text[before:place] + key
        ids += text[places[-1] :] + end
        mask = [False] * (len(ids) - len(answers)) + answers
        return torch.tensor([ids], device="cpu"), torch.tensor(mask, device="cpu")

    def _split(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
