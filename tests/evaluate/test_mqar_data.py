"""Sequences of associative recall: what a plain reader of them finds, and how queries lie."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.evaluate.mqar import VARIANTS, Compositional, Examples, Forgetting, Plain, Scattered, Stacked, Variant
from gossamer.evaluate.mqar.data import IGNORED

EVERY = [
    Plain(vocabulary=40, length=32, pairs=5),
    Plain(vocabulary=40, length=48, pairs=4, passes=3),
    Forgetting(vocabulary=40, length=48, pairs=5, updates=3),
    Forgetting(vocabulary=40, length=48, pairs=5, updates=0),
    Compositional(vocabulary=40, length=64, pairs=9),
    Stacked(vocabulary=40, length=10, pairs=5),
    Stacked(vocabulary=40, length=15, pairs=5, passes=2, lasting=True),
    Scattered(vocabulary=40, length=32, pairs=5),
]
every = pytest.mark.parametrize("variant", EVERY, ids=str)


def readings(variant: Variant, inputs: Tensor) -> dict[int, tuple[int, int]]:
    """Position of each query, with the value that a reader looks up from left to right, and how far back it stands."""
    tokens, held, found = inputs.tolist(), {}, {}
    if isinstance(variant, Stacked):
        for place, (key, value) in enumerate(tokens):
            if value:
                held[key] = value, place
            else:
                found[place] = held[key][0], place - held[key][1]
        return found
    if isinstance(variant, Scattered):
        for place in range(0, variant.length, 2):
            key, value = tokens[place : place + 2]
            if value:
                held[key] = value, place + 1
            elif key:
                found[place] = held[key][0], place - held[key][1]
        return found
    size = 2 if isinstance(variant, Compositional) else 1
    blocks = variant.pairs * getattr(variant, "passes", 1) + getattr(variant, "updates", 0)
    for start in range(0, blocks * (size + 1), size + 1):
        held[tuple(tokens[start : start + size])] = tokens[start + size], start + size
    for place in range(blocks * (size + 1), variant.length - size + 1):
        key = tuple(tokens[place : place + size])
        if 0 not in key:
            value, where = held[key]
            found[place + size - 1] = value, place + size - 1 - where
    return found


def asked(examples: Examples, row: int) -> dict[int, tuple[int, int]]:
    places = (examples.labels[row] != IGNORED).nonzero()[:, 0].tolist()
    return {p: (int(examples.labels[row, p]), int(examples.distances[row, p])) for p in places}


@every
def test_a_plain_reader_finds_the_labels_and_nothing_else_is_asked(variant: Variant) -> None:
    examples = variant.make(40, seed=3)
    for row in range(len(examples)):
        assert asked(examples, row) == readings(variant, examples.inputs[row])
        assert len(asked(examples, row)) == variant.pairs
    assert examples.distances[examples.labels == IGNORED].unique().tolist() == [0]


@every
def test_shapes_and_vocabulary(variant: Variant) -> None:
    examples = variant.make(7, seed=0)
    shape = (7, variant.length, 2) if variant.parts == 2 else (7, variant.length)
    assert examples.inputs.shape == shape
    assert examples.labels.shape == examples.distances.shape == shape[:2]
    assert examples.inputs.dtype == examples.labels.dtype == torch.int64
    assert 0 <= examples.inputs.min() <= examples.inputs.max() < variant.vocabulary
    assert len(variant.make(0, seed=0)) == 0


@every
def test_equal_seeds_give_equal_sequences(variant: Variant) -> None:
    first, second, other = variant.make(9, seed=5), variant.make(9, seed=5), variant.make(9, seed=6)
    assert torch.equal(first.inputs, second.inputs)
    assert torch.equal(first.labels, second.labels)
    assert not torch.equal(first.inputs, other.inputs)


def test_parts_of_a_long_draw_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.evaluate.mqar.data._ROWS", 4)
    examples = EVERY[0].make(10, seed=0)
    assert len(examples) == 10
    assert len({tuple(row) for row in examples.inputs.tolist()}) == 10


@pytest.mark.parametrize("variant", EVERY[:4], ids=str)
def test_keys_and_values_are_different_and_of_their_halves(variant: Variant) -> None:
    context = variant.make(50, seed=1).inputs[:, : 2 * variant.pairs]
    for part, (low, high) in ((context[:, ::2], (1, 20)), (context[:, 1::2], (20, 40))):
        assert all(len(set(row)) == variant.pairs for row in part.tolist())
        assert low <= part.min() <= part.max() < high
        assert set(part.flatten().tolist()) == set(range(low, high))


def test_rounds_repeat_the_pairs() -> None:
    inputs = EVERY[1].make(5, seed=0).inputs[:, :24].unflatten(1, (3, 8))
    assert torch.equal(inputs, inputs[:, :1].expand_as(inputs))


def test_keys_that_are_bound_anew_get_another_value_and_the_last_counts() -> None:
    variant = Forgetting(vocabulary=12, length=32, pairs=4, updates=4)
    examples = variant.make(200, seed=0)
    for tokens, labels in zip(examples.inputs.tolist(), examples.labels.tolist(), strict=True):
        old, new = (dict(zip(tokens[i : i + 8 : 2], tokens[i + 1 : i + 8 : 2], strict=True)) for i in (0, 8))
        assert old.keys() == new.keys()
        assert all(old[key] != new[key] for key in old)
        assert {t: v for t, v in zip(tokens, labels, strict=True) if v != IGNORED} == new


def test_neither_part_of_a_key_tells_the_value() -> None:
    variant = Compositional(vocabulary=40, length=64, pairs=9)
    triples = variant.make(30, seed=0).inputs[:, :27].unflatten(1, (9, 3))
    for row in triples.tolist():
        assert len({(a, b) for a, b, _ in row}) == 9
        assert len({a for a, *_ in row}) == len({b for _, b, _ in row}) == 3
        assert len({value for *_, value in row}) == 9
    orders = {tuple(row[:, 0].argsort(stable=True).tolist()) for row in triples}
    assert len(orders) > 1


def test_a_lasting_map_is_that_of_every_seed() -> None:
    def pairs(lasting: bool, seed: int) -> set[tuple[int, int]]:
        variant = Stacked(vocabulary=40, length=10, pairs=5, lasting=lasting)
        shown = variant.make(200, seed).inputs[:, :5].flatten(0, 1)
        return {(key, value) for key, value in shown.tolist()}

    assert len({key for key, _ in pairs(True, 0)}) == len(pairs(True, 0) | pairs(True, 1)) == 19
    assert len(pairs(False, 0)) > 100


def test_random_fillers_stand_where_zeros_stood() -> None:
    zeros, filled = (
        Plain(vocabulary=40, length=32, pairs=4, fillers=name).make(60, seed=2) for name in ("zero", "random")
    )
    # The first part of a draw is the same, so that the fillers are what differs.
    kept = zeros.inputs != 0
    assert torch.equal(zeros.inputs[kept], filled.inputs[kept])
    assert torch.equal(zeros.labels, filled.labels)
    drawn = filled.inputs[~kept]
    assert set(drawn.tolist()) == set(range(40))


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_queries_lie_by_the_power_law(power: float) -> None:
    """Slots of the key placed first, by chi-square: of 15 degrees of freedom, above 37.7 in a thousandth of draws."""
    variant, draws = Plain(vocabulary=64, length=40, pairs=4, power=power), 6000
    examples = variant.make(draws, seed=0)
    first = examples.inputs[:, :1]
    slots = ((examples.inputs[:, 8:] == first).int().argmax(1) // 2).bincount(minlength=16)
    expected = torch.arange(1, 17, dtype=torch.float64) ** (power - 1)
    expected *= draws / expected.sum()
    assert float(((slots - expected) ** 2 / expected).sum()) < 37.7
    # The test would tell the other law.
    other = torch.arange(1, 17, dtype=torch.float64) ** (0.5 - 1)
    other *= draws / other.sum()
    assert float(((slots - other) ** 2 / other).sum()) > 200


WRONG: list[tuple[type[Variant], dict[str, Any], str]] = [
    (Plain, {"length": 14, "pairs": 4}, "need a length of 16"),
    (Plain, {"length": 63}, "length must be even"),
    (Plain, {"pairs": 0}, "pairs must be 1"),
    (Plain, {"passes": 0}, "passes must be 1"),
    (Plain, {"vocabulary": 8, "pairs": 4}, "has 3 keys"),
    (Plain, {"fillers": "some"}, "fillers must be"),
    (Forgetting, {"updates": 5}, "updates must be 0 to pairs=4"),
    (Forgetting, {"vocabulary": 3, "pairs": 1, "updates": 1}, "enlarge it"),
    (Compositional, {"pairs": 5}, "must be a square"),
    (Compositional, {"vocabulary": 8, "pairs": 4}, "has 1 keys"),
    (Stacked, {"length": 10, "pairs": 4}, r"pairs \* \(passes \+ 1\) = 8"),
    (Stacked, {"length": 8, "pairs": 4, "fillers": "random"}, "has no fillers"),
    (Stacked, {"length": 8, "pairs": 4, "power": 0.5}, "has no power law, got power=0.5"),
    (Scattered, {"power": 1.0}, "has no power law"),
]


@pytest.mark.parametrize(("kind", "fields", "message"), WRONG, ids=lambda value: getattr(value, "name", str(value)))
def test_what_does_not_fit_is_refused(kind: type[Variant], fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**fields)


def test_negative_counts_are_refused_and_fields_are_told() -> None:
    with pytest.raises(ValueError, match="examples must be 0 or more"):
        Plain().make(-1, seed=0)
    assert {kind(length=8, pairs=1).to_dict()["variant"] for kind in (Plain, Compositional)} == {
        "plain",
        "compositional",
    }
    assert set(VARIANTS) == {"plain", "forgetting", "compositional", "stacked", "scattered"}


def test_scattered_pairs_and_queries_stand_anywhere() -> None:
    """Half of the places hold something, each as often, and how far apart the two of a key lie is that of any two."""
    examples = Scattered(vocabulary=64, length=32, pairs=4).make(4000, seed=0)
    asked = examples.labels != IGNORED
    held = (examples.inputs >= 32).roll(-1, 1)  # where pairs begin
    assert not bool((asked | held)[:, 1::2].any())
    share = (asked | held)[:, ::2].double().mean(0)
    torch.testing.assert_close(share, torch.full_like(share, 0.5), atol=0.04, rtol=0)
    far = (examples.distances[asked] + 1) // 2  # places between: of 16, two are d apart in 16 - d of 120 ways
    found = torch.bincount(far, minlength=16)[1:].double() / len(far)
    torch.testing.assert_close(found, (16 - torch.arange(1, 16)).double() / 120, atol=0.01, rtol=0)
