"""Policies that drop tokens for good: StreamingLLM, SnapKV and PyramidKV."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gossamer.cache import keep
from gossamer.cache.layer import StoreLayer
from gossamer.cache.policies import CachePolicy, require_choice, require_tokens
from gossamer.call import AttentionCall
from gossamer.rotary import Rotary

__all__ = ["EvictingLayer", "PyramidKV", "SnapKV", "StreamingLLM", "StreamingLayer", "VotingPolicy"]

Positions = Literal["original", "cache"]


class EvictingLayer(StoreLayer):
    """Keys and values of which some are dropped after the attention that first read them.

    Args:
        choose: what a call leaves in the cache, as `gossamer.cache.keep` says it, ``[B, G, n]``; None for everything.
    """

    drops = True

    def __init__(self, choose: Callable[[AttentionCall], Tensor | None], **fields: int) -> None:
        super().__init__(**fields)
        self._choose = choose

    def attended(self, call: AttentionCall) -> None:
        super().attended(call)
        kept = self._choose(call)
        if kept is not None:
            starts = call.extent.key_start.to(kept.device)[:, None, None]
            self.keep(torch.where(kept < 0, -1, kept + starts))


@dataclass(frozen=True)
class VotingPolicy(CachePolicy):
    """Keeps what the last queries of a prompt attend to: the shared part of `SnapKV` and `PyramidKV`.

    Each row drops tokens after a call that brings it at least ``window`` queries: after a prompt, after each chunk of
    one, and after a long turn of a conversation, whose own queries then vote on all that is left. Shorter turns and
    answers are added and drop nothing. A row that has no more tokens than its budget keeps them all.

    Fields:
        budget: tokens of each key/value head that stay, the window included.
        window: the last queries, which vote; their own keys always stay.
        kernel: votes are pooled over so many neighbours; 1 for none.
        pool: how, ``max`` or ``mean``.
        reduce: how votes of the query heads of a key/value head become one: ``mean``, ``max`` or ``sum``.
    """

    budget: int = 2048
    window: int = 32
    kernel: int = 7
    pool: keep.Pool = "max"
    reduce: keep.Reduce = "mean"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("budget", "window", "kernel"):
            require_tokens(self, name, 1)
        require_choice(self, "pool", get_args(keep.Pool))
        require_choice(self, "reduce", get_args(keep.Reduce))
        if self.window >= self.budget:
            raise ValueError(
                f"{self.name}.budget includes the window and must be above it, got {self.budget} and {self.window}"
            )

    def layer(self, index: int, layers: int) -> EvictingLayer:
        choose = partial(self.kept, index=index, layers=layers)
        return EvictingLayer(choose, sinks=self.sinks, recent=self.recent)

    def kept(self, call: AttentionCall, index: int, layers: int) -> Tensor | None:
        """What a call leaves in the cache of layer ``index`` of ``layers``: ``[B, G, n]``; None for everything."""
        extent = call.extent
        count, queries = extent.key_count, extent.query_count  # of a row that begins in a later chunk, none
        budgets = torch.where(queries >= self.window, self.budgets(count, index, layers), count)
        if call.query_len == 1 or bool((budgets >= count).all()):
            return None
        votes = keep.window_votes(call, self.window, self.kernel, self.pool, self.reduce)
        return keep.best(votes, count, budgets, queries.clamp(max=self.window).minimum(budgets))

    @abstractmethod
    def budgets(self, count: Tensor, index: int, layers: int) -> Tensor:
        """Tokens that each row keeps in a layer, of ``count`` int64 ``[B]``."""


@dataclass(frozen=True)
class SnapKV(VotingPolicy):
    """SnapKV (2404.14469): of a prompt, each key/value head keeps what its last queries attend to most.

    Defaults: window, kernel and pooling of the authors' LongBench configurations; 2048 tokens, the middle of their
    budgets.

    Deviations: votes of the query heads that share a key/value head are averaged, and one copy of the keys is kept
    (the authors' code keeps one for each query head, and no memory is saved); of equal votes the first token stays;
    kept tokens stay in order; a later turn of a conversation that brings a whole window votes anew (there only the
    first prompt is compressed); rows of a batch are independent.
    """

    name: ClassVar[str] = "snapkv"

    def budgets(self, count: Tensor, index: int, layers: int) -> Tensor:
        return count.clamp(max=self.budget)


@dataclass(frozen=True)
class PyramidKV(VotingPolicy):
    """PyramidKV (2406.02069): SnapKV's votes, with budgets that fall evenly from the first layer to the last.

    Fields:
        budget: of a layer in the mean.
        beta: the last layer keeps ``(budget - window) / beta`` tokens before its window.

    Defaults: those of the authors' scripts, and SnapKV's budget. Deviations: `SnapKV`'s.
    """

    name: ClassVar[str] = "pyramidkv"
    window: int = 8
    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens(self, "beta", 1)

    def budgets(self, count: Tensor, index: int, layers: int) -> Tensor:
        return keep.pyramid_budgets(index, layers, count, self.budget, self.window, self.beta)


class StreamingLayer(StoreLayer):
    """The first tokens of each row and the last ones, and nothing between. `StreamingLLM` says what the arguments mean.

    Between two steps there is room in the window for the token that comes next.
    """

    drops = True
    is_croppable = False  # what the window has lost does not come back

    def __init__(self, *, sinks: int, recent: int, moves: bool = False) -> None:
        super().__init__(sinks=sinks, recent=recent)
        self._moves = moves
        self._rotary: Rotary | None = None

    def _forget(self) -> None:
        super()._forget()
        self._unmoved: Tensor | None = None  # the first slots' keys as they came

    def before_update(self, count: int) -> None:
        if self.dropped and self.starts is not None:  # where gradients were recorded before
            starts = torch.tensor(self.starts, device="cpu")
            self._trim(starts, self.slots - starts)

    def attended(self, call: AttentionCall) -> None:
        super().attended(call)
        if call.rotary is not None:
            self._rotary = replace(call.rotary, scaling=1.0, offsets=None)
        self._trim(call.extent.key_start, call.extent.key_count)

    def _trim(self, starts: Tensor, counts: Tensor) -> None:
        if bool((counts < self.sinks + self.recent).all()):
            return
        kept = keep.sinks_and_recent(counts, self.sinks, self.recent - 1)
        index = torch.where(kept < 0, -1, kept + starts[:, None])[:, None]
        keys = self.keys
        assert keys is not None
        index = index.expand(-1, keys.shape[1], -1).to(keys.device)
        if not self._moves:
            self.keep(index)
            return
        if self._rotary is None:
            raise ValueError(
                "positions='cache' turns keys on by the model's rotary embedding, which no call has said: enable the "
                "model with this cache, or take positions='original'"
            )
        if self._unmoved is not None:
            keys = torch.cat([self._unmoved, keys[:, :, self._unmoved.shape[2] :]], dim=2)
        first = index[:, :, : int((kept < 0).sum(dim=1).max()) + self.sinks]
        self._unmoved = keys.gather(2, first.clamp(min=0)[..., None].expand(-1, -1, -1, keys.shape[3]))
        self.keep(index)
        self._move_on(self._rotary, self._unmoved)

    def _move_on(self, rotary: Rotary, first: Tensor) -> None:
        """Turn the first slots' keys by the number of tokens that are missing behind them."""
        assert self.keys is not None
        assert self.positions is not None
        slot = torch.arange(first.shape[2], device=first.device)
        token = self.positions[:, 0, : first.shape[2]].to(first.device)
        missing = torch.where(token < 0, 0, (self.length - token) - (self.slots - slot))
        self.keys[:, :, : first.shape[2]] = rotary.turn(first, missing)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        super().rearrange(change)
        if self._unmoved is not None:
            self._unmoved = change(self._unmoved)


@dataclass(frozen=True)
class StreamingLLM(CachePolicy):
    """StreamingLLM (2309.17453): attention sinks and a recent window.

    A decode step attends the first ``sinks`` tokens of its row and the last ``recent``, its own among them. Several
    queries at once (a prompt, a chunk of one) attend all of their own tokens before them too, and tokens are dropped
    after their attention.

    Fields:
        positions: ``original``: a kept token stays at its position. ``cache`` (the paper): positions count kept tokens.
            As attention looks at distances alone, the window stays as it is and the sinks are turned on behind it, by
            the model's rotary embedding, each time from the keys as they came.

    Defaults: the authors' class, 4 and 512 tokens. Deviations: positions are the original ones unless asked for; in
    the paper the first queries of a chunk see fewer tokens before them, the more the longer the chunk.
    """

    name: ClassVar[str] = "streaming_llm"
    sinks: int = 4
    recent: int = 512
    positions: Positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens(self, "recent", 1)
        require_choice(self, "positions", get_args(Positions))

    def layer(self, index: int, layers: int) -> StreamingLayer:
        return StreamingLayer(sinks=self.sinks, recent=self.recent, moves=self.needs_rotary())

    def needs_rotary(self) -> bool:
        return self.positions == "cache"
