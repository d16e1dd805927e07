"""What heads of a model that reads images get: patterns by modality, and where a boundary is, by cost and recall.

search = ModalitySearch(budget=0.2)
with gossamer.enable(model, "dense") as handle:
    for visit in search.passes():
        handle.observe(visit)
        model(**inputs)
search.profile().save("modalities.json")
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.integrations.stats import Observation
from gossamer.layout import ModalityLayout
from gossamer.methods import AShape, Dense, GridLines, Method, MMInference, PerHead, VerticalSlash
from gossamer.methods.grid_lines import LINES
from gossamer.methods.mminference import BOUNDARIES, groups_of
from gossamer.methods.probed_rows import probed_rows
from gossamer.plan import SparsePlan
from gossamer.profiles import Profile

__all__ = ["PATTERNS", "ModalitySearch"]

PATTERNS: tuple[Method, ...] = (
    *(AShape(128, window) for window in (1024, 2048, 4096)),
    *(
        VerticalSlash(columns, slashes)
        for columns, slashes in (
            *((1000, 1024), (1000, 2048), (2000, 2048), (1000, 3096), (2000, 3096)),
            *((1000, 4096), (2000, 4096), (3500, 200), (1000, 2500)),
        )
    ),
    *(GridLines(frames=frames, **lines) for frames in (True, False) for lines in LINES),
)
"""The paper's search space (its Table 4)."""


