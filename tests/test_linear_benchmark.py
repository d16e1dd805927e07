"""The benchmark of linear layers: what it replaces, counts and compares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from repository import script as loaded
from torch import nn


def model() -> Any:
    made: Any = nn.Module()
    made.block = nn.ModuleDict({"up": nn.Linear(4, 6), "down": nn.Linear(6, 4)})
    made.lm_head = nn.Linear(4, 9)
    return made


def test_all_linear_layers_but_the_head_are_replaced_and_counted(script) -> None:
    linear = script("linear")
    made = model()
    x = torch.randn(2, 4)
    expected = made.block.up(x)
    linear.plain(made)
    assert isinstance(made.lm_head, nn.Linear)
    assert {type(module) for module in made.block.values()} == {linear.Timed}
    assert torch.equal(made.block.up(x), expected)
    assert made.block.up.seconds > 0
    assert made.block.down.seconds == 0


def test_a_layer_in_another_dtype_gives_back_the_dtype_that_it_got(script) -> None:
    linear = script("linear")
    made = model()
    x = torch.randn(2, 4)
    expected = made.block.up(x)
    linear.half(torch.bfloat16)(made)
    found = made.block.up(x)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 0.05


def test_closeness_is_zero_beside_itself_and_the_divergence_otherwise(script) -> None:
    beside = script("linear").beside
    p = torch.tensor([[0.25, 0.75], [0.5, 0.5]]).log()
    assert beside(p, p + 3.0) == {"kl": pytest.approx(0, abs=1e-6), "top1": 1.0, "positions": 2}
    q = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    expected = (0.25 * torch.tensor(1 / 3).log() + 0.75 * torch.tensor(3.0).log()) / 2
    assert beside(p, q)["kl"] == pytest.approx(float(expected))
    assert beside(p, q)["top1"] == 0.5


def test_variants_have_names_that_a_list_can_hold(script) -> None:
    assert not [name for name in script("linear").VARIANTS if "," in name]


def test_tables(script) -> None:
    tables = loaded("docs/contender_tables.py")
    share = {"length": 1024, "method": "dense", "density": 1.0, "total_s": 2.0, "rounds": 3}
    share |= {"linear_share": 0.5, "attention_share": 0.3, "rest_share": 0.2}
    run = {"length": 1024, "linear_s": 1.0, "total_s": 2.0, "total_ratio": 1.0, "kl": 0.5, "top1": 0.25, "rounds": 2}
    ran = [run | {"variant": "slow", "linear_ratio": 0.5}, run | {"variant": "fast", "linear_ratio": 2.0}]
    cannot = {"length": 1024, "variant": "absent", "unavailable": "ImportError: no"}
    found = {"model": {"name": "m"}, "threads": 2, "shares": [share], "variants": [cannot, *ran]}
    assert tables.shares_table(found)[2] == [("1,024", "`dense`", "1.00", "2.00", "50%", "30%", "20%")]
    rows = tables.variants_table(found)[2]
    assert [row[1] for row in rows] == ["fast", "slow", "absent"]
    assert rows[0] == ("1,024", "fast", "1.00", "2.00", "2.00", "1.00", "0.50", "0.250", 2)
    assert tables.shares_table({}) is None
    assert tables.variants_table({}) is None
