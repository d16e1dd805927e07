"""Bounds of pages of keys."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gossamer.summaries.base import Growing, Held, Kept, Summary, raised

__all__ = ["PageBounds"]


@dataclass(frozen=True)
class PageBounds(Summary[Tensor]):
    """The largest and smallest value of each channel in each page of a layer's keys (Quest, 2406.10774, section 3.2).

    bf16 (fp16 for keys of that) ``[B, G, N, 2 * D]``, the D largest or just above, then the D smallest or just below; N
    is ``ceil(extent.longest / size)``. The last page of a row may be a part of one. Of pages that a row does not have:
    anything finite.

    Of keys in bf16 or fp16 they are exact. Of wider ones they are bf16 rounded outward, so that a bound is never below
    a logit: half the bytes to read. ``4 * D / size`` bytes a token and key/value head in either case, a sixteenth of
    the bytes of keys and values in bf16 at 16 tokens a page.

    Fields:
        size: tokens of a page.
    """

    size: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"a page must hold at least 1 token, got {self.size}")

    def begin(self) -> Kept[Tensor]:
        return _Bounds(self.size, (2,))


class _Bounds(Growing[Tensor]):
    def of(self, held: Held) -> Tensor:
        return self.bring(held)[0]

    def blank(self, held: Held, entries: int) -> list[Tensor]:
        batch, groups, _, dim = held.shape
        dtype = torch.float16 if held.dtype == torch.float16 else torch.bfloat16
        return [torch.zeros(batch, groups, entries, 2 * dim, dtype=dtype, device=held.device)]

    def write(self, to: list[Tensor], held: Held, row: slice, begin: int) -> None:
        keys, (bounds,) = held.keys_from(begin)[row], to
        whole = keys.shape[2] // self.size
        past = whole * self.size
        if whole:
            _put(bounds[:, :, :whole], keys[:, :, :past].unflatten(2, (whole, self.size)), 3)
        if past < keys.shape[2]:
            _put(bounds[:, :, whole], keys[:, :, past:], 2)


def _put(to: Tensor, keys: Tensor, dim: int) -> None:
    largest, smallest = keys.amax(dim=dim), keys.amin(dim=dim)
    if keys.dtype != to.dtype:
        largest, smallest = raised(largest), -raised(-smallest)
    width = keys.shape[-1]
    to[..., :width], to[..., width:] = largest, smallest
