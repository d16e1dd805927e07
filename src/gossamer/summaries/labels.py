"""Labels of keys: a few channels of each, in few bits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.plan.integers import ceil_div
from gossamer.summaries.base import Growing, Held, Kept, Summary, raised

__all__ = ["LabelSet", "Labels"]

# Tokens by which channels are chosen where no table says them: the length of the authors' samples.
SEEN = 512


@dataclass(frozen=True, slots=True, eq=False)
class LabelSet:
    """Labels of all keys, by position. L is G, or H where query heads of a key/value head have channels of their own.

    Fields:
        codes: ``[B, L, r, N]`` of floating point, or uint8 of 8 bits; of 4 bits uint8 ``[B, L, ceil(r / 2), N]``, two
            channels a byte, the first in its lower half.
        channels: int64 ``[B, L, r]``, which they are.
        low, step: bf16 ``[B, L, N]``: a value is ``low + step * code``. None for labels of floating point.
    """

    codes: Tensor
    channels: Tensor
    low: Tensor | None = None
    step: Tensor | None = None

    @property
    def packed(self) -> bool:
        """Whether a byte holds two channels."""
        return self.low is not None and self.codes.shape[2] != self.channels.shape[2]

    def values(self) -> Tensor:
        """What the labels stand for, fp32 ``[B, L, r, N]``."""
        if self.low is None or self.step is None:
            return self.codes.float()
        codes = self.codes
        if self.packed:
            codes = torch.stack([codes & 15, codes >> 4], dim=3).flatten(2, 3)[:, :, : self.channels.shape[2]]
        return codes.float() * self.step.float()[:, :, None] + self.low.float()[:, :, None]


@dataclass(frozen=True)
class Labels(Summary[LabelSet]):
    """Some channels of each key, as they are or in few bits (Double Sparsity, 2408.07092, section 3.2).

    In 4 or 8 bits each token's label has a zero and a step of its own, bf16 rounded outward, so that no value is off by
    more than half a step.

    Fields:
        count: channels of a label.
        bits: 4, 8, 16 (bf16, or fp16 for keys of that) or 32.
        channels: for each of L heads its channels, ``count`` or more, the heaviest first; None: those with the largest
            mean magnitude over the first 512 keys of each row and key/value head.
    """

    count: int
    bits: int = 8
    channels: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        if self.bits not in (4, 8, 16, 32):
            raise ValueError(f"labels have 4, 8, 16 or 32 bits, got {self.bits}")
        if self.count < 1 or any(len(row) < self.count for row in self.channels or ()):
            raise ValueError(f"labels need channels, at least 1 and as many as each head has, got {self.count}")

    def begin(self) -> Kept[LabelSet]:
        return _Labels(self)


class _Labels(Growing[LabelSet]):
    def __init__(self, kind: Labels) -> None:
        super().__init__(1, (3,) if kind.bits > 8 else (3, 2, 2))
        self.kind = kind
        self._channels: Tensor | None = None  # [B, L, r]
        self._seen: list[int] | None = None  # tokens of each row by which they were chosen

    def of(self, held: Held) -> LabelSet:
        self._choose_channels(held)
        assert self._channels is not None
        codes, *more = self.bring(held)
        return LabelSet(codes, self._channels, *more)

    def _choose_channels(self, held: Held) -> None:
        batch, groups, slots, dim = held.shape
        if self.kind.channels is not None:
            if self._channels is None or self._channels.shape[0] != batch:
                rows = [row[: self.kind.count] for row in self.kind.channels]
                most = max(map(max, rows))
                if most >= dim or len(rows) % groups:
                    raise ValueError(
                        f"channels are of {len(rows)} heads, the last channel {most}, but keys have "
                        f"{groups} heads of {dim} channels; use a file made for this model"
                    )
                self._channels = torch.tensor(rows, device=held.device).expand(batch, -1, -1)
            return
        seen = [min(SEEN, slots - start) for start in held.starts]
        if seen == self._seen and list(held.starts) == self._starts:
            return
        weights = [_weights(held.keys[b, :, start : start + SEEN]) for b, start in enumerate(held.starts)]
        order = torch.stack(weights).sort(dim=-1, descending=True, stable=True).indices
        self._channels, self._seen = order[..., : min(self.kind.count, dim)], seen
        self.forget()

    def blank(self, held: Held, entries: int) -> list[Tensor]:
        assert self._channels is not None
        (batch, heads, count), device, bits = self._channels.shape, held.device, self.kind.bits
        if bits > 8:
            half = torch.float16 if held.dtype == torch.float16 else torch.bfloat16
            dtype = torch.float32 if bits == 32 else half
            return [torch.zeros(batch, heads, count, entries, dtype=dtype, device=device)]
        rows = ceil_div(count, 8 // bits)
        codes = torch.zeros(batch, heads, rows, entries, dtype=torch.uint8, device=device)
        return [codes, *(torch.zeros(batch, heads, entries, dtype=torch.bfloat16, device=device) for _ in range(2))]

    def write(self, to: list[Tensor], held: Held, row: slice, begin: int) -> None:
        assert self._channels is not None
        keys, channels = held.keys_from(begin)[row], self._channels[row]
        count = keys.shape[2]
        keys = keys.repeat_interleave(channels.shape[1] // keys.shape[1], dim=1)
        labels = keys.gather(3, channels[:, :, None].expand(-1, -1, count, -1)).transpose(2, 3)
        if self.kind.bits > 8:
            to[0][..., :count] = labels
            return
        codes, low, step = _coded(labels.float(), self.kind.bits)
        for own, new in zip(to, (codes, low, step), strict=True):
            own[..., :count] = new

    def cut(self, slots: int) -> None:
        if self._seen is not None and any(slots - start < SEEN for start in self._starts):
            self._seen = None
        super().cut(slots)

    def take_rows(self, index: Tensor) -> None:
        super().take_rows(index)
        if self._channels is not None:
            self._channels = self._channels.index_select(0, index.to(self._channels.device))
        self._seen = None if self._seen is None else [self._seen[row] for row in index.tolist()]


def _weights(keys: Tensor) -> Tensor:
    """Mean magnitude of each channel of keys ``[G, n, D]``: fp32 ``[G, D]``."""
    return keys.float().abs().mean(dim=1) if keys.shape[1] else keys.new_zeros(keys.shape[0], keys.shape[2]).float()


def _coded(labels: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of labels ``[b, L, r, n]``: codes, two a byte of 4 bits, lows and steps ``[b, L, n]``."""
    most = (1 << bits) - 1
    low = -raised(-labels.amin(dim=2))
    step = raised((raised(labels.amax(dim=2)).float() - low.float()) / most)
    over = torch.where(step > 0, step, torch.ones_like(step)).float()
    codes = ((labels - low.float()[:, :, None]) / over[:, :, None]).round().clamp(0, most).to(torch.uint8)
    return (_paired(codes) if bits == 4 else codes), low, step


def _paired(codes: Tensor) -> Tensor:
    if codes.shape[2] % 2:
        codes = torch.cat([codes, torch.zeros_like(codes[:, :, :1])], dim=2)
    return codes[:, :, ::2] | codes[:, :, 1::2] << 4
