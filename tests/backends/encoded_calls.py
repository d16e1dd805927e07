"""Calls whose older keys and values are encoded."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.cache.bitmaps import compress
from gossamer.cache.integers import quantise
from gossamer.encoded import EncodedTokens, Encoding

# What rounding of weights and outputs, and of decoded numbers in the model's dtype, may cost.
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
CODINGS = ("int8", "kivi4", "kivi2", "mustafar")


def encode(coding: str, x: Tensor, *, keys: bool, group: int = 32) -> Encoding:
    if coding == "mustafar":
        return compress(x, 0.7)
    if coding == "int8":
        return quantise(x, 8, x.shape[3], "channels")
    return quantise(x, int(coding[4:]), group, "tokens" if keys else "channels")


def drawn(
    coding: str,
    *,
    heads: int = 4,
    groups: int = 2,
    queries: int = 1,
    tokens: int = 300,
    tails: tuple[int, int] = (44, 40),
    dim: int = 64,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    group: int = 32,
    device: torch.device | None = None,
) -> tuple[Tensor, EncodedTokens, EncodedTokens]:
    generator = torch.Generator().manual_seed(0)
    sizes = (heads, queries, dim), (groups, tokens, dim), (groups, tokens, value_dim or dim)
    q, k, v = (torch.randn(batch, *size, generator=generator).to(device, dtype) for size in sizes)
    k, v = (
        EncodedTokens(encode(coding, x[:, :, : tokens - tail], keys=keys, group=group), x[:, :, tokens - tail :])
        for x, tail, keys in ((k, tails[0], True), (v, tails[1], False))
    )
    return q, k, v
