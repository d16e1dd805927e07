"""Representative keys of blocks: those that the queries right after them attended to most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.rotary import Rotary
from gossamer.summaries.base import Held, Kept, Summary

__all__ = ["Representatives"]

_AT_ONCE = 64  # queries whose weights are held at once


@dataclass(frozen=True)
class Representatives(Summary[Tensor]):
    """For each block and query head the mean of a few of its keys (InfLLM, 2402.04617, section 3.2).

    A key's score is the sum of the attention weights that queries less than ``local`` tokens after it give it, among
    the keys that are as near to them: a block's keys have all of theirs once the block lies ``local`` tokens back. The
    ``count`` keys with the largest scores represent it; of equal ones the first. Where no query has been seen that
    voted, as in a cache that was read before anybody asked, all keys of the block do.

    Keys that a rotary embedding has turned by position are represented as they were before, where it is given.

    Queries vote at positions that are multiples of ``every``, those of decode steps excepted, whose store may have
    their keys elsewhere. A vote is not taken back when its query is cut off.

    Fields:
        block: tokens of a block, counted from each row's first live key.
        count: keys that represent it.
        local: see above.
        every: 1 for every query.
        turned, interleaved: frequencies of the embedding, and which channels are pairs; see `gossamer.rotary.Rotary`.
    """

    block: int
    count: int
    local: int
    every: int
    turned: tuple[float, ...] = ()
    interleaved: bool = False

    def __post_init__(self) -> None:
        for name in ("block", "count", "local", "every"):
            if getattr(self, name) < 1:
                raise ValueError(f"Representatives.{name} must be at least 1, got {getattr(self, name)}")

    def begin(self) -> Kept[Tensor]:
        return _Kept(self)


class _Kept(Kept[Tensor]):
    """`of`: ``[B, heads, N, D]`` in the keys' dtype, of all blocks that lie ``local`` tokens back in the longest row.

    Heads are H where queries were seen, else G. Blocks that a row does not have: anything finite.
    """

    def __init__(self, kind: Representatives) -> None:
        self.kind = kind
        self._votes: Tensor | None = None  # fp32 [B, H, room], by slot
        self._means: Tensor | None = None  # [B, heads, room, D]
        self._starts: list[int] = []
        self._done: list[int] = []  # blocks of each row that have their mean

    def seen(self, call: Any) -> None:
        extent, kind = call.extent, self.kind
        if call.query_len == 1:
            return
        votes = self._votes = _with_room(self._votes, (call.batch, call.heads, call.key_len), 2, torch.float32, call.k)
        for b in range(call.batch):
            first, count = int(extent.first_position[b]), int(extent.query_count[b])
            start, row = int(extent.key_start[b]), int(extent.first_query[b])
            voters = list(range(first + (-first) % kind.every, first + count, kind.every))
            for some in torch.tensor(voters, dtype=torch.int64, device="cpu").split(_AT_ONCE) if voters else ():
                low = max(0, int(some[0]) - kind.local + 1)
                keys = slice(start + low, start + int(some[-1]) + 1)
                q, k = call.q[b, :, (some - first + row).to(call.device)], call.k[b, :, keys]
                distance = some[:, None] - torch.arange(low, int(some[-1]) + 1, device="cpu")
                near = ((distance >= 0) & (distance < kind.local)).to(call.device)
                votes[b, :, keys] += _weights(q, k, near, call.scale, call.softcap).sum(dim=1)

    def of(self, held: Held) -> Tensor:
        size, starts = self.kind.block, list(held.starts)
        if starts != self._starts:
            self._starts, self._done = starts, [0] * len(starts)
        batch, groups, slots, dim = held.shape
        wanted = [max(0, slots - start - self.kind.local) // size for start in starts]
        heads = groups if self._votes is None else self._votes.shape[1]
        if self._means is not None and self._means.shape[1] != heads:
            self._means, self._done = None, [0] * len(starts)
        most = max(wanted, default=0)
        means = self._means = _with_room(self._means, (batch, heads, most, dim), 2, held.dtype, held)
        for b, (done, blocks) in enumerate(zip(self._done, wanted, strict=True)):
            if done < blocks:
                slot = starts[b] + done * size
                keys = self._unturned(held.keys_from(slot)[b, :, : (blocks - done) * size], done * size)
                means[b, :, done:blocks] = self._represented(keys.unflatten(1, (-1, size)), b, slot, heads)
        self._done = [max(pair) for pair in zip(self._done, wanted, strict=True)]
        return means[:, :, :most]

    def _unturned(self, keys: Tensor, position: int) -> Tensor:
        """Keys ``[G, n, D]`` of positions from ``position`` on, as they were before they were turned."""
        if not self.kind.turned:
            return keys
        rotary = Rotary(torch.tensor(self.kind.turned, device=keys.device), interleaved=self.kind.interleaved)
        positions = torch.arange(position, position + keys.shape[1], device=keys.device)
        return rotary.turn(keys[None], positions[None], back=True)[0]

    def _represented(self, keys: Tensor, row: int, slot: int, heads: int) -> Tensor:
        """``[heads, n, D]`` of blocks of keys ``[G, n, block, D]`` that begin at a slot."""
        everything = keys.float().mean(dim=2)
        if self._votes is None or self.kind.count >= self.kind.block:
            return everything.repeat_interleave(heads // keys.shape[0], dim=0).to(keys.dtype)
        share, count, size = heads // keys.shape[0], keys.shape[1], self.kind.block
        votes = self._votes[row, :, slot : slot + count * size]
        votes = torch.nn.functional.pad(votes, (0, count * size - votes.shape[1])).unflatten(1, (count, size))
        order = votes.sort(dim=2, descending=True, stable=True).indices[..., : self.kind.count]
        own = keys.repeat_interleave(share, dim=0).gather(2, order[..., None].expand(-1, -1, -1, keys.shape[3]))
        voted = votes.amax(dim=2) > 0
        everything = everything.repeat_interleave(share, dim=0)
        return torch.where(voted[..., None], own.float().mean(dim=2), everything).to(keys.dtype)

    def cut(self, slots: int) -> None:
        back = [max(0, slots - start - self.kind.local) // self.kind.block for start in self._starts]
        self._done = [min(pair) for pair in zip(self._done, back, strict=True)]
        if self._votes is not None:
            self._votes = _writable(self._votes)
            self._votes[:, :, slots:] = 0

    def take_rows(self, index: Tensor) -> None:
        self._starts, self._done = ([x[row] for row in index.tolist()] if x else [] for x in (self._starts, self._done))
        self._votes, self._means = (
            None if x is None else x.index_select(0, index.to(x.device)) for x in (self._votes, self._means)
        )


def _weights(q: Tensor, k: Tensor, near: Tensor, scale: float, softcap: float | None) -> Tensor:
    """``[H, n, keys]``, the softmax of each query of ``[H, n, D]`` over the keys ``[G, keys, D]`` that are near it."""
    logits = (q.unflatten(0, (k.shape[0], -1)).flatten(1, 2) @ k.transpose(-1, -2)).float() * scale
    logits = logits.unflatten(1, (-1, q.shape[1])).flatten(0, 1)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits.masked_fill(~near, float("-inf")).softmax(dim=-1)


def _with_room(old: Tensor | None, shape: tuple[int, ...], dim: int, dtype: torch.dtype, like: Any) -> Tensor:
    """At least so large in ``dim``, what was there at its place, zeros behind it; one that can be written."""
    if old is not None and old.shape[dim] >= shape[dim]:
        return _writable(old)
    size = list(shape)
    size[dim] += size[dim] // 8 + 64
    grown = torch.zeros(size, dtype=dtype, device=like.device)
    if old is not None:
        grown.narrow(dim, 0, old.shape[dim]).copy_(old)
    return grown


def _writable(tensor: Tensor) -> Tensor:
    """Tensors that were made in inference mode are written in that mode alone."""
    return tensor.clone() if tensor.is_inference() and not torch.is_inference_mode_enabled() else tensor
