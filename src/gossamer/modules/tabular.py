"""What in-context learning on tables is made of (TabICL, 2502.05564, and Orion-MSP, 2511.02818).

A table is a batch of rows, of which the first ``n`` are labelled. Nothing here lets an unlabelled row reach another:
columns are summarised from labelled rows, memory is written from them, and they alone are attended.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.modules.tokens import Factory
from gossamer.rotary import Rotary

__all__ = ["Block", "ColumnEmbedding", "PerceiverMemory", "RowLearner"]


class Block(nn.Module):
    """Attention and a feed-forward network, each behind a norm and added to what came in; both begin as nothing.

    Args:
        width, heads: E and H.
        factor: of the feed-forward network's width (2).
    """

    def __init__(
        self,
        width: int,
        heads: int,
        factor: int = 2,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if heads < 1 or width % heads:
            raise ValueError(f"width must be a multiple of heads, got {width} and {heads}")
        factory: Factory = {"device": device, "dtype": dtype}
        self.heads = heads
        self.norm, self.feed_norm = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.q_proj, self.kv_proj = nn.Linear(width, width, **factory), nn.Linear(width, 2 * width, **factory)
        self.o_proj, self.up = nn.Linear(width, width, **factory), nn.Linear(width, factor * width, **factory)
        self.down = nn.Linear(factor * width, width, **factory)
        for proj in (self.o_proj, self.down):
            nn.init.zeros_(proj.weight)
            nn.init.zeros_(proj.bias)

    def forward(
        self, x: Tensor, context: Tensor | None = None, seen: Tensor | None = None, rotary: Rotary | None = None
    ) -> Tensor:
        """``[N, T, E]`` to the same.

        Args:
            context: ``[N, S, E]``, what is attended; ``x`` itself unless given.
            seen: bool ``[T, S]`` or ``[N, T, S]``, pairs that are.
            rotary: turns queries and keys by their places.
        """
        own = self.norm(x)
        read = own if context is None else self.norm(context)
        q = self.q_proj(own).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.kv_proj(read).chunk(2, dim=-1))
        if rotary is not None:
            q, k = (rotary.turn(y, torch.arange(y.shape[2], device=y.device)[None]) for y in (q, k))
        mask = seen if seen is None or seen.ndim == 2 else seen[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = x + self.o_proj(out.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.feed_norm(x))))


class ColumnEmbedding(nn.Module):
    """Each number of a table by what its column holds: ``x * weight + shift``, both of its column and itself.

    A set transformer: in each of ``depth`` layers learned points read the column's labelled rows, and all rows read the
    points. A column knows nothing of others.

    Args:
        width, heads: E (128) and H (4).
        depth, points: layers (3), and learned points of each (128).
    """

    def __init__(
        self,
        width: int = 128,
        heads: int = 4,
        depth: int = 3,
        points: int = 128,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        self.first = nn.Linear(1, width, **factory)
        starts = (torch.empty(points, width, device=device, dtype=dtype) for _ in range(depth))
        self.points = nn.ParameterList(nn.init.trunc_normal_(start, std=0.02) for start in starts)
        self.write, self.read = (nn.ModuleList(Block(width, heads, **factory) for _ in range(depth)) for _ in range(2))
        self.weight, self.shift = (
            nn.Sequential(nn.Linear(width, width, **factory), nn.LayerNorm(width, **factory)) for _ in range(2)
        )

    def forward(self, x: Tensor, labelled: int) -> Tensor:
        """``[B, T, H]`` to ``[B, T, H, E]``; the first ``labelled`` rows are read by the points."""
        columns = x.transpose(1, 2).flatten(0, 1)[..., None]  # [B H, T, 1]
        found = self.first(columns)
        for start, write, read in zip(self.points, self.write, self.read, strict=True):
            points = write(start.expand(len(columns), -1, -1), found[:, :labelled])
            found = read(found, points)
        out = columns * self.weight(found) + self.shift(found)
        return out.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class _Crossing(nn.Module):
    """Attention to something else, then ``mixes`` (attention among themselves) or a feed-forward network."""

    def __init__(self, width: int, heads: int, mixes: bool, factory: Factory) -> None:
        super().__init__()
        self.norm, self.other_norm = nn.LayerNorm(width, **factory), nn.LayerNorm(width, **factory)
        self.cross = Block(width, heads, **factory)
        self.own = (
            Block(width, heads, **factory)
            if mixes
            else nn.Sequential(
                nn.LayerNorm(width, **factory),
                nn.Linear(width, 2 * width, **factory),
                nn.GELU(),
                nn.Linear(2 * width, width, **factory),
            )
        )

    def forward(self, x: Tensor, other: Tensor) -> Tensor:
        x = x + self.cross(self.norm(x), self.other_norm(other))
        return self.own(x) if isinstance(self.own, Block) else x + self.own(x)


class PerceiverMemory(nn.Module):
    """Learned vectors that labelled rows write to, without their labels, and that all rows read.

    Args:
        width, heads: E and H.
        latents, depth: how many vectors (32), and layers of writing and of reading (2).
        mixing: rows attend each other after they have read, as the released code lets them by mistake: **unlabelled
            rows then reach all others, and the memory is no longer free of leaks.** The vectors always do.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        latents: int = 32,
        depth: int = 2,
        *,
        mixing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(latents, width, device=device, dtype=dtype), std=0.02)
        )
        self.writers = nn.ModuleList(_Crossing(width, heads, True, factory) for _ in range(depth))
        self.readers = nn.ModuleList(_Crossing(width, heads, mixing, factory) for _ in range(depth))

    def write(self, rows: Tensor) -> Tensor:
        """From labelled rows ``[B, n, E]``: ``[B, latents, E]``."""
        found = self.latents.expand(len(rows), -1, -1)
        for layer in self.writers:
            found = layer(found, rows)
        return found

    def forward(self, rows: Tensor, labelled: int) -> Tensor:
        """``[B, T, E]`` to the same, having read what the first ``labelled`` rows wrote."""
        memory = self.write(rows[:, :labelled])
        for layer in self.readers:
            rows = layer(rows, memory)
        return rows


class RowLearner(nn.Module):
    """Learns in context: rows attend the labelled rows, which carry their labels, and unlabelled ones are classified.

    That mask is split at ``labelled``: one rectangle, dense, in which a sparse kernel has nothing to leave out. A layer
    is attention of all rows to the first ones.

    Args:
        width, heads, depth: E, H (4) and layers (12).
        classes: at most so many (10).
    """

    def __init__(
        self,
        width: int,
        heads: int = 4,
        depth: int = 12,
        classes: int = 10,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        factory: Factory = {"device": device, "dtype": dtype}
        self.classes = classes
        self.label = nn.Linear(classes, width, **factory)
        self.blocks = nn.ModuleList(Block(width, heads, **factory) for _ in range(depth))
        self.norm = nn.LayerNorm(width, **factory)
        self.head = nn.Sequential(
            nn.Linear(width, 2 * width, **factory), nn.GELU(), nn.Linear(2 * width, classes, **factory)
        )

    def forward(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Logits ``[B, T - n, classes]`` of the unlabelled rows of ``[B, T, E]``; labels are int64 ``[B, n]``."""
        labelled = labels.shape[1]
        given = self.label(F.one_hot(labels, self.classes).to(rows.dtype))
        rows = rows + F.pad(given, (0, 0, 0, rows.shape[1] - labelled))
        for block in self.blocks:
            rows = block(rows, rows[:, :labelled])
        return self.head(self.norm(rows[:, labelled:]))
