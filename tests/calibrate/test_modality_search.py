"""MMInference's search: planted heads get their boundary and their patterns, and a profile that runs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from methods.prompts import of_weights, planted_boundary, planted_grid, prompt
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import AttentionCall, Extent, backends
from gossamer.calibrate.modalities import PATTERNS, ModalitySearch, _of_row
from gossamer.integrations.stats import Observation
from gossamer.layout import ModalityLayout
from gossamer.methods import Dense, GridLines, MMInference, PerHead, VerticalSlash
from gossamer.plan import SparsePlan
from gossamer.profiles import Profile

FEW, FAR = VerticalSlash(40, 128), VerticalSlash(30, 320)
GRID = GridLines(hline=False, slash=False, max_stride=64)
TRIED = (FEW, FAR, GRID)


def observation(call: AttentionCall, layer: int = 0) -> Observation:
    dense = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    return Observation(replace(call, layer=layer), backends.attend(call, dense)[0])


def searched(*calls: AttentionCall, **given: Any) -> Profile:
    search = ModalitySearch(patterns=TRIED, **given)
    for visit in search.passes():
        for call in calls:
            visit(observation(call))
    return search.profile()


def planted_heads() -> AttentionCall:
    """A grid that repeats after 50 tokens, a K-boundary, a Q-boundary and a 2D-boundary."""
    masks = [planted_grid(800, 50, 13, None, None), *(planted_boundary(kind)[0] for kind in ("k", "q", "2d"))]
    return of_weights(torch.stack(masks), planted_boundary("q")[1])


@pytest.fixture(scope="module")
def profile() -> Profile:
    return searched(planted_heads(), budget=0.75)


def test_planted_heads_get_their_boundary_and_their_patterns(profile: Profile) -> None:
    (heads,) = profile.method.layers
    assert all(isinstance(head, MMInference) for head in heads)
    assert [head.boundary for head in heads if isinstance(head, MMInference)] == ["none", "none", "q", "2d"]
    assert heads[0] == MMInference("none", (GRID,))
    assert isinstance(heads[3], MMInference)
    assert heads[3].patterns[2] == FAR


def test_what_was_found_computes_planted_heads_exactly(profile: Profile, tmp_path: Path) -> None:
    """From the file, too; the errors and costs in it are those of the plan."""
    profile.save(tmp_path / "modalities.json")
    method = Profile.load(tmp_path / "modalities.json").method
    assert isinstance(method, PerHead)
    assert method.layers == profile.method.layers
    seen = observation(planted_heads())
    plan = method.plan(seen.call)
    torch.testing.assert_close(backends.attend(seen.call, plan)[0], seen.out, atol=1e-5, rtol=1e-4)
    assert profile.errors is not None
    assert all(error is not None and error < 1e-9 for error in profile.errors[0])
    share = plan.count_pairs()[0].double() / int(seen.call.extent.count_allowed())
    assert profile.costs is not None
    torch.testing.assert_close(
        torch.tensor(profile.costs[0]).double(), share, atol=1e-6, rtol=1e-6
    )  # rounded in the file
    assert float(share.max()) < 0.75


def test_heads_that_no_pattern_fits_stay_dense() -> None:
    call = prompt("t100 v200 t60", sharp=0.1)
    kept = searched(call, budget=0.5, limit=1e-4)
    assert all(isinstance(head, Dense) for head in kept.method.layers[0])
    assert kept.costs == ((1.0,) * 4,) or kept.costs == [[1.0] * 4]
    without = searched(call, budget=0.5)
    assert all(isinstance(head, MMInference) for head in without.method.layers[0])


def test_the_cheapest_is_taken_where_no_pattern_is_within_the_budget() -> None:
    call = prompt("t100 v200 t60")
    (heads,) = searched(call, budget=0.01).method.layers
    costs: dict[Any, Any] = {p: MMInference("none", (p,)).plan(call).count_pairs()[0] for p in TRIED}
    for number, head in enumerate(heads):
        assert isinstance(head, MMInference)
        if head.boundary == "none":
            assert int(costs[head.patterns[0]][number]) <= 1.2 * min(int(cost[number]) for cost in costs.values())


def test_calls_that_say_nothing_of_modalities_are_no_search() -> None:
    search = ModalitySearch(patterns=TRIED)
    passes = search.passes()
    visit = next(passes)
    call = prompt("t100 v100")
    visit(observation(replace(call, layout=None)))
    with pytest.raises(ValueError, match=r"needs calls of every layer from 0 on .*, got \[\]"):
        next(passes)
    visit = next(passes := ModalitySearch(patterns=TRIED).passes())
    visit(observation(call, layer=1))
    with pytest.raises(ValueError, match=r"got \[1\]"):
        next(passes)
    with pytest.raises(ValueError, match="needs calls"):
        ModalitySearch(patterns=TRIED).profile()
    with pytest.raises(ValueError, match="budget=0"):
        ModalitySearch(budget=0)


def test_the_papers_search_space_has_its_patterns() -> None:
    assert len(PATTERNS) == 3 + 9 + 12
    assert len(set(PATTERNS)) == len(PATTERNS)


def test_a_row_is_planned_by_itself_as_among_the_others() -> None:
    call = prompt("t120 i150 t7 v250 t60", "i30 t200", left=5)
    for method in (MMInference("none", (GRID,)), MMInference("q", (FEW,)), MMInference("2d", (FAR, GRID, FEW, GRID))):
        together = method.plan(call).to_mask()
        for row in range(2):
            assert torch.equal(method.plan(_of_row(call, row)).to_mask()[0], together[row]), (method, row)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_the_search_holds_one_batch_row_at_a_time() -> None:
    """What it finds of a batch is what it finds of its rows one after the other, and takes no larger tensor."""
    rows = [observation(prompt("t60 v150 t40", seed=seed)) for seed in range(3)]
    tensors = {name: torch.cat([getattr(one.call, name) for one in rows]) for name in ("q", "k", "v")}
    kinds = torch.cat([one.call.layout.kinds for one in rows if isinstance(one.call.layout, ModalityLayout)])
    extent = Extent.full(3, 250, 250)
    together = observation(AttentionCall(**tensors, extent=extent, layout=ModalityLayout(kinds)))
    searches = [ModalitySearch(patterns=TRIED, rows=16) for _ in range(2)]
    with LargestTensor() as one_by_one:
        for row in rows:
            next(searches[0].passes())(row)
    with LargestTensor() as at_once:
        next(searches[1].passes())(together)
    for found, expected in zip(searches[1]._sums[0], searches[0]._sums[0], strict=True):
        assert torch.equal(found, expected)
    assert at_once.elements <= max(one_by_one.elements, together.call.q.numel())
