"""What making a method's plan costs, by length."""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gossamer.profiles.files import shown
from gossamer.profiles.kernels import Kernel, read_count, read_kernel, read_number

__all__ = ["Planning", "read_planning"]

_MOST_SLOPE = 2.0  # no planner looks at more than all pairs


@dataclass(frozen=True, slots=True)
class Planning:
    """Seconds of planning, measured.

    Fields:
        kernel: what plans, and for which dtype and head dimension.
        method: `Method.to_dict`.
        heads, groups: H and G of the calls.
        lengths, seconds: of their prompts, ascending; medians, as many.
    """

    kernel: Kernel
    method: Mapping[str, Any]
    heads: int
    groups: int
    lengths: tuple[int, ...]
    seconds: tuple[float, ...]

    def seconds_of(self, heads: int, length: int) -> float:
        """For so many of the heads: their share, interpolated in logarithms of the length.

        Beyond the longest prompt the last slope goes on, at most the square's; below the shortest it costs as much as
        that.
        """
        share = heads / self.heads
        if length <= self.lengths[0]:
            return share * self.seconds[0]
        at = min(bisect(self.lengths, length), len(self.lengths) - 1)
        slope = 1.0
        if at:
            (low, high), (less, more) = self.lengths[at - 1 : at + 1], self.seconds[at - 1 : at + 1]
            slope = math.log(max(more, 1e-12) / max(less, 1e-12)) / math.log(high / low)
        begin = at if length >= self.lengths[at] else at - 1
        if begin == at:
            slope = min(max(slope, 0.0), _MOST_SLOPE)
        return share * self.seconds[begin] * (length / self.lengths[begin]) ** slope


def read_planning(entry: Mapping[str, Any], what: str) -> Planning:
    """An entry of a file.

    Raises:
        ValueError: a field does not fit; the message says which.
    """
    method = entry.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("method"), str):
        raise ValueError(f"{what}.method must be an object that names a method, got {shown(method)}")
    lists = {name: entry.get(name) for name in ("lengths", "seconds")}
    for name, values in lists.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"{what}.{name} must be a list that is not empty, got {shown(values)}")
    numbered = {name: {str(i): value for i, value in enumerate(values or [])} for name, values in lists.items()}
    lengths = tuple(read_count(numbered["lengths"], i, f"{what}.lengths") for i in numbered["lengths"])
    seconds = tuple(read_number(numbered["seconds"], i, f"{what}.seconds") for i in numbered["seconds"])
    if len(lengths) != len(seconds) or list(lengths) != sorted(set(lengths)):
        raise ValueError(f"{what}.lengths must ascend, and have as many entries as seconds, got {shown(list(lengths))}")
    counts = {name: read_count(entry, name, what) for name in ("heads", "groups")}
    return Planning(read_kernel(entry, what), method, lengths=lengths, seconds=seconds, **counts)
