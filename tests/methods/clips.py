"""Calls as a denoising transformer makes them, and their attention weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods.denoising import layout_of

__all__ = ["FRAMES", "HEIGHT", "PATCHES", "WIDTH", "clip", "ranks_of_tokens", "text_of_blocks", "weights"]

FRAMES, HEIGHT, WIDTH = 4, 6, 8
PATCHES = FRAMES * HEIGHT * WIDTH
DIM = 16


def clip(
    *,
    before: tuple[int, ...] = (5, 3),
    after: tuple[int, ...] = (4, 9),
    grid: tuple[int, int, int] = (FRAMES, HEIGHT, WIDTH),
    heads: int = 4,
    groups: int = 2,
    dead: int = 3,
    step: int = 12,
    total: int | None = 50,
    branch: int = 0,
    state: Any = None,
    seed: int = 0,
    sharp: float = 2.0,
    **fields: Any,
) -> AttentionCall:
    """Text, patches and text; rows of different lengths, and ``dead`` tokens of padding after the longest."""
    patches = grid[0] * grid[1] * grid[2]
    counts = [first + patches + last for first, last in zip(before, after, strict=True)]
    tokens, batch = max(counts) + dead, len(counts)
    generator = torch.Generator().manual_seed(seed)
    q = sharp * torch.randn(batch, heads, tokens, DIM, generator=generator)
    k, v = (torch.randn(batch, groups, tokens, DIM, generator=generator) for _ in "kv")
    extent = Extent([0] * batch, [tokens] * batch, [0] * batch, counts, causal=False)
    given: dict[str, Any] = {
        "layer": 0,
        "layout": TokenLayout(before, *grid),
        "step": DenoisingStep(step, total, branch),
        "state": [{} for _ in range(batch)] if state is None else state,
    }
    return AttentionCall(q, k, v, extent, **given | fields)


def text_of_blocks(call: AttentionCall, row: int, block: int) -> tuple[list[bool], list[bool]]:
    """Whether each query block of a batch row holds live text, or nothing that lives; and each key block, live text."""
    layout = layout_of(call)
    live, before = int(call.extent.key_count[row]), layout.before[row]

    def is_text(first: int, end: int) -> bool:
        return any(not before <= token < before + layout.patches for token in range(first, min(end, live)))

    queries = [n >= live or is_text(n, n + block) for n in range(0, call.query_len, block)]
    return queries, [is_text(n, n + block) for n in range(0, live, block)]


def ranks_of_tokens(call: AttentionCall, row: int, ranks: Tensor) -> Tensor:
    """Rank of each token where patches have the ``ranks`` ``[P]`` among each other, and text stays."""
    rank, before = torch.arange(call.query_len), layout_of(call).before[row]
    rank[before : before + len(ranks)] = before + ranks
    return rank


def weights(call: AttentionCall, live: Tensor | None = None) -> Tensor:
    """The softmax over a row's live keys, or over those of ``live`` ``[B, T]``: fp64 ``[B, H, S, T]``."""
    keys = call.k.double().repeat_interleave(call.share, dim=1)
    logits = (call.q.double() @ keys.transpose(-1, -2)) * call.scale
    allowed = call.extent.live_keys(call.key_len) if live is None else live
    return logits.masked_fill(~allowed[:, None, None], float("-inf")).softmax(dim=-1)
