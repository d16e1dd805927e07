"""Combiner (2107.05768): every key counts, near ones by themselves, all others through a summary of their span.

Of a span, the largest query and the largest key in each channel stand for it: a query weighs the span by its logit
with the largest key, in one softmax with the keys that it attends directly, and reads the mean of the span's values
under the softmax of the largest query. So every row of the effective matrix sums to one, and no parameter is added.

Which keys are direct, and what the spans are, is a pattern: `Fixed`, `Axial`, `LogSparse`, `Learnable`, `Mixture`.

- A span counts as one key, however many it holds, so that equal keys in a span are **not** dense attention; in a span,
  what a query reads does not depend on the query (rank 1). ``by_size=True`` adds the log of a span's size to its logit,
  which makes equal keys exact; the paper does not.
- Exactly dense: `Fixed` with one span or with spans of one token, `Learnable` with one cluster.
- Causal attention is strict: a span that a query reads ends before it.
- `Fixed` runs on gossamer's kernels, forward and backward: a plan of diagonal blocks, and one of columns over the
  summaries, joined by their LSE. `Axial` and `LogSparse` have summaries by row of a grid or level of a tree, and run in
  torch, in the paper's time; `Learnable` is the masked-dense definition.
- Queries and keys have as many heads here; the paper has no grouped heads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.backends import attend
from gossamer.call import AttentionCall
from gossamer.modules.centroids import Centroids
from gossamer.modules.spans import attend_clusters, attend_grid, attend_tree, summarise
from gossamer.modules.tokens import Heads, Tokens, join
from gossamer.plan import Extent, SparsePlan

__all__ = [
    "Axial",
    "CombinerAttention",
    "CombinerCache",
    "Fixed",
    "Learnable",
    "LogSparse",
    "Mixture",
    "Pattern",
    "combine",
    "plans_of_spans",
]


@dataclass(frozen=True)
class Fixed:
    """Own span direct, all other spans summarised; causal: those before it. O(T (span + T / span))."""

    span: int

    def __post_init__(self) -> None:
        _at_least_one("span", self.span)


@dataclass(frozen=True)
class Axial:
    """Tokens as a grid, in rows of ``width`` tokens. Causal: rows above and, in the own row, columns to the left.

    Orders:
        vertical: own row and own column direct; each other column, in the rows above, is a span.
        horizontal: the same direct; each row above is a span, without the own column, which is direct already.
        rowmajor: own row direct; each column of the rows above is a span.

    In the first two the own column is direct by the paper's definition (Section 4.3). Of rowmajor it says nothing about
    it, and here it is a span as the others. The paper's formula there has rows as spans (``div``), but its text has
    summaries that depend on the query's column and on the rows above, as columns do (``mod``); they are columns here.
    Without causality "the rows above" are all other rows; the paper leaves that to an appendix that was not read.
    """

    width: int
    order: Literal["vertical", "horizontal", "rowmajor"] = "vertical"

    def __post_init__(self) -> None:
        _at_least_one("width", self.width)
        if self.order not in ("vertical", "horizontal", "rowmajor"):
            raise ValueError(f"order must be 'vertical', 'horizontal' or 'rowmajor', got {self.order!r}")


@dataclass(frozen=True)
class LogSparse:
    """Own token direct; before it (and after it) the spans into which the bits of its position cut the rest.

    Nodes of a binary tree, log2(T) a query, shared by all queries. The first is a single token, a direct one.
    """


@dataclass(frozen=True)
class Learnable:
    """Clusters of online k-means (`Centroids`): own one direct, each other one, up to the query, a span.

    Each token belongs to the cluster nearest to its query, as it asks, and to its key, as it is asked; the paper has
    one region for both (Section 4.4). (The Routing Transformer's clusters of equal size hold a token several times or
    never; spans must be disjoint.) A token's cluster depends on that token alone, so nothing leaks after the first
    training pass. How centroids move the paper leaves to the Routing Transformer: see `Centroids`.
    """

    clusters: int

    def __post_init__(self) -> None:
        _at_least_one("clusters", self.clusters)


@dataclass(frozen=True)
class Mixture:
    """The mean of several patterns' attention. The paper finds two enough."""

    patterns: tuple[Fixed | Axial | LogSparse | Learnable, ...]

    def __post_init__(self) -> None:
        if not self.patterns:
            raise ValueError("a mixture needs at least one pattern")
        if sum(isinstance(pattern, Learnable) for pattern in self.patterns) > 1:
            raise ValueError("a mixture can hold one Learnable pattern: a layer has one set of centroids")


Pattern = Fixed | Axial | LogSparse | Learnable | Mixture


def _at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} must be 1 or more, got {value}")


