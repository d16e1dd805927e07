"""Which positions a rank owns, and which keys it has at a step."""

import itertools

import pytest
import torch

from gossamer.distributed import KINDS, Layout

CASES = [(0, 2, 4), (1, 3, 4), (7, 2, 4), (37, 4, 4), (64, 4, 4), (130, 3, 8), (96, 1, 8)]


def layout(kind: str, length: int, ranks: int, unit: int = 128) -> Layout:
    inner = None if kind != "hierarchical" else 2 if ranks % 2 == 0 else 1
    return Layout(kind, length, ranks, unit, inner)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "ranks", "unit"), CASES)
def test_every_position_has_one_owner_in_ascending_order(kind: str, length: int, ranks: int, unit: int) -> None:
    dealt = layout(kind, length, ranks, unit)
    owned = [dealt.positions(rank) for rank in range(ranks)]
    assert torch.equal(torch.cat(owned).sort().values, torch.arange(length))
    for rank, positions in enumerate(owned):
        assert torch.equal(positions, positions.sort().values)
        assert len(positions) == dealt.tokens(rank)
        slots = dealt.slots(rank)
        assert torch.equal(slots[positions], torch.arange(len(positions)))
        assert int((slots >= 0).sum()) == len(positions)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "ranks", "unit"), CASES)
def test_runs_start_at_units_and_do_not_touch(kind: str, length: int, ranks: int, unit: int) -> None:
    dealt = layout(kind, length, ranks, unit)
    for rank in range(ranks):
        runs = dealt.runs(rank)
        assert all(run.start % unit == 0 and run.slot % unit == 0 and run.tokens > 0 for run in runs)
        assert all(one.stop < other.start for one, other in itertools.pairwise(runs))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("length", "ranks", "unit"), CASES)
def test_joining_what_was_split_gives_the_whole(kind: str, length: int, ranks: int, unit: int) -> None:
    dealt, x = layout(kind, length, ranks, unit), torch.randn(2, 3, length, 5)
    assert torch.equal(dealt.join([dealt.split(x, rank) for rank in range(ranks)]), x)
    ids = torch.arange(length)[None]
    assert torch.equal(dealt.join([dealt.split(ids, rank, dim=1) for rank in range(ranks)], dim=1), ids)


def test_what_each_kind_owns() -> None:
    def owned(kind: str, inner: int | None = None) -> list[list[int]]:
        return [(Layout(kind, 22, 2, 3, inner).positions(rank)[::3] // 3).tolist() for rank in range(2)]

    assert owned("contiguous") == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert owned("zigzag") == [[0, 1, 6, 7], [2, 3, 4, 5]]
    assert owned("striped") == owned("hierarchical", 1) == [[0, 2, 4, 6], [1, 3, 5, 7]]


@pytest.mark.parametrize(("ranks", "inner"), [(4, 4), (4, 2), (4, 1), (6, 3), (1, 1)])
def test_all_keys_come_to_all_ranks_once_and_nobody_shares(ranks: int, inner: int) -> None:
    dealt = Layout("hierarchical", 640, ranks, 8, inner)
    for rank in range(ranks):
        assert dealt.source(rank, 0) == rank
        assert sorted(dealt.source(rank, step) for step in range(ranks)) == list(range(ranks))
    for step in range(ranks):
        assert [dealt.holder(dealt.source(rank, step), step) for rank in range(ranks)] == list(range(ranks))


def test_between_nodes_keys_travel_once_a_ring() -> None:
    dealt = Layout("hierarchical", 640, 6, 8, 3)
    nodes = [{dealt.source(rank, step) // 3 for rank in range(3)} for step in range(6)]
    assert nodes == [{0}, {0}, {0}, {1}, {1}, {1}]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("spiral", 8, 2), "must be one of contiguous, zigzag, striped, hierarchical"),
        (("striped", -1, 2), "Layout.length"),
        (("striped", 8, 0), "Layout.ranks"),
        (("striped", 8, 2, 0), "Layout.unit"),
        (("striped", 8, 2, 4, 2), "goes with kind='hierarchical'"),
        (("hierarchical", 8, 4), "give inner="),
        (("hierarchical", 8, 4, 4, 3), "must divide the 4 ranks"),
    ],
)
def test_what_is_no_layout_is_refused(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Layout(*arguments)


def test_parts_that_do_not_fit_are_refused() -> None:
    dealt = Layout("striped", 20, 2, 4)
    with pytest.raises(ValueError, match="20 positions"):
        dealt.split(torch.zeros(1, 1, 21, 2), 0)
    with pytest.raises(ValueError, match="rank 0 owns 12 positions"):
        dealt.join([torch.zeros(1, 1, 8, 2), torch.zeros(1, 1, 12, 2)])
    with pytest.raises(ValueError, match="all 2 ranks"):
        dealt.join([torch.zeros(1, 1, 20, 2)])
    with pytest.raises(ValueError, match="0 to 1"):
        dealt.positions(2)
