"""Which roles tokens have, and what share of each the routers of a model activate."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from gossamer.evaluate.mqar import Compositional, Forgetting, Plain, Scattered, Stacked
from gossamer.evaluate.mqar.data import IGNORED, Examples
from gossamer.evaluate.mqar.mixers import parse_mixer
from gossamer.evaluate.mqar.network import RecallModel
from gossamer.evaluate.mqar.routers import ROLES, activated, roles
from gossamer.evaluate.mqar.settings import QUICK, Cell
from gossamer.evaluate.mqar.training import train
from gossamer.modules import SeqBoatLayer

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def test_roles_by_hand() -> None:
    inputs = torch.tensor([[3, 25, 7, 31, 7, 0, 3, 0]])
    labels = torch.full((1, 8), IGNORED)
    labels[0, 4], labels[0, 6] = 31, 25
    found = roles(Plain(40, 8, 2), Examples(inputs, labels, torch.zeros_like(labels)))
    assert found is not None
    pair, query = ["key", "value"], ["query", "filler"]
    assert [ROLES[n] for n in found[0].tolist()] == pair + pair + query + query


@pytest.mark.parametrize("variant", [Plain(40, 24, 4), Scattered(40, 24, 4), Forgetting(40, 24, 4, updates=2)], ids=str)
def test_roles_are_as_many_as_the_variant_says(variant: Plain | Scattered | Forgetting) -> None:
    found = roles(variant, variant.make(5, 0))
    assert found is not None
    pairs = 4 + getattr(variant, "updates", 0)
    counts = [int(n) for n in torch.bincount(found.flatten(), minlength=4)]
    assert counts == [5 * (24 - 2 * pairs - 4), 5 * pairs, 5 * pairs, 5 * 4]


def test_roles_that_tokens_do_not_tell_are_none() -> None:
    for variant in (Plain(40, 24, 4, fillers="random"), Stacked(40, 8, 4), Compositional(40, 24, 4)):
        assert roles(variant, variant.make(2, 0)) is None


def test_shares_are_of_what_the_router_activates() -> None:
    torch.manual_seed(0)
    task = Plain(40, 24, 4)
    model = RecallModel(task, parse_mixer("seqboat(4)+seqboat_local(4)"), 8, layers=2)
    layer = model.mixers[0]
    assert isinstance(layer, SeqBoatLayer)
    with torch.no_grad():  # what is above 20 has the first channel, and the averages are off
        model.embedding.weight.zero_()
        model.embedding.weight[20:, 0] = 1.0
        model.embedding.weight[:20, 1] = 1.0
        layer.average.gamma.zero_()
        layer.average.omega.fill_(1.0)
        layer.hidden_proj.weight.zero_()
        layer.hidden_proj.weight[1, 0] = 1.0
        layer.hidden_proj.weight[0, 1] = 1.0
    assert activated(model, task, task.make(6, 0)) == [{"filler": 0.0, "key": 0.0, "value": 1.0, "query": 0.0}]


def test_a_test_goes_through_in_parts_to_the_same_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    task, sizes = Plain(40, 24, 4), []
    model = RecallModel(task, parse_mixer("seqboat(4)"), 8, layers=2)
    examples = task.make(7, 0)
    whole = activated(model, task, examples)
    monkeypatch.setattr("gossamer.evaluate.mqar.routers.TEST_BATCH", 3)

    def count(_: nn.Module, given: tuple[torch.Tensor, ...]) -> None:
        sizes.append(len(given[0]))

    model.register_forward_pre_hook(count)
    assert activated(model, task, examples) == whole
    assert sizes == [3, 3, 1]
    assert len(whole) == 2


def test_a_result_says_what_its_routers_activate() -> None:
    setting = replace(QUICK, epochs=1, examples=8, test_examples=8, batch=4)
    cell = Cell(parse_mixer("convolution(3)+seqboat(4)"), Plain(40, 16, 2), 8, 0.01, 0)
    (active,) = train(cell, setting)["active"]
    assert set(active) == set(ROLES)
    assert all(0 <= share <= 1 for share in active.values())
    assert "active" not in train(replace(cell, mixer=parse_mixer("convolution(3)+seqboat_local(4)")), setting)
