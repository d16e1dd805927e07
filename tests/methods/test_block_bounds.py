"""Bounds of choices by block: each by its definition, on a call without text and on one with."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from clips import PATCHES, clip, text_of_blocks, weights

from gossamer import Extent, methods
from gossamer.call import AttentionCall
from gossamer.layout import TokenLayout
from gossamer.methods.base import Method

BLOCK = 16
NUMBER = PATCHES // BLOCK


def bound(name: str, **fields: Any) -> Method:
    return methods.create(f"{name}_blocks", **{"density": 0.25, "block": BLOCK} | fields)


def chosen(method: Method, call: AttentionCall) -> torch.Tensor:
    """Bool ``[B, H, M, N]``."""
    mask = method.plan(call).block_mask()
    return mask.repeat_interleave(call.heads // mask.shape[1], dim=1)


def plain() -> AttentionCall:
    return clip(before=(0, 0), after=(0, 0), dead=0)


def test_the_oracle_has_the_most_mass_of_all_choices_of_as_many_blocks() -> None:
    call = plain()
    mass = weights(call).unflatten(3, (NUMBER, BLOCK)).unflatten(2, (NUMBER, BLOCK)).sum(dim=(3, 5))
    own = torch.eye(NUMBER, dtype=torch.bool)
    count = -(-NUMBER * NUMBER // 4)
    found = chosen(bound("oracle"), call)
    assert found.sum(dim=(2, 3)).eq(count).all()
    assert found[:, :, own].all()
    worth = mass.masked_fill(own, float("inf")).flatten(2)
    last = worth.sort(dim=2, descending=True).values[:, :, count - 1]
    assert torch.equal(found.flatten(2), worth >= last[:, :, None])


def test_a_window_has_as_many_blocks_at_the_ends() -> None:
    found = chosen(bound("window"), plain())[0, 0]
    assert NUMBER == 12
    assert [row.nonzero()[:, 0].tolist() for row in found[[0, 1, 5, 11]]] == [
        [0, 1, 2],
        [0, 1, 2],
        [4, 5, 6],
        [9, 10, 11],
    ]
    even = chosen(bound("window", density=1 / 3), plain())[0, 0]
    assert even[5].nonzero()[:, 0].tolist() == [3, 4, 5, 6]  # of two that are as near, the first


def test_random_blocks_differ_by_head_layer_and_seed() -> None:
    first = chosen(bound("random"), plain())
    assert first.sum(dim=3).eq(3).all()
    assert first.diagonal(dim1=2, dim2=3).all()
    assert torch.equal(first[0], first[1])
    assert not torch.equal(first[:, 0], first[:, 1])
    others = (
        chosen(bound("random", seed=1), plain()),
        chosen(bound("random"), clip(before=(0, 0), after=(0, 0), dead=0, layer=1)),
    )
    assert not any(torch.equal(first, other) for other in others)
    assert torch.equal(first, chosen(bound("random"), plain()))


@pytest.mark.parametrize("name", ["oracle", "window", "random"])
def test_text_lies_outside_of_the_share(name: str) -> None:
    call = clip()
    found = chosen(bound(name), call)
    for row in range(2):
        rows, columns = (torch.tensor(x) for x in text_of_blocks(call, row, BLOCK))
        free = ~rows[:, None] & ~columns
        inside = found[row][:, : len(rows), : len(columns)]
        assert inside[:, ~free].all()
        whole = free.sum()
        each = free.sum(dim=1)
        counts = (inside & free).sum(dim=2)
        if name == "oracle":
            assert counts.sum(dim=1).eq((whole + 3) // 4).all()
        else:
            assert counts.eq((each + 3) // 4).all()


@pytest.mark.parametrize("name", ["oracle", "window", "random"])
def test_where_there_are_no_patches_all_tokens_are_alike(name: str) -> None:
    given: dict[str, Any] = {"layout": TokenLayout((9, 9)), "extent": Extent.full(2, 96, 96, causal=False)}
    call = clip(before=(0, 0), after=(0, 0), dead=0)
    q, k, v = (x[:, :, :96] for x in (call.q, call.k, call.values))
    words = AttentionCall(q, k, v, layer=0, step=call.step, state=[{}, {}], **given)
    assert chosen(bound(name), words).sum(dim=(2, 3)).eq(9 if name == "oracle" else 12).all()


@pytest.mark.parametrize(
    ("fields", "message"),
    [({"density": 1.5}, r"density must lie in \[0, 1\]"), ({"block": 0}, "block must be at least 1")],
)
def test_fields_are_checked(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bound("window", **fields)
