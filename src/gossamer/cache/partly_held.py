"""What there is to summarise where older tokens lie elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from gossamer.summaries import Held

__all__ = ["PartlyHeld"]


class PartlyHeld(Held):
    """The newest tokens of a layer; the older ones are read when they are asked for.

    Args:
        keys, values: of the slots from ``first`` on.
        read: gives those of all slots.
    """

    def __init__(
        self,
        keys: Tensor,
        values: Tensor,
        starts: Sequence[int],
        prompt: int,
        first: int,
        read: Callable[[], tuple[Tensor, Tensor]],
    ) -> None:
        super().__init__(keys, values, starts, prompt)
        self.shape = (*self.shape[:2], first + keys.shape[2], self.shape[3])
        self._first, self._read = first, read

    @property
    def keys(self) -> Tensor:
        return self._whole()[0]

    @property
    def values(self) -> Tensor:
        return self._whole()[1]

    def keys_from(self, slot: int) -> Tensor:
        return self._all[0][:, :, slot - self._first :] if slot >= self._first else super().keys_from(slot)

    def values_from(self, slot: int) -> Tensor:
        return self._all[1][:, :, slot - self._first :] if slot >= self._first else super().values_from(slot)

    def _whole(self) -> tuple[Tensor, Tensor]:
        if self._first:
            self._all, self._first = self._read(), 0
        return self._all
