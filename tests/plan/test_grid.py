"""`Grid` against its docstring, token by token."""

import pytest
import torch
from definitions import Row, call_in, everywhere, random_extents, rows_of

from gossamer import Extent
from gossamer.plan import Grid

# Blocks of one token, odd ones, and ones that hold everything.
BLOCKS = ((1, 1), (4, 3), (3, 8), (16, 4), (64, 64))
S, T = 12, 17
EXTENTS = [*random_extents(range(24), S, T), Extent([0], [0], [0], [0]), Extent([], [], [], [])]


def grids() -> list[Grid]:
    return [Grid(extent, *blocks) for extent in EXTENTS for blocks in BLOCKS]


def queries_by_block(row: Row, block_q: int) -> dict[int, list[int]]:
    """Positions of live queries by the global number of their block."""
    blocks: dict[int, list[int]] = {}
    for position in row.positions():
        blocks.setdefault(position // block_q, []).append(position)
    return blocks


def assert_lies_as_defined(grid: Grid) -> None:
    rows = rows_of(grid.extent)
    blocks = [queries_by_block(row, grid.block_q) for row in rows]
    assert grid.row_blocks.tolist() == [len(of_row) for of_row in blocks]
    assert grid.query_blocks == max((len(of_row) for of_row in blocks), default=0)
    assert grid.key_blocks == len({key // grid.block_k for row in rows for key in range(row.key_count)})
    assert grid.first_block.tolist() == [max(row.query_start, 0) // grid.block_q for row in rows]
    for b, (row, of_row) in enumerate(zip(rows, blocks, strict=True)):
        for m in range(grid.query_blocks):
            positions = of_row.get(int(grid.first_block[b]) + m, [])
            assert list(range(*grid.queries[b, m].tolist())) == positions
            seen = {
                key // grid.block_k
                for key in range(row.key_count)
                if any(row.allows(query, key) for query in positions)
            }
            assert list(range(*grid.seen[b, m].tolist())) == sorted(seen)
            assert grid.sees(range(m, m + 1))[b, 0].nonzero().flatten().tolist() == sorted(seen)


def test_blocks_of_random_extents_lie_as_defined() -> None:
    for grid in grids():
        assert_lies_as_defined(grid)


@everywhere
def test_blocks_lie_as_defined_everywhere(situation: str) -> None:
    extent = call_in(situation, length=37).extent
    for blocks in BLOCKS:
        assert_lies_as_defined(Grid(extent, *blocks))


@pytest.mark.parametrize("many", [1, 2, 3])
def test_own_blocks_are_those_of_the_queries_and_their_neighbours(many: int) -> None:
    for grid in grids():
        for b, row in enumerate(rows_of(grid.extent)):
            for block, positions in queries_by_block(row, grid.block_q).items():
                # Queries beyond the keys have the last key block for their own.
                nearest = S + T if row.causal else max(0, row.key_count - 1) // grid.block_k
                low = min(min(positions) // grid.block_k, nearest) - (many - 1)
                high = min(max(positions) // grid.block_k, nearest) + (0 if row.causal else many - 1)
                assert grid.own(many)[b, block - int(grid.first_block[b])].tolist() == [low, high + 1]


def test_a_block_has_one_own_block_unless_told_otherwise() -> None:
    grid = Grid(Extent.full(1, 8, 8), 4, 4)
    assert grid.own().tolist() == [[[0, 1], [1, 2]]]


@pytest.mark.parametrize("last", [0, 1, 2, 5, S, 100])
def test_blocks_of_the_last_queries_hold_one_of_them(last: int) -> None:
    for grid in grids():
        for b, row in enumerate(rows_of(grid.extent)):
            positions = row.positions()
            blocks = {position // grid.block_q for position in positions[max(0, len(positions) - last) :]}
            numbers = [int(grid.first_block[b]) + m for m in range(grid.query_blocks)]
            assert grid.holds_last(last)[b].tolist() == [number in blocks for number in numbers]


def test_ends_of_key_blocks_are_those_of_live_keys() -> None:
    for grid in grids():
        low, high = grid.key_block_ends()
        for b, row in enumerate(rows_of(grid.extent)):
            for n in range(grid.key_blocks):
                live = [key for key in range(row.key_count) if key // grid.block_k == n]
                assert list(range(int(low[b, n]), int(high[b, n]))) == live


@pytest.mark.parametrize(
    ("row_bytes", "budget", "lengths"),
    [
        (10, 30, [3, 2]),
        (10, 29, [2, 2, 1]),
        (10, 50, [5]),
        (10, 49, [4, 1]),
        (10, 9, [1] * 5),
        (0, 3, [3, 2]),
    ],
)
def test_parts_fit_the_budget(row_bytes: int, budget: int, lengths: list[int]) -> None:
    parts = list(Grid(Extent.full(1, 18, 18), 4, 4).parts(row_bytes, budget))
    assert [len(part) for part in parts] == lengths
    assert [row for part in parts for row in part] == list(range(5))


@pytest.mark.parametrize("extent", [Extent([0], [0], [0], [9]), Extent([0], [9], [0], [0]), Extent([], [], [], [])])
def test_there_are_no_parts_without_queries_or_keys(extent: Extent) -> None:
    assert not list(Grid(extent, 4, 4).parts(1, 100))


def test_padding_and_companions_move_no_block() -> None:
    alone = Grid(Extent([3], [9], [0], [12]), 4, 4)
    beside = Grid(Extent([3, 0], [9, 17], [2, 0], [12, 17]), 4, 4)
    m = alone.query_blocks
    assert beside.query_blocks > m
    for name in ("queries", "seen"):
        assert torch.equal(getattr(alone, name)[0], getattr(beside, name)[0, :m])
    assert torch.equal(alone.own(2)[0], beside.own(2)[0, :m])


def test_chunks_that_end_at_blocks_have_the_blocks_of_one_piece() -> None:
    extent = Extent([-3], [21], [3], [21], limit=9)
    whole = Grid(extent, 4, 3)
    chunks = [Grid(extent.of_queries(first, stop), 4, 3) for first, stop in ((0, 11), (11, 19), (19, 24))]
    for name in ("queries", "seen"):
        assert torch.equal(torch.cat([getattr(chunk, name) for chunk in chunks], dim=1), getattr(whole, name))
    assert [int(chunk.first_block) for chunk in chunks] == [0, 2, 4]


def test_a_grid_is_frozen() -> None:
    with pytest.raises(AttributeError):
        Grid(Extent.full(1, 4, 4), 4, 4).block_q = 8  # type: ignore[misc]
