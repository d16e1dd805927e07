"""Routing Transformer (2003.05997): half of the heads are local, the others attend inside clusters of tokens.

Online spherical k-means (`gossamer.modules.centroids.Centroids`) has C centroids of each routing head, shared by
queries and keys. Each cluster takes the ``window`` queries and the ``window`` keys nearest to its centroid, and they
attend each other, causally by their original positions. A token may be in several clusters, whose outputs are averaged,
or in none, which gives 0.

**The membership leaks.** Which tokens are the nearest is decided over the whole sequence, so that in training an output
depends on later tokens, though it reads none of their values. ``assign="prefix"`` decides by what precedes: a query
goes to the cluster nearest to it and reads the ``window`` keys, of those up to itself, that are nearest to that
centroid. It is the definition of a step of decoding, and what a cache runs; whole sequences are masked and dense. The
two are not the same function, so that a model trained with one decodes by another. (The authors decode by a third
one: the prefix in balanced clusters, of which the newest query may be in none.)

What sources differ in, with the defaults here ("authors": google-research, ``routing_transformer/utils.py``):

- ``normalise="layer"``: queries and keys that route are layer-normalised without scale and bias (authors); ``"l2"``,
  default: only the scores of routing see unit vectors (lucidrains).
- ``shared``: keys are the queries (an option of the authors' decoder; off by default, as in lucidrains' code).
- A token of several clusters gets their mean; the authors divide by 0.01 more than their number.
- ``memory``: learned keys and values of each cluster that all of its queries see (lucidrains, 1, in causal attention
  whose keys are not shared; it keeps rows from being empty). None takes that default.
- `Centroids.update`: sums, or means. It moves at the end of each forward pass in training, where lucidrains' code has a
  hook of the backward pass: a pass that a checkpoint computes again moves it twice.

Local heads run on gossamer's kernels; clusters are gathered tiles of one size and run in torch, as batched products.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.backends import attend
from gossamer.call import AttentionCall
from gossamer.modules.centroids import Centroids, Update
from gossamer.modules.tokens import Heads, Tokens
from gossamer.plan import SparsePlan

__all__ = ["KeysAndValues", "RoutingAttention", "attend_members", "attend_prefix", "members"]

_NONE = float("-inf")


def members(scores: Tensor, live: Tensor, window: int) -> Tensor:
    """The ``window`` live tokens nearest to each centroid, ascending; -1 where there are fewer.

    Args:
        scores: ``[B, H, T, C]``; of equal ones any.
        live: bool ``[B, T]``.

    Returns:
        int64 ``[B, H, C, w]``, w the smaller of ``window`` and T.
    """
    ranked = scores.masked_fill(~live[:, None, :, None], _NONE).topk(min(window, scores.shape[2]), dim=2)
    chosen = torch.where(ranked.values > _NONE, ranked.indices, scores.shape[2])
    ascending = chosen.sort(dim=2).values.transpose(2, 3)
    return torch.where(ascending < scores.shape[2], ascending, -1)


def attend_members(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    of_query: Tensor,
    of_key: Tensor,
    *,
    causal: bool,
    scale: float,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attention inside clusters, ``[B, H, T, D]``; a query of several clusters has the mean, of none 0.

    Args:
        of_query, of_key: int64 ``[B, H, C, w]``, from `members`.
        memory: keys and values ``[H, C, m, D]`` that every query of a cluster sees.
    """
    queries, keys, values = (_gathered(x, at) for x, at in ((q, of_query), (k, of_key), (v, of_key)))
    seen = (of_key >= 0)[..., None, :] & (of_query >= 0)[..., None]
    if causal:
        seen = seen & (of_key[..., None, :] <= of_query[..., None])
    if memory is not None:
        keys, values = (
            torch.cat([kept.expand(len(q), -1, -1, -1, -1).to(x), x], 3)
            for kept, x in zip(memory, (keys, values), strict=True)
        )
        seen = torch.cat([(of_query >= 0)[..., None].expand(*seen.shape[:-1], memory[0].shape[2]), seen], -1)
    logits = (queries @ keys.transpose(-1, -2) * scale).masked_fill(~seen, _NONE)
    empty = ~seen.any(-1, keepdim=True)
    out = (logits.masked_fill(empty, 0.0).softmax(-1) @ values).masked_fill(empty, 0.0).flatten(2, 3)
    at = of_query.clamp(min=0).flatten(2)
    counts = torch.zeros_like(q[..., 0]).scatter_add(2, at, (of_query >= 0).flatten(2).to(q.dtype))
    total = torch.zeros_like(v).scatter_add(2, at[..., None].expand_as(out), out)
    return total / counts.clamp(min=1)[..., None]


