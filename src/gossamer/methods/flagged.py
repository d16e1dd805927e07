"""Lists of a plan from flags of a few heads and lists at a time, so that what is held grows with the plan alone."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.plan import starts_of

__all__ = ["FlaggedLists", "parts"]

HELD_BYTES = 64 << 20  # of flags and numbers at once


def parts(heads: int, lists: int, members: int) -> Iterator[tuple[slice, slice]]:
    """Heads and lists whose flags are looked at together: some heads with all lists, or some lists of one head.

    Args:
        members: that a list can have.
    """
    most = max(1, HELD_BYTES // max(1, 8 * members))
    if most >= lists:
        together = most // max(1, lists)
        for first in range(0, heads, together):
            yield slice(first, min(first + together, heads)), slice(0, lists)
        return
    for head in range(heads):
        for first in range(0, lists, most):
            yield slice(head, head + 1), slice(first, min(first + most, lists))


class FlaggedLists:
    """Row pointers and members of lists, ``many`` a head, which come in order.

    Attributes:
        indptr: int64; indices: int32, ascending in each list; as `SparsePlan` has them.
    """

    def __init__(self, many: int, device: torch.device) -> None:
        self._many = many
        self._counts = [torch.zeros(0, dtype=torch.int64, device=device)]
        self._members = [torch.zeros(0, dtype=torch.int32, device=device)]

    def add(self, flags: Tensor, live: int, lists: slice) -> None:
        """The next lists: bool ``[heads, lists, members]``, whichever of `parts` they are.

        Args:
            live: lists of each head that come at all; those behind them are empty.
        """
        behind = self._many - live if lists.stop == live else 0
        self._counts.append(F.pad(flags.sum(dim=-1), (0, behind)).flatten())
        self._members.append(flags.nonzero()[:, 2].int())

    def add_empty(self, heads: int) -> None:
        """Of heads that list nothing."""
        self._counts.append(self._counts[0].new_zeros(heads * self._many))

    @property
    def indptr(self) -> Tensor:
        return starts_of(torch.cat(self._counts))

    @property
    def indices(self) -> Tensor:
        return torch.cat(self._members)
