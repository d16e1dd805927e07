"""LongGen's hybrids as profiles: which layers stay full, and what the others have."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest

from gossamer.methods import AShape, Dense, LongGen
from gossamer.profiles import Profile, full_layers, hybrid_profile


@pytest.mark.parametrize(
    ("layers", "full", "placement", "expected"),
    [
        (6, Fraction(1, 3), "middle", (2, 3)),
        (32, Fraction(1, 3), "middle", tuple(range(10, 21))),
        (32, 12, "middle", tuple(range(10, 22))),
        (30, Fraction(1, 3), "middle", tuple(range(10, 20))),
        (6, 2, "first", (0, 1)),
        (6, 2, "last", (4, 5)),
        (6, 2, "interleaved", (1, 4)),
        (7, 3, "interleaved", (1, 3, 5)),
        (6, 0, "middle", ()),
        (6, 0.0, "interleaved", ()),
        (6, 1, "middle", (2,)),
        (6, 1.0, "last", (0, 1, 2, 3, 4, 5)),
        (2, Fraction(1, 10), "middle", (0,)),
    ],
)
def test_full_layers_lie_where_they_are_placed(layers, full, placement, expected) -> None:
    assert full_layers(layers, full, placement) == expected


@pytest.mark.parametrize(("full", "said"), [(7, "0 to 6"), (-1, "0 to 6"), (1.5, "a share in"), (True, "")])
def test_more_layers_than_there_are_is_refused(full, said) -> None:
    if full is True:
        assert full_layers(6, full) == (0, 1, 2, 3, 4, 5)  # a share of 1
        return
    with pytest.raises(ValueError, match=said):
        full_layers(6, full)


def test_an_unknown_placement_is_refused() -> None:
    with pytest.raises(ValueError, match="placement must be one of middle, first, last, interleaved, got 'top'"):
        full_layers(6, 2, "top")  # pyright: ignore[reportArgumentType]


def test_full_layers_are_dense_and_others_have_the_pattern(tmp_path) -> None:
    profile = hybrid_profile(4, 3, (1,), AShape(4, 64))
    assert profile.layers == ((AShape(4, 64),) * 3, (Dense(),) * 3, (AShape(4, 64),) * 3, (AShape(4, 64),) * 3)
    assert "layers 1 are full" in profile.provenance.samples
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile


@pytest.mark.parametrize(("heads", "stride"), [(4, 8), (3, 64), (8, 4), (5, 5)])
def test_offsets_spread_the_heads_over_a_stride(heads, stride) -> None:
    layer: Any = hybrid_profile(1, heads, (), LongGen(sink=0, stride=stride)).layers[0]
    reached = {(-method.offset) % stride for method in layer}
    assert len(reached) == min(heads, stride)
    assert all(0 <= method.offset < stride for method in layer)


def test_an_offset_that_is_given_stays() -> None:
    layer: Any = hybrid_profile(1, 2, (), LongGen(stride=8, offset=3)).layers[0]
    assert [method.offset for method in layer] == [3, 3]


@pytest.mark.parametrize("full", [(6,), (-1,), (1, 1)])
def test_layers_that_are_not_there_are_refused(full) -> None:
    with pytest.raises(ValueError, match="different numbers from 0 to 5"):
        hybrid_profile(6, 4, full, LongGen())
