"""What a candidate costs, as the search of a profile counts it: pairs, seconds of a cost model, or seconds taken here.

Only ratios to the dense plan of the same call count, so that the unit is free.
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
from gossamer.calibrate.cost import CostModel, pairs_of_heads
from gossamer.call import AttentionCall
from gossamer.methods import Dense, Method
from gossamer.plan import SparsePlan

__all__ = ["Measured", "Modelled", "Pairs", "Price", "head_costs"]


class Price(Protocol):
    """How costs are counted."""

    name: ClassVar[str]
    """It stands in the profile."""

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        """Of attending by a plan, each query head's part, fp64 ``[H]`` on the CPU."""
        ...

    def planning(self, call: AttentionCall, method: Method) -> float:
        """Of making a plan for all heads, in the same unit."""
        ...


@dataclass(frozen=True)
class Pairs:
    """Pairs that are computed: the same on every machine and in every run. Planning costs nothing here."""

    name: ClassVar[str] = "pairs"

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        return pairs_of_heads(call, plan)

    def planning(self, call: AttentionCall, method: Method) -> float:
        return 0.0


@dataclass(frozen=True)
class _Timed:
    """Seconds that are taken here: the median of a few rounds."""

    rounds: int = 3
    clock: Callable[[], float] = time.perf_counter

    def planning(self, call: AttentionCall, method: Method) -> float:
        return 0.0 if isinstance(method, Dense) else self._median(call, lambda: method.plan(call))

    def _median(self, call: AttentionCall, work: Callable[[], object]) -> float:
        taken = []
        for _ in range(self.rounds):
            started = self._now(call)
            work()
            taken.append(self._now(call) - started)
        return median(taken)

    def _now(self, call: AttentionCall) -> float:
        if call.device.type == "cuda":
            torch.cuda.synchronize(call.device)
        return self.clock()


@dataclass(frozen=True)
class Measured(_Timed):
    """Seconds on this machine, of attending and planning. No two runs agree to the last bit.

    The seconds of a plan are shared out among its heads by their pairs.
    """

    name: ClassVar[str] = "measured"

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        pairs = pairs_of_heads(call, plan)
        return self._median(call, lambda: backends.attend(call, plan)) * pairs / pairs.sum().clamp(min=1)


@dataclass(frozen=True, kw_only=True)
class Modelled(_Timed):
    """Seconds of attending and planning by a cost model of this machine, which others beside do not disturb.

    Planning that the model does not know is timed here; no two runs then agree to the last bit.
    """

    name: ClassVar[str] = "machine"
    model: CostModel

    def of_heads(self, call: AttentionCall, plan: SparsePlan) -> Tensor:
        return self.model.of_heads(call, plan)

    def planning(self, call: AttentionCall, method: Method) -> float:
        known = 0.0 if isinstance(method, Dense) else self.model.planning(call, method)
        return super().planning(call, method) if known is None else known


def head_costs(price: Price, call: AttentionCall, method: Method, plan: SparsePlan, dense: Tensor) -> Tensor:
    """What each head costs over what it costs dense, fp64 ``[H]`` on the CPU; planning is shared out evenly.

    Args:
        dense: the price of the call's dense plan, ``[H]``.
    """
    seconds = price.of_heads(call, plan) + price.planning(call, method) / call.heads
    return seconds / dense.clamp(min=1e-30)
