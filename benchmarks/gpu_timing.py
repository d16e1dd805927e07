"""Fair timings on a CUDA device: contenders in turn on fresh inputs, CUDA events, the L2 cache flushed before a call.

What a call will take is told from a shorter length, so that nothing begins that would not end in time. Without a
device the clock on the wall serves, so that the same code can be tried under Triton's interpreter.
"""

from __future__ import annotations

import hashlib
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import triton

import gossamer

ROUNDS = 7
LONG_SECONDS = 2.0  # a contender that takes longer is timed in three rounds
LONG_ROUNDS = 3
VERY_LONG_SECONDS = 4.0  # a contender that is expected to take longer is called once, without a warm-up
COMPILING_SECONDS = 5.0  # of a call about which nothing is known
_FLUSH_BYTES = 512 << 20  # several times the L2 cache
_SLEEP_CYCLES = 2_000_000  # a millisecond, in which the host queues the call


@dataclass
class Series:
    """Seconds of one contender, or why it has none. ``peak_bytes`` is what its first call took beside the inputs."""

    seconds: list[float] = field(default_factory=list)
    failure: str | None = None
    skipped: str | None = None
    peak_bytes: int | None = None
    last: float = 0.0

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, object]:
        if self.failure is not None:
            return {"failure": self.failure}
        if not self.seconds:
            return {"skipped": self.skipped or "no time left after the warm-up"}
        peak = {} if self.peak_bytes is None else {"peak_gib": round(self.peak_bytes / 2**30, 2)}
        return {"median_s": self.median, "seconds": [round(s, 7) for s in self.seconds], **peak}

    def rests(self) -> bool:
        """Whether it is called no more."""
        long = len(self.seconds) >= LONG_ROUNDS and max(self.seconds) > LONG_SECONDS
        very_long = len(self.seconds) >= 1 and max(self.seconds) > VERY_LONG_SECONDS
        return bool(self.failure or self.skipped) or long or very_long


