"""Fair timings on a CUDA device: contenders in turn on fresh inputs, CUDA events, the L2 cache flushed before a call.

Without a device the clock on the wall serves, so that the same code can be tried under Triton's interpreter.
"""

from __future__ import annotations

import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

ROUNDS = 7
LONG_SECONDS = 2.0  # a contender that takes longer is timed in three rounds
LONG_ROUNDS = 3
_FLUSH_BYTES = 512 << 20  # several times the L2 cache; also long enough for the host to queue the call behind it


@dataclass
class Series:
    """Seconds of one contender, or why it has none."""

    seconds: list[float] = field(default_factory=list)
    failure: str | None = None

    @property
    def median(self) -> float | None:
        return statistics.median(self.seconds) if self.seconds else None

    def to_dict(self) -> dict[str, object]:
        if self.failure is not None:
            return {"failure": self.failure}
        return {"median_s": self.median, "seconds": [round(s, 7) for s in self.seconds]}


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
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize(self.device)
        return begin.elapsed_time(end) / 1e3


def alternate(
    timer: Timer,
    contenders: Mapping[str, Callable[..., object]],
    inputs: Callable[[int], Sequence[object]],
    *,
    rounds: int = ROUNDS,
) -> dict[str, Series]:
    """Each round draws inputs and calls every contender on them once, in an order that moves on by one a round.

    A first round compiles and does not count. A contender that raises is left out from there on, with its reason.
    """
    found = {name: Series() for name in contenders}
    names = list(contenders)
    for n in range(rounds + 1):
        arguments = inputs(n)
        for name in names[n % len(names) :] + names[: n % len(names)]:
            series = found[name]
            slow = series.seconds and max(series.seconds) > LONG_SECONDS and len(series.seconds) >= LONG_ROUNDS
            if series.failure is not None or slow:
                continue
            try:
                seconds = timer(lambda call=contenders[name], arguments=arguments: call(*arguments))
            except Exception as error:  # another library's refusal is a result
                series.failure = f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
                continue
            if n:
                series.seconds.append(seconds)
    return found


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
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "changed_since": bool(changed)}


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
