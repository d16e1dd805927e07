"""Selectors against sorted lists."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from gossamer.selectors import CsrBuilder, local_blocks, relative_to_max, top_k

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