def combine(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: Pattern,
    *,
    tokens: Tokens | None = None,
    causal: bool = True,
    scale: float | None = None,
    by_size: bool = False,
    centroids: Centroids | None = None,
) -> Tensor:
    """Combiner's attention of ``[B, H, T, D]``; differentiable.

    Args:
        tokens: aligned rows (`Tokens.align`); None: all tokens are live. Dead rows have an output of 0.
        scale: of the logits; D ** -0.5 unless given.
        by_size: whether a span of n tokens counts as n keys; see the module.
        centroids: of a `Learnable` pattern.

    Raises:
        ValueError: heads or lengths differ, or a `Learnable` pattern has no centroids or others.
    """
    if q.shape != k.shape or v.shape[:3] != k.shape[:3]:
        raise ValueError(
            f"q, k and v must have equal heads and tokens, got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    tokens = tokens if tokens is not None else Tokens.of(q[:, 0])
    scale = float(q.shape[-1] ** -0.5 if scale is None else scale)
    if isinstance(pattern, Mixture):
        given = {"tokens": tokens, "causal": causal, "scale": scale, "by_size": by_size, "centroids": centroids}
        outs = [combine(q, k, v, part, **given) for part in pattern.patterns]
        return torch.stack(outs).mean(0)
    if not q.shape[2]:
        return torch.zeros_like(v)
    if isinstance(pattern, Fixed):
        return _attend_spans(q, k, v, pattern.span, tokens, causal, scale, by_size)
    live = tokens.live(q.device)
    how = {"causal": causal, "scale": scale, "by_size": by_size}
    if isinstance(pattern, Axial):
        out = attend_grid(q, k, v, live, width=pattern.width, order=pattern.order, **how)
    elif isinstance(pattern, LogSparse):
        out = attend_tree(q, k, v, live, **how)
    else:
        if centroids is None or centroids.means.shape[1] != pattern.clusters:
            raise ValueError(f"a Learnable pattern of {pattern.clusters} clusters needs as many centroids")
        near = centroids.nearest(q), centroids.nearest(k)
        out = attend_clusters(q, k, v, live, *near, clusters=pattern.clusters, **how)
    return out.masked_fill(~live[:, None, :, None], 0.0)


def plans_of_spans(tokens: Tokens, heads: int, span: int, *, causal: bool) -> tuple[SparsePlan, SparsePlan]:
    """`Fixed` as plans: each span on itself, ``T x T``; and queries on the summaries of other spans, ``T x spans``."""
    spans = -(-tokens.lengths // span)
    own = tokens.extent(causal=causal)
    most = int(spans.max()) if spans.numel() else 0
    number = torch.arange(most, device="cpu")
    eye = torch.eye(most, dtype=torch.bool, device="cpu").expand(len(spans), heads, -1, -1)
    near = SparsePlan.from_block_mask(eye, tokens.slots, tokens.slots, extent=own, block_q=span, block_k=span)
    others = (number[:, None] > number) if causal else (number[:, None] != number)
    mask = (others & (number < spans[:, None, None]))[:, None].expand(-1, heads, -1, -1)
    zero = torch.zeros_like(spans)
    far = SparsePlan(
        heads=heads,
        query_len=tokens.slots,
        key_len=-(-tokens.slots // span),
        extent=Extent(zero, tokens.lengths, zero, spans, causal=False),
        block_q=span,
        column_group=1,
        column_indptr=F.pad(mask.sum(-1).flatten().cumsum(0), (1, 0)),
        column_indices=mask.nonzero()[:, 3].to(torch.int32),
    )
    return near, far


def _attend_spans(
    q: Tensor, k: Tensor, v: Tensor, span: int, tokens: Tokens, causal: bool, scale: float, by_size: bool
) -> Tensor:
    near, far = plans_of_spans(tokens, q.shape[1], span, causal=causal)
    own = attend(AttentionCall(q, k, v, near.extent, scale=scale), near.to(q.device))
    if far.key_len < 2:
        return own[0]
    pad = (0, 0, 0, far.key_len * span - q.shape[2])
    inside = F.pad(tokens.live(q.device), (0, pad[3])).view(len(q), 1, -1, span)
    key, value = summarise(*(F.pad(x, pad).unflatten(2, (-1, span)) for x in (q, k, v)), live=inside, scale=scale)
    bias = inside.sum(-1).clamp(min=1).to(q.dtype).log().expand(key.shape[:3]) if by_size else None
    call = AttentionCall(q, key, value, far.extent, scale=scale, bias=bias)
    return join([own, attend(call, far.to(q.device))])


class CombinerCache:
    """What decoding with `Fixed` reads: the open span, and two vectors of each span before it.

    Memory O(span + T / span) of each head, in place of O(T).
    """

    def __init__(self) -> None:
        self.open: tuple[Tensor, Tensor, Tensor] | None = None  # q, k, v [B, H, n, D] of the open span, n <= span
        self.keys: Tensor | None = None  # [B, H, spans, D]
        self.values: Tensor | None = None
        self.seen = 0  # tokens

    def append(self, q: Tensor, k: Tensor, v: Tensor, span: int, scale: float) -> None:
        """Add tokens ``[B, H, S, D]``. A full span stays open until the next token comes."""
        if self.open is not None:
            q, k, v = (torch.cat(pair, 2) for pair in zip(self.open, (q, k, v), strict=True))
        self.seen += q.shape[2] - (0 if self.open is None else self.open[0].shape[2])
        closed = max(0, q.shape[2] - 1) // span * span
        if closed:
            parts = (x[:, :, :closed].unflatten(2, (-1, span)) for x in (q, k, v))
            whole = torch.ones(1, 1, 1, span, dtype=torch.bool, device=q.device).expand(
                *q.shape[:2], closed // span, -1
            )
            key, value = summarise(*parts, live=whole, scale=scale)
            self.keys = key if self.keys is None else torch.cat([self.keys, key], 2)
            self.values = value if self.values is None else torch.cat([self.values, value], 2)
        self.open = (q[:, :, closed:], k[:, :, closed:], v[:, :, closed:])

    def attend(self, q: Tensor, span: int, scale: float, by_size: bool) -> Tensor:
        """What the newest query ``[B, H, 1, D]`` reads, once it was appended."""
        if self.open is None:
            raise ValueError("the cache is empty: append the query's own token first")
        key, value = self.open[1:]
        logits = q @ key.transpose(-1, -2) * scale
        if self.keys is not None and self.values is not None:
            far = q @ self.keys.transpose(-1, -2) * scale + (math.log(span) if by_size else 0.0)
            logits, value = torch.cat([far, logits], -1), torch.cat([self.values, value], 2)
        return logits.softmax(-1) @ value


class CombinerAttention(nn.Module):
    """A layer of Combiner's attention.

    Positions are the model's own matter: the layer adds none. In training, centroids of a `Learnable` pattern move at
    the end of each forward pass, and begin from k-means of the first.

    Args:
        width, heads: E and H.
        pattern: `Fixed`, `Axial`, `LogSparse`, `Learnable` or `Mixture`.
        causal: whether a token reads those before it and itself alone.
        by_size: see the module.
        bias: of the projections.

    Raises:
        ValueError: ``width`` is no multiple of ``heads``.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        pattern: Pattern,
        *,
        causal: bool = True,
        by_size: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.projections = Heads(width, heads, bias=bias, device=device, dtype=dtype)
        self.pattern, self.causal, self.by_size = pattern, causal, by_size
        parts = pattern.patterns if isinstance(pattern, Mixture) else (pattern,)
        learnable = next((part for part in parts if isinstance(part, Learnable)), None)
        self.centroids = (
            Centroids(heads, learnable.clusters, width // heads, device=device, dtype=dtype) if learnable else None
        )

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: CombinerCache | None = None) -> Tensor:
        """``[B, T, E]`` to the same.

        Args:
            mask: live tokens, bool ``[B, T]``, or lengths ``[B]``; see `Tokens.of`. Dead tokens give 0.
            cache: of causal `Fixed` attention without a mask: ``x`` are the tokens after those that it holds.

        Raises:
            ValueError: the mask has a hole or another shape, or the layer or the call has no use for a cache.
        """
        if cache is not None:
            return self._decode(x, mask, cache)
        tokens = Tokens.of(x, mask)
        q, k, v = self.projections.split(tokens.align(x))
        if self.training and self.centroids is not None:
            self.centroids.start(k, tokens.live(x.device))
        out = combine(
            q, k, v, self.pattern, tokens=tokens, causal=self.causal, by_size=self.by_size, centroids=self.centroids
        )
        if self.training and self.centroids is not None:
            self.centroids.update(q, k, tokens.live(x.device))
        return tokens.restore(self.projections.merge(out))

    def _decode(self, x: Tensor, mask: Tensor | None, cache: CombinerCache) -> Tensor:
        if not isinstance(self.pattern, Fixed) or not self.causal or mask is not None:
            raise ValueError(
                f"a cache serves causal Fixed attention without a mask, got {self.pattern}, causal={self.causal}, "
                f"{'no mask' if mask is None else 'a mask'}; call without a cache on all tokens"
            )
        q, k, v = self.projections.split(x)
        span, scale = self.pattern.span, q.shape[-1] ** -0.5
        if not cache.seen:
            cache.append(q, k, v, span, scale)
            return self.projections.merge(combine(q, k, v, self.pattern, by_size=self.by_size))
        outs = []
        for part in zip(*(tensor.split(1, 2) for tensor in (q, k, v)), strict=True):
            cache.append(*part, span=span, scale=scale)
            outs.append(cache.attend(part[0], span, scale, self.by_size))
        return self.projections.merge(torch.cat(outs, 2) if outs else torch.zeros_like(v))
