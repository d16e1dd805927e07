"""Blocks of bytes in a file that has no name, read past the system's own cache of files where it can be."""

from __future__ import annotations

import contextlib
import errno
import os
import tempfile
import weakref
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

__all__ = ["PAGE", "BlockFile", "aligned"]

PAGE = 4096
"""Bytes of which blocks are multiples, and at multiples of which they begin, in memory too: direct reads need it."""

_AT_ONCE = 64  # buffers of one read: the least that systems allow is 16, Linux allows 1,024
_READERS = 8  # threads that wait for the device


def aligned(count: int, nbytes: int) -> Tensor:
    """Room for so many blocks: uint8 ``[count, nbytes]`` at a multiple of `PAGE`, in memory."""
    room = torch.empty(count * nbytes + PAGE, dtype=torch.uint8, device="cpu")
    first = -room.data_ptr() % PAGE
    return room[first : first + count * nbytes].view(count, nbytes)


class BlockFile:
    """Blocks of equal size, written once each and read in any order.

    The file has no name from the moment that it is opened, so that whatever ends the process, nothing is left of it.
    Room is taken before a block is written: on a full disk `write` raises, and what was written before is as it was.
    Blocks that nobody needs any more are given back by `free`, and their room is used again.

    Args:
        folder: where; None: the system's folder for temporary files. What lies in memory there (tmpfs) saves none.
        nbytes: bytes of a block, a multiple of `PAGE`.
        direct: read and write past the system's cache of files, where the file system can. Else what is read may be
            served from memory that nobody has counted.

    Raises:
        ValueError: a size that is no multiple of `PAGE`.
        OSError: the folder is none, or no file can be made there.
    """

    def __init__(self, folder: str | Path | None, nbytes: int, *, direct: bool = True) -> None:
        if nbytes < PAGE or nbytes % PAGE:
            raise ValueError(f"a block must be a multiple of {PAGE} bytes, got {nbytes}")
        self.folder = Path(tempfile.gettempdir() if folder is None else folder)
        self.nbytes = nbytes
        self.direct = direct
        self.blocks = 0  # that the file has room for
        self._free: list[int] = []
        self._fd, self.is_direct = _opened(self.folder, direct)
        self._closed = weakref.finalize(self, os.close, self._fd)

    def write(self, blocks: Tensor) -> list[int]:
        """Write uint8 ``[n, nbytes]``, made by `aligned`; the blocks' numbers, neighbours where that is possible.

        Raises:
            OSError: the disk has no room for them. Nothing has changed.
        """
        count = blocks.shape[0]
        numbers = self._taken(count)
        for first, run in _runs(numbers):
            buffers = [_bytes(blocks[n]) for n in run]
            self._whole(os.pwritev, buffers, numbers[first] * self.nbytes)
        return numbers

    def read(self, numbers: Sequence[int], into: Sequence[Tensor]) -> None:
        """Read blocks, each into a uint8 ``[nbytes]`` of what `aligned` made. Neighbours are read at once."""
        order = sorted(range(len(numbers)), key=numbers.__getitem__)
        ascending = [numbers[n] for n in order]
        runs = list(_runs(ascending))

        def one(run: tuple[int, Sequence[int]]) -> None:
            buffers = [_bytes(into[order[n]]) for n in run[1]]
            self._whole(os.preadv, buffers, ascending[run[0]] * self.nbytes)

        if len(runs) == 1:
            one(runs[0])
        elif runs:
            list(_readers().map(one, runs))

    def free(self, numbers: Sequence[int]) -> None:
        """These blocks are needed no more."""
        self._free.extend(numbers)
        self._free.sort()

    def copy(self) -> BlockFile:
        """A file of its own with the same blocks under the same numbers."""
        other = BlockFile(self.folder, self.nbytes, direct=self.direct)
        other._allocate(self.blocks)
        buffer = aligned(_AT_ONCE, self.nbytes)
        for first in range(0, self.blocks, _AT_ONCE):
            views = [_bytes(row) for row in buffer[: min(_AT_ONCE, self.blocks - first)]]
            self._whole(os.preadv, views, first * self.nbytes)
            other._whole(os.pwritev, views, first * self.nbytes)
        other._free = list(self._free)
        return other

    def _taken(self, count: int) -> list[int]:
        """Numbers of so many blocks for which there is room, ascending."""
        more = count - len(self._free)
        if more > 0:
            self._allocate(more)
            self._free.extend(range(self.blocks - more, self.blocks))
        taken, self._free = self._free[:count], self._free[count:]
        return taken

    def _allocate(self, more: int) -> None:
        if more == 0:
            return
        try:
            os.posix_fallocate(self._fd, self.blocks * self.nbytes, more * self.nbytes)
        except OSError as error:
            size = self.blocks * self.nbytes
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, size)
            raise OSError(
                error.errno,
                f"{self.folder} has no room for {more * self.nbytes} more bytes of a cache that has {size} there "
                f"({os.strerror(error.errno or errno.ENOSPC)}): free some, or name another folder. What the cache "
                "holds is as it was",
            ) from error
        self.blocks += more

    def _whole(self, call: Any, given: Sequence[memoryview], offset: int) -> None:
        """All bytes: the system may stop in between."""
        buffers = list(given)
        left = sum(map(len, buffers))
        while left:
            done = call(self._fd, buffers, offset)
            if done <= 0:
                raise OSError(errno.EIO, f"a file of a cache in {self.folder} ended {left} bytes too early")
            left -= done
            offset += done
            while buffers and done >= len(buffers[0]):
                done -= len(buffers.pop(0))
            if done:
                buffers[0] = buffers[0][done:]

    def __deepcopy__(self, memo: Any) -> BlockFile:
        return self.copy()

    def __reduce__(self) -> Any:
        buffer = aligned(self.blocks, self.nbytes)
        self.read(range(self.blocks), list(buffer))
        return _of_bytes, (str(self.folder), self.nbytes, self.direct, buffer.clone(), list(self._free))


