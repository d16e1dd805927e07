"""`Room`: a tensor that grows in place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Room"]


class Room:
    """A tensor ``[B, G, n, ...]`` that grows along its third dimension, with a sixteenth of room made ahead.

    Where gradients are recorded it is joined anew, as a stock cache does: a graph may hold what is there.

    Args:
        first: what it starts with; it is copied when the room first grows.
    """

    def __init__(self, first: Tensor) -> None:
        self._room, self._used, self._own = first, first.shape[2], False

    @property
    def held(self) -> Tensor:
        """What is in it, a view."""
        return self._room[:, :, : self._used]

    def append(self, x: Tensor) -> None:
        used, count = self._used, x.shape[2]
        if torch.is_grad_enabled():
            self._room, self._own = torch.cat([self.held, x], dim=2), False
        else:
            if not self._own or self._room.shape[2] < used + count or _is_locked(self._room):
                ahead = used + count + max(64, (used + count) // 16)
                grown = x.new_empty(*x.shape[:2], ahead, *x.shape[3:])
                grown[:, :, :used] = self.held
                self._room, self._own = grown, True
            self._room[:, :, used : used + count] = x
        self._used = used + count

    def drop(self, count: int) -> None:
        """Forget the first ``count``."""
        self._room, self._own = self._room[:, :, count : self._used].clone(), False  # a view would hold the whole
        self._used -= count

    def cut(self, count: int) -> None:
        """Forget all but the first ``count``."""
        self._used = count

    def change(self, change: Callable[[Tensor], Tensor]) -> None:
        """Apply a function to all of it."""
        self._room, self._own = change(self.held), False


def _is_locked(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode, which has been left since: it can be written in that mode alone."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()
