"""One candidate for each head, from what each costs and loses: by a budget of its own, or by one that all share.

Everything is fp64 ``[heads, candidates]``, over all layers; costs are over those of dense attention, so that a budget
is the share of dense attention that heads cost on the mean.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["choose_cheapest", "choose_fixed", "choose_global", "least_under"]

# Branches of one programme, at most: a bound on time that does not depend on the machine.
_MOST_NODES = 200_000


def choose_fixed(
    losses: Tensor, costs: Tensor, budget: float, *, nearly: float = 0.02, dense_above: float = 0.4
) -> Tensor:
    """A budget for each head alike (MInference's search, 2407.02490, section 3.2): int64 ``[heads]``.

    Of the candidates that cost at most ``budget`` a head takes the cheapest that loses at most ``nearly`` more than
    the one that loses least: of two patterns that explain a head equally well, the simpler. A head all of whose
    candidates lose more than ``dense_above``, or cost too much, takes the one that loses least at any cost: dense.
    """
    infinite = torch.full_like(losses, float("inf"))
    within = torch.where(costs <= budget * (1 + 1e-9), losses, infinite)
    best = within.amin(dim=1, keepdim=True)
    near = torch.where(within <= best + nearly, costs, infinite)
    chosen = _first_least(near, within)
    return torch.where(best[:, 0] <= dense_above, chosen, _first_least(losses, costs))


def _first_least(first: Tensor, then: Tensor) -> Tensor:
    """Index of the least of each row; of equal ones that with the least of ``then``, then the first."""
    ties = torch.where(first == first.amin(dim=1, keepdim=True), then, float("inf"))
    return ties.argmin(dim=1)


def choose_global(losses: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The least loss of all heads together whose costs are at most ``budget`` on the mean: int64 ``[heads]``.

    A multiple-choice knapsack, solved by HiGHS to a gap of 1e-9.

    Raises:
        ValueError: even the cheapest candidates cost more.
        ImportError: scipy is missing.
    """
    return _solve(losses, costs, budget, "cost")


def choose_cheapest(losses: Tensor, costs: Tensor, bound: float) -> Tensor:
    """The least cost of all heads together whose losses are at most ``bound`` on the mean: int64 ``[heads]``.

    Raises:
        ValueError: even the best candidates lose more.
        ImportError: scipy is missing.
    """
    return _solve(costs, losses, bound, "loss")


def _solve(least: Tensor, bounded: Tensor, most: float, what: str) -> Tensor:
    try:
        import numpy as np
        from scipy.optimize import Bounds, LinearConstraint, milp  # pyright: ignore[reportMissingImports]
        from scipy.sparse import csr_array  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise ImportError("sharing a budget out among heads needs scipy: pip install scipy") from error
    lowest = float(bounded.amin(dim=1).mean())
    if lowest > most * (1 + 1e-9) + 1e-12:
        raise ValueError(
            f"the candidates with the least {what} have {lowest:.4g} on the mean, more than {most:.4g}; ask for at "
            "least that, or give more candidates"
        )
    head, candidate = _unbeaten(least, bounded).nonzero(as_tuple=True)
    heads, count = least.shape[0], head.numel()
    one_each = csr_array((np.ones(count), (head.numpy(), np.arange(count))), shape=(heads, count))
    values = bounded[head, candidate].numpy() / heads
    rules = [LinearConstraint(one_each, 1, 1), LinearConstraint(values[None], -np.inf, max(most, lowest))]
    options = {"mip_rel_gap": 1e-9, "node_limit": _MOST_NODES}
    goal = least[head, candidate].numpy()
    found = milp(goal, integrality=np.ones(count), bounds=Bounds(0, 1), constraints=rules, options=options)
    if found.x is None:
        raise ValueError(f"no choice was found for a mean {what} of {most:.4g}: {found.message}")
    taken = torch.full(least.shape, -1.0, dtype=torch.float64, device="cpu")
    taken[head, candidate] = torch.from_numpy(found.x)
    return taken.argmax(dim=1)


def _unbeaten(one: Tensor, other: Tensor) -> Tensor:
    """Candidates of each head that none beats in both: bool, as they are. Of equal ones the first stays."""
    heads, count = one.shape
    keep = torch.zeros(heads, count, dtype=torch.bool, device="cpu")
    for head in range(heads):
        best = float("inf")
        pairs = zip(other[head].tolist(), one[head].tolist(), range(count), strict=True)
        for _, value, index in sorted(pairs):
            if value < best:
                best = value
                keep[head, index] = True
    return keep


def least_under(value: Callable[[float], float], bound: float, low: float, high: float, steps: int = 6) -> float:
    """By bisection, a budget between ``low`` and ``high`` whose value is at most ``bound``; ``high`` at worst.

    For values that fall as budgets grow, such as the KL of the logits from a run of the whole model at each step.
    """
    if value(low) <= bound:
        return low
    for _ in range(steps):
        middle = (low + high) / 2
        if value(middle) <= bound:
            high = middle
        else:
            low = middle
    return high
