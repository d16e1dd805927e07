"""Files of what attention costs on a machine: seconds by kernel, and the lengths from which methods pay.

`gossamer bench --cost-model` writes one where `Policy` finds it: the file that ``GOSSAMER_COST_MODEL`` names, or
``gossamer/costs.json`` in the user's cache (``XDG_CACHE_HOME``). One of another machine, number of threads or version
of gossamer is left alone, and `at_hand` says why.
"""

from __future__ import annotations

import functools
import json
import math
import os
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from gossamer.profiles.files import MOST_BYTES, parse_json, read_file, shown, write_whole
from gossamer.profiles.kernels import MOST_TOKENS, Kernel, read_count, read_kernel, read_number, same_fields
from gossamer.profiles.machine import Machine
from gossamer.profiles.planning import Planning, read_planning

__all__ = [
    "ENVIRONMENT",
    "MIN_TOKENS",
    "TERMS",
    "BreakEven",
    "Costs",
    "Kernel",
    "KernelCost",
    "Planning",
    "at_hand",
    "default_path",
]

ENVIRONMENT = "GOSSAMER_COST_MODEL"
OFF = "off"
SCHEMA = 1
# What a call's seconds are a sum of, each with seconds apiece; `gossamer.calibrate.cost` says what they count.
TERMS: tuple[str, ...] = ("calls", "tokens", "pairs", "column_pairs", "blocks", "columns")
# From so many tokens on methods are used whose break-even was not measured on this machine.
MIN_TOKENS = 2048
_MOST_ENTRIES = 10_000


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Seconds of a kernel, fitted.

    Fields:
        seconds: of one of each of `TERMS`; 0 or more, absent is 0.
        error: median relative error on held-out measurements; worst: the largest.
        samples: measurements; lengths: of their prompts.
    """

    kernel: Kernel
    seconds: Mapping[str, float]
    error: float
    worst: float
    samples: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class BreakEven:
    """From which length on a method is faster than dense attention on the same kernel, planning included.

    Fields:
        method: `Method.to_dict`.
        heads, groups: H and G that were measured.
        tokens: the length; the shortest measured if it is faster at all; None if at the longest it is still slower.
        shortest, longest: lengths that were measured.
    """

    kernel: Kernel
    method: Mapping[str, Any]
    heads: int
    groups: int
    tokens: float | None
    shortest: int
    longest: int

    @property
    def pays_from(self) -> int:
        """The first whole number of tokens at which the method was faster; if at none, beyond all that was measured."""
        return max(MIN_TOKENS, self.longest + 1) if self.tokens is None else math.ceil(self.tokens)


@dataclass(frozen=True, slots=True)
class Costs:
    """What is known of a machine's costs: for each kernel, and for methods beside them."""

    machine: Machine
    kernels: tuple[KernelCost, ...] = ()
    break_even: tuple[BreakEven, ...] = ()
    planning: tuple[Planning, ...] = ()

    def kernel(self, kernel: Kernel) -> KernelCost | None:
        return next((cost for cost in self.kernels if cost.kernel == kernel), None)

    def pays_from(self, method: Mapping[str, Any], kernel: Kernel) -> int | None:
        """Tokens from which a method with just these fields (`Method.to_dict`) pays on a kernel; None: not measured.

        Measured for several numbers of heads, the largest. One that was slower up to the longest prompt pays at
        the earliest beyond it, and from `MIN_TOKENS` on.
        """
        points = [point for point in self.break_even if point.kernel == kernel]
        wanted = same_fields(method) if points else ""
        return max((point.pays_from for point in points if same_fields(point.method) == wanted), default=None)

    def planning_seconds(
        self, method: Mapping[str, Any], kernel: Kernel, heads: int, groups: int, length: int
    ) -> float | None:
        """Of making a method's plan (its fields as JSON has them) for some heads of a prompt; None: not measured.

        Measured for several numbers of heads, by those with as many query heads to a key/value head, else the last.
        """
        found = [entry for entry in self.planning if entry.kernel == kernel and entry.method == method]
        found.sort(key=lambda entry: entry.heads * groups == entry.groups * heads)
        return found[-1].seconds_of(heads, length) if found else None

    def updated(self, newer: Costs) -> Costs:
        """The entries of both. Of another machine, nothing is kept.

        Where both have an entry, the newer one's, unless it was measured on shorter calls alone.
        """
        if self.machine != newer.machine:
            return newer
        kernels = _merged(self.kernels, newer.kernels, lambda cost: cost.kernel)
        points = _merged(self.break_even, newer.break_even, _identity)
        plans = _merged(self.planning, newer.planning, _identity)
        return Costs(newer.machine, kernels, points, plans)

    def to_dict(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "machine": self.machine.to_dict(),
            "kernels": [_plain(cost) for cost in self.kernels],
            "break_even": [_plain(point) for point in self.break_even],
            "planning": [_plain(entry) for entry in self.planning],
        }

    @classmethod
    def from_dict(cls, data: Any) -> Costs:
        """Inverse of `to_dict`.

        Raises:
            ValueError: another schema, or a field that does not fit; the message says which.
        """
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            given = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise ValueError(f"schema {shown(given)} of costs is not supported; this version reads schema {SCHEMA}")
        kernels = [_kernel_cost(entry, f"kernels[{i}]") for i, entry in enumerate(_entries(data, "kernels"))]
        points = [_break_even(entry, f"break_even[{i}]") for i, entry in enumerate(_entries(data, "break_even"))]
        if len({cost.kernel for cost in kernels}) < len(kernels):
            raise ValueError("kernels must have one entry for each kernel")
        if len({_identity(point) for point in points}) < len(points):
            raise ValueError("break_even must have one entry for each method, number of heads and kernel")
        planning = [read_planning(entry, f"planning[{i}]") for i, entry in enumerate(_entries(data, "planning"))]
        if len({_identity(entry) for entry in planning}) < len(planning):
            raise ValueError("planning must have one entry for each method, number of heads and kernel")
        return cls(Machine.from_dict(data.get("machine")), tuple(kernels), tuple(points), tuple(planning))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write as JSON, to a temporary name first; its folder is made if there is none.

        Raises:
            OSError: it cannot be written.
        """
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(self.to_dict(), indent=1, allow_nan=False) + "\n")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Costs:
        """Read what `save` wrote.

        Raises:
            OSError: it cannot be read.
            ValueError: it is something else; the message says what.
        """
        content = read_file(path, MOST_BYTES)
        try:
            return cls.from_dict(parse_json(content))
        except ValueError as error:
            raise ValueError(f"{path} is no file of costs: {error}") from None


def default_path() -> Path | None:
    """The file that `Policy` looks for, whether or not it is there; None where ``GOSSAMER_COST_MODEL=off``."""
    named = os.environ.get(ENVIRONMENT, "")
    if named:
        return None if named == OFF else Path(named)
    cache = os.environ.get("XDG_CACHE_HOME", "")
    try:
        folder = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"
    except RuntimeError:  # no home
        return None
    return folder / "gossamer" / "costs.json"


def at_hand() -> tuple[Costs | None, str]:
    """The costs measured on this machine, and where they are from; or None, and why there are none.

    A file is read once in a process.
    """
    path = default_path()
    if path is None:
        return None, f"{ENVIRONMENT}={OFF}" if os.environ.get(ENVIRONMENT) == OFF else "no home folder"
    costs, reason = _read(path)
    if costs is None:
        return None, reason
    other = costs.machine.why_not(Machine.here())
    return (costs, str(path)) if other is None else (None, f"{path} was {other}; run `gossamer bench --cost-model`")


@functools.lru_cache(maxsize=8)
def _read(path: Path) -> tuple[Costs | None, str]:
    try:
        return Costs.load(path), ""
    except FileNotFoundError:
        return None, f"there is no {path}; `gossamer bench --cost-model` writes it"
    except OSError as error:
        return None, f"cannot read {path}: {error.strerror}"
    except ValueError as error:
        return None, str(error)


def forget() -> None:
    """Read the file anew when it is needed next: it was written."""
    _read.cache_clear()


_Entry = TypeVar("_Entry", KernelCost, BreakEven, Planning)


def _merged(
    older: Sequence[_Entry], newer: Sequence[_Entry], identity: Callable[[_Entry], Hashable]
) -> tuple[_Entry, ...]:
    found = {identity(entry): entry for entry in older}
    for entry in newer:
        known = found.get(identity(entry))
        if known is None or _longest(entry) >= _longest(known):
            found[identity(entry)] = entry
    return tuple(found.values())


def _longest(entry: KernelCost | BreakEven | Planning) -> int:
    """Tokens of the longest call that was measured."""
    return entry.longest if isinstance(entry, BreakEven) else max(entry.lengths, default=0)


def _identity(point: BreakEven | Planning) -> tuple[Any, ...]:
    return point.kernel, same_fields(point.method), point.heads, point.groups


def _plain(entry: KernelCost | BreakEven | Planning) -> dict[str, Any]:
    values = {part.name: getattr(entry, part.name) for part in fields(entry) if part.name != "kernel"}
    values |= {name: dict(value) for name, value in values.items() if isinstance(value, Mapping)}
    values |= {name: list(value) for name, value in values.items() if isinstance(value, tuple)}
    return asdict(entry.kernel) | values


def _entries(data: Mapping[str, Any], name: str) -> list[Any]:
    entries = data.get(name, [])
    if not isinstance(entries, list) or len(entries) > _MOST_ENTRIES:
        raise ValueError(f"{name} must be a list of at most {_MOST_ENTRIES:,} entries, got {shown(entries)}")
    for i, entry in enumerate(entries):
        if not isinstance(entry, dict):
            raise ValueError(f"{name}[{i}] must be an object, got {shown(entry)}")
    return entries


def _kernel_cost(entry: Mapping[str, Any], what: str) -> KernelCost:
    seconds = entry.get("seconds")
    if not isinstance(seconds, dict):
        raise ValueError(f"{what}.seconds must be an object, got {shown(seconds)}")
    for name in seconds:
        if name not in TERMS:
            raise ValueError(f"{what}.seconds has {shown(name)}, which is none of {', '.join(TERMS)}")
        read_number(seconds, name, f"{what}.seconds")
    lengths = entry.get("lengths")
    if not isinstance(lengths, list):
        raise ValueError(f"{what}.lengths must be a list, got {shown(lengths)}")
    numbered = {str(i): length for i, length in enumerate(lengths)}
    return KernelCost(
        read_kernel(entry, what),
        {name: float(value) for name, value in seconds.items()},
        read_number(entry, "error", what),
        read_number(entry, "worst", what),
        read_count(entry, "samples", what),
        tuple(read_count(numbered, i, f"{what}.lengths") for i in numbered),
    )


def _break_even(entry: Mapping[str, Any], what: str) -> BreakEven:
    method = entry.get("method")
    if not isinstance(method, dict) or not isinstance(method.get("method"), str):
        raise ValueError(f"{what}.method must be an object that names a method, got {shown(method)}")
    counts = {name: read_count(entry, name, what) for name in ("heads", "groups", "shortest", "longest")}
    tokens = None if entry.get("tokens") is None else read_number(entry, "tokens", what, MOST_TOKENS)
    return BreakEven(read_kernel(entry, what), method, tokens=tokens, **counts)
