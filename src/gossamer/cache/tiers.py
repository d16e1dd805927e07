"""A cache in two tiers: the newest tokens in memory, the older ones in a file, of which a step reads what it needs."""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from gossamer import backends
from gossamer.backends.torch.partial import merge
from gossamer.cache.block_file import aligned
from gossamer.cache.layer import StoreLayer
from gossamer.cache.marks import is_locked
from gossamer.cache.partly_held import PartlyHeld
from gossamer.cache.policies import CachePolicy, require_tokens
from gossamer.cache.pool import Pool
from gossamer.cache.step_calls import chosen_slots, dense_on, on_keys
from gossamer.cache.tiered_tokens import tiered
from gossamer.cache.token_blocks import TokenBlocks
from gossamer.call import AttentionCall
from gossamer.plan import Extent, SparsePlan, ceil_div, starts_of
from gossamer.summaries import Held

__all__ = ["TieredLayer", "Tiers"]

_log = logging.getLogger("gossamer")
_FULL = (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
_AT_ONCE = 64  # blocks of all heads that are written, or read in passing, at once


class TieredLayer(StoreLayer):
    """All tokens: the last ones in memory, the older ones in blocks in a file.

    A block is ``block`` consecutive slots of one batch row and key/value head, keys and then values; once it is full
    and at least ``hot`` tokens came after it, it is written, and never changes. A decode step attends what its plan
    names: what lies in the file is read in whole blocks, which stay in memory until others need their place (`Pool`).
    A step without a plan reads the whole file in passing. So does every call of several tokens, which the layer gives
    all of its keys and values at once: one layer's at a time.

    Decode steps get `TieredTokens` for keys and values, which read what is looked at.

    Attributes:
        keys, values: of the newest tokens, in memory.
        first: the first slot that is in memory; a multiple of the block.
    """

    def __init__(self, *, block: int, hot: int, resident: int, folder: str | None, **fields: int) -> None:
        self._block, self._hot, self._resident, self._folder = block, hot, resident, folder
        super().__init__(**fields)

    def _forget(self) -> None:
        super()._forget()
        self.first = 0
        self._begin = 0  # of the newest tokens in their room
        self._numbers: Tensor | None = None  # int64 [B, G, blocks], of the file
        self._blocks: TokenBlocks | None = None
        self._pool: Pool | None = None
        self._warned = False

    # What the cache is asked for.

    def attend(self, call: AttentionCall, plan: SparsePlan | None) -> tuple[Tensor, Tensor]:
        """Attention of one query a row; see `gossamer.unread.Elsewhere.attend`."""
        return self._attend_all(call) if plan is None else self._attend_chosen(call, plan)

    @property
    def nbytes(self) -> int:
        """Bytes in memory: of the newest tokens, and of the blocks of the file that are there."""
        return super().nbytes + (0 if self._pool is None else self._pool.nbytes)

    @property
    def file_bytes(self) -> int:
        return 0 if self._blocks is None else self._blocks.file.blocks * self._blocks.file.nbytes

    @property
    def is_direct(self) -> bool:
        """Whether the file is read and written past the system's cache of files."""
        return self._blocks is not None and self._blocks.file.is_direct

    @property
    def pool(self) -> Pool | None:
        """The blocks of the file that are in memory; None before there is a file."""
        return self._pool

    # What `StoreLayer` has overridden.

    def append(self, keys: Tensor, values: Tensor) -> None:
        if torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad):
            raise ValueError("a cache in a file records no gradients: call the model under torch.no_grad()")
        held = self.slots - self.first
        self._make_tail(held, keys, values)
        assert self._room is not None
        at = self._begin + held
        for room, new in zip(self._room, (keys, values), strict=True):
            room[:, :, at : at + new.shape[2]] = new
        self._show(self.slots + keys.shape[2])

    def read(self) -> tuple[Tensor, Tensor]:
        assert self.keys is not None
        assert self.values is not None
        if not self.first:
            return self.keys, self.values
        found = []
        for newest in (self.keys, self.values):
            whole = newest.new_empty(*newest.shape[:2], self.first + newest.shape[2], newest.shape[3])
            whole[:, :, self.first :] = newest
            found.append(whole)
        for part, keys, values in self._passing():
            found[0][:, :, part], found[1][:, :, part] = keys, values
        return found[0], found[1]

    def shown(self, count: int) -> tuple[Tensor, Tensor]:
        """What a call of so many tokens gets of `update`."""
        if count > 1 or not self.first:
            return self.read()
        assert self.keys is not None
        assert self.values is not None
        return tiered(self, self.keys, self.values, self.slots)

    def attended(self, call: AttentionCall) -> None:
        try:
            self._write_old()
        except OSError as error:  # the layers of a model hold the same tokens: what has no room stays in memory, ...
            if error.errno not in _FULL:
                raise

    def before_update(self, count: int) -> None:
        try:
            self._write_old()
        except OSError as error:
            if self.leads or error.errno not in _FULL:
                raise  # ... until the next call, which fails before any layer has its tokens
            if not self._warned:
                _log.warning("what a cache has no room for in its file stays in memory: %s", error)
            self._warned = True

    def cut(self, slots: int) -> None:
        if slots < self.first:
            self._bring_back(slots)
        self._show(slots)

    def keep(self, index: Tensor) -> None:
        """Not here: all tokens are kept."""
        raise ValueError("a layer in tiers drops no tokens; use one of the two")

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        super().rearrange(change)
        if self._numbers is not None:
            self._numbers = change(self._numbers)
            self._free_unused()

    def _move(self, device: torch.device | str) -> None:
        """Offloading moves the newest tokens alone."""
        numbers, self._numbers = self._numbers, None
        super()._move(device)
        self._numbers = numbers

    def _show(self, slots: int) -> None:
        assert self._room is not None
        part = slice(self._begin, self._begin + slots - self.first)
        self.keys, self.values = (room[:, :, part] for room in self._room)

    # Memory and file.

    def _make_tail(self, held: int, keys: Tensor, values: Tensor) -> None:
        """Room behind the newest tokens for more; they move to its front when it is at its end."""
        count = held + keys.shape[2]
        room = self._room
        if room is not None and room[0].shape[2] >= self._begin + count and not is_locked(room[0]):
            return
        rooms = []
        for like, old in zip((keys, values), room or (None, None), strict=True):
            grown = like.new_empty(*like.shape[:2], count + self._hot // 2 + self._block, like.shape[3])
            if old is not None:
                grown[:, :, :held] = old[:, :, self._begin : self._begin + held]
            rooms.append(grown)
        self._room, self._begin = (rooms[0], rooms[1]), 0

    def _write_old(self) -> None:
        """Write the blocks that are due. Where the disk has no room, what was not written stays in memory."""
        due = (self.slots - self.first - self._hot) // self._block
        if due <= 0:
            return
        assert self._room is not None
        keys, values = self._room
        if self._blocks is None:
            self._blocks = TokenBlocks.like(keys, values, self._block, self._folder)
        for kept in self._summaries.values():
            kept.of(self.held())  # from the newest tokens, before they go
        for start in range(0, due, _AT_ONCE):
            count = min(_AT_ONCE, due - start)
            part = slice(self._begin, self._begin + count * self._block)
            numbers = self._blocks.write(keys[:, :, part], values[:, :, part])
            self._numbers = numbers if self._numbers is None else torch.cat([self._numbers, numbers], dim=2)
            self._begin += count * self._block
            self.first += count * self._block
            self._show(self.slots)
        if due > 1:  # what a prompt took
            held = self.slots - self.first
            room, self._room = self._room, None
            old = [x[:, :, self._begin : self._begin + held] for x in room]
            self._begin = 0
            self._make_tail(held, *(x[:, :, :0] for x in old))
            assert self._room is not None
            for new, x in zip(cast(Any, self._room), old, strict=True):
                new[:, :, :held] = x
            self._show(self.slots)

    def held(self) -> Held:
        assert self.keys is not None
        assert self.values is not None
        starts = self.starts or [0] * self.keys.shape[0]
        return PartlyHeld(self.keys, self.values, starts, self.prompt, self.first, self.read)

    def _bring_back(self, slots: int) -> None:
        """The block that the cache now ends in becomes the newest tokens."""
        assert self._numbers is not None
        assert self._blocks is not None
        assert self._room is not None
        whole, rest = divmod(slots, self._block)
        tail = None
        if rest:
            rows = aligned(self._numbers[..., whole].numel(), self._blocks.file.nbytes)
            self._blocks.file.read(self._numbers[..., whole].flatten().tolist(), list(rows))
            tail = self._blocks.unpacked(rows, self._numbers.shape[:2])
        keys, values = self._room
        self._room, self._begin = None, 0
        self._make_tail(rest, keys[:, :, :0], values[:, :, :0])
        assert self._room is not None
        for room, old in zip(cast(Any, self._room), tail or (), strict=False):
            room[:, :, :rest] = old[:, :, :rest]
        self.first = whole * self._block
        self._numbers = self._numbers[:, :, :whole]
        self._free_unused()

    def _free_unused(self) -> None:
        assert self._numbers is not None
        assert self._blocks is not None
        unused = sorted(self._blocks.used - set(self._numbers.flatten().tolist()))
        if unused:
            self._blocks.free(unused)
            if self._pool is not None:
                self._pool.forget(unused)

    def _passing(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Stretches of slots of the file, and their keys and values ``[B, G, n, .]``, which hold until the next.

        The next one is read meanwhile.
        """
        assert self._numbers is not None
        assert self._blocks is not None
        blocks, parts = self._blocks, self._numbers.split(_AT_ONCE, dim=2)
        buffers = [aligned(parts[0].numel(), blocks.file.nbytes) for _ in parts[:2]]

        def read(n: int) -> Tensor:
            rows = buffers[n % 2][: parts[n].numel()]
            blocks.file.read(parts[n].flatten().tolist(), list(rows))
            return rows

        with ThreadPoolExecutor(1, thread_name_prefix="gossamer-cache-ahead") as ahead:
            coming = ahead.submit(read, 0)
            for n, part in enumerate(parts):
                rows = coming.result()
                if n + 1 < len(parts):
                    coming = ahead.submit(read, n + 1)
                keys, values = blocks.unpacked(rows, part.shape[:2])
                first = n * _AT_ONCE * self._block
                yield slice(first, first + keys.shape[2]), keys, values

    # Attention of a step.

    def _attend_all(self, call: AttentionCall) -> tuple[Tensor, Tensor]:
        """The newest tokens, and the file in passing."""
        assert self.keys is not None
        assert self.values is not None
        out, lse = self._attend_part(call, slice(self.first, self.slots), self.keys, self.values, call.sinks)
        out = out.float()
        for part in self._passing() if self.first else ():
            merge(out, lse, *self._attend_part(call, *part, None))
        return out.to(call.q.dtype), lse

    def _attend_part(
        self, call: AttentionCall, part: slice, keys: Tensor, values: Tensor, sinks: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """One stretch of slots; keys that a row does not have are none of its own."""
        extent = call.extent
        begin = extent.key_start.clamp(min=part.start, max=part.stop)
        end = (extent.key_start + extent.key_count).clamp(min=part.start, max=part.stop)
        live = Extent(0 * begin, extent.query_count, begin - part.start, end - begin, causal=False)
        return dense_on(call, keys, values, live, sinks)

    def _attend_chosen(self, call: AttentionCall, plan: SparsePlan) -> tuple[Tensor, Tensor]:
        slots, counts = chosen_slots(plan)
        batch, heads = counts.shape
        most = int(counts.max()) if counts.numel() else 0
        none = torch.zeros(batch, dtype=torch.int64, device="cpu")
        extent = Extent(none, call.extent.query_count, none, most, causal=False)
        if slots.numel() == batch * heads * most:
            keys, values = self.gathered(slots.view(batch, heads, most))
            return dense_on(call, keys, values, extent, call.sinks)
        # Behind the slots of a head that has fewer its last ones again, which nobody attends.
        order = torch.arange(most, device=slots.device)
        first = starts_of(counts)[:-1].view(batch, heads, 1)
        place = first + order.minimum((counts - 1).clamp(min=0)[..., None])
        keys, values = self.gathered(slots[place.clamp(max=slots.numel() - 1)])
        own = SparsePlan.unchecked(
            heads=heads,
            query_len=1,
            key_len=most,
            extent=extent,
            column_indptr=starts_of(counts),
            column_indices=order.expand(batch, heads, -1)[order < counts[..., None]].to(torch.int32),
        )
        return backends.attend(on_keys(call, keys, values, extent, call.sinks), own)

    def gathered(self, slots: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[B, heads, n, .]`` of slots int64 ``[B, heads, n]``; heads G or more."""
        assert self._room is not None
        batch, groups, room = self._room[0].shape[:3]
        heads = slots.shape[1]
        group = torch.arange(heads, device=slots.device) // max(1, heads // groups)
        row = torch.arange(batch, device=slots.device)[:, None] * groups + group
        is_old = (slots < self.first).flatten()
        old, new = is_old.nonzero()[:, 0], (~is_old).nonzero()[:, 0]
        place = (row[..., None] * room + (slots - self.first + self._begin)).flatten()[new]
        found = [x.new_empty(slots.numel(), x.shape[3]) for x in self._room]
        for to, held in zip(found, self._room, strict=True):
            to.index_copy_(0, new, held.view(-1, held.shape[3]).index_select(0, place))
        if old.numel():
            for to, held in zip(found, self._read_chosen(row, slots, old), strict=True):
                to.index_copy_(0, old, held.to(to))
        return tuple(x.view(*slots.shape, -1) for x in found)  # type: ignore[return-value]

    def _read_chosen(self, row: Tensor, slots: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values ``[n, .]`` of those slots that are in the file, by way of the pool.

        Args:
            row: int64 ``[B, heads]``, batch row times G and key/value head.
            old: which of all slots they are.
        """
        assert self._numbers is not None
        assert self._blocks is not None
        if self._pool is None:
            rows = self._numbers.shape[0] * self._numbers.shape[1]
            self._pool = Pool(self._blocks.file, ceil_div(self._resident, self._block) * rows)
        slot = slots.flatten()[old].cpu()
        of = row[..., None].expand(slots.shape).flatten()[old].cpu() * self._numbers.shape[2] + slot // self._block
        # Slots ascend in each head, so that those of a block are neighbours.
        blocks, which = of.unique_consecutive(return_inverse=True)
        numbers = self._numbers.flatten()[blocks].tolist()
        place = torch.tensor(self._pool.hold(numbers), dtype=torch.int64, device="cpu")[which]
        return self._blocks.gathered(self._pool.rows, place, slot % self._block)


@dataclass(frozen=True)
class Tiers(CachePolicy):
    """All tokens, the older ones in a file: InfLLM's tiers (2402.04617, section 3.3), with a file as the lower one.

    Memory holds the last ``hot`` tokens of each layer, and of the older ones ``resident`` a key/value head: the blocks
    that steps have read last. What a step reads is chosen by a method (``decode``); without one each step reads the
    file. The file has no name and ends with the cache.

    Fields:
        hot: tokens that are in memory in any case, at least; up to a block more are.
        resident: tokens of older blocks that memory holds. A step that needs more makes it hold more.
        block: tokens that are written and read together.
        folder: of the file, on a disk; None: the system's folder for temporary files.

    Defaults are InfLLM's: blocks of 128 tokens, 32 of them, and a local window of 4,096. Deviations: the authors' lower
    tier is memory beside a GPU's, and blocks are thrown out by their score, optionally; here by their last use.
    """

    name: ClassVar[str] = "tiers"
    hot: int = 4096
    resident: int = 4096
    block: int = 128
    folder: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_tokens(self, "hot", 1)
        require_tokens(self, "resident")
        require_tokens(self, "block", 1)
        if self.folder is not None and not isinstance(self.folder, str):
            raise TypeError(f"tiers.folder must be the path of a folder, or None, got {self.folder!r}")

    def layer(self, index: int, layers: int) -> TieredLayer:
        size = {"block": self.block, "hot": self.hot, "resident": self.resident}
        return TieredLayer(**size, folder=self.folder, sinks=self.sinks, recent=self.recent)
