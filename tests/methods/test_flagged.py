"""Plans from flags of a few lists at a time: the same as from all of them at once, and no tensor of all of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from prompts import prompt
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer.methods import GridLines, Method, MMInference, VerticalSlash, flagged
from gossamer.methods.flagged import FlaggedLists, parts
from gossamer.plan import SparsePlan

GRID = GridLines(stride=9, last=3)
METHODS: dict[str, Method] = {
    "grid": GRID,
    "in groups of queries": MMInference("q", (VerticalSlash(33, 128, last=20), GRID)),
    "in groups of keys too": MMInference("2d", (GRID, VerticalSlash(33, 128, last=20), GRID, GRID)),
}


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


@pytest.mark.parametrize("held", [1, 8 * 40 * 3, 8 * 40 * 7 * 2, 1 << 20])
def test_lists_are_those_of_all_flags(monkeypatch, held: int) -> None:
    """A batch row of 5 live lists of 7, one of none, and one of all."""
    monkeypatch.setattr(flagged, "HELD_BYTES", held)
    flags = torch.rand(3, 3, 7, 40) < 0.3
    flags[0, :, 5:], flags[1] = False, False
    lists = FlaggedLists(7, torch.device("cpu"))
    for row, live in enumerate((5, 0, 7)):
        for heads, part in parts(3, live, 40):
            lists.add(flags[row, heads, part], live, part)
    expected = SparsePlan.from_block_mask(flags, 7, 40, block_q=1, block_k=1)
    assert torch.equal(lists.indptr, expected.block_indptr)
    assert torch.equal(lists.indices, expected.block_indices)


def test_heads_that_list_nothing() -> None:
    lists = FlaggedLists(2, torch.device("cpu"))
    lists.add_empty(2)
    lists.add(torch.ones(1, 2, 1, dtype=torch.bool), 2, slice(0, 2))
    assert lists.indptr.tolist() == [0, 0, 0, 0, 0, 1, 2]


@pytest.mark.parametrize("name", METHODS)
def test_plans_are_those_of_all_flags(monkeypatch, name: str) -> None:
    call = prompt("t120 i150 t7 v250 t60", "i30 t200", left=5)
    found = []
    for held in (1, 64 << 20):
        monkeypatch.setattr(flagged, "HELD_BYTES", held)
        found.append(METHODS[name].plan(call))
    for list_name in ("block_indptr", "block_indices", "column_indptr", "column_indices", "q_order"):
        piecewise, whole = (getattr(plan, list_name) for plan in found)
        assert torch.equal(piecewise, whole), list_name
    assert found[0].block_indices.numel() > 0


def test_a_grid_holds_no_mask_of_all_blocks(monkeypatch) -> None:
    """Neither when its pairs are counted: at 1M tokens that of a head has 268M entries."""
    monkeypatch.setattr(flagged, "HELD_BYTES", 1 << 18)
    monkeypatch.setattr("gossamer.plan.count_permuted._BUDGET", 1 << 16)
    call = prompt("t32768", heads=4, groups=1, dim=2)
    with LargestTensor() as largest:
        plan = GridLines(stride=64, hline=False, slash=False, last=1).plan(call)
        assert int(plan.count_pairs().min()) > 0
    assert largest.elements < 4 * plan.num_query_blocks * plan.num_key_blocks // 2


def test_a_grid_inside_of_a_group_holds_no_mask_of_all_keys(monkeypatch) -> None:
    """At 1M tokens that of a head has 17G entries."""
    monkeypatch.setattr(flagged, "HELD_BYTES", 1 << 16)
    call = prompt("t1000 v3000 t96", heads=2, groups=1, dim=2)
    with LargestTensor() as largest:
        plan = MMInference("q", (GridLines(stride=50, last=1),)).plan(call)
    assert plan.column_indices.numel() > 0
    assert largest.elements < 2 * plan.num_column_groups * call.key_len // 4
