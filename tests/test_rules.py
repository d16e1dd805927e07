"""Selection rules against sorted lists: of equal scores the lower index comes first."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer.rules import (
    AtLeast,
    Besides,
    Candidates,
    Either,
    PerHead,
    RelativeToMax,
    Rule,
    TopK,
    TopKOfRows,
    TopP,
    TopPBelow,
    TopPInTiers,
    TopPOfAllRows,
    TopPReaching,
    count_top_p,
    per_head,
    shares,
    top_k,
)

# Whole numbers and eighths, so that sums and thresholds are exact, and many are equal.
rows = st.lists(st.integers(0, 8), min_size=1, max_size=10)
eighths = st.integers(0, 8)
given_often = settings(max_examples=200, deadline=None)


def select(rule: Rule, row: list[float], forced: set[int] | None = None) -> set[int]:
    """What a rule chooses of a single row."""
    mask = torch.tensor([i in (forced or ()) for i in range(len(row))])
    return members(rule.select(torch.tensor(row, dtype=torch.float32).view(1, 1, 1, -1), mask))


def members(chosen: Tensor) -> set[int]:
    assert chosen.dtype == torch.bool
    return set(chosen.flatten().nonzero().flatten().tolist())


def best_first(row: list[float]) -> list[int]:
    return sorted(range(len(row)), key=lambda i: (-row[i], i))


def while_running(row: list[float], order: list[int], keeps: Callable[[float, float], bool]) -> set[int]:
    """Candidates in an order, as long as the sums before and up to them pass."""
    chosen, before = set(), 0.0
    for i in order:
        if not keeps(before, before + row[i]):
            break
        chosen.add(i)
        before += row[i]
    return chosen


@given_often
@given(rows, eighths)
def test_relative_to_max_keeps_what_reaches_the_share_of_the_largest(row: list[float], alpha: int) -> None:
    expected = {i for i, score in enumerate(row) if 8 * score >= alpha * max(row) and (score > 0 or alpha == 0)}
    assert select(RelativeToMax(alpha / 8), row) == expected


@given_often
@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, math.inf]), min_size=1), st.sampled_from([-math.inf, 0.5]))
def test_at_least_takes_what_reaches_the_bar(row: list[float], bar: float) -> None:
    assert select(AtLeast(bar), row) == {i for i, score in enumerate(row) if score >= bar and score > -math.inf}


@given_often
@given(st.lists(st.sampled_from([-math.inf, -1.0, 0.0, 0.5, 1.0, math.inf]), min_size=1), st.integers(-1, 14))
def test_top_k_takes_the_best(row: list[float], count: int) -> None:
    expected = {i for i in best_first(row)[: max(0, count)] if row[i] > -math.inf}
    assert select(TopK(count), row) == expected
    assert members(top_k(torch.tensor(row), count)) == expected


@given_often
@given(rows, eighths)
def test_top_p_takes_what_stands_before_its_share_is_held(row: list[float], p: int) -> None:
    expected = while_running(row, best_first(row), lambda before, _: 8 * before < p * sum(row))
    assert select(TopP(p / 8), row) == expected


@given_often
@given(rows, eighths, st.sets(st.integers(0, 9)))
def test_top_p_counts_forced_candidates_first(row: list[float], p: int, drawn: set[int]) -> None:
    forced = {i for i in drawn if i < len(row)}
    held = sum(row[i] for i in forced)
    rest = [i for i in best_first(row) if i not in forced]
    expected = while_running(row, rest, lambda before, _: 8 * (held + before) < p * sum(row))
    assert select(TopP(p / 8, forced_first=True), row, forced) | forced == expected | forced


@given_often
@given(rows, eighths, st.sets(st.integers(0, 9)))
def test_top_p_takes_no_notice_of_forced_candidates_unless_told(row: list[float], p: int, drawn: set[int]) -> None:
    assert select(TopP(p / 8), row, drawn) == select(TopP(p / 8), row)


@given_often
@given(rows, eighths)
def test_top_p_reaching_ends_with_the_candidate_that_reaches_p(row: list[float], p: int) -> None:
    scores = [score / 8 for score in row]
    expected = while_running(scores, best_first(row), lambda before, _: before < p / 8 or before == 0)
    reached = sum(row) >= p and sum(row) > 0
    assert select(TopPReaching(p / 8), scores) == (expected if reached else set())


@given_often
@given(rows, eighths)
def test_top_p_below_ends_before_the_candidate_that_crosses_p(row: list[float], p: int) -> None:
    order = best_first(row)
    within = while_running(row, order, lambda _, up_to: 8 * up_to <= p * sum(row))
    assert select(TopPBelow(p / 8), row) == within | {order[0]}
    assert int(count_top_p(torch.tensor(row).float().view(1, 1, 1, -1), p / 8)) == len(within)


@given_often
@given(st.lists(st.tuples(*[st.integers(0, 8)] * 3), min_size=1, max_size=4), eighths)
def test_top_p_of_all_rows_spends_one_budget_on_them(table: list[tuple[int, ...]], p: int) -> None:
    flat: list[float] = [score for row in table for score in row]
    expected = while_running(flat, best_first(flat), lambda _, up_to: 8 * up_to <= p * sum(flat))
    scores = torch.tensor(table, dtype=torch.float32)[None, None]
    chosen = TopPOfAllRows(p / 8).select(scores, torch.zeros(1, dtype=torch.bool))
    assert chosen.shape == scores.shape
    assert members(chosen) == expected


def test_only_top_p_of_all_rows_needs_them() -> None:
    assert [rule.all_rows for rule in (TopPOfAllRows, TopP, TopPBelow, TopPReaching, TopK, RelativeToMax)] == [
        True,
        *[False] * 5,
    ]


def test_rules_by_order_and_by_a_bar_take_minus_infinity_for_what_is_not_seen() -> None:
    assert AtLeast.unseen == -math.inf
    assert [rule.unseen for rule in (TopK, TopP, TopPBelow, TopPReaching, TopPOfAllRows, RelativeToMax)] == [
        -math.inf,
        *[0.0] * 5,
    ]


# Batches, heads and rows

BY_HEAD: list[tuple[Callable[[Any], Rule], list[float]]] = [
    (AtLeast, [0.0, 0.5, math.inf]),
    (TopK, [0, 2, 5]),
    (TopP, [0.0, 0.5, 1.0]),
    (lambda p: TopP(p, forced_first=True), [0.25, 0.5, 1.0]),
    (TopPReaching, [0.1, 1.0, 3.0 / 8]),
    (TopPBelow, [0.0, 0.5, 1.0]),
    (TopPOfAllRows, [0.0, 0.5, 1.0]),
]


@pytest.mark.parametrize("kind", [list, tuple, torch.tensor])
@pytest.mark.parametrize(("make", "values"), BY_HEAD)
def test_each_head_has_its_own_value(make: Callable[[Any], Rule], values: list[float], kind: Callable) -> None:
    scores = torch.rand(2, 3, 4, 5, generator=torch.Generator().manual_seed(0))
    forced = torch.tensor([False, True, False, False, False])
    together = make(kind(values)).select(scores, forced)
    for h, value in enumerate(values):
        assert torch.equal(together[:, h], make(value).select(scores[:, h : h + 1], forced)[:, 0])


@pytest.mark.parametrize(
    "rule", [RelativeToMax(0.5), TopK(2), TopP(0.5), TopP(0.5, True), TopPReaching(0.7), TopPBelow(0.8)]
)
def test_each_row_is_chosen_by_itself(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(2, 3, 4, 5, generator=generator)
    forced = torch.rand(2, 1, 4, 5, generator=generator) < 0.2
    together = rule.select(scores, forced)
    for b, h, m in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
        alone = rule.select(scores[b, h, m].view(1, 1, 1, -1), forced[b, 0, m])
        assert torch.equal(together[b, h, m], alone.flatten())


def test_budgets_of_top_k_may_differ_between_rows() -> None:
    scores = torch.tensor([[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]])
    chosen = top_k(scores, torch.tensor([1, 2, 0]))
    assert chosen.int().tolist() == [[1, 0, 0], [0, 1, 1], [0, 0, 0]]


def test_budgets_of_no_rows_choose_nothing() -> None:
    assert top_k(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64)).shape == (0, 3)


def test_counts_of_top_p_are_by_head() -> None:
    scores = torch.tensor([4.0, 2.0, 1.0, 1.0]).expand(2, 3, 5, 4)
    assert count_top_p(scores, [0.0, 0.75, 1.0])[1].tolist() == [[0] * 5, [2] * 5, [4] * 5]


def test_sums_of_many_small_scores_are_exact() -> None:
    """In fp32 a sum of 2^24 and ones stays where it is."""
    row = torch.ones(1, 1, 1, 1001)
    row[..., 0] = 1 << 24
    assert int(TopP(1.0).select(row, torch.zeros(1, dtype=torch.bool)).sum()) == 1001
    assert int(count_top_p(row, ((1 << 24) + 500) / ((1 << 24) + 1000))) == 501


@pytest.mark.parametrize(
    "rule", [RelativeToMax(0.5), TopK(2), TopP(0.5), TopP(0.5, True), TopPReaching(0.0), TopPBelow(0.5)]
)
def test_of_nothing_nothing_is_chosen(rule: Rule) -> None:
    scores = torch.zeros(2, 3, 4, 0)
    assert rule.select(scores, torch.zeros(0, dtype=torch.bool)).shape == scores.shape


def test_of_no_rows_nothing_is_chosen() -> None:
    scores = torch.zeros(2, 3, 0, 5)
    assert TopPOfAllRows(0.5).select(scores, torch.zeros(5, dtype=torch.bool)).shape == scores.shape


# Values


@pytest.mark.parametrize("value", [2, [2, 2], (2, 2), torch.tensor(2), torch.tensor([2, 2])])
def test_a_value_serves_every_head(value: PerHead) -> None:
    got = per_head(value, 2, torch.int64, "cpu")
    assert (got.tolist(), got.dtype) == ([2, 2], torch.int64)


@pytest.mark.parametrize("value", [[1, 2, 3], [[1, 2]], []])
def test_values_for_other_heads_are_named(value: list) -> None:
    with pytest.raises(ValueError, match=r"one number, or one for each of 2 heads, got \("):
        per_head(value, 2, torch.int64, "cpu")


def test_shares_are_doubles() -> None:
    assert shares(0.9, 2, "cpu").tolist() == [0.9, 0.9]


@pytest.mark.parametrize(("p", "wrong"), [(1.5, "1.5"), (-0.1, "-0.1"), ([0.5, 2.0], "2.0"), (math.nan, "nan")])
@pytest.mark.parametrize("rule", [TopP, TopPReaching, TopPBelow, TopPOfAllRows])
def test_a_share_outside_zero_and_one_is_named(rule: Callable[[Any], Rule], p: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=rf"p must lie in \[0, 1\], got {wrong}"):
        rule(p).select(torch.ones(1, 2, 3, 4), torch.zeros(1, dtype=torch.bool))


def test_a_count_by_a_share_outside_zero_and_one_is_named() -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        count_top_p(torch.ones(1, 2, 3, 4), 1.5)


@pytest.mark.parametrize("rule", [AtLeast, RelativeToMax, TopK, TopP, TopPReaching, TopPBelow, TopPOfAllRows])
def test_a_rule_is_itself_alone(rule: Callable[[Any], Rule]) -> None:
    """Values by head may be lists and tensors, which neither hash nor compare to one truth."""
    one, other = rule([0, 1]), rule(torch.tensor([0, 1]))
    assert len({one, other, rule([0, 1])}) == 3


def test_candidates_are_themselves_alone() -> None:
    seen = torch.zeros(1, 2, 2, dtype=torch.int64)
    assert Candidates(seen, seen) != Candidates(seen, seen)
    assert Candidates(seen, seen).first == 0


@given_often
@given(rows, eighths, st.sets(st.integers(0, 9)), st.sets(st.integers(0, 9)))
def test_top_p_in_tiers_counts_forced_candidates_and_then_early_ones(
    row: list[float], p: int, drawn: set[int], soon: set[int]
) -> None:
    forced, early = ({i for i in some if i < len(row)} for some in (drawn, soon))
    order = sorted(range(len(row)), key=lambda i: (i not in forced, i not in forced | early, -row[i], i))
    expected = while_running(row, order, lambda before, _: 8 * before < p * sum(row) or p == 8)
    mask = torch.tensor([i in early for i in range(len(row))]).view(1, 1, 1, -1)
    assert select(TopPInTiers(p / 8, mask), row, forced) == expected


def test_top_k_of_rows_has_a_number_for_each_row() -> None:
    scores = torch.tensor([[[[3.0, 1.0, 2.0], [1.0, 1.0, -math.inf]], [[0.0, 5.0, 4.0], [2.0, 2.0, 2.0]]]])
    counts = torch.tensor([[[2, 3], [1, 0]]])
    chosen = TopKOfRows(counts).select(scores, torch.zeros(1, dtype=torch.bool))
    assert [members(chosen[0, h, m]) for h in range(2) for m in range(2)] == [{0, 2}, {0, 1}, {1}, set()]
    of_all_heads = TopKOfRows(counts[:, :1]).select(scores, torch.zeros(1, dtype=torch.bool))
    assert [members(of_all_heads[0, 1, m]) for m in range(2)] == [{1, 2}, {0, 1, 2}]


@given_often
@given(rows, eighths, st.sets(st.integers(0, 9)))
def test_besides_adds_to_a_rule_what_is_taken_anyway(row: list[float], p: int, drawn: set[int]) -> None:
    taken = {i for i in drawn if i < len(row)}
    mask = torch.tensor([i in taken for i in range(len(row))]).view(1, 1, 1, -1)
    for rule in (TopP(p / 8), TopK(p)):
        joined = Besides(rule, mask)
        assert joined.unseen == rule.unseen
        assert select(joined, row) == select(rule, row) | taken


@given_often
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=9), eighths, eighths)
def test_either_takes_what_one_of_two_rules_takes_by_scores_of_its_own(
    pairs: list[tuple[int, int]], p: int, q: int
) -> None:
    row, other = ([float(pair[n]) for pair in pairs] for n in range(2))
    joined = Either(TopP(p / 8), TopP(q / 8), torch.tensor(other).view(1, 1, 1, -1))
    assert joined.unseen == 0.0
    assert select(joined, row) == select(TopP(p / 8), row) | select(TopP(q / 8), other)


def test_joined_rules_refuse_one_for_all_rows() -> None:
    nothing, of_all = torch.zeros(1, dtype=torch.bool), TopPOfAllRows(0.5)
    for make in (
        lambda: Besides(of_all, nothing),
        lambda: Either(of_all, TopP(0.5), nothing),
        lambda: Either(TopP(0.5), of_all, nothing),
    ):
        with pytest.raises(ValueError, match="TopPOfAllRows needs all rows at once"):
            make()
