"""Scores and choices of pages in C++ against their definitions, on every instruction set."""

from __future__ import annotations

import pytest
import torch
from cpu_checks import every_kernel, needs_kernels, poisoned, same_on_threads
from stored_calls import step
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.backends.cpu import native
from gossamer.summaries import PageBounds

pytestmark = [needs_kernels, poisoned]


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def bounds_of(call: AttentionCall, size: int) -> Tensor:
    assert call.store is not None
    return call.store.summary(PageBounds(size))


@every_kernel
@pytest.mark.parametrize(("groups", "share", "dim"), [(2, 4, 64), (1, 7, 20), (3, 1, 80), (1, 5, 128)])
def test_scores(isa: str, dtype: torch.dtype, groups: int, share: int, dim: int) -> None:
    """Odd numbers of pages and channels, and other numbers of query heads than are taken at once."""
    call = step(700, groups=groups, share=share, dim=dim, dtype=dtype)
    bounds = bounds_of(call, 16)
    found, wanted = (backend.page_scores(call, bounds, 16) for backend in (cpu, reference))
    assert torch.equal(found == -torch.inf, wanted == -torch.inf)
    live = wanted > -torch.inf
    torch.testing.assert_close(found[live], wanted[live], rtol=1e-5, atol=1e-5)


@every_kernel
def test_scores_depend_on_a_row_alone(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit: not on threads, and not on who else is in the batch."""
    call = step(4500, padding=(0, 130), dtype=dtype)
    bounds = bounds_of(call, 16)
    found = same_on_threads(lambda: cpu.page_scores(call, bounds, 16))
    extent = Extent([4499], [1], [0], [4500])
    alone = AttentionCall(call.q[:1], call.k[:1], call.k[:1], extent, store=call.store)
    assert torch.equal(cpu.page_scores(alone, bounds[:1], 16), found[:1])


def assert_chosen_alike(call: AttentionCall, scores: Tensor, size: int, count: int, heads: int) -> None:
    found, wanted = (backend.page_tokens(call, scores, size, count, heads) for backend in (cpu, reference))
    assert torch.equal(found[1], wanted[1])
    assert torch.equal(found[0], wanted[0])
    assert found[0].dtype == wanted[0].dtype == torch.int32


@every_kernel
@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(("size", "count"), [(16, 5), (16, 1), (1, 40), (64, 400), (7, 30)])
def test_choices(isa: str, dtype: torch.dtype, together: bool, size: int, count: int) -> None:
    """With sinks and recent tokens that need a part of a page, more of them than the choice has, and all pages."""
    for sinks, recent in ((0, 0), (3, 0), (20, 33), (100, 150)):
        call = step(700, dtype=dtype, sinks=sinks, recent=recent)
        scores = reference.page_scores(call, bounds_of(call, size), size)
        assert_chosen_alike(call, scores, size, count, call.groups if together else call.heads)


def test_ties_take_the_lower_page_and_what_is_no_number_is_not_read() -> None:
    call = step(700, padding=(0, 300), share=2)
    scores = reference.page_scores(call, bounds_of(call, 16), 16)
    whole = torch.where(scores == -torch.inf, scores, scores.round())
    assert int(whole.unique().numel()) < whole.numel() // 4
    assert_chosen_alike(call, whole, 16, 11, call.heads)
    for odd in (torch.nan, torch.inf, -torch.inf):
        strange = scores.clone()
        strange[0, 1, 7] = odd
        assert_chosen_alike(call, strange, 16, 11, call.heads)


@every_kernel
def test_many_pages_are_chosen_the_same_on_any_threads(isa: str, dtype: torch.dtype) -> None:
    call = step(9000, padding=(0,), dim=16, dtype=dtype)
    scores = cpu.page_scores(call, bounds_of(call, 4), 4)
    found = same_on_threads(lambda: cpu.page_tokens(call, scores, 4, 300, 2))
    assert found[1].tolist() == [[1200, 1200]]
    assert_chosen_alike(call, scores, 4, 300, 8)


def test_rows_without_a_query_read_nothing() -> None:
    call = step(64, padding=(0, 10))
    extent = Extent([63, 0], [1, 0], [0, 10], [64, 0])
    call = AttentionCall(call.q, call.k, call.k, extent, store=call.store)
    scores = torch.zeros(2, 8, 4)
    assert_chosen_alike(call, scores, 16, 2, 8)


def test_addresses_and_sizes_are_checked() -> None:
    kernels, keys = native.kernels(), torch.tensor([64])
    choice = {"heads": 2, "pages": 4, "size": 16, "keys": (keys.data_ptr(), 1), "sinks": 0, "recent": 0, "count": 1}
    with pytest.raises(ValueError, match="tokens of a page"):
        kernels.PageChoice(**choice | {"size": 0})
    scores = torch.zeros(1, 2, 4)
    room = {"query_heads": 2, "room": 16, "tokens": (0, 31), "counts": (0, 2), "threads": 1}
    with pytest.raises(ValueError, match="tokens"):
        kernels.page_tokens("portable", (scores.data_ptr(), 8), choice=kernels.PageChoice(**choice), **room)
