"""Fair timings: contenders in turn in one process, fresh inputs each round, and what else the machine was doing."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from gossamer.ops import cpu

ROUNDS = 7
# A contender whose call takes longer than this is timed in three rounds.
LONG_SECONDS = 40.0
LONG_ROUNDS = 3


@dataclass
class Series:
    """Seconds of one contender: on the clock, and CPU time of the process by threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    def to_dict(self) -> dict[str, object]:
        return {
            "median_s": round(self.median, 6),
            "wall_s": [round(s, 6) for s in self.wall],
            "cpu_s": [round(s, 6) for s in self.cpu],
        }


def alternate(
    contenders: Mapping[str, Callable[..., object]],
    inputs: Callable[[int], Sequence[object]],
    *,
    rounds: int = ROUNDS,
    warm_up: bool = True,
) -> dict[str, Series]:
    """Each round draws inputs and calls every contender on them once, in an order that moves on by one a round.

    Args:
        inputs: arguments of the contenders, for a seed.
        warm_up: one more round, in front, that does not count.
    """
    found = {name: Series() for name in contenders}
    names = list(contenders)
    for n in range(rounds + warm_up):
        arguments = inputs(n)
        for name in names[n % len(names) :] + names[: n % len(names)]:
            series = found[name]
            if series.wall and max(series.wall) > LONG_SECONDS and len(series.wall) >= LONG_ROUNDS:
                continue
            wall, used = time.perf_counter(), time.process_time()
            contenders[name](*arguments)
            taken = time.perf_counter() - wall, (time.process_time() - used) / torch.get_num_threads()
            if n or not warm_up:
                series.wall.append(taken[0])
                series.cpu.append(taken[1])
    return found


class Bystanders:
    """The share of the machine that other programs take while a section runs."""

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.perf_counter(), time.process_time(), _busy_seconds()

    def share(self) -> float | None:
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        seconds = max(time.perf_counter() - self._wall, 1e-9)
        others = busy - self._busy - (time.process_time() - self._own)
        return round(max(0.0, others) / seconds / (os.cpu_count() or 1), 3)


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = (int(x) for x in stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def machine() -> dict[str, object]:
    """Processor, cores, instruction sets, versions."""
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text().splitlines()
        model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), model)
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "isas": cpu.supported_isas(),
        "torch": torch.__version__,
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
    }


def write(path: Path, report: object) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)
