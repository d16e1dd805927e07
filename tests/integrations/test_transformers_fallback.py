"""Dense attention pair by pair, for what no plan describes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensorMode

from gossamer.integrations.transformers.fallback import (
    causal_pairs,
    dense_attention,
    listed_pairs,
    pairs_of_sequences,
    restricted,
)

PLAIN: dict[str, Any] = {"scale": 0.5, "sinks": None, "softcap": None, "dropout": 0.0, "position_bias": None}


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_causal_pairs_are_those_of_the_last_queries(window: int | None) -> None:
    pairs = causal_pairs(5, 8, window, torch.device("cpu"))
    assert pairs.shape == (1, 1, 5, 8)
    for i in range(5):
        for j in range(8):
            assert bool(pairs[0, 0, i, j]) == (j <= i + 3 and (window is None or i + 3 - j < window))


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("queries", [1, 2, 5])
def test_an_additive_mask_is_added_to_grouped_heads(groups: int, queries: int) -> None:
    q, k, v = torch.randn(2, 4, queries, 8), torch.randn(2, groups, 7, 8), torch.randn(2, groups, 7, 6)
    mask = torch.randn(2, 1, queries, 7)
    out = dense_attention(None, q, k, v, mask, **PLAIN)
    logits = q @ k.repeat_interleave(4 // groups, 1).transpose(-1, -2) * 0.5 + mask
    expected = logits.softmax(-1) @ v.repeat_interleave(4 // groups, 1)
    torch.testing.assert_close(out, expected.transpose(1, 2))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"dropout": 0.5}, "cannot be combined with dropout"),
        ({"position_bias": torch.zeros(1, 2, 3, 3)}, "cannot be combined with an additive mask or position bias"),
        ({"mask": torch.zeros(1, 1, 3, 3)}, "cannot be combined with an additive mask or position bias"),
    ],
)
@pytest.mark.parametrize("softening", [{"sinks": torch.zeros(2)}, {"softcap": 3.0}])
def test_what_cannot_be_combined_is_named(change: dict[str, Any], what: str, softening: dict[str, Any]) -> None:
    q = torch.randn(1, 2, 3, 4)
    given: dict[str, Any] = {"mask": None} | PLAIN | softening | change
    with pytest.raises(ValueError, match=what):
        dense_attention(nn.Module(), q, q, q, given.pop("mask"), **given)


def test_pairs_that_are_listed_or_of_one_sequence() -> None:
    listed = listed_pairs(torch.tensor([[[0, 2], [1, -1]]]), 3)
    assert listed.tolist() == [[[[True, False, True], [False, True, False]]]]
    q = torch.randn(1, 1, 3, 4)
    sequences = pairs_of_sequences(torch.tensor([0, 1, 3]), q, q)
    assert sequences.tolist() == [[[[True, False, False], [False, True, True], [False, True, True]]]]
    assert restricted(None, listed) is listed
    assert restricted(torch.ones_like(listed), listed).equal(listed)
    added = restricted(torch.zeros(1, 1, 2, 3), listed)
    assert added.equal(torch.where(listed, 0.0, torch.finfo(torch.float32).min))


def test_the_operator_says_its_shape_beforehand() -> None:
    with FakeTensorMode():
        q, k, v = torch.empty(2, 4, 9, 8), torch.empty(2, 2, 9, 8), torch.empty(2, 2, 9, 6)
        out = torch.ops.gossamer.attention(q, k, v, None, None, 0.5, None, None, True, 0, 1, "")
    assert out.shape == (2, 9, 4, 6)
