"""Texts to fill in: a stretch with masks after a prompt, a part of which the prompt has said before."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Passage", "answer_tokens", "draw"]


@dataclass(frozen=True, eq=False)
class Passage:
    """One text.

    Fields:
        tokens: int64 ``[S]``, nothing masked; masked: bool ``[S]``.
        copied: bool ``[S]``, the masked tokens that the prompt has said before.
        prompt: tokens before the part that has masks.
        index, seed: which text, and which masks of it.
    """

    tokens: Tensor
    masked: Tensor
    copied: Tensor
    prompt: int
    index: int
    seed: int

    @property
    def length(self) -> int:
        return len(self.tokens)


def answer_tokens(length: int) -> int:
    """Tokens of the part of a passage that has masks: its last quarter."""
    return length // 4


def draw(text: Tensor, length: int, index: int, seed: int, share: float) -> Passage:
    """A window of a text, whose last quarter is to be filled in.

    An eighth of the window, from somewhere before the last quarter, is said again somewhere in the last quarter. Where
    all this lies is drawn for an index and a length; which tokens of the last quarter are masked, for a seed as well.

    Args:
        text: tokens, int64 ``[n]``.
        share: of the last quarter that is masked, above 0 to 1.

    Raises:
        ValueError: a share or a length out of range, or a text that is too short.
    """
    if not 0 < share <= 1 or length < 16:
        raise ValueError(f"a passage needs a share above 0 to 1 and at least 16 tokens, got {share} and {length}")
    if len(text) < length:
        raise ValueError(
            f"the text has {len(text):,} tokens, {length:,} are needed; give a longer one, or ask for less"
        )
    places = random.Random(f"{length}/{index}")
    start = places.randrange(len(text) - length + 1)
    tokens = text[start : start + length].clone()
    answer, size = answer_tokens(length), length // 8
    prompt = length - answer
    source = places.randrange(prompt - size + 1)
    target = prompt + places.randrange(answer - size + 1)
    tokens[target : target + size] = tokens[source : source + size].clone()
    chosen = random.Random(f"{length}/{index}/{seed}").sample(range(prompt, length), max(1, round(share * answer)))
    masked = torch.zeros(length, dtype=torch.bool, device=text.device)
    masked[chosen] = True
    again = torch.zeros_like(masked)
    again[target : target + size] = True
    return Passage(tokens, masked, masked & again, prompt, index, seed)
