"""Orion-MSP (2511.02818): tables learned in context, their columns seen at three scales under sparse links.

For every row of a table, the embedded columns are gathered in groups of 1, 4 and 16; each scale is a sequence of
learned class tokens, global tokens and groups, attended along `links`, and the row is the mean of the scales' class
tokens. Rows then read a memory that labelled rows wrote (`gossamer.modules.tabular.PerceiverMemory`), and the labelled
rows with their labels (`RowLearner`). Nothing leaks from unlabelled rows, or from labels after the labelled ones.

**Sequences are short, at most a hundred columns and ten special tokens, and a batch is all rows of all tables under one
mask: the layer is the masked-dense definition.** `plan_of_links` is the same mask as a plan of sinks, a window and
columns, for longer ones.

What the paper says and the released code does differ:

- **The released mask has no window**: the term is minus infinity inside the window too, and what was trained has
  special tokens, random links and the diagonal. Here the window is applied, and ``window=None`` is the release.
- **The release draws its random links at every call**, in inference too, so that equal tables get other answers. Here
  they are drawn from a seed, each scale its own; ``seed=None`` is the release.
- **Reading the memory leaks in the release**: what stands for a feed-forward network there is a whole encoder layer, in
  which all rows attend each other. ``mixing=True`` is the release.
- Options differ from place to place; by default they are those of the project's description (6 blocks, scales 1, 4 and
  16, window 8, 2 random links, 4 global tokens, learned groups, 32 memory vectors in 2 layers). The class there has 3
  blocks, scales 1, 4 and 8, window 4, no random links, 2 global tokens, means as groups and 16 vectors.
- **Links matter from a scale's second block on**: class tokens, which alone are read, attend all, and what the others
  attend shows one block later. With as many blocks as scales, as that class has, no link changes the output.
- With learned groups, in the release as here, all groups of all scales read all columns, by what a column holds and not
  by its place: **the order of columns is lost, and columns whose numbers lie alike cannot be told apart.** With means
  the rotary embedding tells their places.
- ``embed_with_test`` lets columns be summarised from all rows, which reaches from unlabelled rows to others.
- Left out: more classes than the model has (a tree of models there), ensembles, and a value that marks empty columns.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.modules.tabular import Block, ColumnEmbedding, PerceiverMemory, RowLearner
from gossamer.modules.tokens import Factory
from gossamer.plan import Extent, SparsePlan, ceil_div, starts_of
from gossamer.rotary import Rotary

__all__ = ["OrionMSP", "RowInteraction", "links", "plan_of_links"]


def links(
    length: int,
    special: int,
    window: int | None = 8,
    random: int = 2,
    seed: int | None = 0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Which tokens attend which, bool ``[length, length]``, the first ``special`` being class and global tokens.

    These attend all and are attended by all. Any other attends itself, those at most ``window`` places away (None:
    none), and ``random`` of the others, itself perhaps among them, drawn from the seed (None: from torch's own state).
    """
    place = torch.arange(length, device="cpu")
    seen = (place < special)[:, None] | (place < special) | torch.eye(length, dtype=torch.bool, device="cpu")
    if window is not None:
        seen = seen | ((place[:, None] - place).abs() <= window)
    rest = length - special
    if random > 0 and rest > 1:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        order = torch.rand(rest, rest, generator=generator, device="cpu").argsort(dim=1)[:, :random]
        seen[special:, special:].scatter_(1, order, True)
    return seen.to(device)


def plan_of_links(seen: Tensor, special: int, window: int | None = None, heads: int = 1) -> SparsePlan:
    """`links` as a plan: special tokens' keys as sinks, the window as a band, all else as columns of each row."""
    length = len(seen)
    place = torch.arange(length, device=seen.device)
    band = (place < special) | ((place[:, None] - place).abs() <= (window or 0))
    rest = seen & ~band
    return SparsePlan(
        heads=heads,
        query_len=length,
        key_len=length,
        extent=Extent.full(1, length, length, causal=False),
        block_q=1,
        column_group=1,
        column_indptr=starts_of(rest.sum(-1).repeat(heads)),
        column_indices=rest.nonzero()[:, 1].to(torch.int32).repeat(heads),
        sink=special,
        window=(window or 0) + 1,
    )


