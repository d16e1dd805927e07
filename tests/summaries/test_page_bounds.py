"""Bounds of pages: what they are, and that keeping them up equals working them out from scratch."""

from __future__ import annotations

import pytest
import torch
from definitions import raised
from kept import held, keys_of
from torch import Tensor

from gossamer.summaries import Kept, PageBounds


def from_scratch(keys: Tensor, starts: list[int], size: int) -> list[Tensor]:
    """Of each row, by the definition: the largest and the smallest of each channel, page by page, rounded outward."""
    rows = []
    for row, start in zip(keys, starts, strict=True):
        pages = [row[:, first : first + size] for first in range(start, keys.shape[2], size)]
        bounds = [torch.cat([raised(page.amax(1)), -raised(-page.amin(1))], dim=-1) for page in pages]
        rows.append(torch.stack(bounds, dim=1).float())
    return rows


def assert_from_scratch(pages: Kept[Tensor], keys: Tensor, starts: list[int], size: int = 16) -> None:
    found = pages.of(held(keys, starts))
    expected = from_scratch(keys, starts, size)
    assert found.shape[2] == max(row.shape[1] for row in expected)
    for row, wanted in zip(found, expected, strict=True):
        assert torch.equal(row[:, : wanted.shape[1]].float(), wanted)


@pytest.mark.parametrize("starts", [[0, 0], [3, 3], [0, 7], [16, 1]])
@pytest.mark.parametrize("slots", [17, 48, 63])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_page_has_the_largest_and_the_smallest_of_each_channel(
    starts: list[int], slots: int, dtype: torch.dtype
) -> None:
    assert_from_scratch(PageBounds(16).begin(), keys_of(slots).to(dtype), starts)


def test_padding_is_in_no_page() -> None:
    keys = keys_of(40)
    keys[0, :, :9] = torch.nan
    assert not bool(PageBounds(8).begin().of(held(keys, [9, 0]))[0].isnan().any())


@pytest.mark.parametrize("starts", [[0, 0], [0, 6]])
def test_added_tokens_one_by_one_and_in_chunks(starts: list[int]) -> None:
    keys, pages = keys_of(400), PageBounds(16).begin()
    upto = 10
    for count in [1] * 40 + [5, 30, 16, 1, 15, 100, 1, 64, 1]:
        upto += count
        assert_from_scratch(pages, keys[:, :, :upto], starts)


@pytest.mark.parametrize("left", [0, 1, 20, 32, 33, 47])
def test_tokens_cut_off_and_others_in_their_place(left: int) -> None:
    keys, pages = keys_of(48), PageBounds(16).begin()
    pages.of(held(keys, [0, 0]))
    pages.cut(left)
    if left:
        assert_from_scratch(pages, keys[:, :, :left], [0, 0])
    assert_from_scratch(pages, torch.cat([keys[:, :, :left], keys_of(29, seed=1)], dim=2), [0, 0])


def test_tokens_cut_off_behind_different_padding() -> None:
    keys, pages = keys_of(48), PageBounds(16).begin()
    pages.of(held(keys, [0, 9]))
    pages.cut(37)
    assert_from_scratch(pages, keys[:, :, :37], [0, 9])


def test_beams_that_change_places() -> None:
    keys, pages = keys_of(50, batch=3), PageBounds(16).begin()
    starts = [0, 4, 20]
    pages.of(held(keys, starts))
    for index in ([1, 1, 2], [2, 0, 0]):
        rows = torch.tensor(index)
        keys, starts = keys[rows], [starts[row] for row in index]
        pages.take_rows(rows)
        assert_from_scratch(pages, keys, starts)
        keys = torch.cat([keys, keys_of(3, batch=3, seed=5)], dim=2)
        assert_from_scratch(pages, keys, starts)


def test_rows_whose_padding_turns_out_otherwise() -> None:
    keys, pages = keys_of(50), PageBounds(16).begin()
    pages.of(held(keys, [0, 0]))
    assert_from_scratch(pages, keys, [0, 11])


@pytest.mark.parametrize("size", [1, 16, 64])
@pytest.mark.parametrize("share", [1, 4])
def test_no_key_of_a_page_has_a_larger_logit_than_its_bound(size: int, share: int) -> None:
    keys = keys_of(130, dim=8)
    q = torch.randn(2, 2, share, 8, generator=torch.Generator().manual_seed(9))
    bounds = PageBounds(size).begin().of(held(keys, [0, 0])).float()
    both = torch.cat([q.clamp(min=0), q.clamp(max=0)], dim=-1)
    bound = both @ bounds.transpose(-1, -2)
    logits = q @ keys.transpose(-1, -2)
    for page in range(bound.shape[-1]):
        largest = logits[..., page * size : (page + 1) * size].amax(dim=-1)
        assert bool((bound[..., page] >= largest - 1e-5).all())


def test_a_page_holds_a_token() -> None:
    with pytest.raises(ValueError, match="at least 1 token, got 0"):
        PageBounds(0)
