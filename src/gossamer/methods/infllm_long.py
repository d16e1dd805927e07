"""InfLLM as published: prompts and steps by units of the context, and far tokens at one distance."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.methods.base import Settings, require_at_least
from gossamer.methods.reduced import Reduced, Reducing, gathered, listed, reduced_call
from gossamer.plan import Extent, Grid, SparsePlan, ceil_div, on_device
from gossamer.rotary import Rotary
from gossamer.rules import top_k
from gossamer.summaries import Held, Representatives, Summary

__all__ = ["InfLLMLong"]


@dataclass(frozen=True)
class InfLLMLong(Reducing):
    """InfLLM (2402.04617) whole: a model reads texts beyond the length that it was trained on.

    A query attends the keys less than ``local`` tokens back as the model does. Of those further back, the *far* ones,
    it attends the first ``init`` and the best ``blocks`` units of ``block`` tokens, all of them as if they were
    ``local - 1`` tokens back, by the rotary embedding: no distance is longer than the model knows. One softmax is over
    both. Queries choose units together, ``together`` of them in a prompt: the best by the sum, over all heads, of the
    products of their mean with the mean of the ``count`` keys of a unit that later queries attended to most
    (`Representatives`). Far keys that are in no unit yet for the first of these queries are attended too.

    It is the method for prompts and for steps at once, and nothing is too short or too dense for it: where all keys are
    near, attention is dense, and the same. Under a gradient it is dense.

    Fields:
        init: the first tokens, which are attended in any case, rounded up to whole units.
        local: tokens of the window, the query's own among them.
        every: only queries at multiples of it vote.
        together: queries of a prompt that share a choice, by position; a multiple of ``block``.

    Defaults are the authors': units of 128 tokens, 16 of them, 4 representatives, 128 first tokens, a window of 4,096,
    512 queries.

    Deviations: votes are of each eighth query, in prompts alone, and normalised over the window; units of an answer are
    represented by the mean of all of their keys; the first units are sinks whole. Keys are turned back from the
    positions that the model gave them, which rounds them once more. A prompt has its keys in memory, turned, for each
    call; read it in chunks.
    """

    name: ClassVar[str] = "infllm_long"
    needs: ClassVar[frozenset[str]] = frozenset({"causal", "rotary", "values"})
    apart: ClassVar[bool] = False
    extends: ClassVar[bool] = True
    settings: ClassVar[Settings] = tuple({"blocks": blocks} for blocks in (4, 8, 16, 32))
    blocks: int = 16
    block: int = 128
    count: int = 4
    init: int = 128
    local: int = 4096
    every: int = 8
    together: int = 512

    def __post_init__(self) -> None:
        require_at_least(self, 0, "blocks", "init")
        require_at_least(self, 1, "block", "count", "local", "every", "together")
        if self.together % self.block:
            raise ValueError(f"{self.name}.together must be a multiple of block = {self.block}, got {self.together}")

    def represents(self, call: AttentionCall) -> Representatives:
        """What is kept of a layer's keys, which the call's rotary embedding has turned."""
        assert call.rotary is not None
        turned = tuple(call.rotary.frequencies.tolist())
        return Representatives(self.block, self.count, self.local, self.every, turned, call.rotary.interleaved)

    def watches(self, call: AttentionCall) -> tuple[Summary[Any], ...]:
        return () if self.lacks(call) else (self.represents(call),)

    def lacks(self, call: AttentionCall) -> str | None:
        if call.extent.limit is not None:
            return "a call without the model's own window"
        return "a call without a bias" if call.bias is not None else super().lacks(call)

    def reduce(self, call: AttentionCall) -> Reduced | None:
        if call.extent.longest <= self.local:
            return None
        return self._step(call) if call.query_len == 1 and call.store is not None else self._prompt(call)

    # A prompt: the window and what is far, as two calls.

    def _prompt(self, call: AttentionCall) -> Reduced:
        near = replace(call, store=None, state=None, rotary=None)
        window = SparsePlan.unchecked(
            heads=call.groups,
            query_len=call.query_len,
            key_len=call.key_len,
            extent=call.extent,
            window=self.local,
        )
        far = self._far(call)
        plan = self._plan(far, self._means(call))
        pairs = window.count_pairs().sum() + plan.count_pairs().sum()
        whole = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent).count_pairs().sum()
        density = float(pairs / whole.clamp(min=1))
        return Reduced(near, density, window, Reduced(far, density, plan))

    def _far(self, call: AttentionCall) -> AttentionCall:
        """The same queries ``local`` tokens earlier: those that are then dead have no far keys."""
        extent, turn = call.extent, _turns(call)
        positions = extent.query_positions(call.query_len, call.device)
        q = self._as_of(turn, call.q, positions).to(call.q.dtype)
        k = turn.turn(call.k, extent.key_positions(call.key_len, call.device), back=True)
        end = extent.first_position + extent.query_count - self.local
        live = (end - (extent.query_start - self.local).clamp(min=0)).clamp(min=0).minimum(extent.query_count)
        moved = Extent(extent.query_start - self.local, live, extent.key_start, extent.key_count)
        return replace(call, q=q, k=k, extent=moved, sinks=None, store=None, state=None, rotary=None)

    def _as_of(self, turn: Rotary, q: Tensor, positions: Tensor) -> Tensor:
        """Queries ``[B, H, n, D]`` of positions ``[B, n]``, turned as of position ``local - 1``; fp32 (fp64)."""
        wide = q.to(torch.promote_types(q.dtype, torch.float32))
        return turn.turn(turn.turn(wide, positions, back=True), torch.full_like(positions, self.local - 1))

    def _means(self, call: AttentionCall) -> Tensor:
        """Representatives of the units of a prompt, whose queries a store has seen."""
        kind = self.represents(call)
        if call.store is not None:
            return call.store.summary(kind)
        kept = kind.begin()
        kept.seen(call)
        return kept.of(Held(call.k, call.values, call.extent.key_start.tolist(), call.key_len))

    def _plan(self, far: AttentionCall, means: Tensor) -> SparsePlan:
        grid = Grid(far.extent, self.block, self.block)
        share, units = self.together // self.block, min(grid.key_blocks, means.shape[2])
        row = on_device(grid.first_block[:, None] + torch.arange(grid.query_blocks, device="cpu"), far.device)
        shared, first = row // share, on_device(grid.first_block // share, far.device)[:, None]
        block = torch.arange(grid.key_blocks, device=far.device)
        # The first units, and those that are none yet for the first of the queries that choose together.
        chosen = (block < self._sinks) | (block >= shared[..., None] * share)
        chosen &= block <= row[..., None]
        if units and self.blocks and grid.query_blocks:
            most = int((shared - first).max()) + 1
            scores = _scores(self._together(far, first, most), means[:, :, :units])
            end = (first + torch.arange(most, device=far.device))[..., None] * share
            inside = (block[:units] < end) & (block[:units] >= self._sinks)
            best = top_k(scores.masked_fill(~inside, float("-inf")), self.blocks)
            chosen[..., :units] |= best.gather(1, (shared - first)[..., None].expand(-1, -1, units))
        live = torch.arange(grid.query_blocks, device="cpu") < grid.row_blocks[:, None]
        chosen &= on_device(live, far.device)[..., None]
        mask = chosen[:, None].expand(-1, far.groups, -1, -1)
        sizes = {"block_q": self.block, "block_k": self.block}
        return SparsePlan.from_block_mask(mask, far.query_len, far.key_len, extent=far.extent, **sizes)

    def _together(self, far: AttentionCall, first: Tensor, most: int) -> Tensor:
        """The mean of the live queries that choose together: fp32 ``[B, H, most, D]``, of numbers from ``first`` on."""
        extent = far.extent
        means = far.q.new_zeros(far.batch, far.heads, most, far.q.shape[3], dtype=torch.float32)
        begin, stop = extent.first_query.tolist(), (extent.first_query + extent.query_count).tolist()
        positions = extent.query_positions(far.query_len, far.device)
        for b in range(far.batch):
            number = positions[b, begin[b] : stop[b]] // self.together - first[b]
            means[b].index_add_(1, number, far.q[b, :, begin[b] : stop[b]].float())
            means[b] /= number.bincount(minlength=most).clamp(min=1)[:, None]
        return means

    @property
    def _sinks(self) -> int:
        return ceil_div(self.init, self.block)

    # A step: what is read, gathered into one call.

    def _step(self, call: AttentionCall) -> Reduced:
        assert call.store is not None
        means, turn = call.store.summary(self.represents(call)), _turns(call)
        keys = on_device(call.extent.key_count, call.device)[:, None]
        back = (keys - self.local).clamp(min=0) // self.block
        block = torch.arange(ceil_div(call.extent.longest, self.block), device=call.device)
        sinks = max(self._sinks, ceil_div(call.store.sinks, self.block))
        chosen = (block < sinks) | (block >= back)
        units = means.shape[2]
        if units and self.blocks:
            q = self._as_of(turn, call.q, keys - 1)
            scores = _scores(q.float(), means)[:, 0].masked_fill(chosen[:, :units], float("-inf"))
            chosen[:, :units] |= top_k(scores, self.blocks)
        token = torch.arange(call.extent.longest, device=call.device)
        recent = token >= keys - call.store.recent
        index = listed((((chosen[:, token // self.block]) | recent) & (token < keys))[:, None])
        k, v = gathered(call, index.expand(-1, call.groups, -1))
        # A key that is far comes as near as the window reaches.
        nearer = (keys - self.local - index[:, 0]).clamp(min=0).masked_fill(index[:, 0] < 0, 0)
        far = int((nearer > 0).sum(dim=1).max()) if nearer.numel() else 0
        if far:
            k = torch.cat([turn.turn(k[:, :, :far], nearer[:, :far]), k[:, :, far:]], dim=2)
        bias = torch.zeros(index.shape, device=call.device).masked_fill(index < 0, float("-inf"))
        return reduced_call(call, k, v, bias.expand(-1, call.groups, -1).contiguous())


def _turns(call: AttentionCall) -> Rotary:
    """The rotary embedding by which the call's tokens are moved: a row's offset, and a factor, are the same for all."""
    assert call.rotary is not None
    return replace(call.rotary, scaling=1.0, offsets=None)


def _scores(q: Tensor, means: Tensor) -> Tensor:
    """Sums over all heads of ``q`` ``[B, H, n, D]`` times ``means`` ``[B, H or G, N, D]``: fp32 ``[B, n, N]``."""
    q = q.unflatten(1, (means.shape[1], -1)).sum(dim=2)
    return torch.einsum("bhqd,bhnd->bqn", q, means.float())
