"""Heads whose pattern is known, planted into q and k; noise is a share of the size of what is planted."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer import AttentionCall, methods

PATTERNS = ("sink", "window", "columns", "diagonals", "blocks", "dense")
LENGTH, DIM, STRENGTH = 768, 64, 14.0
# The candidates of each method near a share of a half of so short a prompt.
CANDIDATES = (
    methods.create("dense"),
    methods.create("a_shape", sink=16, window=64),
    methods.create("a_shape", sink=16, window=128),
    methods.create("vertical_slash", vertical_size=60, slash_size=128),
    methods.create("vertical_slash", vertical_size=30, slash_size=256),
    methods.create("block_sparse", blocks=1),
    methods.create("block_sparse", blocks=2),
)
# Which methods stand for each pattern.
KNOWN_AS = {
    "sink": {"a_shape"},
    "window": {"a_shape"},
    "columns": {"vertical_slash"},
    "diagonals": {"vertical_slash"},
    "blocks": {"block_sparse", "xattention", "max_relative"},
    "dense": {"dense"},
}


def planted(patterns: list[str], noise: float, seed: int) -> AttentionCall:
    """A head for each pattern; logits of planted pairs are `STRENGTH` above the others', before noise."""
    g = torch.Generator().manual_seed(seed)
    heads = [_head(name, g) for name in patterns]
    q, k = (torch.stack(x)[None] for x in zip(*heads, strict=True))
    size = (STRENGTH * DIM**0.5) ** 0.5 / DIM**0.5
    q, k = (x + noise * size * torch.randn(x.shape, generator=g) for x in (q, k))
    return AttentionCall(q, k, torch.randn(k.shape, generator=g))


def _head(name: str, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """q and k ``[S, D]`` whose logits, scaled, are `STRENGTH` on the pattern and near 0 elsewhere."""
    size = (STRENGTH * DIM**0.5) ** 0.5
    one = torch.zeros(DIM)
    one[0] = size
    q, k = torch.zeros(LENGTH, DIM), torch.zeros(LENGTH, DIM)
    if name == "sink":
        q[:] = one
        k[:8] = one
    elif name == "columns":
        q[:] = one
        k[torch.randint(100, LENGTH - 100, (12,), generator=g)] = one
    elif name == "window":
        q, k = _waves(int(torch.randint(0, 40, (1,), generator=g))), _waves(0)
    elif name == "diagonals":
        distance = int(torch.randint(150, 350, (1,), generator=g))
        q, k = _waves(distance), _waves(0)
    elif name == "blocks":
        # Blocks of keys, each attended by some blocks of queries: rows and keys of a topic.
        blocks = LENGTH // 64
        topics = torch.linalg.qr(torch.randn(DIM, DIM, generator=g))[0][:blocks] * size
        of_query = torch.tensor([int(torch.randint(0, m + 1, (1,), generator=g)) for m in range(blocks)])
        q, k = topics[of_query].repeat_interleave(64, 0), topics.repeat_interleave(64, 0)
    else:  # every key a little, none much
        q, k = (torch.randn(LENGTH, DIM, generator=g) for _ in range(2))
    return q, k


def _waves(shift: int) -> Tensor:
    """Vectors whose product peaks where their positions are ``shift`` apart: waves too short for means of blocks."""
    waves = 0.5 + 2 * torch.rand(DIM // 2, generator=torch.Generator().manual_seed(5))
    at = (torch.arange(LENGTH) - shift)[:, None] * waves
    return torch.cat([at.cos(), at.sin()], dim=-1) * (STRENGTH * DIM**0.5 / (DIM / 2)) ** 0.5
