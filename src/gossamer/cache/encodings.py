"""Policies that keep all tokens, the older ones encoded: KIVI, plain int8 and Mustafar."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, cast

import torch
from torch import Tensor

from gossamer.cache.bitmaps import Sparse, compress
from gossamer.cache.integers import Quantised, quantise
from gossamer.cache.layer import StoreLayer
from gossamer.cache.policies import CachePolicy, require_choice, require_tokens
from gossamer.cache.rooms import Room
from gossamer.call import AttentionCall
from gossamer.encoded import EncodedTokens, Encoding
from gossamer.methods.base import require_share

__all__ = ["Coder", "EncodedLayer", "Int8", "Kivi", "Mustafar"]


class Coder(Protocol):
    """How keys, or values, are encoded."""

    def check(self, dim: int) -> None:
        """Raise ValueError for channels that it does not encode."""
        ...

    def due(self, tokens: int) -> int:
        """Of so many that are not encoded, how many of the oldest now are."""
        ...

    def encode(self, x: Tensor, live: Tensor) -> Encoding:
        """``[B, G, n, D]``, of which ``live`` bool ``[B, n]`` are tokens."""
        ...


class _Side:
    """Keys or values: older tokens encoded, and the newest as they came. Both grow in place."""

    def __init__(self, coder: Coder) -> None:
        self.coder = coder
        self._form: Encoding | None = None  # its tensors are in the rooms
        self._rooms: tuple[Room, ...] = ()
        self._tail: Room | None = None

    @property
    def encoded(self) -> Encoding | None:
        return None if self._form is None else self._form.like([room.held for room in self._rooms])

    @property
    def tail(self) -> Tensor | None:
        return None if self._tail is None else self._tail.held

    @property
    def first(self) -> int:
        """The first slot of the tail."""
        encoded = self.encoded
        return 0 if encoded is None else encoded.tokens

    @property
    def nbytes(self) -> int:
        rooms = self._rooms if self._tail is None else (*self._rooms, self._tail)
        return sum(room.held.numel() * room.held.element_size() for room in rooms)

    def append(self, x: Tensor) -> None:
        if self._tail is None:
            self._tail = Room(x)
        else:
            self._tail.append(x)

    def read(self) -> Tensor:
        """All tokens; not yet decoded where a kernel may read them encoded."""
        encoded, tail = self.encoded, self.tail
        assert tail is not None
        if encoded is None:
            return tail
        found = EncodedTokens(encoded, tail)
        recorded = torch.is_grad_enabled() and tail.requires_grad
        return found.rows() if recorded or torch.compiler.is_compiling() else found

    def encode(self, live: Tensor) -> bool:
        """Encode what is due; ``live`` bool ``[B, slots]``. Returns whether anything was."""
        tail = self.tail
        assert self._tail is not None
        assert tail is not None
        count = self.coder.due(tail.shape[2])
        if not count:
            return False
        first = self.first
        new = self.coder.encode(tail[:, :, :count], live[:, first : first + count])
        if self._form is None:
            self._form, self._rooms = new, tuple(Room(x) for x in new.tensors)
        else:
            for room, x in zip(self._rooms, new.tensors, strict=True):
                room.append(x)
        self._tail.drop(count)
        return True

    def cut(self, slots: int) -> None:
        assert self._tail is not None
        self._tail.cut(slots - self.first)

    def apply(self, change: Callable[[Tensor], Tensor]) -> None:
        for room in self._rooms if self._tail is None else (*self._rooms, self._tail):
            room.change(change)


class EncodedLayer(StoreLayer):
    """All tokens, the older ones encoded after the attention that first read them.

    A call gets them as `gossamer.encoded.EncodedTokens`: few queries read them as they are, in C++ or Triton, and a
    step has fewer bytes to read. Whatever else looks at them (prompts that methods plan in torch, masks that are not
    plain, other attention) has them decoded, of this layer alone, for the call. Where gradients are recorded, under
    ``torch.compile``, and for several queries on other devices than CPUs they are decoded for each call.

    Attributes:
        keys, values: of the newest tokens, as they came.
    """

    is_croppable = False  # what was cut off has its part in scales

    def __init__(self, keys: Coder, values: Coder, **fields: int) -> None:
        self._coders = keys, values
        super().__init__(**fields)

    def _forget(self) -> None:
        super()._forget()
        self._sides = tuple(_Side(coder) for coder in self._coders)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        super().lazy_initialization(key_states, value_states)
        for coder, x in zip(self._coders, (key_states, value_states), strict=True):
            coder.check(x.shape[3])

    def before_update(self, count: int) -> None:
        if self.starts is not None:  # of a call that was not shown; before any was, nobody knows what is padding
            slots = torch.arange(self.slots, device="cpu")
            self._encode(slots >= torch.tensor(self.starts, device="cpu")[:, None])

    def attended(self, call: AttentionCall) -> None:
        self._encode(call.extent.live_keys(self.slots))

    def _encode(self, live: Tensor) -> None:
        keys, values = self._sides
        assert keys.tail is not None
        assert values.tail is not None
        if keys.tail.requires_grad or values.tail.requires_grad:  # codes have no gradient
            return
        first, live = keys.first, live.expand(keys.tail.shape[0], -1)
        if keys.encode(live):
            self._cut_summaries(first)
        values.encode(live)
        self._show(self.slots)

    def append(self, keys: Tensor, values: Tensor) -> None:
        for side, new in zip(self._sides, (keys, values), strict=True):
            side.append(new)
        self._show(self.slots)

    def read(self) -> tuple[Tensor, Tensor]:
        keys, values = self._sides
        return keys.read(), values.read()

    def shown(self, count: int) -> tuple[Tensor, Tensor]:
        keys, values = self.read()
        if count == 1 or keys.device.type == "cpu":
            return keys, values
        return tuple(x.rows() if isinstance(x, EncodedTokens) else x for x in (keys, values))  # type: ignore[return-value]

    def cut(self, slots: int) -> None:
        for side in self._sides:
            side.cut(slots)
        self._show(slots)

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Raises:
            ValueError: a positive number, or tokens that are encoded.
        """
        newest = min((side.tail.shape[2] for side in self._sides if side.tail is not None), default=0)
        if newest < -tokens_to_remove < self.length:
            raise ValueError(
                f"cannot remove the last {-tokens_to_remove} tokens: this layer has encoded all but {newest}. Assisted "
                "decoding and the like need a cache that encodes nothing"
            )
        if -tokens_to_remove >= self.length:
            self.reset()
        else:
            super().crop(tokens_to_remove)

    def keep(self, index: Tensor) -> None:
        """Not here: encoded tokens are all kept."""
        raise ValueError("a layer that encodes its tokens drops none; use one of the two")

    def rearrange(self, change: Callable[[Tensor], Tensor]) -> None:
        for side in self._sides:
            side.apply(change)
        self._show(self.slots)

    @property
    def nbytes(self) -> int:
        return sum(side.nbytes for side in self._sides)

    def _move(self, device: torch.device | str) -> None:
        self.rearrange(lambda x: x.to(device, non_blocking=True))

    def _show(self, slots: int) -> None:
        self.keys, self.values = (side.tail for side in self._sides)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._show(self.slots)


