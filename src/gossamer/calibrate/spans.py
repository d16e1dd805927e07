"""MoA's budget optimisation (2406.14909, section 4.2): a span for each head, by a mixed-integer programme.

The authors solve it with Gurobi; here it is HiGHS, by ``scipy``. For each profiled length in turn the influence that is
lost there is minimised, while what is lost at the others stays below a bound that sweeps from strict to loose; what no
other choice beats at every length remains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gossamer.methods import MoA

__all__ = ["Choice", "candidates", "choose_spans", "lost_influence"]


@dataclass(frozen=True)
class Choice:
    """Spans for all heads, and the influence that they lose at each profiled length.

    Fields:
        method: with the spans.
        lost: share of the length's whole influence, by length.
        density: mean share of the keys that heads keep, by length.
    """

    method: MoA
    lost: Mapping[int, float]
    density: Mapping[int, float]


def candidates(
    lengths: Sequence[int], *, step: int = 1024, slopes: int = 9, least: int = 128
) -> list[tuple[float, float]]:
    """Lines ``(alpha, beta)`` whose span lies within ``least`` and the length, at every length.

    Alphas lie ``step`` apart, from minus the shortest length to the longest; ``slopes`` betas lie evenly in 0 to 1.
    """
    lines = [
        (float(alpha), beta / max(1, slopes - 1))
        for alpha in range(-min(lengths), max(lengths) + 1, step)
        for beta in range(slopes)
    ]
    return [(a, b) for a, b in lines if all(least <= a + b * length <= length for length in lengths)]


def lost_influence(influence: Tensor, *, first: int = 1) -> Tensor:
    """Influence that a head loses with a window of n blocks, beside ``first`` sink blocks, for each n.

    Args:
        influence: ``[layers, H, M, M]`` of one prompt from its start, as `gossamer.calibrate.influence` says.

    Returns:
        fp64 ``[layers, H, M + 1]``; 0 for the last.

    Raises:
        ValueError: not of a whole prompt.
    """
    if influence.ndim != 4 or influence.shape[2] != influence.shape[3]:
        raise ValueError(f"influence must be [layers, heads, blocks, blocks], got {tuple(influence.shape)}")
    blocks = influence.shape[-1]
    beyond = influence.double().clone()
    beyond[..., :first] = 0.0
    by_distance = torch.stack([beyond.diagonal(-d, 2, 3).sum(-1) for d in range(blocks)], dim=-1)
    # What lies n blocks before or farther.
    return torch.nn.functional.pad(by_distance.flip(-1).cumsum(-1).flip(-1), (0, 1))


def choose_spans(
    influences: Mapping[int, Tensor],
    *,
    density: float = 0.5,
    least_density: float = 0.45,
    further: Sequence[int] = (16384,),
    distinct: int = 2,
    points: int = 5,
    lines: Sequence[tuple[float, float]] | None = None,
    seconds: float = 120.0,
    **fields: Any,
) -> list[Choice]:
    """Spans that lose the least influence at a density, none of which is beaten by another at every length.

    Args:
        influences: `gossamer.calibrate.influence.mean_influence` by length in tokens, at least one.
        density, least_density: bounds of the heads' mean share of the keys, at every length, ``further`` ones too.
        distinct: different lines in one layer, at most.
        points: bounds of the sweep, for each length.
        lines: to choose from; default `candidates` of the lengths.
        seconds: for one programme; the best that was found until then counts.
        **fields: of `MoA`, such as ``sink`` and ``block``.

    Returns:
        choices, the least lost at the longest length first. Which is best says the loss on answers of a length that was
        not profiled (`gossamer.calibrate.influence.answer_loss`).

    Raises:
        ValueError: nothing to choose from, or no choice within the densities.
        ImportError: scipy is missing.
    """
    problem = _Problem.of(influences, further, lines, fields)
    bounds = dict.fromkeys([*influences, *further], (least_density, density))
    found: list[Choice] = []
    for length in influences:
        alone = problem.solve(length, bounds, distinct, {}, seconds)
        if alone is None:
            raise ValueError(
                f"no choice of {len(problem.lines)} lines keeps a density of {least_density:g} to {density:g} at "
                f"{', '.join(map(str, bounds))} tokens; widen the densities, or give other lines"
            )
        found.append(problem.choice(alone))
    best = dict(zip(influences, found, strict=True))
    for length, loosest in list(best.items()):
        for bound in _sweep(best, length, loosest, points):
            chosen = problem.solve(length, bounds, distinct, bound, seconds)
            if chosen is not None:
                found.append(problem.choice(chosen))
    kept = {choice.method: choice for choice in found if not any(_beats(other, choice) for other in found)}
    return sorted(kept.values(), key=lambda choice: choice.lost[max(influences)])


def _sweep(best: Mapping[int, Choice], length: int, loosest: Choice, points: int) -> Iterator[dict[int, float]]:
    """Bounds of what is lost at the other lengths, from the least there to what minimising at ``length`` loses."""
    others = [other for other in best if other != length]
    for point in range(points if others else 0):
        share = point / max(1, points - 1)
        yield {other: (1 - share) * best[other].lost[other] + share * loosest.lost[other] + 1e-12 for other in others}


def _beats(one: Choice, other: Choice) -> bool:
    pairs = [(one.lost[length], other.lost[length]) for length in one.lost]
    return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)


@dataclass(frozen=True, eq=False)
class _Problem:
    """What each line loses and keeps, by length: ``losses [layers, H, lines]`` as shares of all, ``kept [lines]``."""

    lines: Sequence[tuple[float, float]]
    losses: Mapping[int, Tensor]
    kept: Mapping[int, Tensor]
    fields: Mapping[str, Any]

    @classmethod
    def of(
        cls,
        influences: Mapping[int, Tensor],
        further: Sequence[int],
        lines: Sequence[tuple[float, float]] | None,
        fields: Mapping[str, Any],
    ) -> _Problem:
        lengths = [*influences, *further]
        if not influences:
            raise ValueError("choose_spans needs the influence at one length at least")
        lines = candidates(lengths) if lines is None else lines
        if not lines:
            raise ValueError(f"no line fits the lengths {', '.join(map(str, lengths))}; give lines")
        alphas, betas = zip(*lines, strict=True)
        method = MoA((alphas,), (betas,), **fields)  # each line as a head
        spans = {length: method.spans(length, 0, len(lines)) for length in lengths}
        losses = {}
        for length, influence in influences.items():
            blocks = -(-length // method.block)
            if influence.shape[-1] != blocks:
                raise ValueError(
                    f"influence of {length} tokens must have {blocks} blocks of {method.block}, got "
                    f"{influence.shape[-1]}"
                )
            lost = lost_influence(influence, first=-(-method.sink // method.block))
            window = -(-(spans[length] - method.sink).clamp(min=0) // method.block)
            whole = influence.double().sum().clamp(min=1e-300)
            losses[length] = lost[..., window.clamp(1, blocks)] / whole
        kept = {length: (span.double() / length).clamp(max=1.0) for length, span in spans.items()}
        return cls(lines, losses, kept, fields)

    def solve(
        self,
        length: int,
        densities: Mapping[int, tuple[float, float]],
        distinct: int,
        most_lost: Mapping[int, float],
        seconds: float,
    ) -> Tensor | None:
        """The line of each head, int64 ``[layers, H]``, that loses the least at a length; None where none may."""
        try:
            import numpy as np
            from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingImports]
            from scipy.sparse import coo_array, csr_array, hstack, identity, kron  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ImportError("choosing MoA's spans needs scipy: pip install scipy") from error
        layers, heads, lines = self.losses[length].shape
        # Unknowns: whether a head has a line, [layers, heads, lines]; whether a layer uses it, [layers, lines].
        has, uses = layers * heads * lines, layers * lines

        def row(weights: Any) -> Any:
            return hstack([csr_array(np.asarray(weights)[None]), csr_array((1, uses))])

        one_line = hstack([kron(identity(layers * heads), np.ones((1, lines))), csr_array((layers * heads, uses))])
        few_lines = hstack([csr_array((layers, has)), kron(identity(layers), np.ones((1, lines)))])
        user = np.repeat(np.arange(uses).reshape(layers, 1, lines), heads, axis=1).ravel()
        used = hstack([identity(has), -coo_array((np.ones(has), (np.arange(has), user)), shape=(has, uses))])
        rules = [
            LinearConstraint(one_line, 1, 1),
            LinearConstraint(few_lines, -np.inf, distinct),
            LinearConstraint(used, -np.inf, 0),
        ]
        for other, (least, most) in densities.items():
            shares = self.kept[other].numpy() / (layers * heads)
            rules.append(LinearConstraint(row(np.tile(shares, layers * heads)), least, most))
        for other, most in most_lost.items():
            rules.append(LinearConstraint(row(self.losses[other].flatten().numpy()), -np.inf, most))
        cost = np.concatenate([self.losses[length].flatten().numpy(), np.zeros(uses)])
        options = {"time_limit": seconds}
        found = milp(cost, integrality=np.ones(has + uses), bounds=Bounds(0, 1), constraints=rules, options=options)
        if found.x is None:
            return None
        return torch.from_numpy(found.x[:has].reshape(layers, heads, lines)).argmax(-1)

    def choice(self, chosen: Tensor) -> Choice:
        alphas, betas = ([[self.lines[line][part] for line in layer] for layer in chosen.tolist()] for part in (0, 1))
        lost = {length: float(all.gather(-1, chosen[..., None]).sum()) for length, all in self.losses.items()}
        density = {length: float(shares[chosen].mean()) for length, shares in self.kept.items()}
        return Choice(MoA(alphas, betas, **self.fields), lost, density)
