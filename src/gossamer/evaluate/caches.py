"""What caches lose that drop tokens or encode them: predictions of a text's last tokens, read one by one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import gossamer
from gossamer.cache import CachePolicy, Keep, nbytes
from gossamer.evaluate.steps import differences, read_steps

__all__ = ["CacheLoss", "compare_caches"]


@dataclass(frozen=True)
class CacheLoss:
    """How the last tokens of a text were read from one cache of those before.

    Fields:
        kl: mean over the steps of the divergence of its predictions from those of a whole cache, nats.
        top1: share of the steps whose likeliest token is the same.
        nats: mean loss of the text's tokens.
        cache_bytes: of keys and values, after the last step; share: over those of a whole cache.
        step_s: median seconds of a step.
    """

    kl: float
    top1: float
    nats: float
    cache_bytes: int
    share: float
    step_s: float


@torch.inference_mode()
def compare_caches(
    model: Any, tokens: Tensor, caches: Mapping[str, CachePolicy], steps: int = 64
) -> dict[str, CacheLoss]:
    """Read a text but for its last tokens into each of some caches, and those one by one.

    The text before is attended densely, in one piece; what votes on it is its own end. The steps see the text's tokens,
    whatever is predicted.

    Args:
        model: a transformers model that is not enabled.
        tokens: int64 ``[1, S]``.
        caches: by the names of the results, which have ``keep`` besides.
        steps: how many of the last tokens are read one by one.

    Raises:
        ValueError: no token before the steps.
    """
    if not 0 < steps < tokens.shape[1]:
        raise ValueError(f"{steps} steps need a longer text than {tokens.shape[1]} tokens, and at least one step")
    found: dict[str, CacheLoss] = {}
    wanted, whole = torch.empty(0), 0
    for name, policy in {"keep": Keep(), **caches}.items():
        with gossamer.enable(model, "dense", cache=policy) as handle:
            cache = handle.new_cache()
            model(input_ids=tokens[:, :-steps], past_key_values=cache, use_cache=True, logits_to_keep=1)
            rows, seconds = read_steps(model, tokens[:, -steps:], cache)
        held = nbytes(cache)
        if not found:
            wanted, whole = rows, held
        kl, top1, nats = differences(rows, wanted, tokens[0, -steps:])
        found[name] = CacheLoss(kl, top1, nats, held, held / whole, sorted(seconds)[len(seconds) // 2])
    return found
