"""What a layer holds, for summaries that are tested without one."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.summaries import Held


def keys_of(slots: int, *, batch: int = 2, groups: int = 2, dim: int = 5, seed: int = 0) -> Tensor:
    return torch.randn(batch, groups, slots, dim, generator=torch.Generator().manual_seed(seed))


def held(keys: Tensor, starts: list[int], prompt: int | None = None, values: Tensor | None = None) -> Held:
    """Values are made of the keys where none are given: equal tokens have equal ones."""
    values = keys.roll(1, dims=-1) * 0.5 if values is None else values
    return Held(keys, values, starts, keys.shape[2] if prompt is None else prompt)
