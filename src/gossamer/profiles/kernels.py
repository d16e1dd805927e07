"""What computes, and how entries of files of costs name it; their numbers are read without trust."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from gossamer.call import AttentionCall
from gossamer.profiles.files import shown
from gossamer.profiles.machine import device_name

__all__ = ["MOST_TOKENS", "Kernel", "read_count", "read_kernel", "read_number", "same_fields"]

MOST_TOKENS = 2**40
_MOST_SECONDS = 1e9


@dataclass(frozen=True, slots=True)
class Kernel:
    """What computes: ``cpu/avx512`` or ``triton`` (`gossamer.backends.name_of`), on ``cpu`` or a GPU by its name, in a
    dtype, for a head dimension."""

    backend: str
    device: str
    dtype: str
    head_dim: int

    @classmethod
    def of(cls, subject: AttentionCall | Tensor) -> Kernel:
        """The one that attends a call, or queries like these."""
        from gossamer import backends

        q = subject if isinstance(subject, Tensor) else subject.q
        dtype = str(q.dtype).removeprefix("torch.")
        return cls(backends.name_of(subject), device_name(q.device), dtype, q.shape[-1])

    def __str__(self) -> str:
        where = self.backend if self.device == "cpu" else f"{self.backend} on {self.device}"
        return f"{where}, {self.dtype}, head dimension {self.head_dim}"


def same_fields(method: Mapping[str, Any]) -> str:
    """A method's name and fields as a text, the same in any order."""
    return json.dumps(dict(method), sort_keys=True, default=str)


def read_kernel(entry: Mapping[str, Any], what: str) -> Kernel:
    for name in ("backend", "device", "dtype"):
        if not isinstance(entry.get(name), str):
            raise ValueError(f"{what}.{name} must be text, got {shown(entry.get(name))}")
    return Kernel(entry["backend"], entry["device"], entry["dtype"], read_count(entry, "head_dim", what))


def read_count(entry: Mapping[str, Any], name: str, what: str) -> int:
    value = entry.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST_TOKENS:
        raise ValueError(f"{what}.{name} must be an integer, 1 to {MOST_TOKENS:,}, got {shown(value)}")
    return value


def read_number(entry: Mapping[str, Any], name: str, what: str, most: float = _MOST_SECONDS) -> float:
    value = entry.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value <= most:
        raise ValueError(f"{what}.{name} must be a number, 0 to {most:g}, got {shown(value)}")
    return float(value)
