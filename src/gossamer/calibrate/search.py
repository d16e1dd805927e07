"""The search of a profile: measure every candidate on every head of a dense run, choose, and say how the choice holds.

    found = measure(subject, samples, candidates(), Pairs(), Store(None, {}))
    methods = found.methods(found.choose("global", 0.3))

A prompt is read once, with dense attention, and each layer is looked at as it comes by, a few heads at a time: in
memory lie the model, one layer's tensors, and figures of some bytes a head (`gossamer.calibrate.figures`). The choice
is made by their means over the prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from gossamer.calibrate.choice import choose_cheapest, choose_fixed, choose_global
from gossamer.calibrate.figures import FIGURES, LayerFigures, measure_layer
from gossamer.calibrate.prices import Price
from gossamer.calibrate.samples import Sample, Samples
from gossamer.calibrate.store import Store
from gossamer.evaluate.metrics import bootstrap_interval
from gossamer.evaluate.subject import Subject
from gossamer.integrations.transformers import Observation
from gossamer.methods import Dense, Method
from gossamer.policy import Policy

__all__ = ["OBJECTIVES", "Found", "Mode", "measure"]

Mode = Literal["fixed", "global", "cheapest"]
Figures = dict[str, Tensor]
"""Of `FIGURES`, each ``[layers, H, candidates]``, or of each prompt ``[prompts, layers, H, candidates]``."""

# What is minimised, from the figures of a candidate.
OBJECTIVES: dict[str, Callable[[Figures], Tensor]] = {
    "asked": lambda figures: (figures["error"] + figures["last_error"]) / 2,
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
        of_prompts, of_held_out: of each prompt that chooses, and of each other; of_held_out is None without any.
        objective: one of `OBJECTIVES`; ``asked`` counts the last queries, where a prompt asks, as much as all together.
        weights: what an error counts, by layer and head, ``[layers, H]``; None: all alike.
        depth: layers of the model; None: none after the last that was looked at.
    """

    candidates: Sequence[Method]
    layers: Sequence[int]
    of_prompts: Figures
    of_held_out: Figures | None = None
    objective: str = "asked"
    weights: Tensor | None = field(default=None)
    depth: int | None = None

    @cached_property
    def calibration(self) -> Figures:
        """Means over the prompts that choose."""
        return _over_prompts(self.of_prompts)

    @cached_property
    def held_out(self) -> Figures | None:
        """Means over the prompts that were held out, if any were."""
        return None if self.of_held_out is None else _over_prompts(self.of_held_out)

    def losses(self, figures: Figures) -> Tensor:
        """What is minimised, in the shape of the figures."""
        losses = OBJECTIVES[self.objective](figures)
        return losses if self.weights is None else losses * self.weights.double()[..., None]

    def choose(self, mode: Mode, at: float, **rules: float) -> Tensor:
        """A candidate for each head, int64 ``[layers, H]``.

        Args:
            at: the budget as a share of dense attention; for ``cheapest`` the mean loss that is accepted.
            rules: of `choose_fixed`.

        Raises:
            ValueError: no choice is as cheap, or as good.
        """
        losses, costs = (x.flatten(0, 1) for x in (self.losses(self.calibration), self.calibration["cost"]))
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
            for layer in range(self.depth or max(self.layers) + 1)
        )

    def of_choice(self, chosen: Tensor, *, held_out: bool = False) -> dict[str, Tensor]:
        """Of `FIGURES` and ``loss``, means over the prompts by layer and head, ``[layers, H]``."""
        figures = self.held_out if held_out else self.calibration
        if figures is None:
            raise ValueError("no samples were held out")
        return self._taken(figures, chosen)

    def _taken(self, figures: Figures, chosen: Tensor) -> dict[str, Tensor]:
        tables = figures | {"loss": self.losses(figures)}
        return {n: t.gather(-1, chosen.expand(t.shape[:-1])[..., None])[..., 0] for n, t in tables.items()}

    def summary(self, chosen: Tensor) -> dict[str, dict[str, Any]]:
        """Means over the heads, on the calibration's prompts and on those that were held out.

        Returns:
            by ``calibration`` and ``held_out``: each of `FIGURES` and ``loss``; ``prompts``, their number; and
            ``intervals``, 95% intervals of the means over the prompts (`bootstrap_interval`) where there are several.
        """
        parts = {"calibration": self.of_prompts, "held_out": self.of_held_out}
        return {part: self._summed(figures, chosen) for part, figures in parts.items() if figures is not None}

    def _summed(self, figures: Figures, chosen: Tensor) -> dict[str, Any]:
        means = self._taken(_over_prompts(figures), chosen)
        each = {name: t.mean(dim=(1, 2)).tolist() for name, t in self._taken(figures, chosen).items()}
        count = len(each["error"])
        intervals = {name: list(bootstrap_interval(values)) for name, values in each.items()} if count > 1 else {}
        return {name: float(t.mean()) for name, t in means.items()} | {"prompts": count, "intervals": intervals}