@dataclass(frozen=True)
class _Blocks:
    """In groups of tokens, a block of ``residual`` at a time."""

    bits: int
    group: int
    residual: int

    def check(self, dim: int) -> None:
        _check_bytes(dim, self.bits)

    def due(self, tokens: int) -> int:
        return tokens // self.residual * self.residual

    def encode(self, x: Tensor, live: Tensor) -> Quantised:
        return quantise(x, self.bits, self.group, "tokens", live)


@dataclass(frozen=True)
class _Tokens:
    """In groups of channels, a token once ``residual`` came after it; ``group`` 0 is all channels."""

    bits: int
    group: int
    residual: int

    def check(self, dim: int) -> None:
        _check_bytes(dim, self.bits)
        if self.group and dim % self.group:
            raise ValueError(f"head dimension {dim} is no multiple of group={self.group}; take one that divides it")

    def due(self, tokens: int) -> int:
        return max(0, tokens - self.residual)

    def encode(self, x: Tensor, live: Tensor) -> Quantised:
        return quantise(x, self.bits, self.group or x.shape[3], "channels", live)


def _check_bytes(dim: int, bits: int) -> None:
    if dim * bits % 8:
        raise ValueError(f"{dim} channels of {bits} bits fill no whole bytes; take more bits, or another cache")