class ModalitySearch:
    """MMInference's search (2504.16083, Algorithm 4), over the calls of one or several prompts.

    In a first pass every pattern is planned under every boundary, and what it keeps of the mass of some queries is
    measured: for the whole prompt, for the queries of each modality, and for each pair of modalities. Each of these
    takes the pattern that keeps the most, of those whose pairs are at most the share ``budget``; the cheapest where
    none is. In a second pass each head has its output computed under each boundary with the patterns that were found,
    and takes the boundary with the least error.

    Points left open by the paper, as decided here: the budget is a share of the dense pairs (theirs are the FLOPs of an
    A-shape of 1K + 4K tokens at an unsaid length); recall is that of ``rows`` queries of each modality, evenly apart;
    errors are mean squares of what changes in a head's output, over those of the output. Equal ones go to the boundary
    that comes first: none, Q, 2D.

    Args:
        budget: share of the pairs.
        patterns: tried.
        rows: queries of each modality by which recall is measured.
        limit: heads that lose more under all boundaries stay dense; None: none do.

    Raises:
        ValueError: no patterns, or a number out of range.
    """

    def __init__(
        self,
        budget: float = 0.2,
        patterns: Sequence[Method] = PATTERNS,
        rows: int = 64,
        limit: float | None = None,
    ) -> None:
        if not patterns or not 0 < budget <= 1 or rows < 1:
            raise ValueError(
                f"a search needs patterns, a budget above 0 and up to 1 and at least 1 row, got {len(patterns)} "
                f"patterns, budget={budget} and rows={rows}"
            )
        self.budget, self.patterns, self.rows, self.limit = budget, tuple(patterns), rows, limit
        # By layer: mass and pairs, kept by boundary and pattern [boundaries, patterns, H, 2, 2], and all [H, 2, 2].
        self._sums: dict[int, list[Tensor]] = {}
        self._found: dict[int, list[tuple[MMInference, ...]]] = {}
        self._errors: dict[int, Tensor] = {}
        self._costs: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}

    def passes(self) -> Iterator[Callable[[Observation], None]]:
        """What to observe with, in the first pass over the prompts and in the second.

        Raises:
            ValueError: after a pass that saw no call of a model that reads images.
        """
        yield self._measure
        self._check(self._sums)
        self._found = {layer: self._composed(*sums) for layer, sums in self._sums.items()}
        yield self._compare

    def profile(self) -> Profile:
        """The methods of all heads, with their errors and the share of pairs that they compute.

        Raises:
            ValueError: not both passes were made, or not over every layer.
        """
        self._check(self._errors)
        layers, errors, costs = [], [], []
        for layer in sorted(self._errors):
            error, cost = self._errors[layer] / self._calls[layer], self._costs[layer] / self._calls[layer]
            best = error.argmin(dim=0)
            chosen: list[Method] = [self._found[layer][int(n)][head] for head, n in enumerate(best)]
            least, share = error.gather(0, best[None])[0].tolist(), cost.gather(0, best[None])[0].tolist()
            for head, loss in enumerate(least):
                if self.limit is not None and loss > self.limit:
                    chosen[head], least[head], share[head] = Dense(), 0.0, 1.0
            layers.append(chosen)
            errors.append(least)
            costs.append(share)
        return Profile(layers, errors=errors, costs=costs)

    def _check(self, seen: dict[int, Tensor] | dict[int, list[Tensor]]) -> None:
        layers = sorted(seen)
        if not layers or layers != list(range(len(layers))):
            raise ValueError(
                f"a search needs calls of every layer from 0 on that say which tokens are an image's, got {layers}; "
                "observe a whole prompt with an image in each of the passes()"
            )

    def _lacks(self, observed: Observation) -> bool:
        call = observed.call
        known = isinstance(call.layout, ModalityLayout) and call.layer is not None
        return not known or call.lacks({"causal", "whole prompt"}) is not None

    def _measure(self, observed: Observation) -> None:
        call = observed.call
        if self._lacks(observed) or call.layer is None:
            return
        kept = torch.zeros(2, len(BOUNDARIES), len(self.patterns), call.heads, 2, 2, dtype=torch.float64, device="cpu")
        whole = torch.zeros(2, call.heads, 2, 2, dtype=torch.float64, device="cpu")
        for row in range(call.batch):  # the weights of one at a time
            own = _of_row(call, row)
            sample = _Sample(own, self.rows)
            whole += torch.stack([sample.by_pair(sample.mass), sample.by_pair(sample.allowed)])
            for b, boundary in enumerate(BOUNDARIES):
                for p, pattern in enumerate(self.patterns):
                    mask = sample.mask(MMInference(boundary, (pattern,)).plan(own))
                    kept[:, b, p] += torch.stack([sample.by_pair(sample.mass * mask), sample.by_pair(mask)])
        before = self._sums.get(call.layer)
        found = [*kept, *whole]
        self._sums[call.layer] = found if before is None else [x + y for x, y in zip(before, found, strict=True)]

    def _composed(
        self, mass: Tensor, pairs: Tensor, all_mass: Tensor, all_pairs: Tensor
    ) -> list[tuple[MMInference, ...]]:
        """For each boundary a method of each head."""

        def best(boundary: int, queries: Sequence[int], keys: Sequence[int]) -> list[Method]:
            part = [
                torch.stack([x[..., m, n] for m in queries for n in keys]).sum(dim=0)
                for x in (mass[boundary], pairs[boundary], all_mass, all_pairs)
            ]
            recall, cost = part[0] / part[2].clamp(min=1e-30), part[1] / part[3].clamp(min=1)
            fits = cost <= self.budget
            fits |= (cost == cost.amin(dim=0)) & ~fits.any(dim=0)
            # Of those that keep as much but for rounding the cheapest.
            most = recall.masked_fill(~fits, -1.0).amax(dim=0)
            fits &= recall >= most - 1e-6
            return [self.patterns[int(n)] for n in cost.masked_fill(~fits, float("inf")).argmin(dim=0)]

        none = [best(0, (0, 1), (0, 1))]
        of_queries = [best(1, (group,), (0, 1)) for group in (0, 1)]
        of_pairs = [best(2, (m,), (n,)) for m in (0, 1) for n in (0, 1)]
        return [
            tuple(MMInference(boundary, patterns) for patterns in zip(*chosen, strict=True))
            for boundary, chosen in zip(BOUNDARIES, (none, of_queries, of_pairs), strict=True)
        ]

    def _compare(self, observed: Observation) -> None:
        call = observed.call
        if self._lacks(observed) or call.layer not in self._found:
            return
        whole = observed.out.double().square().mean(dim=(2, 3)).clamp(min=1e-30)
        allowed = call.extent.count_allowed().double()[:, None].clamp(min=1)
        errors, costs = [], []
        for methods in self._found[call.layer]:
            plan = PerHead((methods,)).plan(replace(call, layer=0))
            changed = backends.attend(call, plan)[0].double() - observed.out.double()
            errors.append((changed.square().mean(dim=(2, 3)) / whole).mean(dim=0).cpu())
            pairs = plan.count_pairs().repeat_interleave(call.heads // plan.heads, dim=1)
            costs.append((pairs / allowed).mean(dim=0))
        layer = call.layer
        error, cost = torch.stack(errors), torch.stack(costs)
        self._errors[layer] = self._errors.get(layer, torch.zeros_like(error)) + error
        self._costs[layer] = self._costs.get(layer, torch.zeros_like(cost)) + cost
        self._calls[layer] = self._calls.get(layer, 0) + 1


def _of_row(call: AttentionCall, row: int) -> AttentionCall:
    """One batch row of a call, which is planned as it is among the others."""
    layout, rows = call.layout, slice(row, row + 1)
    assert isinstance(layout, ModalityLayout)
    return replace(
        call,
        q=call.q[rows],
        k=call.k[rows],
        v=None,
        extent=call.extent.of_rows(rows),
        layout=ModalityLayout(layout.kinds[rows], layout.strides[rows]),
        store=None,
        state=None,
        bias=None,
    )


class _Sample:
    """Some queries of a call of one batch row, of each modality evenly apart and the last one among them.

    Attributes:
        mass: of each key, fp32 ``[H, L, keys]`` on the CPU; allowed: the causal pairs, the same shape.
    """

    def __init__(self, call: AttentionCall, count: int) -> None:
        layout = call.layout
        assert isinstance(layout, ModalityLayout)
        first, keys = int(call.extent.key_start[0]), int(call.extent.key_count[0])
        self._keys = slice(first, first + keys)
        groups = groups_of(layout, 0, call)[:keys]
        positions = torch.cat([_evenly((groups == group).nonzero()[:, 0], count) for group in (0, 1)]).sort().values
        self._of_query = torch.nn.functional.one_hot(groups[positions], 2).double()
        self._of_key = torch.nn.functional.one_hot(groups, 2).float()
        self._rows, self._heads = positions - int(call.extent.query_start[0]), call.heads
        self.mass = torch.cat([weights for _, weights in probed_rows(call, 0, positions)]).cpu()
        self.allowed = (torch.arange(keys, device="cpu") <= positions[:, None]).expand_as(self.mass)

    def mask(self, plan: SparsePlan) -> Tensor:
        """What a plan computes, as `mass`."""
        mask = plan.rows_mask(self._rows)[0, :, :, self._keys].cpu()
        return mask.repeat_interleave(self._heads // plan.heads, dim=0)

    def by_pair(self, x: Tensor) -> Tensor:
        """Sums by modality of query and key, fp64 ``[H, 2, 2]``."""
        return torch.einsum("hin,im->hmn", (x.float() @ self._of_key).double(), self._of_query)


def _evenly(positions: Tensor, count: int) -> Tensor:
    return positions.flip(0)[:: max(1, len(positions) // count)][:count]
