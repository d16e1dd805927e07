"""`Extent` against its docstring, pair by pair."""

from typing import Any

import pytest
import torch
from definitions import Row, allowed_pairs, call_in, everywhere, random_extents, rows_of
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gossamer import Extent
from gossamer.testing import random_extent

MOST = (1 << 31) - 1

extents = st.builds(
    random_extent,
    st.integers(0, 10_000),
    batch=st.integers(1, 3),
    query_len=st.just(8),
    key_len=st.just(11),
    causal=st.booleans(),
    limit=st.sampled_from([None, 1, 2, 5, 30]),
)


def fields(extent: Extent) -> list:
    return [getattr(extent, name).tolist() for name in ("query_start", "query_count", "key_start", "key_count")]


@everywhere
def test_allowed_pairs_are_the_definition(situation: str) -> None:
    call = call_in(situation)
    got = call.extent.allowed(torch.arange(call.query_len), call.key_len)
    assert torch.equal(got, allowed_pairs(call.extent, call.query_len, call.key_len))


@settings(max_examples=150, deadline=None)
@given(extents)
def test_allowed_pairs_of_random_extents_are_the_definition(extent: Extent) -> None:
    assert torch.equal(extent.allowed(torch.arange(8), 11), allowed_pairs(extent, 8, 11))


def test_allowed_takes_rows_in_any_order() -> None:
    extent = Extent([-2, 3], [5, 6], [1, 0], [9, 8], limit=4)
    rows = torch.tensor([6, 0, 3, 3])
    assert torch.equal(extent.allowed(rows, 11), allowed_pairs(extent, 8, 11)[:, rows])


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("distance", "allowed"), [(0, True), (2, True), (3, False)])
def test_a_limit_counts_the_token_itself(distance: int, allowed: bool, causal: bool) -> None:
    extent = Extent.full(1, 10, 10, causal=causal, limit=3)
    assert bool(extent.allowed(torch.tensor([6]), 10)[0, 0, 6 - distance]) is allowed
    assert bool(extent.allowed(torch.tensor([6]), 10)[0, 0, 6 + distance]) is (allowed and (not causal or not distance))


@everywhere
def test_live_tokens_and_their_positions_are_the_definition(situation: str) -> None:
    call = call_in(situation)
    extent, S, T = call.extent, call.query_len, call.key_len
    queries, keys = extent.live_queries(S), extent.live_keys(T)
    query, key = extent.query_positions(S), extent.key_positions(T)
    for b, row in enumerate(rows_of(extent)):
        assert queries[b].nonzero().flatten().tolist() == row.live_queries()
        assert keys[b].nonzero().flatten().tolist() == row.live_keys()
        assert query[b].tolist() == [row.query_start + i for i in range(S)]
        assert key[b].tolist() == [j - row.key_start for j in range(T)]
        assert int(extent.first_query[b]) == row.padding
        assert int(extent.first_position[b]) == row.query_start + row.padding


@settings(max_examples=300, deadline=None)
@given(extents)
def test_count_allowed_counts_the_pairs(extent: Extent) -> None:
    assert extent.count_allowed().tolist() == allowed_pairs(extent, 8, 11).sum(dim=(1, 2)).tolist()


@everywhere
def test_count_allowed_counts_the_pairs_everywhere(situation: str) -> None:
    call = call_in(situation)
    pairs = allowed_pairs(call.extent, call.query_len, call.key_len)
    assert call.extent.count_allowed().tolist() == pairs.sum(dim=(1, 2)).tolist()