def _gathered(x: Tensor, at: Tensor) -> Tensor:
    """Tokens of ``[B, H, T, D]`` at ``[B, H, C, w]``."""
    flat = at.clamp(min=0).flatten(2)[..., None].expand(-1, -1, -1, x.shape[-1])
    return x.gather(2, flat).unflatten(2, at.shape[2:])


def attend_prefix(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    centroids: Centroids,
    *,
    window: int,
    scale: float,
    live: Tensor | None = None,
    memory: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Causal attention of the last S tokens by what precedes them alone: ``q [B, H, S, D]``, k and v ``[B, H, T, D]``.

    Each query's cluster is the nearest, and its keys are the ``window`` nearest to that centroid of those up to itself.
    Of equal scores, which is kept is not defined.

    Args:
        live: bool ``[B, T]`` of keys.
        memory: as `attend_members` has it, of the query's cluster.
    """
    queries, keys = q.shape[2], k.shape[2]
    cluster = centroids.nearest(q)  # [B, H, S]
    scores = centroids.scores_of(cluster, k)
    place = torch.arange(keys, device=q.device)
    seen = place <= place[keys - queries :, None]
    if live is not None:
        seen = seen & live[:, None, None]
    scores = scores.masked_fill(~seen, _NONE)
    ranked = scores.topk(min(window, keys), dim=-1)
    if queries == 1:  # a step of decoding reads the chosen keys and values, not all
        k, v = (_gathered(x, ranked.indices)[:, :, 0] for x in (k, v))
        seen = ranked.values > _NONE
    else:
        seen = torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, ranked.indices, True) & (scores > _NONE)
    logits = (q @ k.transpose(-1, -2) * scale).masked_fill(~seen, _NONE)
    if memory is not None:
        head = torch.arange(q.shape[1], device=q.device)[:, None]
        key, value = (kept[head, cluster] for kept in memory)  # [B, H, S, m, D]
        logits = torch.cat([logits, torch.einsum("bhsd,bhsmd->bhsm", q, key.to(q)) * scale], -1)
    empty = (logits == _NONE).all(-1, keepdim=True)
    weights = logits.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    read = k.shape[2]
    out = weights[..., :read] @ v
    if memory is not None:
        out = out + torch.einsum("bhsm,bhsmd->bhsd", weights[..., read:], value.to(v))
    return out


class KeysAndValues:
    """Keys and values of all tokens so far, ``[B, H, T, D]``: a cache for decoding.

    Without gradients its room doubles where it is full, so that a token does not copy those before it; with gradients,
    which keep what was read, every call copies. ``copy.deepcopy`` branches it; a shallow copy shares the room.
    """

    def __init__(self) -> None:
        self.held: tuple[Tensor, Tensor] | None = None
        self._room: tuple[Tensor, Tensor] | None = None

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Those of the tokens before, and these."""
        if self.held is None:
            self.held = k, v
        elif torch.is_grad_enabled() and any(x.requires_grad for x in (k, v, *self.held)):
            self.held, self._room = (torch.cat([self.held[0], k], 2), torch.cat([self.held[1], v], 2)), None
        else:
            before = self.held[0].shape[2]
            total = before + k.shape[2]
            if self._room is None or self._room[0].shape[2] < total or _locked(self._room[0]):
                self._room = _roomy(self.held[0], max(total, 2 * before)), _roomy(self.held[1], max(total, 2 * before))
            for room, new in zip(self._room, (k, v), strict=True):
                room[:, :, before:total] = new
            self.held = self._room[0][:, :, :total], self._room[1][:, :, :total]
        return self.held


def _locked(x: Tensor) -> bool:
    """Whether torch refuses to write: what inference mode made, outside of it."""
    return x.is_inference() and not torch.is_inference_mode_enabled()


def _roomy(x: Tensor, tokens: int) -> Tensor:
    """``[B, H, tokens, D]`` that begins with ``x``."""
    made = x.new_empty(*x.shape[:2], tokens, x.shape[3])
    made[:, :, : x.shape[2]] = x.detach()
    return made


class RoutingAttention(nn.Module):
    """A layer of local and of routing heads.

    Args:
        width, heads: E and H.
        clusters: C, about the root of the length; the paper has ``window = T / clusters``.
        local_heads: of ``heads``, those that are local; half unless given.
        window: tokens of a cluster, and how far a local head looks back, its own token included (128); without
            causality it looks as far ahead.
        assign: ``"balanced"`` or ``"prefix"``; see the module.
        normalise, shared, memory: see the module.
        decay, update: of `Centroids`.

    Raises:
        ValueError: a number out of range, an option that is not known, or ``assign="prefix"`` without causality.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        clusters: int,
        *,
        local_heads: int | None = None,
        window: int = 128,
        causal: bool = True,
        assign: Literal["balanced", "prefix"] = "balanced",
        normalise: Literal["l2", "layer"] = "l2",
        shared: bool = False,
        memory: int | None = None,
        decay: float = 0.999,
        update: Update = "sum",
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.local = heads // 2 if local_heads is None else local_heads
        if not 0 <= self.local < heads:
            raise ValueError(f"local_heads must be at least 0 and below heads={heads}, got {self.local}")
        if window < 1:
            raise ValueError(f"window must be 1 or more, got {window}")
        if assign not in ("balanced", "prefix"):
            raise ValueError(f"assign must be 'balanced' or 'prefix', got {assign!r}")
        if normalise not in ("l2", "layer"):
            raise ValueError(f"normalise must be 'l2' or 'layer', got {normalise!r}")
        if assign == "prefix" and not causal:
            raise ValueError("assign='prefix' is causal; use assign='balanced' without causality")
        self.window, self.causal, self.assign = window, causal, assign
        self.normalise, self.shared = normalise, shared
        self.projections = Heads(width, heads, bias=bias, device=device, dtype=dtype)
        routing, dim = heads - self.local, width // heads
        self.centroids = Centroids(routing, clusters, dim, decay=decay, update=update, device=device, dtype=dtype)
        kept = (1 if causal and not shared else 0) if memory is None else memory
        shape = (2, routing, clusters, kept, dim)
        self.memory = nn.Parameter(torch.randn(shape, device=device, dtype=dtype)) if kept else None

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: KeysAndValues | None = None) -> Tensor:
        """``[B, T, E]`` to the same.

        Args:
            mask: live tokens, bool ``[B, T]``, or lengths ``[B]``; see `Tokens.of`. Dead tokens give 0.
            cache: for causal decoding without a mask: ``x`` are the tokens after those that it holds, and clusters are
                those of ``assign="prefix"``.

        Raises:
            ValueError: a cache beside a mask or without causality.
        """
        if cache is not None and (mask is not None or not self.causal):
            raise ValueError("a cache serves causal attention without a mask; call without it on all tokens")
        tokens = Tokens.of(x, mask)
        q, k, v = self._projected(tokens.align(x))
        if cache is not None:
            k, v = cache.append(k, v)
        live = None if cache is not None else tokens.live(x.device)
        outs = [self._routed(*(part[:, self.local :] for part in (q, k, v)), live=live)]
        if self.local:
            outs.insert(
                0, self._near(*(part[:, : self.local] for part in (q, k, v)), tokens=tokens, cached=cache is not None)
            )
        return tokens.restore(self.projections.merge(torch.cat(outs, 1)))

    def _projected(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.projections.split(x)
        local, far_q, far_k = self.local, q[:, self.local :], k[:, self.local :]
        if self.shared:
            far_k = far_q
        if self.normalise == "layer":
            far_q, far_k = (F.layer_norm(part, part.shape[-1:]).to(v.dtype) for part in (far_q, far_k))
        return torch.cat([q[:, :local], far_q], 1), torch.cat([k[:, :local], far_k], 1), v

    def _routed(self, q: Tensor, k: Tensor, v: Tensor, live: Tensor | None) -> Tensor:
        scale = q.shape[-1] ** -0.5
        memory = None if self.memory is None else (self.memory[0], self.memory[1])
        if self.training and live is not None:
            self.centroids.start(k, live)
        if live is None or self.assign == "prefix":
            out = attend_prefix(q, k, v, self.centroids, window=self.window, scale=scale, live=live, memory=memory)
        else:
            of_query, of_key = (members(self.centroids.scores(x), live, self.window) for x in (q, k))
            out = attend_members(q, k, v, of_query, of_key, causal=self.causal, scale=scale, memory=memory)
        if self.training and live is not None:
            self.centroids.update(q, k, live)
        return out

    def _near(self, q: Tensor, k: Tensor, v: Tensor, tokens: Tokens, cached: bool) -> Tensor:
        if cached:  # nearer than the window are all that a plan would read
            k, v = (part[:, :, -(self.window - 1 + q.shape[2]) :] for part in (k, v))
        call = AttentionCall(q, k, v) if cached else AttentionCall(q, k, v, tokens.extent(causal=self.causal))
        plan = SparsePlan(
            heads=q.shape[1], query_len=q.shape[2], key_len=k.shape[2], extent=call.extent, window=self.window
        )
        return attend(call, plan.to(q.device))[0]

    def commitment(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Mean squared distance of unit keys and the centroid nearest to each, to be added to a loss (times 1e-4).

        It draws keys to their centroids (lucidrains); the authors' code draws queries too.
        """
        tokens = Tokens.of(x, mask)
        keys = F.normalize(self._projected(tokens.align(x))[1][:, self.local :], dim=-1)
        head = torch.arange(keys.shape[1], device=keys.device)[:, None]
        near = self.centroids.means[head, self.centroids.nearest(keys)].to(keys)
        return (keys - near).square().mean(-1).transpose(1, 2)[tokens.live(x.device)].mean()
