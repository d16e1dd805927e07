"""Metrics on cases made by hand; intervals on distributions that are known."""

from __future__ import annotations

import random

import pytest

from gossamer.evaluate.metrics import bootstrap_interval, first_number_matches, first_word_matches, string_match_all


@pytest.mark.parametrize(
    ("generated", "references", "score"),
    [
        (" 123 and 456.", ["123", "456"], 1.0),
        (" 123.", ["123", "456"], 0.5),
        (" Amber Falcon", ["amber falcon"], 1.0),
        (" amber  falcon", ["amber falcon"], 0.0),
        ("", ["1"], 0.0),
        (" 91234", ["123"], 1.0),  # contained is enough, as in RULER
    ],
)
def test_string_match_all(generated, references, score):
    assert string_match_all(generated, references) == score


def test_no_reference_is_an_error():
    with pytest.raises(ValueError, match="at least one reference"):
        string_match_all("x", [])


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" 48372.", 1.0), ("the key: 48372", 1.0), (" 483721", 0.0), (" 4837", 0.0), (" none", 0.0), (" 1, 48372", 0.0)],
)
def test_first_number(generated, right):
    assert first_number_matches(generated, ["48372"]) == right


@pytest.mark.parametrize(
    ("generated", "right"),
    [(" amber-falcon.", 1.0), (" Amber-Falcon", 1.0), (" amber", 0.0), (" the amber-falcon", 0.0)],
)
def test_first_word(generated, right):
    assert first_word_matches(generated, ["amber-falcon"]) == right


def test_interval_of_equal_values_is_a_point():
    assert bootstrap_interval([1.0] * 10) == (1.0, 1.0)
    with pytest.raises(ValueError, match="at least one value"):
        bootstrap_interval([])


def test_interval_is_deterministic_and_covers_the_mean():
    rng = random.Random(0)
    covered = 0
    for _ in range(200):
        values = [float(rng.random() < 0.7) for _ in range(40)]
        low, high = bootstrap_interval(values, draws=300)
        assert (low, high) == bootstrap_interval(values, draws=300)
        covered += low <= 0.7 <= high
    assert 180 <= covered <= 199