def _of_bytes(folder: str, nbytes: int, direct: bool, blocks: Tensor, free: list[int]) -> BlockFile:
    file = BlockFile(folder, nbytes, direct=direct)
    buffer = aligned(blocks.shape[0], nbytes)
    buffer.copy_(blocks)
    file.write(buffer)
    file.free(free)
    return file


def _opened(folder: Path, direct: bool) -> tuple[int, bool]:
    """A descriptor of a new file without a name, and whether what is read passes the system's cache."""
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, "the folder of a cache is no folder", str(folder))
    fast = getattr(os, "O_DIRECT", 0) if direct else 0
    for flags in (fast, 0) if fast else (0,):
        with contextlib.suppress(OSError):
            return _nameless(folder, flags), bool(flags)
    return _nameless(folder, 0), False


def _nameless(folder: Path, flags: int) -> int:
    temporary = getattr(os, "O_TMPFILE", 0)
    if temporary:
        try:
            return os.open(folder, temporary | os.O_RDWR | os.O_CLOEXEC | flags, 0o600)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT):
                raise
    fd, name = tempfile.mkstemp(dir=folder, prefix="gossamer-cache-")
    try:
        if not flags:
            return fd
        again = os.open(name, os.O_RDWR | os.O_CLOEXEC | flags)
        os.close(fd)
        return again
    finally:
        os.unlink(name)


def _bytes(row: Tensor) -> memoryview:
    return memoryview(cast(Any, row.numpy()))


def _runs(numbers: Sequence[int]) -> list[tuple[int, range]]:
    """Stretches of neighbours among ascending numbers: the first one's index, and the indices."""
    found: list[tuple[int, range]] = []
    first = 0
    for n in range(1, len(numbers) + 1):
        if n == len(numbers) or numbers[n] != numbers[n - 1] + 1 or n - first == _AT_ONCE:
            found.append((first, range(first, n)))
            first = n
    return found


@cache
def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(_READERS, thread_name_prefix="gossamer-cache")
