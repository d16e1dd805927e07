"""The search of a profile: measure every candidate on every head of a dense run, choose, and say how the choice holds.

    found = measure(subject, samples, candidates(), Pairs(), Store(None, {}))
    methods = found.methods(found.choose("global", 0.3))

A prompt is read once, with dense attention, and each layer is looked at as it comes by, a few heads at a time: in
memory lie the model, one layer's tensors, and figures of some bytes a head. Figures of a layer are the means over the
prompts of what `gossamer.calibrate.figures` says.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from gossamer.calibrate.choice import choose_cheapest, choose_fixed, choose_global
from gossamer.calibrate.figures import FIGURES, LayerFigures, measure_layer
from gossamer.calibrate.prices import Price
from gossamer.calibrate.samples import Sample, Samples
from gossamer.calibrate.store import Store
from gossamer.evaluate.subject import Subject
from gossamer.integrations.transformers import Observation
from gossamer.methods import Dense, Method
from gossamer.policy import Policy

__all__ = ["OBJECTIVES", "Found", "Mode", "measure"]

Mode = Literal["fixed", "global", "cheapest"]
Figures = dict[str, Tensor]
"""Of `FIGURES`, each ``[layers, H, candidates]``."""

# What is minimised, from the figures of a candidate.
OBJECTIVES: dict[str, Callable[[Figures], Tensor]] = {
    "output": lambda figures: figures["error"],
    "squared_output": lambda figures: figures["error"].square(),
    "mass": lambda figures: 1 - figures["recall"],
}


@dataclass(frozen=True)
class Found:
    """What was measured.

    Fields:
        candidates: the first is dense.
        layers: the model's indices of those that were looked at.
        calibration, held_out: means over the prompts; held_out is None where none were.
        objective: one of `OBJECTIVES`.
        weights: what an error counts, by layer and head, ``[layers, H]``; None: all alike.
    """

    candidates: Sequence[Method]
    layers: Sequence[int]
    calibration: Figures
    held_out: Figures | None = None
    objective: str = "output"
    weights: Tensor | None = field(default=None)

    def losses(self, figures: Figures) -> Tensor:
        """``[layers * H, candidates]``."""
        losses = OBJECTIVES[self.objective](figures)
        if self.weights is not None:
            losses = losses * self.weights.double()[..., None]
        return losses.flatten(0, 1)

    def choose(self, mode: Mode, at: float, **rules: float) -> Tensor:
        """A candidate for each head, int64 ``[layers, H]``.

        Args:
            at: the budget as a share of dense attention; for ``cheapest`` the mean loss that is accepted.
            rules: of `choose_fixed`.

        Raises:
            ValueError: no choice is as cheap, or as good.
        """
        losses, costs = self.losses(self.calibration), self.calibration["cost"].flatten(0, 1)
        chosen = {
            "fixed": lambda: choose_fixed(losses, costs, at, **rules),
            "global": lambda: choose_global(losses, costs, at),
            "cheapest": lambda: choose_cheapest(losses, costs, at),
        }[mode]()
        return chosen.view(self.calibration["cost"].shape[:2])

    def methods(self, chosen: Tensor) -> tuple[tuple[Method, ...], ...]:
        """``[layer][head]``. Layers that were not looked at are dense."""
        rows = dict(zip(self.layers, chosen.tolist(), strict=True))
        heads = chosen.shape[1]
        return tuple(
            tuple(self.candidates[index] for index in rows[layer]) if layer in rows else (Dense(),) * heads
            for layer in range(max(self.layers) + 1)
        )

    def of_choice(self, chosen: Tensor, *, held_out: bool = False) -> dict[str, Tensor]:
        """Of `FIGURES` and ``loss``, by layer and head, ``[layers, H]``."""
        figures = self.held_out if held_out else self.calibration
        if figures is None:
            raise ValueError("no samples were held out")
        tables = figures | {"loss": self.losses(figures).view_as(figures["cost"])}
        return {name: table.gather(-1, chosen[..., None])[..., 0] for name, table in tables.items()}

    def summary(self, chosen: Tensor) -> dict[str, dict[str, float]]:
        """Means over the heads, on the calibration's samples and on those that were held out."""
        parts = {"calibration": False} | ({} if self.held_out is None else {"held_out": True})
        return {
            part: {name: float(t.mean()) for name, t in self.of_choice(chosen, held_out=out).items()}
            for part, out in parts.items()
        }


def measure(
    subject: Subject,
    samples: Samples,
    methods: Sequence[Method],
    price: Price,
    store: Store,
    *,
    groups: int = 1,
    objective: str = "output",
    weights: Tensor | None = None,
    progress: Callable[[Sample, int], None] = lambda sample, layer: None,
) -> Found:
    """Measure what the store lacks.

    Args:
        groups: key/value heads that are looked at together.
        weights: as `Found.weights`, but of all the model's layers.
        progress: called for each layer of each sample, when it is done.

    Raises:
        ValueError: a prompt cannot be made, the model's attention not be observed, or an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    layers: set[int] = set()
    for sample in samples.listed:
        layers |= _read(subject, samples, sample, methods, price, store, groups, progress)
    if not layers:
        raise ValueError(f"{type(subject.model).__name__} made no attention call that can be looked at")
    order = sorted(layers)
    parts = []
    for held_out in (False, True):
        keys = [sample.key for sample in samples.listed if sample.held_out == held_out]
        parts.append(_means(store, keys, order) if keys else None)
    assert parts[0] is not None
    return Found(methods, order, parts[0], parts[1], objective, None if weights is None else weights[order])


def _read(
    subject: Subject,
    samples: Samples,
    sample: Sample,
    methods: Sequence[Method],
    price: Price,
    store: Store,
    groups: int,
    progress: Callable[[Sample, int], None],
) -> set[int]:
    """Look at one prompt, unless all its layers are there. Which layers it has."""
    count = int(subject.config.num_hidden_layers)
    done = {layer for layer in range(count) if store.has(sample.key, layer)}
    if len(done) == count:
        for layer in sorted(done):
            progress(sample, layer)
        return done

    def visit(observed: Observation) -> None:
        call = observed.call
        if call.layer is None:
            return
        if not store.has(sample.key, call.layer):
            figures = measure_layer(call, observed.out, methods, price, groups=groups)
            store.add(sample.key, call.layer, figures)
        done.add(call.layer)
        progress(sample, call.layer)

    subject.hidden_states(samples.tokens(sample), Policy.of("dense"), visit)
    return done


def _means(store: Store, prompts: Sequence[str], layers: Sequence[int]) -> Figures:
    """In the order of the prompts, so that an interrupted search ends with the same bits."""

    def of(layer: int) -> list[LayerFigures]:
        return [store.get(prompt, layer) for prompt in prompts]

    return {
        name: torch.stack([torch.stack([getattr(f, name) for f in of(layer)]).mean(dim=0).T for layer in layers])
        for name in FIGURES
    }