def test_count_allowed_of_a_million_tokens_is_exact() -> None:
    many = 1_000_003
    assert Extent.full(1, many, many).count_allowed().tolist() == [many * (many + 1) // 2]
    assert Extent.full(1, many, many, causal=False).count_allowed().tolist() == [many * many]


def test_longest_is_the_largest_number_of_live_keys() -> None:
    assert Extent([0, 0, 0], [1, 1, 1], [4, 0, 0], [3, 7, 5]).longest == 7
    assert Extent([], [], [], []).longest == 0


# Construction


def test_causal_queries_of_a_full_extent_are_the_last_tokens() -> None:
    extent = Extent.full(2, 3, 10)
    assert (fields(extent), extent.causal, extent.limit) == ([[7, 7], [3, 3], [0, 0], [10, 10]], True, None)


def test_other_queries_of_a_full_extent_begin_at_zero() -> None:
    extent = Extent.full(1, 12, 10, causal=False, limit=4)
    assert (fields(extent), extent.causal, extent.limit) == ([[0], [12], [0], [10]], False, 4)


def test_a_full_extent_keeps_its_limit() -> None:
    assert Extent.full(1, 3, 10, limit=4).limit == 4


def test_one_number_serves_all_rows() -> None:
    assert fields(Extent([0, -1], 2, 3, 4)) == [[0, -1], [2, 2], [3, 3], [4, 4]]


def test_tensors_are_copied() -> None:
    given = [torch.tensor([n, n]) for n in (1, 2, 3, 4)]
    extent = Extent(*given)
    for tensor in given:
        tensor += 5
    assert fields(extent) == [[1, 1], [2, 2], [3, 3], [4, 4]]


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8])
def test_tensors_of_other_integers_are_converted(dtype: torch.dtype) -> None:
    extent = Extent(*(torch.tensor([n], dtype=dtype) for n in (1, 2, 3, 4)))
    assert extent.key_count.dtype == torch.int64
    assert fields(extent) == [[1], [2], [3], [4]]


def test_an_extent_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Extent.full(1, 2, 2).causal = False  # type: ignore[misc]


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"query_start": 0}, ValueError, r"query_start must hold one integer for each batch row, got shape \(\)"),
        ({"query_start": [[0]]}, ValueError, r"query_start must hold .* got shape \(1, 1\)"),
        ({"query_start": [-MOST - 1]}, ValueError, f"query_start must be at least -{MOST} .* got -{MOST + 1}"),
        ({"query_start": [MOST + 1]}, ValueError, f"query_start .* at most {MOST}, got {MOST + 1}"),
        ({"query_start": [0.5]}, TypeError, "query_start must hold integers, got torch.float32"),
        ({"query_start": [True]}, TypeError, "query_start must hold integers, got torch.bool"),
        ({"query_start": ["0"]}, ValueError, r"query_start must hold integers .* got \['0'\]"),
        ({"query_count": [1, 1]}, ValueError, r"query_count .* each batch row \(1 of them\), got shape \(2,\)"),
        ({"query_count": [-1]}, ValueError, "query_count must not be negative .* got -1"),
        ({"key_start": [-2]}, ValueError, "key_start must not be negative .* got -2"),
        ({"key_start": [MOST + 1]}, ValueError, f"key_start .* at most {MOST}, got {MOST + 1}"),
        ({"key_count": [-3]}, ValueError, "key_count must not be negative .* got -3"),
        ({"key_count": [1 << 70]}, ValueError, r"key_count must hold integers .* got \[1180591620717411303424\]"),
        ({"limit": 0}, ValueError, "limit must be at least 1 .* got 0"),
        ({"limit": MOST + 1}, ValueError, f"limit .* at most {MOST}, got {MOST + 1}"),
        ({"limit": 2.0}, TypeError, r"limit must be an integer, got 2\.0"),
        ({"limit": True}, TypeError, "limit must be an integer, got True"),
    ],
)
def test_bad_fields_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    good: dict[str, Any] = {"query_start": [0], "query_count": [1], "key_start": [0], "key_count": [1]}
    with pytest.raises(error, match=f"Extent.{message}"):
        Extent(**good | given)


def test_more_causal_queries_than_keys_are_an_error() -> None:
    with pytest.raises(ValueError, match="5 queries cannot be the last tokens of 4 keys"):
        Extent.full(1, 5, 4)


# From a mask of keys


def mask_of(*rows: str) -> Tensor:
    return torch.tensor([[slot == "x" for slot in row] for row in rows])


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_key_mask_makes_the_extent_of_the_tokens_that_are_live(data: st.DataObject) -> None:
    key_len = data.draw(st.integers(1, 9))
    query_len = data.draw(st.integers(0, key_len))
    first_slot = data.draw(st.one_of(st.none(), st.integers(0, key_len - query_len)))
    causal, limit = data.draw(st.booleans()), data.draw(st.sampled_from([None, 1, 3]))
    start = data.draw(st.integers(0, key_len))
    count = data.draw(st.integers(0, key_len - start))
    live = [start <= j < start + count for j in range(key_len)]
    extent = Extent.from_key_mask(torch.tensor([live]), query_len, first_slot=first_slot, causal=causal, limit=limit)
    extent.check(query_len, key_len)
    row = Row(0, 0, 0, 0, causal, limit)
    own = key_len - query_len if first_slot is None else first_slot
    expected = [
        [live[own + i] and live[j] and row.allows(own + i, j) for j in range(key_len)] for i in range(query_len)
    ]
    assert extent.allowed(torch.arange(query_len), key_len)[0].tolist() == expected
    assert extent.live_queries(query_len)[0].tolist() == [live[own + i] for i in range(query_len)]


