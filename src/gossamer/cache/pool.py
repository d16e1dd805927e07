"""Blocks of a file that memory holds: those that were used last."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from gossamer.cache.block_file import BlockFile, aligned

__all__ = ["Pool"]


class Pool:
    """Memory for some blocks of a `BlockFile`. A block that is asked for takes the place of the one unused for longest.

    Args:
        most: blocks that it has room for. Where more are asked for at once, it grows to hold them.

    Attributes:
        rows: uint8 ``[room, nbytes]``.
        read, found: blocks that were read from the file, and those that were there, since it was made.
    """

    def __init__(self, file: BlockFile, most: int) -> None:
        self.file = file
        self.rows = aligned(0, file.nbytes)
        self._most = most
        self._place: OrderedDict[int, int] = OrderedDict()  # of each block that is here; the oldest first
        self.read = self.found = 0

    def hold(self, numbers: Sequence[int]) -> list[int]:
        """Read what is not here; the row of each block. They stay until the next call."""
        missing = [number for number in dict.fromkeys(numbers) if number not in self._place]
        for number in numbers:
            if number in self._place:
                self._place.move_to_end(number)
        self.found += len(set(numbers)) - len(missing)
        self.read += len(missing)
        wanted = set(numbers) if missing else set()
        self._make_room(len(missing) + len(self._place), len(wanted))
        vacant = self._vacated(len(missing), wanted)
        self.file.read(missing, [self.rows[row] for row in vacant])
        self._place.update(zip(missing, vacant, strict=True))
        return [self._place[number] for number in numbers]

    def forget(self, numbers: Sequence[int]) -> None:
        """These numbers may be given to other blocks."""
        for number in numbers:
            self._place.pop(number, None)

    @property
    def nbytes(self) -> int:
        return self.rows.numel()

    def _make_room(self, all_: int, least: int) -> None:
        wanted = max(min(all_, self._most), least)
        if wanted <= self.rows.shape[0]:
            return
        grown = aligned(max(wanted, min(self._most, 2 * self.rows.shape[0])), self.file.nbytes)
        grown[: self.rows.shape[0]] = self.rows
        self.rows = grown

    def _vacated(self, count: int, wanted: set[int]) -> list[int]:
        """Rows for so many blocks: of none, and then of those unused for longest."""
        used = set(self._place.values())
        rows = [row for row in range(self.rows.shape[0]) if row not in used][:count]
        for number in list(self._place):
            if len(rows) == count:
                break
            if number not in wanted:
                rows.append(self._place.pop(number))
        return rows

    def __reduce__(self) -> Any:
        return Pool, (self.file, self._most)
