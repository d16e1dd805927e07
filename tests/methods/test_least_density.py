"""What is known of a plan's density before it is made, which saves the making of plans that have everything."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gossamer.methods import MInference, VerticalSlash
from gossamer.testing import SITUATIONS, make_call


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("vertical", "slash"), [(9999, 64), (0, 9999), (9999, (64, 9999)), ((9999, 1), (64, 9999))])
@pytest.mark.parametrize("exact", [False, True])
def test_budgets_that_have_everything_are_known_before_planning(
    situation: str, vertical: Any, slash: Any, exact: bool
) -> None:
    call = make_call(situation, length=200, heads=2, groups=1, dim=8)
    if exact and not call.extent.causal:
        pytest.skip("the exact form is for causal attention")
    method = VerticalSlash(exact=exact)
    for name, sizes in (("vertical_size", vertical), ("slash_size", slash)):
        object.__setattr__(method, name, torch.tensor(sizes) if isinstance(sizes, tuple) else sizes)
    assert method.least_density(call) == 1
    assert method.plan(call).density() == 1


def test_what_budgets_below_everything_choose_is_known_by_planning_alone() -> None:
    for length in (129, 192, 193, 320, 600):
        call = make_call(SITUATIONS[0], length=length, heads=2, groups=1, dim=8)
        for method in (
            VerticalSlash(30, 192),
            VerticalSlash(30, 192, exact=True),
            MInference(vertical_size=30, slash_size=192),
        ):
            assert method.plan(call).density() >= method.least_density(call)
    assert VerticalSlash(30, 192).least_density(call) == 0
    assert MInference().least_density(call) == 1
    assert MInference(layers=[[VerticalSlash()] * 2]).least_density(call) == 0