@dataclass(frozen=True)
class Kivi(CachePolicy):
    """KIVI (2402.02750): keys in groups of tokens of a channel, values in groups of channels of a token.

    Keys as the model turned them. They are encoded a block of ``residual`` tokens at a time, when the last ones fill
    it, so that 0 to ``residual - 1`` are as they came; values one by one, all but the last ``residual``.

    Fields:
        bits: 2 or 4 a number.
        group: tokens, or channels, that share a scale and a zero.
        residual: see above; a multiple of the group.

    Defaults: the paper's groups and residual, and 4 bits, which the authors advise for models whose query heads share
    key/value heads (2 for others).

    Deviations: zeros and scales are rounded outwards in the model's dtype, so that no number is off by more than half
    a scale; padding enters no scale. On CPUs and in Triton a step multiplies codes, as the authors' does; elsewhere it
    decodes the layer's keys and values.
    """

    name: ClassVar[str] = "kivi"
    bits: int = 4
    group: int = 32
    residual: int = 128

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice(self, "bits", (2, 4))
        require_tokens(self, "group", 1)
        require_tokens(self, "residual", 1)
        if self.residual % self.group:
            raise ValueError(f"kivi.residual must be a multiple of group={self.group}, got {self.residual}")

    def layer(self, index: int, layers: int) -> EncodedLayer:
        size = self.bits, self.group, self.residual
        return EncodedLayer(_Blocks(*size), _Tokens(*size), sinks=self.sinks, recent=self.recent)


@dataclass(frozen=True)
class Int8(CachePolicy):
    """Keys and values in 8 bits, with a scale and a zero for each token and key/value head.

    Tokens are encoded as soon as they were attended; their own call has them as they came.
    """

    name: ClassVar[str] = "int8"

    def layer(self, index: int, layers: int) -> EncodedLayer:
        return EncodedLayer(_Tokens(8, 0, 0), _Tokens(8, 0, 0), sinks=self.sinks, recent=self.recent)


@dataclass(frozen=True)
class _Largest:
    """Without the small elements of each token, ``pack`` tokens at a time once ``residual`` came after them."""

    sparsity: float
    residual: int
    pack: int

    def check(self, dim: int) -> None:
        """Any number of channels."""

    def due(self, tokens: int) -> int:
        return max(0, tokens - self.residual) // self.pack * self.pack

    def encode(self, x: Tensor, live: Tensor) -> Sparse:
        return compress(x, self.sparsity)


@dataclass(frozen=True)
class Mustafar(CachePolicy):
    """Mustafar (2505.22913): of each token's key and value the small elements are left out, by magnitude.

    A bitmap says which are there. Keys as the model turned them. Tokens are encoded ``pack`` at a time, once
    ``residual`` others came after them, so that the last ``residual`` to ``residual + pack - 1`` are as they came.

    Fields:
        key_sparsity, value_sparsity: the share of elements that is left out.

    Defaults: the authors' higher sparsity, 0.7, their window and pack.

    Deviations: exactly ``D - floor(sparsity * D)`` elements of each token stay, ties broken by the lower channel (the
    authors' code keeps one more, and all ties), so that tokens have equal lengths: there are no offsets and no padding
    of tiles. On CPUs and in Triton a step multiplies what is there, as the authors' does; elsewhere it decodes the
    layer's keys and values.
    """

    name: ClassVar[str] = "mustafar"
    key_sparsity: float = 0.7
    value_sparsity: float = 0.7
    residual: int = 32
    pack: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_sparsity", "value_sparsity"):
            require_share(cast(Any, self), name)
            if getattr(self, name) == 1:
                raise ValueError(f"mustafar.{name} must be below 1: something of each token has to stay")
        require_tokens(self, "residual")
        require_tokens(self, "pack", 1)

    def layer(self, index: int, layers: int) -> EncodedLayer:
        keys, values = (_Largest(share, self.residual, self.pack) for share in (self.key_sparsity, self.value_sparsity))
        return EncodedLayer(keys, values, sinks=self.sinks, recent=self.recent)
