"""Queries and keys in int8, as `gossamer.plan.SparsePlan.quantised` has them multiplied, for all backends that do."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Codes", "integers_of"]

_LARGEST = 127


class Codes(NamedTuple):
    """Queries int8 ``[B, H, S, D]`` and keys int8 ``[B, G, T, D]``, their steps ``[B, H, S]`` and ``[B, G, T]``, and
    what the keys' mean gives a row's products, ``[B, H, S]``: ``q . k`` is about
    ``q_steps * k_steps * (codes of q . codes of k) + shifts``."""

    q: Tensor
    k: Tensor
    q_steps: Tensor
    k_steps: Tensor
    shifts: Tensor


def integers_of(q: Tensor, k: Tensor, live: Tensor) -> Codes:
    """Queries and keys in int8 (SageAttention, 2410.02367, section 4.2).

    Keys are less their mean over the batch row's live keys: that takes away what all of them share, and changes all
    logits of a row alike. ``q . mean`` is added again, so that the LSE, sinks and a soft-cap see what they would. A
    token's step is its largest number over 127. SageAttention has one for each block of tokens; one for each token is
    closer, and one number more for each to read.

    Args:
        q: ``[B, H, S, D]`` in fp32 or fp64, 0 where a query is dead.
        k: ``[B, G, T, D]`` in the same dtype, 0 where a key is dead.
        live: which keys are, bool ``[B, T]``.
    """
    mean = k.sum(2, keepdim=True) / live.sum(1).clamp(min=1)[:, None, None, None]
    stacked = q.reshape(q.shape[0], k.shape[1], -1, q.shape[3])
    shifts = (stacked @ mean.mT).reshape(q.shape[:3])
    return Codes(*_rounded(q, torch.where(live[:, None, :, None], k - mean, 0.0)), shifts)


def _rounded(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Codes of both, and steps of both."""
    steps = [x.abs().amax(-1) / _LARGEST for x in (q, k)]
    codes = [
        (x / torch.where(step > 0, step, 1.0)[..., None]).round_().to(torch.int8)
        for x, step in zip((q, k), steps, strict=True)
    ]
    return codes[0], codes[1], steps[0], steps[1]