def _over_prompts(figures: Figures) -> Figures:
    return {name: table.mean(dim=0) for name, table in figures.items()}


def measure(
    subject: Subject,
    samples: Samples,
    methods: Sequence[Method],
    price: Price,
    store: Store,
    *,
    groups: int = 1,
    objective: str = "asked",
    weights: Tensor | None = None,
    progress: Callable[[Sample, int], None] = lambda sample, layer: None,
) -> Found:
    """Measure what the store lacks.

    Args:
        groups: key/value heads that are looked at together.
        weights: as `Found.weights`, but of all the model's layers.
        progress: called for each layer of each sample that the store lacked, when it is measured.

    Raises:
        ValueError: a prompt cannot be made, the model's attention not be observed or has NaN, or an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise ValueError(f"unknown objective {objective!r}; known: {', '.join(OBJECTIVES)}")
    layers: set[int] = set()
    for sample in samples.listed:
        layers |= _read(subject, samples, sample, methods, price, store, groups, progress)
    if not layers:
        raise ValueError(f"{type(subject.model).__name__} made no attention call that can be looked at")
    order = sorted(layers)
    keys = {out: [sample.key for sample in samples.listed if sample.held_out == out] for out in (False, True)}
    chosen_by, held_out = (_stacked(store, keys[out], order) if keys[out] else None for out in (False, True))
    assert chosen_by is not None
    depth = int(subject.config.num_hidden_layers)
    weights = None if weights is None else weights[order]
    return Found(methods, order, chosen_by, held_out, objective, weights, depth)


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
        return done

    def visit(observed: Observation) -> None:
        call = observed.call
        if call.layer is None or call.layer in done:
            return
        figures = measure_layer(call, observed.out, methods, price, groups=groups)
        _check_finite(figures, call.layer, f"{samples.name(sample.source)} at {sample.length} tokens")
        store.add(sample.key, call.layer, figures)
        done.add(call.layer)
        progress(sample, call.layer)

    subject.hidden_states(samples.tokens(sample), Policy.of("dense"), visit)
    return done


def _check_finite(figures: LayerFigures, layer: int, prompt: str) -> None:
    for name in FIGURES:
        wrong = ~getattr(figures, name).isfinite().all(dim=0)
        if wrong.any():
            raise ValueError(
                f"layer {layer}, head {int(wrong.nonzero()[0])}: the {name} on {prompt} is no finite number, since "
                "the attention's numbers are none; look for NaN in the model, or try another dtype"
            )


def _stacked(store: Store, prompts: Sequence[str], layers: Sequence[int]) -> Figures:
    """Of each prompt, in their order, so that an interrupted search ends with the same bits."""
    found = [[store.get(prompt, layer) for layer in layers] for prompt in prompts]
    return {
        name: torch.stack([torch.stack([getattr(of_layer, name).T for of_layer in row]) for row in found])
        for name in FIGURES
    }
