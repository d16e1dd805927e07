"""Dense attention for what no plan describes: masks pair by pair, position biases, packed sequences, dropout."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from gossamer.backends.torch.dense import sdpa, under_mask

__all__ = ["causal_pairs", "dense_attention", "listed_pairs", "pairs_of_sequences", "restricted"]


def dense_attention(
    module: nn.Module | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    sinks: Tensor | None,
    softcap: float | None,
    dropout: float,
    position_bias: Tensor | None,
) -> Tensor:
    """Under a mask ``[B, 1, S, T]``, bool or to be added; None means no mask. Returns ``[B, S, H, Dv]``.

    The module is needed with a position bias alone.

    Raises:
        ValueError: sinks or a soft-cap with dropout, a position bias or an additive mask.
    """
    plain_torch = sinks is not None or softcap is not None
    additive = position_bias is not None or (mask is not None and mask.is_floating_point())
    if plain_torch and (dropout > 0 or additive):
        what = "dropout" if dropout > 0 else "an additive mask or position bias"
        raise ValueError(
            f"attention sinks or a logit soft-cap cannot be combined with {what} here; "
            "call model.eval(), pass a boolean mask, or use attn_implementation='eager'"
        )
    if position_bias is not None:
        return sdpa_attention_forward(
            cast(nn.Module, module),
            query,
            key,
            value,
            mask,
            dropout,
            scale,
            is_causal=False,
            position_bias=position_bias,
        )[0]
    if dropout > 0 or additive:
        return sdpa(query, key, value, scale, mask, dropout=dropout).transpose(1, 2).contiguous()
    return under_mask(query, key, value, mask, scale, sinks, softcap).transpose(1, 2).contiguous()


def causal_pairs(query_len: int, key_len: int, window: int | None, device: torch.device) -> Tensor:
    """The pairs of the last queries with all keys, bool ``[1, 1, S, T]``."""
    query = torch.arange(query_len, device=device)[:, None] + (key_len - query_len)
    key = torch.arange(key_len, device=device)
    pairs = key <= query
    return (pairs if window is None else pairs & (query - key < window))[None, None]


def restricted(mask: Tensor | None, pairs: Tensor) -> Tensor:
    """A mask, without the pairs that are not in ``pairs``."""
    if mask is None:
        return pairs
    if mask.is_floating_point():
        return mask.masked_fill(~pairs, torch.finfo(mask.dtype).min)
    return mask & pairs


def listed_pairs(indices: Tensor, key_len: int) -> Tensor:
    """The pairs that ``indices`` int ``[B, S, n]`` name, bool ``[B, 1, S, T]``."""
    slots = torch.where(indices >= 0, indices, key_len).long()
    listed = torch.zeros(*indices.shape[:2], key_len + 1, dtype=torch.bool, device=indices.device)
    return listed.scatter_(-1, slots, True)[:, None, :, :key_len]


def pairs_of_sequences(cu_seq_lens: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """The pairs within one of several sequences that are packed into a row, bool ``[1, 1, S, T]``."""
    if query.shape[0] != 1 or query.shape[2] != key.shape[2]:
        raise ValueError(
            f"cu_seq_lens_q describes {cu_seq_lens.numel() - 1} sequences packed into one row without a cache, but "
            f"got {query.shape[0]} rows of {query.shape[2]} queries and {key.shape[2]} keys; pass use_cache=False"
        )
    slots = torch.arange(key.shape[2], device=key.device)
    sequence = torch.searchsorted(cu_seq_lens.to(slots), slots, right=True)
    return (sequence[:, None] == sequence[None, :])[None, None]