class Budget:
    """How much time is left, and what each call took, which tells what it takes at another length."""

    def __init__(self, seconds: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._end = clock, clock() + seconds
        self._calls: dict[str, tuple[int, float]] = {}

    def left(self) -> float:
        return self._end - self._clock()

    def note(self, name: str, length: int, seconds: float) -> None:
        self._calls[name] = length, seconds

    def expected(self, name: str, length: int, power: float) -> float | None:
        """Seconds of a call whose cost grows with that power of the length; None where it was never made."""
        if name not in self._calls:
            return None
        at, seconds = self._calls[name]
        return seconds * (length / at) ** power

    def refusal(self, seconds: float) -> str | None:
        """Why something that takes this long must not begin, or None."""
        left = max(0.0, self.left())
        return None if seconds <= left else f"{seconds:.0f} s expected, {left:.0f} s left"


class Timer:
    """Seconds of a call on the device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        on_cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if on_cuda else None

    def __call__(self, call: Callable[[], object]) -> float:
        if self._flush is None:
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        # While the device sleeps the host queues what comes; else short calls would count the host's time too.
        torch.cuda._sleep(_SLEEP_CYCLES)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def alternate(
    timer: Callable[[Callable[[], object]], float],
    contenders: Mapping[str, Callable[[Any], object]],
    inputs: Callable[[int], Any],
    *,
    rounds: int = ROUNDS,
    warm_up: bool = True,
    budget: Budget | None = None,
    length: int = 0,
    scope: str = "",
    powers: Mapping[str, float] | None = None,
) -> dict[str, Series]:
    """Each round draws inputs and calls every contender on them once, in an order that moves on by one a round.

    A first round compiles and does not count, unless ``warm_up`` is False. A contender that raises is left out from
    there on, with its reason.

    Args:
        inputs: what the contenders are called with, for a seed.
        budget: contenders that are not expected to fit are skipped, the dearest first, and rounds end with the time.
        length, scope: what the budget knows the calls by, beside the contender's name.
        powers: of the length, with which a contender's cost grows; 2 where none is given.
    """
    found = {name: Series() for name in contenders}
    if budget is not None:
        _refuse(found, budget, length, scope, powers or {}, rounds)
    names = [name for name, series in found.items() if series.skipped is None]
    for n in range(rounds + warm_up if names else 0):
        active = [name for name in names if not found[name].rests()]
        if not active or (n and budget is not None and sum(found[name].last for name in active) > budget.left()):
            break
        drawn = inputs(n)
        first = n % len(names)
        for name in names[first:] + names[:first]:
            if name in active:
                _call(found[name], timer, contenders[name], drawn, counts=n > 0 or not warm_up)
        del drawn  # before the next are drawn: at a million tokens they are large
    if budget is not None:
        for name, series in found.items():
            if series.median is not None:
                budget.note(f"{scope} {name}".strip(), length, series.median)
    return found


def _refuse(
    found: Mapping[str, Series],
    budget: Budget,
    length: int,
    scope: str,
    powers: Mapping[str, float],
    rounds: int,
) -> None:
    """Mark as skipped what does not fit, beginning with the dearest."""
    costs: dict[str, float] = {}
    for name, series in found.items():
        seconds = budget.expected(f"{scope} {name}".strip(), length, powers.get(name, 2))
        if seconds is None:
            costs[name] = COMPILING_SECONDS
            continue
        series.last = seconds
        calls = 1 if seconds > VERY_LONG_SECONDS else LONG_ROUNDS + 1 if seconds > LONG_SECONDS else rounds + 1
        costs[name] = calls * seconds
    taken = 0.0
    for name, cost in sorted(costs.items(), key=lambda item: item[1]):
        refusal = budget.refusal(taken + cost)
        if refusal is None:
            taken += cost
        else:
            found[name].skipped = refusal


def _call(
    series: Series,
    timer: Callable[[Callable[[], object]], float],
    contender: Callable[[Any], object],
    drawn: Any,
    *,
    counts: bool,
) -> None:
    """One call. A first one measures memory, and counts only if it is expected to be very long."""
    on_cuda = torch.cuda.is_available()
    base = 0
    if on_cuda and not counts:
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
    counts = counts or series.last > VERY_LONG_SECONDS
    try:
        series.last = timer(lambda: contender(drawn))
    except Exception as error:  # another library's refusal is a result
        series.failure = reason(error)
        if on_cuda and isinstance(error, torch.OutOfMemoryError):
            torch.cuda.empty_cache()
        return
    if on_cuda and series.peak_bytes is None:
        series.peak_bytes = torch.cuda.max_memory_allocated() - base
    if counts:
        series.seconds.append(series.last)


def reason(error: BaseException) -> str:
    """An exception in a line."""
    return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]


def machine(device: torch.device) -> dict[str, object]:
    """Device, versions and commit."""
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    if device.type != "cuda":
        return {"device": "none: Triton's interpreter on a CPU; its times mean nothing", **versions, **_commit()}
    about = torch.cuda.get_device_properties(device)
    return {
        "device": about.name,
        "capability": f"{about.major}.{about.minor}",
        "multiprocessors": about.multi_processor_count,
        "memory_gib": round(about.total_memory / 2**30, 1),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "clocks_mhz": _output("nvidia-smi", "--query-gpu=clocks.sm,clocks.max.sm", "--format=csv,noheader,nounits"),
        **versions,
        **_commit(),
    }


def _commit() -> dict[str, object]:
    """The commit, where this is a checkout, and a digest of the code that is measured, which tells versions apart."""
    here = Path(__file__).parent
    commit = _output("git", "-C", str(here), "rev-parse", "HEAD")
    changed = _output("git", "-C", str(here), "status", "--porcelain", "--untracked-files=no")
    digest = hashlib.sha256()
    files = [*Path(gossamer.__file__).parent.rglob("*.py"), *here.glob("gpu*.py"), here / "decoder.py"]
    for path in sorted(files):
        digest.update(path.read_bytes())
    return {"commit": commit, "changed_since": bool(changed), "source": digest.hexdigest()[:16]}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
