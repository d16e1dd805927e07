"""What becomes of memory that a process frees."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["keep_freed_memory"]

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4  # of mallopt, in glibc's malloc.h
_PAD = 64 << 20


def keep_freed_memory() -> bool:
    """Have glibc keep what this process frees, for what it asks for next.

    By default large tensors are taken from the system one by one and given back at once, so that each operation of a
    long prompt begins with pages that the system has to clear. With this the process holds on to the most memory that
    it ever needed, as by the variables ``MALLOC_MMAP_MAX_=0`` and ``MALLOC_TRIM_THRESHOLD_=2147483647`` when it
    starts: the whole process, once and for all, so that no other function of gossamer does it.

    Returns:
        Whether it could: on Linux with glibc, and no other allocator in its place that refuses.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        set_option = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    set_option.argtypes, set_option.restype = (ctypes.c_int, ctypes.c_int), ctypes.c_int
    wanted = ((_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, _PAD), (_MMAP_MAX, 0))
    return all(set_option(option, value) == 1 for option, value in wanted)
