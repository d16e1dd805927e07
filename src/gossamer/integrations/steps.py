"""Which step of a sampling a model's call belongs to, and what methods keep over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.layout import DenoisingStep

__all__ = ["Steps"]


class Steps:
    """Follows the timesteps that models are called with. Models that share the steps of one sampling share it.

    Calls of one timestep are branches of one step, in their order. With a scheduler the step's number is its place
    among the scheduler's timesteps; without one, timesteps are counted, and one that goes back the way they came
    begins a sampling anew. What is kept belongs to one sampling.

    Args:
        scheduler: has ``timesteps`` while a pipeline runs; None without one.
        total: steps of a sampling, where there is no scheduler to say it.
    """

    def __init__(self, scheduler: Any = None, total: int | None = None) -> None:
        self._scheduler, self._total = scheduler, total
        self._scaling: int | None = None
        self._last: float | None = None
        self._direction = 0.0
        self._number = self._branch = 0
        self._kept: dict[tuple[int, int], tuple[Any, list[dict[str, Any]]]] = {}
        self.now: DenoisingStep | None = None

    def restart(self) -> None:
        """The next call begins a sampling."""
        self._last, self._direction, self._number, self._branch, self.now = None, 0.0, 0, 0, None
        self._kept.clear()

    def begin(self, timestep: Any) -> None:
        """A model is called with a timestep: a number, or a tensor whose largest number is it; None: it says none."""
        if timestep is None:
            self.now = None
            return
        time = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        place = self._place(time)
        if place is not None:
            self._follow(place, restarts=self._last is not None and place < self._number)
        elif self._last is None or time == self._last:
            self._follow(self._number, restarts=False)
        else:
            direction = 1.0 if time > self._last else -1.0
            back = self._direction * direction < 0
            self._follow(self._number + 1, restarts=back)
            self._direction = 0.0 if back else direction
        self._last = time
        total = self._total if place is None else len(self._scheduler.timesteps)
        self.now = DenoisingStep(self._number, total, self._branch)

    def at(self, number: int, total: int | None, branch: int) -> None:
        """A step that somebody says. Step 0 of the first branch begins a sampling."""
        if (number, branch) == (0, 0):
            self.restart()
        self.now = DenoisingStep(number, total, branch)

    def _follow(self, number: int, *, restarts: bool) -> None:
        if restarts:
            place = number if number < self._number else 0
            self.restart()
            self._number = place
            return
        again = self._last is not None and number == self._number
        self._branch = self._branch + 1 if again else 0
        self._number = number

    def _place(self, time: float) -> int | None:
        """Of a timestep among the scheduler's, which models get as it is, over a thousand, or as what is left."""
        times = getattr(self._scheduler, "timesteps", None)
        if times is None or not len(times):
            return None
        times = torch.as_tensor(times, dtype=torch.float64, device="cpu")
        places: dict[int, int] = {}
        for scaling, scaled in enumerate((times, times / 1000, 1 - times / 1000)):
            apart = (scaled - time).abs()
            # Some are rounded to 16 bits on the way.
            if float(apart.min()) <= 4e-3 * max(abs(time), float(scaled.abs().max()) * 1e-3):
                places[scaling] = int(apart.argmin())
        if self._scaling is None and places:  # a model has one, and what begins a sampling tells which
            self._scaling = next((scaling for scaling, place in places.items() if place == 0), min(places))
        return None if self._scaling is None else places.get(self._scaling)

    def state(self, layer: int, sizes: Sequence[int]) -> list[dict[str, Any]]:
        """What methods keep of a layer in this branch, a mapping for each batch row; new ones for calls of other sizes.

        Args:
            sizes: batch rows first, then whatever a plan depends on.
        """
        branch = 0 if self.now is None else self.now.branch
        had, rows = self._kept.get((layer, branch), (None, []))
        if had != tuple(sizes):
            rows = [{} for _ in range(sizes[0])]
            self._kept[layer, branch] = tuple(sizes), rows
        return rows
