"""Which step of a sampling a model's call belongs to, and what methods keep over the steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from gossamer.layout import DenoisingStep

__all__ = ["Steps"]

# Calls of one timestep that may be branches of guidance: no pipeline has as many, and plans are kept for each.
_MOST_BRANCHES = 8
# Numbers of a call's latents that tell them from others.
_SKETCH = 64

Sketch = tuple[tuple[int, ...], bytes]


class Steps:
    """Follows the timesteps that models are called with. Models that share the steps of one sampling share it.

    Calls of one timestep are branches of one step, in their order. With a scheduler the step's number is its place
    among the scheduler's timesteps, each counted once: schedulers of second order have a timestep twice, and what
    comes there with other latents is no branch. Without one, timesteps are counted.

    What is kept belongs to one sampling. One begins where the scheduler's timesteps are set anew, where timesteps go
    back the way they came, where a call of the first step failed, and in the first step where the third or a later
    call has other latents than the first. Of two calls with different latents the second may be a branch or the next
    sampling: what the first step found is then not kept. Otherwise `restart` says so.

    Args:
        scheduler: gives what has ``timesteps`` while a pipeline runs, which may be another one in each call; None
            without one.
        total: steps of a sampling, where there is no scheduler to say it.
    """

    def __init__(self, scheduler: Callable[[], Any] | None = None, total: int | None = None) -> None:
        self._scheduler, self._total = scheduler, total
        self._schedule: Any = None
        self._running = False
        self._kept: dict[tuple[int, int], tuple[Any, list[dict[str, Any]]]] = {}
        self.restart()

    def restart(self) -> None:
        """The next call begins a sampling."""
        self.now: DenoisingStep | None = None
        self._last: float | None = None
        self._scaling: int | None = None
        self._direction = 0.0
        self._number = self._began = 0
        self._sketches: list[Sketch | None] = []  # of the branches of this step
        self._kept.clear()

    def begin(self, timestep: Any, latents: Any = None) -> None:
        """A model is called; `done` or `failed` say how it went. Neither of them: it was interrupted.

        Args:
            timestep: a number, or a tensor whose largest number is it; None: it says none.
            latents: that it is called with, if a tensor; few of their numbers are looked at.
        """
        if self._running:
            self.failed()
        if timestep is None:
            self.now = None
            return
        self._running = True
        dtype = timestep.dtype if isinstance(timestep, Tensor) else torch.float64
        time = float(timestep.max()) if isinstance(timestep, Tensor) else float(timestep)
        schedule = None if self._scheduler is None else getattr(self._scheduler(), "timesteps", None)
        if schedule is not self._schedule:
            self.restart()
            self._schedule = schedule
        distinct = _distinct(schedule)
        places = self._places(distinct, time, dtype)
        sketch = _sketch(latents)
        if places:
            self._go_to(places, time, sketch, lambda: self._places(distinct, time, dtype))
        else:
            self._count(time, sketch)
        self._last = time
        total = len(distinct) if places else self._total
        self.now = DenoisingStep(self._number, total, len(self._sketches) - 1)

    def done(self) -> None:
        """The call that began last came to its end."""
        self._running = False

    def failed(self) -> None:
        """The call that began last raised an error. It may come again, or another sampling begins."""
        if not self._running:
            return
        self._running = False
        if self._number == self._began:
            self.restart()
        elif self._sketches:
            self._sketches.pop()

    def at(self, number: int, total: int | None, branch: int) -> None:
        """A step that somebody says. Step 0 of the first branch begins a sampling."""
        if (number, branch) == (0, 0):
            self.restart()
        self.now = DenoisingStep(number, total, branch)

    def _go_to(self, places: list[int], time: float, sketch: Sketch | None, anew: Callable[[], list[int]]) -> None:
        """To the step at one of some places, all of which this timestep may be once it is rounded."""
        if self._last is None:
            self._start(places[0], sketch)
            return
        later = [place for place in places if place > self._number]
        same = time == self._last or (self._number in places and not later)
        # Where the next step has the same timestep once it is rounded, it has other latents.
        if same and not (later and self._is_new(sketch)):
            self._again(sketch)
        elif later:
            self._advance(later[0], sketch)
        else:
            self.restart()
            self._start(anew()[0], sketch)

    def _count(self, time: float, sketch: Sketch | None) -> None:
        if self._last is None:
            self._start(0, sketch)
        elif time == self._last:
            self._again(sketch)
        else:
            direction = 1.0 if time > self._last else -1.0
            if self._direction * direction < 0:
                self.restart()
                self._start(0, sketch)
            else:
                self._direction = direction
                self._advance(self._number + 1, sketch)

    def _start(self, number: int, sketch: Sketch | None) -> None:
        self._number = self._began = number
        self._sketches = [sketch]
        self._kept.clear()

    def _advance(self, number: int, sketch: Sketch | None) -> None:
        if self._number == self._began and len(set(self._sketches)) > 1:
            self._kept.clear()  # of branches with latents of their own, or of a sampling that was left and the next
        self._number, self._sketches = number, [sketch]

    def _again(self, sketch: Sketch | None) -> None:
        """A further call of the same timestep: a branch, the second stage of a step, or another sampling."""
        seen, number, scaling = self._sketches, self._number, self._scaling
        if self._is_new(sketch) and _times_of(self._schedule, number) > 1:
            self._sketches = [sketch]
            return
        other = number == self._began and len(seen) > 1 and sketch is not None and sketch != seen[0]
        if other and sketch == seen[-1]:  # the call before began it
            self._forget(next(n for n in reversed(range(len(seen))) if seen[n] != sketch) + 1)
        elif other or len(seen) >= _MOST_BRANCHES:
            self.restart()
            self._start(number, sketch)
            self._scaling = scaling
            return
        self._sketches.append(sketch)

    def _is_new(self, sketch: Sketch | None) -> bool:
        """Whether a call has other latents than all that came before in this step."""
        return sketch is not None and bool(self._sketches) and sketch not in self._sketches

    def _forget(self, branches: int) -> None:
        """The first branches of this step were of another sampling."""
        self._sketches = self._sketches[branches:]
        kept = {(layer, n - branches): rows for (layer, n), rows in self._kept.items() if n >= branches}
        self._kept.clear()
        self._kept.update(kept)

    def _places(self, times: Tensor, time: float, dtype: torch.dtype) -> list[int]:
        """Of a timestep among the scheduler's, ascending; several where they are one once they are rounded.

        Models get timesteps as they are, over a thousand, or as what is left.
        """
        if not len(times):
            return []
        found: dict[int, list[int]] = {}
        for scaling, scale in enumerate((lambda t: t, lambda t: t / 1000, lambda t: 1 - t / 1000)):
            # Rounded before or after it was scaled, to what it comes in or, on the way, to 16 bits.
            for kind in (dtype, torch.bfloat16, torch.float16):
                ways = torch.stack([scale(times.to(kind)).double(), scale(times).to(kind).double()])
                exact = (ways == time).any(dim=0).nonzero()[:, 0].tolist()
                if exact:
                    found[scaling] = exact
                    break
            else:
                scaled = scale(times.double())
                apart = (scaled - time).abs()
                if float(apart.min()) <= 4e-3 * max(abs(time), float(scaled.abs().max()) * 1e-3):
                    found[scaling] = [int(apart.argmin())]
        if self._scaling is None and found:  # a model has one, and what begins a sampling tells which
            self._scaling = next((scaling for scaling, places in found.items() if places[0] == 0), min(found))
        return [] if self._scaling is None else found.get(self._scaling, [])

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


def _distinct(schedule: Any) -> Tensor:
    """A scheduler's timesteps, each once, in their order; on the CPU."""
    if schedule is None or not len(schedule):
        return torch.zeros(0, device="cpu")
    return torch.as_tensor(schedule, device="cpu").unique_consecutive()


def _times_of(schedule: Any, number: int) -> int:
    """How often a timestep comes in a row."""
    if schedule is None or not len(schedule):
        return 1
    _, counts = torch.as_tensor(schedule, device="cpu").unique_consecutive(return_counts=True)
    return int(counts[number]) if number < len(counts) else 1


def _sketch(latents: Any) -> Sketch | None:
    if not isinstance(latents, Tensor) or not latents.numel():
        return None
    flat = latents.detach().reshape(-1)
    few = flat[:: max(1, flat.numel() // _SKETCH)][:_SKETCH]
    return tuple(latents.shape), few.float().cpu().numpy().tobytes()
