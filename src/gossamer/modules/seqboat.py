"""SeqBoat (2306.11197): an average runs over every token, and decides which few tokens attend each other.

The state of a damped average (`gossamer.modules.moving_average.MovingAverage`) goes to a router, which activates a
gated attention unit for a token or leaves it out. Activated tokens move together, and each attends those that are at
most ``window`` places away **among the activated**, however far apart they lay. The choice is hard; what the unit
gives is multiplied by the router's confidence, through which alone the router learns. No loss asks for sparsity: how
many tokens are active is what the task wants.

A layer is a whole block, its norm and its residual included::

    phi = SiLU(average(x))          u, h = W phi          p = softmax(u / tau)          active where p_1 > p_0
    y = SiLU(h + confidence * unit(active phi) + x)

- ``activation="softmax"`` with rotary positions or with none (the enwik8 script, and the default) runs on gossamer's
  kernels, forward and backward, as a window over the compacted tokens; values wider than the kernels' heads are cut
  into heads of the same weights. The relative bias depends on both tokens, and ``"relu2"`` is no softmax: those run in
  torch, in tiles of a window, at the same cost in tokens.
- Positions are those before compaction, as in the authors' code: activated tokens know how far apart they lay.
- ``norm="batch"`` (the image scripts) takes its statistics over all tokens of a batch: **in training a causal layer
  with it sees the future.** ``"layer"``, the default, does not. Dead tokens count in the authors' statistics, not here.
- Left out: dropout, T5's and chunk-local biases, the Laplace activation, truncated averages.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.backends import MAX_HEAD_DIM, attend
from gossamer.call import AttentionCall
from gossamer.modules.moving_average import MovingAverage, truncated_normal
from gossamer.modules.tokens import Factory, Tokens
from gossamer.plan import Extent, SparsePlan, ceil_div
from gossamer.rotary import Rotary

__all__ = ["SeqBoatCache", "SeqBoatLayer", "attend_near", "compacted", "plan_of_window"]

_NONE = float("-inf")


def compacted(active: Tensor) -> tuple[Tensor, Tensor]:
    """Where the active tokens of each row are, in order.

    Args:
        active: bool ``[B, T]``.

    Returns:
        int64 ``[B, m]``, m the most that a row has, and how many each row has, int64 ``[B]`` on the CPU. Places beyond
        a row's count name tokens that are not active.
    """
    counts = active.sum(1).cpu()
    most = int(counts.max()) if len(counts) else 0
    return (~active).to(torch.int8).argsort(dim=1, stable=True)[:, :most], counts


def plan_of_window(counts: Tensor, slots: int, window: int, *, causal: bool, heads: int = 1) -> SparsePlan:
    """Each of ``counts [B]`` compacted tokens on those at most ``window`` places away; itself besides."""
    zero = torch.zeros_like(counts)
    extent = Extent(zero, counts, zero, counts, causal=causal)
    return SparsePlan(heads=heads, query_len=slots, key_len=slots, extent=extent, window=window + 1)


def _weights(logits: Tensor, seen: Tensor, activation: str) -> Tensor:
    if activation == "relu2":
        return logits.relu().square() * seen
    empty = ~seen.any(-1, keepdim=True)
    return logits.masked_fill(~seen, _NONE).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)


def attend_near(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    at: Tensor,
    counts: Tensor,
    *,
    window: int,
    causal: bool,
    activation: str = "softmax",
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """`plan_of_window` in torch, with a relative bias and either activation: tiles of a window and its neighbours.

    Args:
        q, k, v: ``[B, m, Z]`` and ``[B, m, V]``, compacted.
        at: int64 ``[B, m]``, positions before compaction.
        counts: int64 ``[B]``.
        bias: ``[2 P - 1]``, added to the logits by how far the key lies after the query, at most P - 1.
    """
    slots = q.shape[1]
    size = max(1, min(window, slots))
    pad = -slots % size
    order = torch.arange(slots + pad, device=q.device).view(-1, size)
    q, k, v = (F.pad(x, (0, 0, 0, pad)).unflatten(1, (-1, size)) for x in (q, k, v))
    at = F.pad(at, (0, pad)).unflatten(1, (-1, size))
    keys, values, key_at = (_with_neighbours(x, causal) for x in (k, v, at))
    rank = _with_neighbours((order + 1)[None], causal)[0] - 1  # -1 where there is no neighbour
    ahead = rank[:, None] - order[..., None]
    near = (rank >= 0)[:, None] & (ahead >= -window) & (ahead <= (0 if causal else window))
    seen = near & (rank < counts.to(q.device)[:, None, None])[:, :, None]
    logits = q @ keys.transpose(-1, -2) * scale
    if bias is not None:
        logits = logits + _relative(bias, key_at[:, :, None] - at[..., None])
    return (_weights(logits, seen, activation) @ values).flatten(1, 2)[:, :slots]


def _with_neighbours(x: Tensor, causal: bool) -> Tensor:
    """Of tiles ``[B, n, size, ..]``: the one before, the tile, and without causality the one after, in one."""
    none = torch.zeros_like(x[:, :1])
    parts = [torch.cat([none, x[:, :-1]], 1), x]
    return torch.cat(parts if causal else [*parts, torch.cat([x[:, 1:], none], 1)], 2)


def _relative(bias: Tensor, ahead: Tensor) -> Tensor:
    reach = (len(bias) - 1) // 2
    return bias[ahead.clamp(-reach, reach) + reach]


class SeqBoatCache:
    """What decoding reads: the state of the averages, and the last ``window`` activated tokens of each row.

    Its size does not grow, and how far back those tokens lie has no bound.
    """

    def __init__(self) -> None:
        self.state: Tensor | None = None  # [B, E, N]
        self.memory: tuple[Tensor, Tensor, Tensor, Tensor] | None = None  # keys, values, positions, held: [B, w, ..]
        self.seen = 0  # tokens


class SeqBoatLayer(nn.Module):
    """A layer of SeqBoat. Options are by default as in the authors' enwik8 script, but for a window of 1024 there.

    Args:
        width: E.
        key_dim, value_dim: of the attention unit; 128 and 2 E unless given (the image script has 96).
        averages: N of `MovingAverage`.
        window: how many activated tokens a token looks back, its own not counted (128); without causality also ahead.
        causal: whether a token reads those before it and itself alone.
        activation: ``"softmax"``, or ``"relu2"`` (the image script): squares of what is above 0, of
            ``q k / window + bias``, or ``2 window`` without causality.
        positions: ``"rotary"``; ``"relative"``, a learned bias for each distance below ``most_positions``, the last one
            for all beyond; or ``"none"``.
        norm: ``"layer"`` or ``"batch"``; see the module.
        prenorm: whether the norm stands before the averages or after everything.
        router: off, every token is active with full confidence: a local attention to compare with.
        temperature: the router's tau is at first this times the root of E (1.0; 0.3 in some scripts).

    Raises:
        ValueError: a number out of range, or an option that is not known.
    """

    def __init__(
        self,
        width: int,
        *,
        key_dim: int = 128,
        value_dim: int | None = None,
        averages: int = 16,
        window: int = 128,
        causal: bool = True,
        activation: Literal["softmax", "relu2"] = "softmax",
        positions: Literal["rotary", "relative", "none"] = "rotary",
        most_positions: int = 1024,
        norm: Literal["layer", "batch"] = "layer",
        prenorm: bool = True,
        router: bool = True,
        temperature: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        value_dim = 2 * width if value_dim is None else value_dim
        for name, value in (("window", window), ("key_dim", key_dim), ("value_dim", value_dim)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        for name, value, known in (
            ("activation", activation, ("softmax", "relu2")),
            ("positions", positions, ("rotary", "relative", "none")),
            ("norm", norm, ("layer", "batch")),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        if positions == "rotary" and key_dim % 2:
            raise ValueError(f"rotary positions turn pairs of channels; key_dim must be even, got {key_dim}")
        if temperature <= 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.width, self.window, self.causal, self.activation = width, window, causal, activation
        self.dims, self.prenorm, self.router = (key_dim, value_dim, value_dim), prenorm, router
        factory: Factory = {"device": device, "dtype": dtype}
        self.norm = (nn.LayerNorm if norm == "layer" else nn.BatchNorm1d)(width, **factory)
        self.average = MovingAverage(width, averages, causal=causal, **factory)
        self.unit_proj = nn.Linear(width, sum(self.dims), **factory)
        self.hidden_proj = nn.Linear(width, width + (2 if router else 0), **factory)
        self.out_proj = nn.Linear(value_dim, width, **factory)
        for proj in (self.unit_proj, self.hidden_proj, self.out_proj):
            truncated_normal(proj.weight, 0.02)
            nn.init.zeros_(proj.bias)
        # Queries and keys are one projection, scaled and shifted by channel.
        self.gains = nn.Parameter(truncated_normal(torch.empty(2, key_dim, device=device, dtype=dtype), 0.02))
        self.shifts = nn.Parameter(torch.zeros(2, key_dim, device=device, dtype=dtype))
        start = torch.full((1,), math.log(temperature * width**0.5), device=device, dtype=dtype)
        self.log_temperature = nn.Parameter(start) if router else None
        made = truncated_normal(torch.empty(2 * most_positions - 1, device=device, dtype=dtype), 0.02)
        self.relative = nn.Parameter(made) if positions == "relative" else None
        self.rotary = replace(Rotary.of_base(key_dim), interleaved=True) if positions == "rotary" else None

    def forward(self, x: Tensor, mask: Tensor | None = None, cache: SeqBoatCache | None = None) -> Tensor:
        """``[B, T, E]`` to the same.

        Args:
            mask: live tokens, bool ``[B, T]``, or lengths ``[B]``; see `Tokens.of`. Dead tokens give 0.
            cache: for causal decoding without a mask: ``x`` are the tokens after those that it holds.

        Raises:
            ValueError: the mask has a hole or another shape, or a cache beside a mask, without
                causality, or in training with ``norm="batch"``.
        """
        if cache is not None and (mask is not None or not self.causal):
            raise ValueError("a cache serves causal layers without a mask; call without it on all tokens")
        if cache is not None and self.training and isinstance(self.norm, nn.BatchNorm1d):
            raise ValueError("in training the statistics of norm='batch' change step by step; call eval() first")
        tokens = Tokens.of(x, mask)
        if cache is not None and cache.seen:
            return torch.stack([self._step(part, cache) for part in x.unbind(1)], 1) if x.shape[1] else x
        return tokens.restore(self._whole(tokens.align(x), tokens, cache))

    @torch.no_grad()
    def active(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Which tokens the router activates, bool ``[B, T]``."""
        tokens = Tokens.of(x, mask)
        state, _ = self._averaged(tokens.align(x), tokens)
        chosen, _, _ = self._routed(state)
        return tokens.restore(chosen & tokens.live(x.device)).bool()

    def _averaged(self, x: Tensor, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """``phi``, and what the averages read, which in dead slots is 0."""
        read = self._normed(x, tokens.live(x.device)) if self.prenorm else x
        read = read if tokens.whole else read.masked_fill(~tokens.live(x.device)[..., None], 0)
        return F.silu(self.average(read)), read

    def _normed(self, x: Tensor, live: Tensor) -> Tensor:
        if isinstance(self.norm, nn.LayerNorm):
            return self.norm(x)
        return torch.zeros_like(x).masked_scatter(live[..., None], self.norm(x[live]))

    def _routed(self, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of ``phi [.., E]``: which are active, with what confidence, and what goes around the unit."""
        hidden = self.hidden_proj(state)
        if self.log_temperature is None:
            one = torch.ones_like(hidden[..., 0])
            return one.bool(), one, hidden
        chance = (hidden[..., :2] / self.log_temperature.exp()).softmax(-1)
        return chance[..., 1] > chance[..., 0], chance.amax(-1), hidden[..., 2:]

    def _unit(self, state: Tensor, at: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries, keys, values and gates of ``[B, m, E]`` at positions ``[B, m]``."""
        shared, gate, values = F.silu(self.unit_proj(state)).split(self.dims, dim=-1)
        q, k = (shared[..., None, :] * self.gains + self.shifts).to(values.dtype).unbind(-2)
        if self.rotary is not None:
            q, k = (self.rotary.turn(x[:, None], at)[:, 0] for x in (q, k))
        return q, k, values, gate

    @property
    def _scale(self) -> float:
        if self.activation == "softmax":
            return self.dims[0] ** -0.5
        return 1.0 / (self.window if self.causal else 2 * self.window)

    def _whole(self, x: Tensor, tokens: Tokens, cache: SeqBoatCache | None) -> Tensor:
        state, read = self._averaged(x, tokens)
        active, confidence, hidden = self._routed(state)
        at, counts = compacted(active & tokens.live(x.device))
        q, k, v, gate = self._unit(state.gather(1, at[..., None].expand(-1, -1, self.width)), at)
        if self.activation == "softmax" and self.relative is None:
            out = self._attend(q, k, v, counts)
        else:
            given = {"window": self.window, "causal": self.causal, "activation": self.activation}
            out = attend_near(q, k, v, at, counts, scale=self._scale, bias=self.relative, **given)
        held = torch.arange(at.shape[1], device=x.device) < counts.to(x.device)[:, None]
        out = self.out_proj(out * gate) * (confidence.gather(1, at) * held)[..., None]
        added = torch.zeros_like(hidden).scatter_add(1, at[..., None].expand_as(out), out.to(hidden.dtype))
        if cache is not None:
            cache.seen, cache.state = x.shape[1], self.average.state(read)
            last = counts.to(x.device)[:, None] - self.window + torch.arange(self.window, device=x.device)
            slot = last.clamp(min=0, max=max(0, at.shape[1] - 1))
            parts = (k, v, at) if at.shape[1] else (F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1)), F.pad(at, (0, 1)))
            rows = torch.arange(len(x), device=x.device)[:, None]
            keys, values, places = (part[rows, slot] for part in parts)
            cache.memory = keys, values, places, last >= 0
        return self._closed(hidden + added + x, tokens.live(x.device))

    def _closed(self, x: Tensor, live: Tensor) -> Tensor:
        out = F.silu(x)
        return out if self.prenorm else self._normed(out, live)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, counts: Tensor) -> Tensor:
        """On the kernels: values are cut into heads, whose queries and keys are the same."""
        if not q.shape[1]:
            return v
        heads = next(n for n in range(ceil_div(v.shape[-1], MAX_HEAD_DIM), v.shape[-1] + 1) if not v.shape[-1] % n)
        plan = plan_of_window(counts, q.shape[1], self.window, causal=self.causal, heads=heads)
        q, k = (x[:, None].expand(-1, heads, -1, -1) for x in (q, k))
        call = AttentionCall(q, k, v.unflatten(-1, (heads, -1)).transpose(1, 2), plan.extent)
        return attend(call, plan.to(q.device))[0].transpose(1, 2).flatten(2)

    def _step(self, x: Tensor, cache: SeqBoatCache) -> Tensor:
        """One more token ``[B, E]`` of every row."""
        if cache.state is None or cache.memory is None:
            raise ValueError("the cache holds tokens but no state; make a new one and begin with all tokens")
        read = self.norm(x) if self.prenorm else x
        out, cache.state = self.average.step(read, cache.state)
        state = F.silu(out)
        active, confidence, hidden = self._routed(state)
        at = torch.full((len(x), 1), cache.seen, device=x.device)
        q, k, v, gate = self._unit(state[:, None], at)
        own = k, v, at, torch.ones_like(at, dtype=torch.bool)
        keys, values, places, held = (torch.cat(pair, 1) for pair in zip(cache.memory, own, strict=True))
        logits = (q @ keys.transpose(-1, -2))[:, 0] * self._scale
        if self.relative is not None:
            logits = logits + _relative(self.relative, places - at)
        out = (_weights(logits, held, self.activation)[:, None] @ values)[:, 0]
        out = self.out_proj(out * gate[:, 0]) * (confidence * active)[:, None]
        moved = [
            torch.where(active.view(-1, *[1] * (new.ndim - 1)), new[:, 1:], old)
            for new, old in zip((keys, values, places, held), cache.memory, strict=True)
        ]
        cache.memory = moved[0], moved[1], moved[2], moved[3]
        cache.seen += 1
        return self._closed(hidden + out + x, torch.ones(len(x), dtype=torch.bool, device=x.device))
