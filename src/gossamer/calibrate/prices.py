"""What a plan costs, as the search of a profile counts it: pairs, or seconds that are taken here.

A price is any object with a name, `Price.seconds` of attending by a plan, and `Price.planning` of making one. Only
ratios to the dense plan of the same call count, so that the unit is free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.methods import Dense, Method
from gossamer.plan import SparsePlan

__all__ = ["Measured", "Pairs", "Price", "head_costs"]


class Price(Protocol):
    """How costs are counted. ``name`` stands in the profile."""

    name: ClassVar[str]

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        """Of attending by a plan."""
        ...

    def planning(self, call: AttentionCall, method: Method) -> float:
        """Of making a plan, in the same unit."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Pairs that are computed: the same on every machine and in every run. Planning costs nothing here."""

    name: ClassVar[str] = "pairs"

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        return float(plan.count_pairs().sum()) * (call.heads // plan.heads)

    def planning(self, call: AttentionCall, method: Method) -> float:
        return 0.0


@dataclass(frozen=True)
class Measured:
    """Seconds on this machine, planning included: the median of a few rounds. No two runs agree to the last bit."""

    name: ClassVar[str] = "measured"
    rounds: int = 3

    def seconds(self, call: AttentionCall, plan: SparsePlan) -> float:
        return self._median(call, lambda: backends.attend(call, plan))

    def planning(self, call: AttentionCall, method: Method) -> float:
        return 0.0 if isinstance(method, Dense) else self._median(call, lambda: method.plan(call))

    def _median(self, call: AttentionCall, work: Callable[[], object]) -> float:
        taken = []
        for _ in range(self.rounds):
            _wait(call)
            started = time.perf_counter()
            work()
            _wait(call)
            taken.append(time.perf_counter() - started)
        return median(taken)


def _wait(call: AttentionCall) -> None:
    if call.device.type == "cuda":
        torch.cuda.synchronize(call.device)


def head_costs(price: Price, call: AttentionCall, method: Method, plan: SparsePlan, dense: float) -> Tensor:
    """What each head costs over what it costs dense, fp64 ``[H]`` on the CPU.

    The seconds of a plan are shared out among its heads by their pairs, those of planning evenly.

    Args:
        dense: the price of the call's dense plan.
    """
    pairs = plan.count_pairs()[0].double().repeat_interleave(call.heads // plan.heads)
    attend, planning = price.seconds(call, plan), price.planning(call, method)
    return (attend * pairs / pairs.sum().clamp(min=1) + planning / call.heads) * call.heads / max(dense, 1e-30)
