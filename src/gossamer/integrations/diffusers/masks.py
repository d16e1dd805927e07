"""Masks of padded text, as calls without them."""

from __future__ import annotations

import torch
from torch import Tensor

from gossamer.plan import Extent

__all__ = ["NotPlain", "live_keys", "ordered_by_life"]

# What models add to logits of padding; exp of it is 0 in float32.
FAR_BELOW = -1e4


class NotPlain(ValueError):
    """A mask that says more than which keys are live."""


def live_keys(mask: Tensor | None, batch: int, keys: int) -> Tensor | None:
    """Which keys of each row are live, bool ``[B, T]`` on the CPU; None for all.

    Args:
        mask: bool, or to be added, of the shapes that diffusers' models give: ``[B, T]`` or ``[B, 1, 1, T]``, where 1
            may stand for B.

    Raises:
        NotPlain: another shape, or numbers between 0 and what removes a key.
    """
    if mask is None:
        return None
    shape = mask.shape
    if not ((mask.ndim == 2 and shape[1] == keys) or (mask.ndim == 4 and shape[1:] == (1, 1, keys))):
        raise NotPlain(f"a mask of shape {tuple(shape)}")
    if shape[0] not in (1, batch):
        raise NotPlain(f"a mask of shape {tuple(shape)}")
    rows = mask.reshape(shape[0], keys).expand(batch, keys).cpu()
    if rows.dtype != torch.bool:
        if not bool(((rows == 0) | (rows <= FAR_BELOW)).all()):
            raise NotPlain("a mask that adds numbers")
        rows = rows == 0
    return None if bool(rows.all()) else rows


def ordered_by_life(live: Tensor) -> tuple[Extent, Tensor | None]:
    """Extent of a row's tokens once live ones come first, and that order, int64 ``[B, T]``; None where they do already.

    All queries stay live: those of padding attend the same keys as the others, as a mask of keys has it.
    """
    batch, keys = live.shape
    count = live.sum(dim=1)
    rows = torch.ones(batch, dtype=torch.int64, device="cpu")
    extent = Extent(rows * 0, rows * keys, rows * 0, count, causal=False)
    if bool((live == (torch.arange(keys, device="cpu") < count[:, None])).all()):
        return extent, None
    return extent, (~live).int().argsort(dim=1, stable=True)
