"""Fair timings: contenders in turn in one process, fresh inputs each round, and what else the machine was doing."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

ROUNDS = 7
# A contender whose call takes longer than this is timed in three rounds.
LONG_SECONDS = 40.0
LONG_ROUNDS = 3
# A call that got less than this share of the CPU time that the contender's best call got was short of a core: it is
# repeated, unless it is a long one. So is waking the threads, where they got less than this share of the threads.
LOW_SHARE = 0.75
REPEATS = 2
LONGEST_REPEATED = 10.0
WAKE_SECONDS = 0.2


@dataclass
class Series:
    """Seconds of one contender: on the clock, and CPU time of the process by threads."""

    wall: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    repeated: int = 0

    @property
    def median(self) -> float:
        return statistics.median(self.wall)

    def add(self, wall: float, used: float) -> None:
        self.wall.append(wall)
        self.cpu.append(used)

    def to_dict(self) -> dict[str, object]:
        threads = torch.get_num_threads()
        return {
            "median_s": round(self.median, 6),
            "wall_s": [round(s, 6) for s in self.wall],
            "cpu_s": [round(s, 6) for s in self.cpu],
            "threads_used": [round(used / wall * threads, 2) for wall, used in zip(self.wall, self.cpu, strict=True)],
            "repeated": self.repeated,
        }


def cpu_seconds() -> float:
    """CPU time of this process. `time.process_time` may leave out what another thread has used since its last tick, a
    few milliseconds; where the system has a clock for each thread, their sum does not."""
    try:
        threads = os.listdir("/proc/self/task")
    except OSError:
        return time.process_time()
    used = 0.0
    for thread in threads:
        with contextlib.suppress(OSError):  # it has ended since
            used += time.clock_gettime((~int(thread) << 3) | 6)  # the number that Linux gives a thread's clock
    return used


def timed(call: Callable[..., object], *arguments: object) -> tuple[float, float]:
    """Seconds of a call on the clock, and of CPU time by threads."""
    wall, used = time.perf_counter(), cpu_seconds()
    call(*arguments)
    taken = time.perf_counter() - wall
    return taken, (cpu_seconds() - used) / torch.get_num_threads()


def wake_threads() -> int:
    """Works on all threads until each gets a core, or a fifth of a second has passed; returns how often that was tried.

    Drawing inputs is the work of one thread. The others sleep meanwhile, and the system may wake them on the core of
    the first one, where they would share it for the next tenths of a second.
    """
    data = torch.zeros(1 << 20)
    out = torch.empty_like(data)
    tries, began = 0, time.perf_counter()
    while True:
        wall, used = timed(lambda: [torch.exp(data, out=out) for _ in range(4)])
        tries += 1
        if used > LOW_SHARE * wall or time.perf_counter() - began > WAKE_SECONDS:
            return tries
        time.sleep(0.01)


def alternate(
    contenders: Mapping[str, Callable[[Any], object]],
    inputs: Callable[[int], Any],
    *,
    rounds: int = ROUNDS,
    warm_up: bool = True,
    long_rounds: int = LONG_ROUNDS,
) -> dict[str, Series]:
    """Each round draws inputs and calls every contender on them once, in an order that moves on by one a round.

    All threads are woken between the drawing and the calls. A call that ran on fewer cores than the contender's best
    one is repeated, up to twice, and the one that had most cores counts.

    Args:
        inputs: what the contenders are called with, for a seed.
        warm_up: one more round, in front, that does not count.
        long_rounds: rounds of a contender whose call takes more than 40 seconds.
    """
    found = {name: Series() for name in contenders}
    most = dict.fromkeys(contenders, 0.0)
    names = list(contenders)
    for n in range(rounds + warm_up):
        drawn = inputs(n)
        wake_threads()
        for name in names[n % len(names) :] + names[: n % len(names)]:
            series = found[name]
            if series.wall and max(series.wall) > LONG_SECONDS and len(series.wall) >= long_rounds:
                continue
            wall, used = timed(contenders[name], drawn)
            for _ in range(REPEATS):
                if wall > LONGEST_REPEATED or used >= LOW_SHARE * most[name] * wall:
                    break
                series.repeated += bool(n or not warm_up)
                wake_threads()
                again = timed(contenders[name], drawn)
                wall, used = max((wall, used), again, key=lambda pair: pair[1] / pair[0])
            most[name] = max(most[name], min(1.0, used / wall))
            if n or not warm_up:
                series.add(wall, used)
    return found


class Bystanders:
    """The share of the machine that other programs take while a section runs. Children of this process are none."""

    def __init__(self) -> None:
        self._wall, self._own, self._busy = time.perf_counter(), _own_seconds(), _busy_seconds()

    def share(self) -> float | None:
        busy = _busy_seconds()
        if busy is None or self._busy is None:
            return None
        seconds = max(time.perf_counter() - self._wall, 1e-9)
        others = busy - self._busy - (_own_seconds() - self._own)
        return round(max(0.0, others) / seconds / (os.cpu_count() or 1), 3)


def _busy_seconds() -> float | None:
    stat = Path("/proc/stat")
    if not stat.exists():
        return None
    user, nice, system = (int(x) for x in stat.read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    """CPU time of this process, of its children that have ended, and of those that run, with theirs."""
    ended = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + ended.ru_utime + ended.ru_stime + sum(map(_running_seconds, _children(os.getpid())))


def _children(process: int) -> Iterable[int]:
    try:
        tasks = list(Path(f"/proc/{process}/task").iterdir())
        return [int(child) for task in tasks for child in (task / "children").read_text().split()]
    except OSError:
        return []


def _running_seconds(process: int) -> float:
    """CPU time of a process and its descendants; those that have ended are in the fields of their parent."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    ticks = sum(int(x) for x in fields[11:15])  # utime, stime, cutime, cstime
    return ticks / os.sysconf("SC_CLK_TCK") + sum(map(_running_seconds, _children(process)))


@contextlib.contextmanager
def environment(name: str, value: str) -> Iterator[None]:
    """A variable for the time being."""
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        del os.environ[name]
        if before is not None:
            os.environ[name] = before


def write(path: Path, report: object) -> None:
    """A whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(report, indent=1) + "\n")
    temporary.replace(path)
