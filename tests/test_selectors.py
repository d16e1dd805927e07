"""Selectors against sorted lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.selectors import (
    CsrBuilder,
    local_blocks,
    relative_to_max,
    top_k,
    top_p,
    top_p_below,
    top_p_count,
    top_p_of_all_rows,
    top_p_reaching,
)

rows = st.lists(st.sampled_from([float("-inf"), -1.0, 0.0, 0.5, 1.0, 2.0, float("inf")]), min_size=1, max_size=12)


@settings(max_examples=200, deadline=None)
@given(rows, st.integers(0, 14))
def test_top_k_breaks_ties_by_the_lower_index(row: list[float], k: int) -> None:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))[:k]
    expected = {i for i in order if row[i] > float("-inf")}
    assert set(top_k(torch.tensor([row]), k)[0].nonzero().flatten().tolist()) == expected


def test_top_k_takes_a_budget_a_head() -> None:
    scores = torch.tensor([[[3.0, 2.0, 1.0], [1.0, 2.0, 3.0], [1.0, 1.0, 1.0]]])
    chosen = top_k(scores, torch.tensor([1, 2, 0]))
    assert chosen.tolist() == [[[True, False, False], [False, True, True], [False, False, False]]]


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.0, [1, 1, 1, 1]), (0.1, [1, 1, 0, 0]), (0.5, [0, 1, 0, 0]), (1.0, [0, 1, 0, 0])]
)
def test_relative_to_max(alpha: float, expected: list[int]) -> None:
    assert relative_to_max(torch.tensor([0.4, 1.0, 0.05, 0.0]), alpha).int().tolist() == expected


# Quarters, so that sums are exact: ranks of the row are 1, 3, 0, 2 (a tie of 2 and 3 goes to the lower index).
QUARTERS = torch.tensor([1.0, 2.0, 0.5, 0.5]) / 4


@pytest.mark.parametrize(
    ("p", "including", "reaching", "below"),
    [
        (0.0, [0, 0, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]),
        (0.4, [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]),
        (0.5, [0, 1, 0, 0], [0, 1, 0, 0], [0, 1, 0, 0]),
        (0.6, [1, 1, 0, 0], [1, 1, 0, 0], [0, 1, 0, 0]),
        (0.75, [1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 0, 0]),
        (0.8, [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 0, 0]),
        (1.0, [1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]),
    ],
)
def test_top_p_and_the_entry_that_crosses(p: float, including: list, reaching: list, below: list) -> None:
    assert top_p(QUARTERS, p).int().tolist() == including
    assert top_p_reaching(QUARTERS, p).int().tolist() == reaching
    assert top_p_below(QUARTERS, p).int().tolist() == below
    assert int(top_p_count(QUARTERS, p)) == sum(below) - (p < 0.5)  # no least entry


def test_top_p_reaching_keeps_nothing_where_p_is_not_reached() -> None:
    assert not bool(top_p_reaching(QUARTERS / 2, 0.6).any())
    assert top_p(QUARTERS / 2, 0.6).int().tolist() == [1, 1, 0, 0]  # p is a share of what there is


def test_top_p_reaching_keeps_nothing_of_nothing() -> None:
    assert not bool(top_p_reaching(torch.zeros(2, 3), 0.0).any())


def test_top_p_takes_a_share_a_head() -> None:
    scores = QUARTERS.expand(3, 2, 4)  # heads, rows
    chosen = top_p(scores, torch.tensor([0.0, 0.6, 1.0])[:, None])
    assert chosen.sum(-1).tolist() == [[0, 0], [2, 2], [4, 4]]
    assert top_p_count(scores, torch.tensor([0.0, 0.6, 1.0])[:, None]).tolist() == [[0, 0], [1, 1], [4, 4]]


def test_top_p_counts_forced_entries_first() -> None:
    forced = torch.tensor([False, False, False, True])  # holds 0.125
    assert top_p(QUARTERS, 0.5, forced).int().tolist() == [0, 1, 0, 1]
    assert top_p(QUARTERS, 0.1, forced).int().tolist() == [0, 0, 0, 1]
    assert top_p(QUARTERS, 0.7, forced).int().tolist() == [1, 1, 0, 1]


def test_top_p_leaves_what_holds_nothing() -> None:
    assert top_p(torch.tensor([0.5, 0.0, 0.5, 0.0]), 1.0).int().tolist() == [1, 0, 1, 0]
    assert not bool(top_p(torch.zeros(2, 3), 0.9).any())


def test_top_p_of_all_rows_shares_one_budget() -> None:
    scores = torch.tensor([[4.0, 1.0], [2.0, 1.0]])
    assert top_p_of_all_rows(scores, 0.75).int().tolist() == [[1, 0], [1, 0]]
    assert top_p_of_all_rows(scores, 0.5).int().tolist() == [[1, 0], [0, 0]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 8), min_size=1, max_size=12), st.integers(0, 8))
def test_top_p_against_a_sorted_list(row: list[int], eighths: int) -> None:
    order = sorted(range(len(row)), key=lambda i: (-row[i], i))
    expected, before = set(), 0
    for i in order:
        if 8 * before < eighths * sum(row):
            expected.add(i)
        before += row[i]
    got = top_p(torch.tensor([row]).float(), eighths / 8)[0]
    assert set(got.nonzero().flatten().tolist()) == expected


@pytest.mark.parametrize("select", [top_p, top_p_reaching, top_p_below, top_p_of_all_rows, top_p_count])
def test_top_p_outside_its_range_is_named(select) -> None:
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        select(torch.ones(1, 2, 3), 1.5)


def test_local_blocks() -> None:
    chosen = local_blocks(torch.tensor([3, 1]), torch.tensor([4, 1]), window=2, blocks=6)
    assert chosen.int().tolist() == [[0, 0, 1, 1, 1, 0], [1, 1, 0, 0, 0, 0]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1000), st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_csr_of_chunks_equals_csr_of_the_whole(seed: int, sizes: list[int]) -> None:
    mask = torch.rand(2, 3, sum(sizes), 5, generator=torch.Generator().manual_seed(seed)) < 0.4
    whole, chunked = CsrBuilder(), CsrBuilder()
    whole.add(mask)
    for part in mask.split(sizes, dim=2):
        chunked.add(part)
    for one, other in zip(whole.build(), chunked.build(), strict=True):
        assert torch.equal(one, other)