def test_rows_of_a_key_mask_have_padding_of_their_own() -> None:
    extent = Extent.from_key_mask(mask_of("..xxx", "xxxxx", "xxx..", "....."), 5)
    assert fields(extent)[1:] == [[3, 5, 3, 0], [2, 0, 0, 0], [3, 5, 3, 0]]
    assert fields(extent)[0][:3] == [-2, 0, 0]


@pytest.mark.parametrize(
    ("mask", "query_len", "first_slot", "error", "message"),
    [
        (mask_of("xx").int(), 1, None, TypeError, "must be bool, got torch.int32"),
        (mask_of("xx")[0], 1, None, ValueError, r"slots 1 to 1 for the 1 queries' own keys, got shape \(2,\)"),
        (mask_of("xx"), 3, None, ValueError, r"slots -1 to 1 for the 3 queries' own keys, got shape \(1, 2\)"),
        (mask_of("xx"), 1, 2, ValueError, r"slots 2 to 2 for the 1 queries' own keys, got shape \(1, 2\)"),
        (mask_of("xx"), 1, -1, ValueError, "slots -1 to -1"),
        (mask_of("xxx", "x.x"), 1, None, ValueError, "live keys of batch row 1 have a hole"),
    ],
)
def test_bad_key_masks_are_named(
    mask: Tensor, query_len: int, first_slot: int | None, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        Extent.from_key_mask(mask, query_len, first_slot=first_slot)


# Against the lengths of a call


def test_tokens_up_to_the_last_row_and_slot_pass() -> None:
    Extent([-2, 0], [3, 5], [0, 4], [9, 5]).check(5, 9)


def test_rows_without_tokens_may_begin_anywhere() -> None:
    Extent([-50, 7], [0, 0], [50, 3], [0, 0]).check(5, 9)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (([0, -2], [5, 4], [0, 0], [9, 9]), "6 queries in batch row 1, .* but there are 5"),
        (([0, 0], [6, 5], [0, 0], [9, 9]), "6 queries in batch row 0, .* but there are 5"),
        (([0, 0], [5, 5], [0, 1], [9, 9]), "10 keys in batch row 1, .* but there are 9"),
    ],
)
def test_tokens_beyond_the_lengths_are_named(rows: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Extent(*rows).check(5, 9)


@pytest.mark.parametrize(
    ("rows", "trivial"),
    [
        (([4], [5], [0], [9]), True),
        (([3], [5], [0], [9]), False),
        (([4], [4], [0], [9]), False),
        (([4], [5], [1], [9]), False),
        (([4], [5], [0], [8]), False),
        (([4, 4], [5, 5], [0, 0], [9, 8]), False),
    ],
)
def test_an_extent_is_trivial_if_all_tokens_are_live_and_the_queries_last(rows: tuple, trivial: bool) -> None:
    assert Extent(*rows).is_trivial(5, 9) is trivial


def test_where_attention_is_not_causal_queries_begin_anywhere_in_a_trivial_extent() -> None:
    assert Extent([2], [5], [0], [9], causal=False).is_trivial(5, 9)


# Parts


def test_an_extent_of_some_queries_allows_the_pairs_of_these() -> None:
    for extent in random_extents(range(24), 8, 11):
        whole = allowed_pairs(extent, 8, 11)
        for first in range(9):
            for stop in range(first, 9):
                part = extent.of_queries(first, stop)
                part.check(stop - first, 11)
                assert torch.equal(part.allowed(torch.arange(stop - first), 11), whole[:, first:stop])
                assert torch.equal(part.query_positions(stop - first), extent.query_positions(8)[:, first:stop])


def test_an_extent_of_some_rows_allows_the_pairs_of_these() -> None:
    for extent in random_extents(range(8), 8, 11, batch=4):
        part = extent.of_rows(slice(1, 3))
        assert part.batch == 2
        assert torch.equal(part.allowed(torch.arange(8), 11), allowed_pairs(extent, 8, 11)[1:3])
