"""Windows of a text to measure perplexity on."""

from __future__ import annotations

import random
from functools import cached_property

import torch
from torch import Tensor

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.subject import Subject

__all__ = ["Windows"]


class Windows:
    """Windows at different places of a text, with the tokenizer's special tokens in front.

    The text is tokenized once, and the starts of a length are drawn among its tokens, each at most once. Windows may
    overlap.
    """

    def __init__(self, subject: Subject, text: Haystack, seed: int) -> None:
        self._subject, self._text, self._seed = subject, text, seed
        self._drawn: dict[int, tuple[random.Random, list[int]]] = {}

    @cached_property
    def _parts(self) -> tuple[list[int], list[int]]:
        """The special tokens in front of any text, and the text's own tokens."""
        tokens, empty = self._subject.tokens(self._text.text), self._subject.tokens("")
        front = 0
        while front < len(empty) and tokens[front] == empty[front]:
            front += 1
        after = len(empty) - front
        if after and tokens[-after:] == empty[front:]:
            tokens = tokens[:-after]
        return tokens[:front], tokens[front:]

    @property
    def text_tokens(self) -> int:
        """Tokens of the text, without special ones."""
        return len(self._parts[1])

    def start(self, length: int, index: int) -> int:
        """Where a window begins, in tokens of the text: the same however many windows are asked for.

        Args:
            length: tokens of the window, special tokens included.

        Raises:
            ValueError: the text is shorter, or has fewer windows that differ.
        """
        front, own = self._parts
        room = len(own) + len(front) - length + 1
        if room < 1:
            raise ValueError(
                f"the text {self._text.name!r} has {len(own):,} tokens, perplexity at {length:,} needs as many; give "
                "a longer text or ask for a smaller length"
            )
        if index >= room:
            raise ValueError(
                f"the text {self._text.name!r} has only {room} different windows of {length:,} tokens; ask for fewer "
                "samples or give a longer text"
            )
        rng, starts = self._drawn.setdefault(length, (random.Random(f"{self._seed}/perplexity/{length}"), []))
        while len(starts) <= index:
            start = rng.randrange(room)
            if start not in starts:
                starts.append(start)
        return starts[index]

    def tokens(self, length: int, index: int) -> Tensor:
        """``[1, length]`` on the model's device."""
        start = self.start(length, index)
        front, own = self._parts
        return torch.tensor([[*front, *own[start : start + length - len(front)]]], device=self._subject.device)

    def spread(self, length: int, count: int) -> list[Tensor]:
        """Windows ``[1, length]`` that share no token of the text, at even distances over all of it.

        Raises:
            ValueError: the text is shorter than that takes.
        """
        front, own = self._parts
        inner = length - len(front)
        if inner < 1 or count * inner > len(own):
            raise ValueError(
                f"the text {self._text.name!r} has {len(own):,} tokens, {count} windows of {length:,} take more; give "
                "a longer text, or ask for fewer or shorter windows"
            )
        starts = [n * (len(own) - inner) // max(1, count - 1) for n in range(count)]
        return [torch.tensor([[*front, *own[start : start + inner]]], device=self._subject.device) for start in starts]
