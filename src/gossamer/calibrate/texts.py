"""Samples for training from plain texts, each made from its number alone: what was stopped goes on with the next."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["windows"]


def windows(tokenizer: Any, texts: Sequence[str], length: int, seed: int = 0) -> Callable[[int], Tensor]:
    """For each step a random window ``[1, length]`` of the tokens of all texts, one after the other.

    Raises:
        ValueError: they have fewer tokens.
    """
    tokens = [token for text in texts for token in tokenizer(text)["input_ids"]]
    if len(tokens) < length:
        raise ValueError(f"the texts have {len(tokens)} tokens, fewer than {length}; give more text, or ask for less")

    def sample(step: int) -> Tensor:
        start = random.Random(f"{seed} {step}").randrange(len(tokens) - length + 1)
        return torch.tensor([tokens[start : start + length]], device="cpu")

    return sample
