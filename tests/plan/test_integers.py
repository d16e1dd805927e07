"""Integers as plans take them."""

import pytest
import torch

from gossamer.plan.integers import MOST, ceil_div, integer, integers_per_head, integers_per_row


def test_an_empty_list_holds_no_integers() -> None:
    empty = integers_per_row([], "n", None)
    assert (empty.dtype, tuple(empty.shape)) == (torch.int64, (0,))


@pytest.mark.parametrize(("a", "b", "quotient"), [(0, 4, 0), (1, 4, 1), (4, 4, 1), (5, 4, 2)])
def test_division_rounds_up(a: int, b: int, quotient: int) -> None:
    assert ceil_div(a, b) == quotient


@pytest.mark.parametrize("value", [3, MOST])
def test_the_ends_of_the_range_are_in_it(value: int) -> None:
    assert integer(value, "n", least=3) == value
    assert int(integers_per_row([value], "n", 1, least=3)) == value


def test_one_number_serves_all_heads() -> None:
    got = integers_per_head(7, "n", 3)
    assert (got.tolist(), got.dtype, got.is_contiguous()) == ([7, 7, 7], torch.int32, True)


def test_each_head_may_have_its_own() -> None:
    assert integers_per_head([1, 2, 3], "n", 3).tolist() == [1, 2, 3]


@pytest.mark.parametrize("value", [[1, 2], [[1, 2, 3]]])
def test_numbers_for_other_heads_are_an_error(value: list) -> None:
    with pytest.raises(ValueError, match=r"n must hold one integer for each of the plan's 3 heads, got shape"):
        integers_per_head(value, "n", 3)
