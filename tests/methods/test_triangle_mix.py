"""TriangleMix: which layers are dense, and that the others are tri-shape's."""

from dataclasses import replace

import pytest
import torch

from gossamer import Policy, sparse_attention
from gossamer.attention import CallRecord
from gossamer.methods import TriangleMix, TriShape
from gossamer.testing import SITUATIONS, make_call


@pytest.mark.parametrize("situation", SITUATIONS)
def test_layers_are_dense_before_the_first_and_tri_shape_from_it_on(situation: str) -> None:
    call = make_call(situation, length=200, heads=4, groups=2, dim=8)
    method = TriangleMix(sink=5, window=20, last=30, block=32, first_layer=3)
    triangle = TriShape(5, 20, 30, 32).plan(call).to_mask()
    for layer in (0, 2, 3, 11):
        plan = method.plan(replace(call, layer=layer))
        assert plan.density() == 1.0 if layer < 3 else torch.equal(plan.to_mask(), triangle)
    assert TriShape(5, 20, 30, 32).plan(call).density() < 1.0


def test_a_call_without_a_layer_runs_dense_and_says_so() -> None:
    call = make_call("no padding", length=200, heads=2, groups=1, dim=8)
    records: list[CallRecord] = []
    policy = Policy(TriangleMix(8, 16, 8), min_tokens=0)
    for layer in (None, 20):
        sparse_attention(call.q, call.k, call.values, policy, layer=layer, record=records.append)
    assert [(record.path, record.reason) for record in records] == [
        ("dense", "triangle_mix needs layer"),
        ("sparse", None),
    ]


def test_defaults_are_the_published_ones() -> None:
    expected = {"sink": 8, "window": 512, "last": 128, "block": 64, "first_layer": 16}
    assert TriangleMix().to_dict() == {"method": "triangle_mix", **expected}
