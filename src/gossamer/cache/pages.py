"""Bounds of pages of keys, kept up as keys are added, cut off and moved between batch rows."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.encoded import EncodedTokens
from gossamer.plan.integers import ceil_div

__all__ = ["PageBounds"]


class PageBounds:
    """The largest and smallest value of each channel in each page of a layer's keys (Quest, 2406.10774, section 3.2).

    Pages count from each row's first live key, so padding is in none. Pages are worked out from the keys themselves,
    from the page on in which keys were added or cut off since: what is kept is at every time, bit for bit, what all
    keys would give from scratch.

    Of keys in bf16 or fp16 they are exact. Of wider ones they are bf16 rounded outward, so that a bound is never below
    a logit: half the bytes to read. ``4 * D / size`` bytes a token and key/value head in either case, a sixteenth of
    the bytes of keys and values in bf16 at 16 tokens a page.

    Args:
        size: tokens of a page.
    """

    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"a page must hold at least 1 token, got {size}")
        self.size = size
        self._bounds: Tensor | None = None  # [B, G, room, 2 * D]
        self._starts: list[int] = []
        self._slots = 0  # slots of keys that are in the bounds

    def of(self, keys: Tensor, starts: list[int]) -> Tensor:
        """The bounds of all pages, brought up to date.

        Args:
            keys: ``[B, G, T, D]``, all keys of the layer; those that were there before are the same as before.
            starts: slot of each row's first live key. Later ones than before make all pages anew.

        Returns:
            bf16 (fp16 for keys of that) ``[B, G, N, 2 * D]``: the largest, then the smallest. N is for the row with
            the most live keys.
        """
        batch, groups, slots, dim = keys.shape
        pages = ceil_div(slots - min(starts, default=slots), self.size)
        if starts != self._starts:
            self._slots, self._starts = 0, list(starts)
        if self._bounds is None or self._bounds.shape[2] < pages:
            room = max(pages + ceil_div(pages, 8), ceil_div(256, self.size))
            dtype = torch.float16 if keys.dtype == torch.float16 else torch.bfloat16
            grown = torch.zeros(batch, groups, room, 2 * dim, dtype=dtype, device=keys.device)
            if self._bounds is not None:
                grown[:, :, : self._bounds.shape[2]] = self._bounds
            self._bounds = grown
        if self._slots < slots:
            if self._bounds.is_inference() and not torch.is_inference_mode_enabled():
                self._bounds = self._bounds.clone()  # such tensors are written in that mode alone
            rows = [slice(None)] if len(set(starts)) == 1 else [slice(b, b + 1) for b in range(batch)]
            for row in rows:
                self._renew(self._bounds[row], keys, row, starts[row.start or 0])
            self._slots = slots
        return self._bounds[:, :, :pages]

    def _renew(self, bounds: Tensor, keys: Tensor, row: slice, start: int) -> None:
        """Of some batch rows, from the page on that holds the first new key."""
        size, slots = self.size, keys.shape[2]
        page = max(self._slots - start, 0) // size
        begin = start + page * size
        whole = max(slots - begin, 0) // size
        past = begin + whole * size
        if whole:
            pages = _between(keys, begin, past)[row].unflatten(2, (whole, size))
            self._put(bounds[:, :, page : page + whole], pages, 3)
        if past < slots:
            self._put(bounds[:, :, page + whole], _between(keys, past, slots)[row], 2)

    @staticmethod
    def _put(to: Tensor, keys: Tensor, dim: int) -> None:
        largest, smallest = keys.amax(dim=dim), keys.amin(dim=dim)
        if keys.dtype != to.dtype:
            largest, smallest = _raised(largest), -_raised(-smallest)
        width = keys.shape[-1]
        to[..., :width], to[..., width:] = largest, smallest

    def cut(self, slots: int) -> None:
        """Only the first ``slots`` of the keys are left; others may follow."""
        if slots < self._slots:  # what is left of a page that was cut is a page anew
            self._slots = slots - max(((slots - start) % self.size for start in self._starts), default=0)

    def take_rows(self, index: Tensor) -> None:
        """Batch rows ``index`` int64, any of them more than once, take the place of all."""
        self._starts = [self._starts[row] for row in index.tolist()] if self._starts else []
        if self._bounds is not None:
            self._bounds = self._bounds.index_select(0, index.to(self._bounds.device))


def _between(keys: Tensor, first: int, last: int) -> Tensor:
    """Some slots; of encoded ones no others are decoded."""
    return keys.between(first, last) if isinstance(keys, EncodedTokens) else keys[:, :, first:last]


def _raised(x: Tensor) -> Tensor:
    """The smallest bf16 that is no smaller."""
    near = x.to(torch.bfloat16)
    above = torch.nextafter(near, torch.full_like(near, float("inf")))
    return torch.where(near.to(x.dtype) < x, above, near)
