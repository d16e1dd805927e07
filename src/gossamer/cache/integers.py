"""Keys and values in 2, 4 or 8 bits a number, with a scale and a zero for each group (KIVI, 2402.02750)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

__all__ = ["BITS", "Over", "Quantised", "pack", "quantise", "unpack"]

BITS = (2, 4, 8)
Over = Literal["tokens", "channels"]


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """Encoded ``[B, G, T, D]``; a number is about ``zero + scale * code``.

    Fields:
        codes: uint8 ``[B, G, T, D * bits / 8]``, see `pack`.
        scale, zero: of groups of tokens ``[B, G, T / group, D]``, of groups of channels ``[B, G, T, D / group]``.
    """

    coding: ClassVar[str] = "codes"
    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int
    group: int
    over: Over

    @property
    def tokens(self) -> int:
        return self.codes.shape[2]

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.codes, self.scale, self.zero

    def like(self, tensors: Sequence[Tensor]) -> Quantised:
        """The same form with other tensors."""
        codes, scale, zero = tensors
        return Quantised(codes, scale, zero, self.bits, self.group, self.over)

    def decode(self, dtype: torch.dtype | None = None) -> Tensor:
        """``[B, G, T, D]``, of arithmetic in fp32 (fp64 for fp64); dtype: that of the scales unless given."""
        wide = torch.promote_types(self.scale.dtype, torch.float32)
        codes = _grouped(unpack(self.codes, self.bits).to(wide), self.group, self.over)
        axis = 3 if self.over == "tokens" else 4
        numbers = codes * self.scale.to(wide).unsqueeze(axis) + self.zero.to(wide).unsqueeze(axis)
        return _flat(numbers, self.over).to(dtype or self.scale.dtype)

    def between(self, first: int, last: int) -> Tensor:
        """Tokens ``first`` to ``last - 1``, decoded, with those that share a group with them."""
        step = self.group if self.over == "tokens" else 1
        begin, end = first // step, -(-last // step)
        own = slice(begin, end)
        some = self.like([self.codes[:, :, begin * step : end * step], self.scale[:, :, own], self.zero[:, :, own]])
        return some.decode()[:, :, first - begin * step : last - begin * step]


def quantise(x: Tensor, bits: int, group: int, over: Over, live: Tensor | None = None) -> Quantised:
    """Encode ``x`` ``[B, G, T, D]`` in groups of ``group`` tokens of a channel, or of channels of a token.

    As stored, a group's zero is at most its minimum and its scale at least ``(max - zero) / (2 ** bits - 1)``: both are
    rounded outwards to the dtype of ``x``, so that no number is off by more than half a scale.

    Args:
        live: bool ``[B, T]``; what dead tokens hold enters no scale, and their numbers come back as anything.

    Raises:
        ValueError: bits are none of `BITS`, or T or D is no multiple of the group or of a byte.
    """
    size, channels = (x.shape[2] if over == "tokens" else x.shape[3]), x.shape[3]
    if bits not in BITS or (channels * bits) % 8:
        raise ValueError(f"quantise takes 2, 4 or 8 bits, and channels that fill bytes; got {bits} and {channels}")
    if group < 1 or size % group:
        raise ValueError(f"quantise: {size} {over} are no multiple of the group of {group}")
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    low = high = wide
    if live is not None:
        dead = ~live.to(x.device)[:, None, :, None]
        low, high = wide.masked_fill(dead, float("inf")), wide.masked_fill(dead, float("-inf"))
    axis = 3 if over == "tokens" else 4
    least, most = _grouped(low, group, over).amin(axis), _grouped(high, group, over).amax(axis)
    if live is not None:
        nothing = least > most
        least, most = least.masked_fill(nothing, 0.0), most.masked_fill(nothing, 0.0)
    zero = _rounded(least, x.dtype, up=False)
    steps = 2**bits - 1
    scale = _rounded((most - zero.to(wide.dtype)) / steps, x.dtype, up=True)
    wide_zero, divisor = zero.to(wide.dtype).unsqueeze(axis), scale.to(wide.dtype).unsqueeze(axis)
    divisor = torch.where(divisor > 0, divisor, 1.0)
    codes = ((_grouped(wide, group, over) - wide_zero) / divisor).round().nan_to_num(0.0).clamp(0, steps)
    return Quantised(pack(_flat(codes, over).to(torch.uint8), bits), scale, zero, bits, group, over)


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes uint8 ``[..., n]``, below ``2 ** bits``, as bytes ``[..., n * bits / 8]``; the first in the lowest bits."""
    each = 8 // bits
    packed = torch.zeros_like(codes[..., ::each])
    for place in range(each):
        packed |= codes[..., place::each] << (bits * place)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """Inverse of `pack`."""
    shifts = torch.arange(0, 8, bits, device=packed.device, dtype=torch.uint8)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def _grouped(x: Tensor, group: int, over: Over) -> Tensor:
    return x.unflatten(2, (x.shape[2] // group, group)) if over == "tokens" else x.unflatten(3, (-1, group))


def _flat(x: Tensor, over: Over) -> Tensor:
    return x.flatten(2, 3) if over == "tokens" else x.flatten(3, 4)


def _rounded(x: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """In a dtype, the nearest number that is not below ``x``, or not above it."""
    near = x.to(dtype)
    wrong = near.to(x.dtype) < x if up else near.to(x.dtype) > x
    beyond = torch.nextafter(near, torch.full_like(near, float("inf") if up else float("-inf")))
    return torch.where(wrong, beyond, near)