class RowInteraction(nn.Module):
    """Rows of embedded columns ``[B, T, H, E]`` to vectors ``[B, T, classes * E]``.

    Args:
        width, heads: E (128) and H (8).
        blocks: of all scales together (6): each scale has its share, rounded up.
        scales: columns in a group.
        classes, globals_: class tokens (4), which are read, and global ones (4).
        window, random, seed: of `links`; every scale has a seed of its own.
        group: ``"learned"``, attention of one head from a learned vector and the group's sinusoidal place to **all**
            columns; ``"mean"``, of the group's own columns.
        base: of the rotary embedding of places, special tokens' included.
    """

    def __init__(
        self,
        width: int = 128,
        heads: int = 8,
        blocks: int = 6,
        *,
        scales: Sequence[int] = (1, 4, 16),
        classes: int = 4,
        globals_: int = 4,
        window: int | None = 8,
        random: int = 2,
        seed: int | None = 0,
        group: Literal["learned", "mean"] = "learned",
        base: float = 100_000.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not scales or min(scales) < 1:
            raise ValueError(f"scales must be one or more sizes of groups, each 1 or more, got {tuple(scales)}")
        if group not in ("learned", "mean"):
            raise ValueError(f"group must be 'learned' or 'mean', got {group!r}")
        if classes < 1 or globals_ < 0 or random < 0 or (window is not None and window < 0):
            raise ValueError(
                f"expected a class token or more, and no negative number, got classes={classes}, "
                f"globals_={globals_}, random={random}, window={window}"
            )
        if width % heads or width // heads % 2:
            raise ValueError(f"heads must cut width into even parts, got {width} and {heads}")
        factory: Factory = {"device": device, "dtype": dtype}
        self.scales = tuple(sorted(set(scales)))
        self.classes, self.window, self.random, self.seed = classes, window, random, seed
        self.depth = ceil_div(blocks, len(self.scales))
        self.blocks = nn.ModuleList(Block(width, heads, **factory) for _ in range(self.depth * len(self.scales)))
        self.special = nn.Parameter(
            nn.init.trunc_normal_(torch.empty(classes + globals_, width, device=device, dtype=dtype), std=0.02)
        )
        self.norm = nn.LayerNorm(width, **factory)
        self.rotary = replace(Rotary.of_base(width // heads, base), interleaved=True)
        if group == "learned":
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(width, width, **factory) for _ in range(3))
            self.group = nn.Parameter(0.02 * torch.randn(width, device=device, dtype=dtype))
        else:
            self.register_parameter("group", None)

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tensor:
        """``[B, T, H, E]`` to ``[B, T, classes * E]``.

        Args:
            features: int64 ``[B]``, how many columns each table has, the first ones; all unless given.
        """
        batch, rows, columns = x.shape[:3]
        counts = [columns] * batch if features is None else features.tolist()
        special = self.special.expand(batch, rows, -1, -1)
        found = []
        for n, size in enumerate(self.scales):
            sequence = torch.cat([special, self.gather(x, size, counts)], 2).flatten(0, 1)
            seen = self._seen(n, [ceil_div(count, size) for count in counts], sequence.shape[1], x.device)
            seen = seen[0] if len(seen) == 1 else seen.repeat_interleave(rows, 0)
            for block in self.blocks[n * self.depth : (n + 1) * self.depth]:
                sequence = block(sequence, seen=seen, rotary=self.rotary)
            found.append(sequence[:, : self.classes])
        return self.norm(torch.stack(found).mean(0)).flatten(1).unflatten(0, (batch, rows))

    def _seen(self, scale: int, groups: list[int], length: int, device: torch.device) -> Tensor:
        """Of each table, or of all where they have as many groups: bool ``[B or 1, length, length]``."""
        special, seed = len(self.special), None if self.seed is None else self.seed + scale
        made = {n: links(special + n, special, self.window, self.random, seed, device) for n in sorted(set(groups))}
        for n, mask in made.items():
            pad = length - special - n
            made[n] = F.pad(mask, (0, pad, 0, pad))
            made[n][:, 0] = True  # those that are not there have something to attend, too
        return torch.stack([made[n] for n in (groups if len(made) > 1 else groups[:1])])

    def gather(self, x: Tensor, size: int, counts: list[int]) -> Tensor:
        """Groups of columns, ``[B, T, ceil(H / size), E]``."""
        columns, width = x.shape[2:]
        live = torch.arange(columns, device=x.device) < torch.tensor(counts, device=x.device)[:, None]
        if self.group is None:
            pad = -columns % size
            parts = F.pad(x * live[:, None, :, None], (0, 0, 0, pad)).unflatten(2, (-1, size)).sum(3)
            return parts / F.pad(live, (0, pad)).unflatten(1, (-1, size)).sum(2).clamp(min=1)[:, None, :, None]
        place = torch.arange(ceil_div(columns, size), device=x.device, dtype=x.dtype)[:, None]
        rate = torch.exp(torch.arange(0, width, 2, device=x.device, dtype=x.dtype) * (-math.log(10_000.0) / width))
        where = torch.stack([(place * rate).sin(), (place * rate).cos()], -1).flatten(1)[:, :width]
        logits = self.q_proj(self.group + where) @ self.k_proj(x).transpose(-1, -2) * width**-0.5
        weights = logits.masked_fill(~live[:, None, None], float("-inf")).softmax(-1)
        return weights @ self.v_proj(x)


class OrionMSP(nn.Module):
    """Tables with some labelled rows to the classes of the others.

    Args:
        width: E of a column (128); rows have ``classes`` times as many, of the class tokens.
        outputs: classes of a table at most (10).
        column_heads, column_depth, points: of `ColumnEmbedding`.
        row_heads, blocks, scales, classes, globals_, window, random, seed, group: of `RowInteraction`.
        latents, memory_depth, mixing: of `PerceiverMemory`; no latents, no memory.
        heads, depth: of `RowLearner`, and ``heads`` of the memory.
        embed_with_test: see the module.
    """

    def __init__(
        self,
        width: int = 128,
        outputs: int = 10,
        *,
        column_heads: int = 4,
        column_depth: int = 3,
        points: int = 128,
        row_heads: int = 8,
        blocks: int = 6,
        scales: Sequence[int] = (1, 4, 16),
        classes: int = 4,
        globals_: int = 4,
        window: int | None = 8,
        random: int = 2,
        seed: int | None = 0,
        group: Literal["learned", "mean"] = "learned",
        latents: int = 32,
        memory_depth: int = 2,
        mixing: bool = False,
        heads: int = 4,
        depth: int = 12,
        embed_with_test: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if latents < 0:
            raise ValueError(f"latents must be 0 or more, got {latents}")
        factory: Factory = {"device": device, "dtype": dtype}
        self.embed_with_test = embed_with_test
        self.columns = ColumnEmbedding(width, column_heads, column_depth, points, **factory)
        self.rows = RowInteraction(
            width,
            row_heads,
            blocks,
            scales=scales,
            classes=classes,
            globals_=globals_,
            window=window,
            random=random,
            seed=seed,
            group=group,
            **factory,
        )
        wide = width * classes
        self.memory = PerceiverMemory(wide, heads, latents, memory_depth, mixing=mixing, **factory) if latents else None
        self.learner = RowLearner(wide, heads, depth, outputs, **factory)

    def forward(self, x: Tensor, labels: Tensor, labelled: int | None = None, features: Tensor | None = None) -> Tensor:
        """Logits ``[B, T - n, outputs]`` of the rows after the first n of ``[B, T, H]``.

        Args:
            labels: integers ``[B, n or more]``; those after the first n are not looked at.
            labelled: n; as many as there are labels unless given.
            features: integers ``[B]``, how many columns each table has, the first ones; all unless given.

        Raises:
            ValueError: shapes do not fit, there is no labelled row, or a label is no class of the model.
        """
        labelled = labels.shape[-1] if labelled is None else labelled
        if x.ndim != 3 or labels.shape[:-1] != x.shape[:1]:
            raise ValueError(
                f"x must be [tables, rows, columns] and labels [tables, labelled rows], got {tuple(x.shape)} "
                f"and {tuple(labels.shape)}"
            )
        if not 1 <= labelled <= min(x.shape[1], labels.shape[1]):
            raise ValueError(f"labelled must be 1 to {min(x.shape[1], labels.shape[1])}, got {labelled}")
        given = labels[:, :labelled].long()
        if given.numel() and not 0 <= int(given.min()) <= int(given.max()) < self.learner.classes:
            raise ValueError(f"labels must be 0 to {self.learner.classes - 1}, got {given.unique().tolist()}")
        if features is not None:
            if features.shape != x.shape[:1] or not 1 <= int(features.min()) <= int(features.max()) <= x.shape[2]:
                raise ValueError(f"features must be {len(x)} integers of 1 to {x.shape[2]}, got {features.tolist()}")
            x = x.masked_fill((torch.arange(x.shape[2], device=x.device) >= features[:, None])[:, None], 0.0)
        rows = self.rows(self.columns(x, x.shape[1] if self.embed_with_test else labelled), features)
        if self.memory is not None:
            rows = self.memory(rows, labelled)
        return self.learner(rows, given)
