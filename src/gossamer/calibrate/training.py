"""A loop that trains a few parameters beside a frozen model, and can go on where it was stopped.

What it needs to go on, parameters and the optimiser's averages, lies in a file of safetensors that is written whole,
under a temporary name first. A run that was stopped ends with the same numbers as one that was not.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from gossamer.methods.seer_gates import load_tensors, save_tensors

__all__ = ["Schedule", "Training"]

_AVERAGES = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Schedule:
    """How many steps, and the learning rate of each.

    Fields:
        rate: the largest.
        shape: ``cosine``, from ``rate`` to 0; or ``trapezoid``, which rises in the first ``edge`` of the steps and
            falls in the last, both in a straight line.
    """

    steps: int
    rate: float
    shape: Literal["cosine", "trapezoid"] = "cosine"
    edge: float = 0.2

    def at(self, step: int) -> float:
        done = (step + 0.5) / self.steps
        if self.shape == "cosine":
            return self.rate * 0.5 * (1 + math.cos(math.pi * done))
        return self.rate * min(1.0, done / self.edge, (1 - done) / self.edge)


class Training:
    """Adam on named parameters.

    Args:
        parameters: all that is trained, by name.
        backward: makes the gradients of a step, by its number, and returns its loss.
        about: what a file to go on with must say of itself: settings, model, data.
        path: of that file; None to keep none.
        after: called after each step, such as to bring parameters into a range.

    Raises:
        ValueError: the file is there, and of another training; the message says what differs.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        backward: Callable[[int], float],
        schedule: Schedule,
        *,
        about: Mapping[str, Any],
        path: Path | None = None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        self._parameters, self._backward, self._after = dict(parameters), backward, after
        self._schedule, self._path = schedule, path
        self._about = dict(about) | {"steps": schedule.steps, "rate": schedule.rate, "shape": schedule.shape}
        self._optimizer = torch.optim.Adam(self._parameters.values(), lr=schedule.rate)
        self.step, self.losses = 0, []
        if path is not None and path.exists():
            self._load(path)

    def run(self, progress: Callable[[int, float], None] = lambda step, loss: None, *, save_every: int = 50) -> None:
        """All steps that are left; the file is written every so many, and when something stops it."""
        try:
            while self.step < self._schedule.steps:
                for group in self._optimizer.param_groups:
                    group["lr"] = self._schedule.at(self.step)
                self._optimizer.zero_grad()
                loss = self._backward(self.step)
                if not math.isfinite(loss):
                    raise ValueError(f"the loss of step {self.step} is {loss}; lower the rate, or try another dtype")
                self._optimizer.step()
                with torch.no_grad():
                    self._after()
                self.step += 1
                self.losses.append(loss)
                progress(self.step, loss)
                if self.step % save_every == 0 and self.step < self._schedule.steps:
                    self.save()
        except KeyboardInterrupt:
            self.save()
            raise

    def save(self) -> None:
        """Write the file to go on with."""
        if self._path is None or self.step == 0:
            return
        tensors: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            tensors[f"parameter.{name}"] = parameter.detach()
            # One that no step has reached yet has none; Adam leaves it alone.
            state = self._optimizer.state.get(parameter)
            for average in _AVERAGES:
                tensors[f"{average}.{name}"] = state[average] if state else torch.zeros_like(parameter)
            tensors[f"step.{name}"] = state["step"].reshape(1) if state else torch.zeros(1, device="cpu")
        about = {"about": json.dumps(self._about, sort_keys=True), "losses": json.dumps(self.losses)}
        save_tensors(self._path, tensors, about)

    def done(self) -> None:
        """The result is written: the file to go on with is no longer needed."""
        if self._path is not None and self._path.exists():
            os.unlink(self._path)

    def _load(self, path: Path) -> None:
        tensors, metadata = load_tensors(path)
        mine = json.loads(json.dumps(self._about))
        try:
            theirs, losses = json.loads(metadata["about"]), [float(loss) for loss in json.loads(metadata["losses"])]
        except (KeyError, ValueError, TypeError, RecursionError):
            raise ValueError(f"{path} is no file of a training to go on with; remove it, or write elsewhere") from None
        other = sorted(n for n in mine.keys() | theirs.keys() if mine.get(n) != theirs.get(n)) if mine != theirs else []
        if other:
            raise ValueError(f"{path} is of a training with another {', '.join(other)}; remove it, or write elsewhere")
        for name, parameter in self._parameters.items():
            kept = [tensors.get(f"{kind}.{name}") for kind in ("parameter", *_AVERAGES)]
            if any(tensor is None or tensor.shape != parameter.shape for tensor in kept):
                raise ValueError(f"{path} lacks {name} in its shape {tuple(parameter.shape)}; remove it")
            value, first, second = (tensor.to(parameter) for tensor in kept if tensor is not None)
            with torch.no_grad():
                parameter.copy_(value)
            kept_step = tensors.get(f"step.{name}")
            step = torch.tensor(float(len(losses) if kept_step is None else kept_step), device="cpu")
            if step > 0:
                self._optimizer.state[parameter] = {"step": step, "exp_avg": first, "exp_avg_sq": second}
        self.losses, self.step = losses, len(losses)
