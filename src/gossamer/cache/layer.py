"""`StoreLayer`: one layer's keys and values, as transformers' caches hold them and as methods read them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from gossamer.cache.marks import is_locked, marked
from gossamer.call import AttentionCall
from gossamer.plan import Extent
from gossamer.summaries import Held, Kept, Summary

__all__ = ["Part", "StoreLayer"]

# Calls of so many tokens are drafts and short turns, which leave a summary of the prompt as it is.
_DRAFT = 64

T = TypeVar("T")


class StoreLayer(DynamicLayer):
    """Keys and values of one attention layer, with what was worked out from them. A `gossamer.call.Store`.

    A **slot** is a place in ``keys``; the cache's **length** is the number of tokens it has seen, dropped ones and
    padding included. They differ once a policy has dropped tokens (`keep`): ``get_seq_length`` says the length, by
    which models give positions to the next tokens, ``get_mask_sizes`` the slots, and `positions` which token a slot
    holds. Keys keep the phase that they were given: a token that is kept stays at its position.

    Keys and values grow in place: room is made ahead, so that a step copies one token and not the cache. Where
    gradients are recorded they are joined anew, as a stock layer does: a graph may hold those that were there.

    A policy of what is kept, and how, is a subclass that overrides some of:

    * `before_update` and `attended`, which run before tokens are added and after the attention that first read them;
      an eviction calls `keep` there. Both do nothing here.
    * `append`, `read` and `rearrange`, for a layer that stores something else than the keys and values themselves:
      add tokens, give all keys and values for one attention call (a `gossamer.unread.Unread` serves), and apply a
      function to everything with a batch dimension. Whoever overrides them also overrides `cut` and `keep`, or says
      that it cannot (`is_croppable`).

    Attributes:
        drops: whether the policy drops tokens.
        peak: the most bytes that the layer has held at once, with the tokens of the call that had come (`nbytes`).
        leads: whether this is the first layer of its cache, which raises for all of them while none has changed.
        keys, values: views ``[B, G, slots, D]`` and ``[B, G, slots, Dv]``; None before the first update.
        length: tokens seen.
        dropped: tokens seen and no longer held, in each row.
        starts: slot of each row's first live key; None until a call has said it.
        prompt: slots that were there at the end of the last prompt: the first call, and any of more than 64 tokens.
        positions: int64 ``[B, G, slots]``, the token that each slot holds, counted with its row's padding, or -1; None
            while slot j holds token j.
        sinks, recent: see `gossamer.call.Store`.
        state: one mapping for each batch row, for what a method keeps over the steps of one answer. It is emptied
            whenever several tokens come at once, tokens are cut off or dropped, or rows change places.
    """

    drops = False

    def __init__(self, *, sinks: int = 0, recent: int = 0) -> None:
        super().__init__()
        self.sinks, self.recent, self.leads = sinks, recent, True
        self._forget()

    def _forget(self) -> None:
        self._room: tuple[Tensor, Tensor] | None = None
        self._in_graph = False  # a graph may hold the room
        self._told, self._padded, self.peak = True, False, 0  # of the last call: its attention, its padding
        self.length = self.dropped = self.prompt = self._appended = 0
        self.starts: list[int] | None = None
        self.positions: Tensor | None = None
        self.state: list[dict[str, Any]] = []
        self._summaries: dict[Summary[Any], Kept[Any]] = {}

    # What a policy overrides.

    def before_update(self, count: int) -> None:
        """Before ``count`` tokens a row are added."""

    def attended(self, call: AttentionCall) -> None:
        """After the attention of a call on this layer, its keys and values those of `read`.

        Not called where the mask is no plain one, nor where a gradient is needed. A call of the whole prompt has
        ``call.query_len == call.key_len`` (several, where a prompt comes in chunks); a decode step has one query.
        """
        self.told()

    def append(self, keys: Tensor, values: Tensor) -> None:
        """Add tokens ``[B, G, n, D]`` and ``[B, G, n, Dv]`` behind the last slot."""
        old = self.slots
        if torch.is_grad_enabled():
            self._join(keys, values)
            return
        self._make_room(old + keys.shape[2], keys, values)
        assert self._room is not None
        for room, new in zip(self._room, (keys, values), strict=True):
            room[:, :, old : old + new.shape[2]] = new
        self._show(old + keys.shape[2])

    def read(self) -> tuple[Tensor, Tensor]:
        """All keys and values ``[B, G, slots, .]``, for one attention call. Nobody writes to them."""
        assert self.keys is not None
        assert self.values is not None
        return self.keys, self.values

    def shown(self, count: int) -> tuple[Tensor, Tensor]:
        """What `update` gives a call of ``count`` tokens: all keys and values, which a `gossamer.unread.Elsewhere` of
        theirs may read when they are looked at."""
        del count
        return self.read()

    def cut(self, slots: int) -> None:
        """Forget the slots from ``slots`` on."""
        self._show(slots)

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to everything that has a batch dimension, the first one."""
        assert self._room is not None
        keys, values = self._room
        self._room = change(keys), change(values)
        self._show(self.slots)

    # What policies call.

    @property
    def slots(self) -> int:
        """Tokens held, padding included, in each row and head."""
        return self.length - self.dropped

    def keep(self, index: Tensor) -> None:
        """Keep these slots alone, in each row and head, and count those before a row's first live one as padding.

        Args:
            index: int64 ``[B, G, n]``, ascending, after any number of ``-1`` for slots without a token. Those and slots
                of padding come to as many in all heads of a row.

        Raises:
            ValueError: another shape, slots that there are none of, that do not ascend, or padding that differs.
        """
        slots, keys, values = self.slots, self.keys, self.values
        assert keys is not None
        assert values is not None
        if index.ndim != 3 or index.shape[:2] != keys.shape[:2] or index.is_floating_point():
            raise ValueError(f"keep needs slots [B, G, n] = {tuple(keys.shape[:2])} x n, got {tuple(index.shape)}")
        ascends = bool(((index.diff(dim=2) > 0) | (index[..., 1:] == -1)).all())
        if not ascends or bool(((index < -1) | (index >= slots)).any()):
            raise ValueError(f"slots to keep must ascend and lie in 0 .. {slots - 1}, after any -1")
        padding = torch.tensor(self.starts or [0] * keys.shape[0], device=index.device)[:, None, None]
        kept = (index < padding).sum(dim=2)
        if bool((kept != kept[:, :1]).any()):
            raise ValueError("the heads of a row must keep as many slots of padding each")
        held = self._positions()
        moved = [x.gather(2, index.clamp(min=0)[..., None].expand(-1, -1, -1, x.shape[3])) for x in (keys, values)]
        self.positions = held.gather(2, index.clamp(min=0)).masked_fill(index < 0, -1)
        self.starts = kept[:, 0].tolist()
        self.dropped = self.length - index.shape[2]
        self._appended, self._room = 0, None
        self._make_room(index.shape[2], *moved)
        assert self._room is not None
        for room, new in zip(self._room, moved, strict=True):
            room[:, :, : index.shape[2]] = new
        self._show(index.shape[2])
        self.prompt = self.slots
        self._summaries.clear()
        self._forget_state()

    def _positions(self) -> Tensor:
        if self.positions is not None:
            return self.positions
        assert self.keys is not None
        return torch.arange(self.slots, device=self.keys.device).expand(*self.keys.shape[:2], -1)

    # What the attention function asks and says.

    def place(self, extent: Extent) -> None:
        """What a call's mask says about this layer's keys: where each row's first live one is."""
        if self.dropped == 0:
            self.starts = extent.key_start.tolist()

    def extent(self, query_len: int) -> Extent | None:
        """Of a call whose queries are the last tokens, in slots; None while the mask describes it."""
        if self.dropped == 0:
            return None
        starts = torch.tensor(self.starts, device="cpu")
        count = self.slots - starts
        live = count.clamp(max=query_len)
        return Extent(count - query_len, live, starts, count)

    def pad(self, count: int, padding: Tensor) -> bool:
        """Take in that of the last ``count`` tokens the first ``padding`` int64 ``[B]`` are padding: rows without a
        live token before begin behind it. Returns whether no other row has any.
        """
        if self._padded:  # by another layer of the model that reads this store
            return True
        rows = padding.tolist()
        starts = self.starts or [0] * len(rows)
        if any(n and start < self.slots - count for n, start in zip(rows, starts, strict=True)):
            return False
        self.starts, self._padded = [start + n for n, start in zip(rows, starts, strict=True)], True
        return True

    def parts(self) -> tuple[Part, ...]:
        """Stores of some of the heads each, where one call cannot attend them all; most layers have none."""
        return ()

    @property
    def nbytes(self) -> int:
        """Bytes of what is held of keys and values, without the room made ahead and what is worked out from them."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)

    def told(self) -> None:
        """The last tokens were attended, and what a policy does then was done, or is not to be."""
        self._told = True

    def refuse(self, what: str) -> None:
        """Raise for attention that only a mask describes: where tokens were dropped, or are to be after such a call.

        Raises:
            ValueError: some were, or the layer `drops`.
        """
        if self.dropped or self.drops:
            raise ValueError(
                f"a cache that drops tokens cannot be combined with {what}, where attention knows its mask "
                "alone; use one that drops nothing (cache='keep')"
            )

    def summary(self, kind: Summary[T]) -> T:
        """See `gossamer.call.Store.summary`."""
        return self.begin(kind).of(self.held())

    def begin(self, kind: Summary[T]) -> Kept[T]:
        """Keep up a summary from now on, and show it the queries of prompts where it wants them."""
        return self._summaries.setdefault(kind, kind.begin())

    def seen(self, call: AttentionCall) -> None:
        """A call's queries, and all keys, for summaries that want them; before its attention."""
        for kept in self._summaries.values():
            kept.seen(call)

    def held(self) -> Held:
        """What there is to summarise."""
        keys, values = self.read()
        return Held(keys, values, self.starts or [0] * keys.shape[0], self.prompt)

    # What transformers calls.

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        self.state = [{} for _ in range(key_states.shape[0])]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens; all keys and values, from which `store_of` finds this layer."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        count = key_states.shape[2]
        if self.length:
            if self.drops and not self._told and not torch.is_grad_enabled():
                raise ValueError(
                    "a cache that drops tokens was not told of the last call's attention: it ran under torch.compile, "
                    "recorded gradients or failed. Take a new cache with an uncompiled model under torch.no_grad(), "
                    "or one that drops nothing (cache='keep')"
                )
            self.before_update(count)
        self._told = self._padded = False
        if count > 1:
            self._forget_state()
        if self.positions is not None:
            new = torch.arange(self.length, self.length + count, device=self.positions.device)
            self.positions = torch.cat([self.positions, new.expand(*self.positions.shape[:2], -1)], dim=2)
        self.append(key_states, value_states)
        if self.length == 0 or count > _DRAFT:
            self.prompt = self.slots + count
        self.length += count
        self._appended += count
        self.peak = max(self.peak, self.nbytes)
        if torch.compiler.is_compiling():
            self.refuse("torch.compile")
            return self.read()
        keys, values = self.shown(count)
        return marked(keys, self), values

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.slots + query_length, self.dropped

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: a positive number; or more tokens than came since some were dropped for good.
        """
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes 0 or a negative number of tokens to remove, got {tokens_to_remove}")
        removed = min(-tokens_to_remove, self.length)
        if removed == 0 or not self.is_initialized:
            return
        if self.dropped and removed > self._appended:
            raise ValueError(
                f"cannot remove the last {removed} tokens: this layer has dropped others since, for good, and can go "
                f"back {self._appended}. Assisted decoding and the like need a cache that drops nothing"
            )
        self.length -= removed
        self._appended -= removed
        self.cut(self.slots)
        self.starts = None if self.starts is None else [min(start, self.slots) for start in self.starts]
        if self.positions is not None:
            self.positions = self.positions[:, :, : self.slots]
        self._cut_summaries(self.slots)
        self.prompt = min(self.prompt, self.slots)
        self._forget_state()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take_rows(torch.arange(len(self.state), device="cpu").repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take_rows(torch.arange(len(self.state), device="cpu")[indices.cpu()])

    def _take_rows(self, index: Tensor) -> None:
        if not self.length:
            return
        self.rearrange(lambda x: x.index_select(0, index.to(x.device)))
        if self.positions is not None:
            self.positions = self.positions.index_select(0, index.to(self.positions.device))
        rows = index.tolist()
        self.starts = None if self.starts is None else [self.starts[row] for row in rows]
        for kept in self._summaries.values():
            kept.take_rows(index)
        self.state = [{} for _ in rows]

    def reset(self) -> None:
        super().reset()
        self._forget()

    def offload(self) -> None:
        self._move("cpu")

    def prefetch(self) -> None:
        if self.is_initialized:
            self._move(self.device)

    def _move(self, device: torch.device | str) -> None:
        if self._room is not None and self._room[0].device != torch.device(device):
            keys, values = (room.to(device, non_blocking=True) for room in self._room)
            self._room = keys, values
            self._show(self.slots)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"keys": None, "values": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        if self._room is not None:
            self._show(self.slots)

    def _make_room(self, slots: int, keys: Tensor, values: Tensor) -> None:
        """For so many slots, of tensors like these; those that were there stay."""
        fits = self._room is not None and self._room[0].shape[2] >= slots
        if fits and not self._in_graph and not is_locked(cast(Any, self._room)[0]):
            return
        ahead = slots + max(64, slots // 16)
        rooms = []
        for like, old in zip((keys, values), self._room or (None, None), strict=True):
            room = like.new_empty(*like.shape[:2], ahead, like.shape[3])
            if old is not None:
                room[:, :, : self.slots] = old[:, :, : self.slots]
            rooms.append(room)
        self._room, self._in_graph = (rooms[0], rooms[1]), False

    def _join(self, keys: Tensor, values: Tensor) -> None:
        """As `append`, where a graph may hold what is there: that is not written to."""
        if self.keys is not None and self.values is not None and self.slots:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        self._room, self._in_graph = (keys, values), True
        self._show(keys.shape[2])

    def _show(self, slots: int) -> None:
        assert self._room is not None
        self.keys, self.values = (room[:, :, :slots] for room in self._room)

    def _cut_summaries(self, slots: int) -> None:
        """What is summarised is as it was before ``slots`` alone."""
        for kept in self._summaries.values():
            kept.cut(slots)

    def _forget_state(self) -> None:
        for row in self.state:
            row.clear()


Part = tuple[list[int], StoreLayer]
"""Key/value heads of a layer, ascending, and their store."""
