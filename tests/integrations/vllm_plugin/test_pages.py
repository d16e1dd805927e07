"""Caches written by hand as the table in `pages` says, and read back. Needs no vLLM."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer.integrations.vllm.pages import LAYOUTS, read, verify

GROUPS, PAGE, DIM = 2, 32, 16
SHAPE = (3, GROUPS, PAGE, 2 * DIM)


def place(isa: str, half: str, token: int, channel: int, page: int, dim: int) -> int:
    """Where a number stands in its half of a page, written out."""
    if isa == "amx" and half == "K":  # [page/16, D/2, 16, 2]
        return ((token // 16 * (dim // 2) + channel // 2) * 16 + token % 16) * 2 + channel % 2
    if isa == "amx":  # [D/16, page/2, 16, 2]
        return ((channel // 16 * (page // 2) + token // 2) * 16 + channel % 16) * 2 + token % 2
    return channel * page + token if half == "K" else token * dim + channel


def writer(isa: str) -> Callable[[Tensor, Tensor, Tensor, Tensor], None]:
    """Puts keys and values ``[tokens, G, D]`` at slots of a cache, a number at a time."""

    def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
        _, groups, page, both = cache.shape
        dim = both // 2
        at: list[list[int]] = [[], []]
        for slot in slots.tolist():
            for group in range(groups):
                for channel in range(dim):
                    for half, name in enumerate("KV"):
                        head = (slot // page * groups + group) * page * both
                        inside = place(isa, name, slot % page, channel, page, dim)
                        at[half].append(head + half * page * dim + inside)
        for half, rows in enumerate((keys, values)):
            cache.view(-1)[torch.tensor(at[half])] = rows.reshape(-1)

    return write


def sequence(tokens: int, dim: int = DIM, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    keys, values = (torch.randn(tokens, GROUPS, dim, generator=generator).to(dtype) for _ in range(2))
    return keys, values


def written(isa: str, tokens: int, page: int = PAGE, dim: int = DIM) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A cache of NaN with one sequence in the pages of a table, in no order; with what was written."""
    keys, values = sequence(tokens, dim)
    table = torch.tensor([6, 1, 4, 0, 5], dtype=torch.int32)
    cache = torch.full((8, GROUPS, page, 2 * dim), torch.nan)
    places = torch.arange(tokens)
    writer(isa)(keys, values, cache, table[places // page].long() * page + places % page)
    return cache, table, keys, values


@pytest.mark.parametrize("tokens", [1, 31, 32, 33, 100, 160])
@pytest.mark.parametrize("isa", LAYOUTS)
def test_each_number_comes_back_and_nothing_foreign(isa: str, tokens: int) -> None:
    cache, table, keys, values = written(isa, tokens)
    found = read(cache, table, 0, tokens, isa)
    for mine, theirs in zip(found, (keys, values), strict=True):
        assert mine.shape == (1, GROUPS, tokens, DIM)
        assert torch.equal(mine[0].transpose(0, 1), theirs)


@pytest.mark.parametrize(("first", "last"), [(0, 90), (31, 90), (32, 33), (40, 90), (63, 65), (64, 90), (89, 90)])
@pytest.mark.parametrize("isa", LAYOUTS)
def test_a_window_begins_at_a_page_and_needs_none_before(isa: str, first: int, last: int) -> None:
    cache, table, keys, values = written(isa, 90)
    begin = first // PAGE * PAGE
    table[: first // PAGE] = 7  # of NaN; freed pages may be anything
    for mine, theirs in zip(read(cache, table, first, last, isa), (keys, values), strict=True):
        assert torch.equal(mine[0].transpose(0, 1), theirs[begin:last])


@pytest.mark.parametrize(("page", "dim"), [(32, 80), (96, 16), (128, 32)])
@pytest.mark.parametrize("isa", LAYOUTS)
def test_pages_and_channels_of_other_sizes(isa: str, page: int, dim: int) -> None:
    cache, table, keys, values = written(isa, page + 5, page, dim)
    for mine, theirs in zip(read(cache, table, 0, page + 5, isa), (keys, values), strict=True):
        assert torch.equal(mine[0].transpose(0, 1), theirs)


def test_what_is_read_is_a_copy() -> None:
    cache, table, keys, _ = written("vec", 40)
    found = read(cache, table, 0, 40, "vec")
    cache.fill_(7)
    assert torch.equal(found[0][0].transpose(0, 1), keys)


@pytest.mark.parametrize(("first", "last"), [(0, 161), (5, 5), (-1, 9), (0, 0)])
def test_tokens_that_no_page_holds_are_refused(first: int, last: int) -> None:
    cache, table, _, _ = written("vec", 3)
    message = re.escape(f"cannot read tokens {first} to {last} of 5 pages from a cache of shape (8, 2, 32, 32)")
    with pytest.raises(ValueError, match=message):
        read(cache, table, first, last, "vec")


def test_a_cache_that_is_none_is_refused() -> None:
    table = torch.tensor([0])
    with pytest.raises(ValueError, match="must be contiguous"):
        read(torch.zeros(2, PAGE, GROUPS, 2 * DIM).transpose(1, 2), table, 0, 4, "vec")
    with pytest.raises(ValueError, match="must be contiguous"):
        read(torch.zeros(2, GROUPS, PAGE, 15), table, 0, 4, "vec")
    with pytest.raises(KeyError, match="neon"):
        read(torch.zeros(*SHAPE), table, 0, 4, "neon")


class TestVerify:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("isa", LAYOUTS)
    def test_a_layout_as_expected_is_right(self, isa: str, dtype: torch.dtype) -> None:
        assert verify(writer(isa), SHAPE, dtype, isa) is None

    @pytest.mark.parametrize(("written", "expected"), [("vec", "amx"), ("amx", "vec"), ("amx", "vec16")])
    def test_another_one_is_found(self, written: str, expected: str) -> None:
        wrong = verify(writer(written), SHAPE, torch.float32, expected)
        assert wrong == "keys do not come back from it as they were written"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda k, v, cache, slots, put: put(v, k, cache, slots), "keys do not come back"),
            (lambda k, v, cache, slots, put: put(k, k, cache, slots), "values do not come back"),
            (lambda k, v, cache, slots, put: put(k, v.flip(1), cache, slots), "values do not come back"),
            (lambda k, v, cache, slots, put: put(k, v, cache, slots.roll(1)), "keys do not come back"),
            (lambda k, v, cache, slots, put: put(k, v, cache, slots % PAGE), "keys do not come back"),
            (lambda k, v, cache, slots, put: put(k[:-1], v[:-1], cache, slots[:-1]), "keys do not come back"),
            (lambda k, v, cache, slots, put: put(k.half().float(), v, cache, slots), "keys do not come back"),
            (lambda k, v, cache, slots, put: None, "keys do not come back"),
            (lambda k, v, cache, slots, put: put.isa, "writing to it fails: AttributeError: .*isa"),
            (lambda k, v, cache, slots, put: put(k), "writing to it fails: TypeError"),
        ],
        ids=["swapped", "no-values", "heads", "tokens", "pages", "last", "rounded", "nothing", "interface", "given"],
    )  # fmt: skip
    def test_each_kind_of_fault_is_found(self, change: Any, message: str) -> None:
        wrong = verify(lambda *given: change(*given, writer("vec")), SHAPE, torch.float32, "vec")
        assert wrong is not None
        assert re.match(message, wrong)

    def test_a_cache_with_keys_beside_values_is_found(self) -> None:
        def write(keys: Tensor, values: Tensor, cache: Tensor, slots: Tensor) -> None:
            rows = torch.cat([keys, values], -1)
            cache[slots // PAGE, :, slots % PAGE] = rows

        assert verify(write, SHAPE, torch.float32, "vec") == "keys do not come back from it as they were written"

    @pytest.mark.parametrize(
        ("isa", "shape", "message"),
        [
            ("neon", SHAPE, "the layout 'neon' is not known"),
            ("vec", (2, 3, GROUPS, PAGE, DIM), r"its shape \(2, 3, 2, 32, 16\) is not \[pages, heads, page"),
            ("vec", (3, GROUPS, PAGE, 33), "its shape .* is not"),
            ("vec", (2, GROUPS, PAGE, 32), "its shape .* is not"),
            ("amx", (3, GROUPS, 16, 32), "pages of 16 tokens of 16 channels are not tiled by 16"),
            ("amx", (3, GROUPS, 32, 48), "pages of 32 tokens of 24 channels are not tiled by 16"),
        ],
    )
    def test_a_shape_or_kernel_that_is_not_known(self, isa: str, shape: tuple[int, ...], message: str) -> None:
        wrong = verify(lambda *_: pytest.fail("nothing is written"), shape, torch.float32, isa)
        assert wrong is not None
        assert re.match(message, wrong)
