"""Metrics on cases made by hand; intervals on distributions that are known."""

from __future__ import annotations

import random

import pytest

from gossamer.evaluate.metrics import (
    bootstrap_interval,
    difference_interval,
    first_number_matches,
    first_word_matches,
    pooled_interval,
    score_interval,
    string_match_all,
    wilson_interval,
)


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


def test_wilson_intervals_are_those_of_the_published_formula():
    # Newcombe, Statistics in Medicine 17:857 (1998), table I, method 3.
    for right, total, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0, 0.1611)):
        assert wilson_interval(right / total, total) == pytest.approx((low, high), abs=5e-5)
    assert wilson_interval(1.0, 1) == pytest.approx((0.2065, 1.0), abs=5e-5)
    assert wilson_interval(1.0, 29)[1] == 1.0


def test_scores_that_are_all_right_or_all_alike_have_a_width():
    assert score_interval([1.0]) == wilson_interval(1.0, 1)
    assert score_interval([1.0, 0.0, 1.0]) == wilson_interval(2 / 3, 3)
    assert score_interval([0.25] * 4) == wilson_interval(0.25, 4)
    assert score_interval([0.25, 0.5, 1.0]) == bootstrap_interval([0.25, 0.5, 1.0])
    with pytest.raises(ValueError, match="at least one value"):
        score_interval([])


def test_equal_differences_leave_room_for_as_many_others_as_the_rule_of_three_allows():
    for count in (10, 100):
        low, high = difference_interval([0.0] * count)
        assert low == -high
        assert high == pytest.approx(3 / count, rel=0.15)
        # Exactly: others that are this frequent stay unseen in one of twenty such series.
        assert (1 - high) ** count == pytest.approx(0.05)
    low, high = difference_interval([-1.0] * 10)
    assert low == pytest.approx(-1.0)
    assert high == pytest.approx(-1 + 2 * 0.2589, abs=1e-4)
    assert difference_interval([0.0, 0.0, -0.5]) == bootstrap_interval([0.0, 0.0, -0.5])


def test_pooling_takes_tasks_as_strata():
    right, wrong = [1.0] * 20, [0.0] * 20
    low, high = pooled_interval([right, wrong], score_interval)
    # Half the samples are wrong, but which half is no matter of chance.
    assert 0.4 < low < 0.45
    assert 0.55 < high < 0.6
    assert pooled_interval([right], score_interval) == score_interval(right)
    with pytest.raises(ValueError, match="at least one value"):
        pooled_interval([], score_interval)


def test_pooled_intervals_cover_the_mean():
    rng = random.Random(1)
    covered = 0
    for _ in range(300):
        groups = [[float(rng.random() < p) for _ in range(30)] for p in (0.95, 0.6, 0.2)]
        low, high = pooled_interval(groups, score_interval)
        covered += low <= (0.95 + 0.6 + 0.2) / 3 <= high
    assert 0.93 * 300 <= covered <= 0.99 * 300
