"""Which machine this is: what measured seconds hold for."""

from __future__ import annotations

import functools
import os
import platform
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from gossamer.profiles.files import shown

__all__ = ["Machine", "cpu_info", "cpu_model", "device_name", "usable_cores", "usable_cpus"]

_MOST_THREADS = 1_000_000


def cpu_info() -> str:
    """What Linux says of its processors; nothing elsewhere."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.is_file() else ""


@functools.cache
def cpu_model() -> str:
    named = re.search(r"^model name\s*:\s*(.+)$", cpu_info(), re.MULTILINE)
    return named[1] if named else platform.processor() or platform.machine()


def usable_cpus() -> list[int]:
    """Numbers of the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    return len(usable_cpus())


def device_name(device: torch.device) -> str:
    """``cpu``, or the name of a GPU."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@dataclass(frozen=True, slots=True)
class Machine:
    """What seconds depend on, whatever the model and the device.

    Fields:
        cpu: the processor's name.
        threads: of torch.
        library: version of gossamer.
    """

    cpu: str
    threads: int
    library: str

    @classmethod
    def here(cls) -> Machine:
        import gossamer  # its version is defined after this module

        return cls(cpu_model(), torch.get_num_threads(), gossamer.__version__)

    @classmethod
    def from_dict(cls, data: Any) -> Machine:
        """Inverse of `to_dict`.

        Raises:
            ValueError: a field is missing or of another type.
        """
        if not isinstance(data, dict):
            raise ValueError(f"machine must be an object, got {shown(data)}")
        for name in ("cpu", "library"):
            if not isinstance(data.get(name), str):
                raise ValueError(f"machine.{name} must be text, got {shown(data.get(name))}")
        threads = data.get("threads")
        if not isinstance(threads, int) or isinstance(threads, bool) or not 1 <= threads <= _MOST_THREADS:
            raise ValueError(f"machine.threads must be an integer, 1 to {_MOST_THREADS:,}, got {shown(threads)}")
        return cls(data["cpu"], threads, data["library"])

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def why_not(self, other: Machine) -> str | None:
        """Why seconds of this machine say nothing on another one, or None."""
        for name, what in (("cpu", "on"), ("threads", "with torch threads:"), ("library", "by gossamer")):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                return f"measured {what} {mine}, here it is {theirs}"
        return None
