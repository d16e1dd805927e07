"""The definition of how rules, forced ranges and diagonals make lists, against loops over candidates."""

from typing import Any

import pytest
import torch
from definitions import lists_of
from torch import Tensor

from gossamer import Extent
from gossamer.backends.torch import ListWriter, count, finish
from gossamer.rules import Candidates, TopK

B, H, ROWS, WIDTH = 2, 3, 4, 9
CPU = torch.device("cpu")
TWO_BEST = TopK(2)


def drawn(seed: int, **more: Any) -> Candidates:
    """Ranges may be empty, and what is forced may lie outside of what is seen."""
    generator = torch.Generator().manual_seed(seed)

    def ranges(least: int) -> Tensor:
        low = torch.randint(least, 5, (B, ROWS), generator=generator)
        return torch.stack([low, low + torch.randint(0, 6, (B, ROWS), generator=generator)], dim=-1)

    return Candidates(ranges(0), ranges(-4), **more)


def diagonals(seed: int, mirrored: bool) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(B, H, 5, generator=generator) < 0.4
    return {
        "diagonals": chosen,
        "origin": torch.randint(0, WIDTH, (B, ROWS), generator=generator),
        "mirrored": mirrored,
    }


def scores_of(seed: int) -> Tensor:
    return torch.rand(B, H, ROWS, WIDTH, generator=torch.Generator().manual_seed(seed))


def chosen_of(candidates: Candidates, scores: Tensor | None, b: int, h: int, row: int) -> list[int]:
    seen = range(*candidates.seen[b, row].tolist())
    low, high = candidates.forced[b, row].tolist()
    taken: set[int] = set()
    if candidates.forced_heads is None or bool(candidates.forced_heads[b, h]):
        taken |= {*range(low, high), *range(candidates.first)}
    if candidates.diagonals is not None and candidates.origin is not None:
        distances = candidates.diagonals[b, h].nonzero().flatten().tolist()
        origin = int(candidates.origin[b, row])
        taken |= {origin - d for d in distances} | ({origin + d for d in distances} if candidates.mirrored else set())
    if candidates.everywhere is not None:
        taken |= set(candidates.everywhere[b, h].nonzero().flatten().tolist())
    if scores is not None and (candidates.ruled_heads is None or bool(candidates.ruled_heads[b, h])):
        taken |= set(sorted(seen, key=lambda n: (-float(scores[b, h, row, n]), n))[:2])
    return sorted(taken & set(seen))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("with_rule", [True, False])
@pytest.mark.parametrize(
    "more",
    [
        {},
        {"first": 2},
        {"first": 1, "forced_heads": torch.tensor([[True, False, True], [False, False, True]])},
        diagonals(0, mirrored=False),
        diagonals(1, mirrored=True),
        diagonals(2, mirrored=True) | {"forced_heads": torch.zeros(B, H, dtype=torch.bool)},
        {"everywhere": torch.arange(B * H * WIDTH).view(B, H, WIDTH) % 5 == 0},
        {"ruled_heads": torch.tensor([[True, False, True], [False, False, True]])},
    ],
)
def test_lists_unite_what_is_chosen_forced_and_on_diagonals(more: dict, with_rule: bool, seed: int) -> None:
    candidates, scores = drawn(seed, **more), scores_of(seed) if with_rule else None
    writer = ListWriter(B, H, ROWS, WIDTH, CPU)
    writer.choose(range(ROWS), candidates, scores, TWO_BEST if with_rule else None)
    indptr, indices = writer.build()
    assert (indptr.dtype, indices.dtype) == (torch.int64, torch.int32)
    for b in range(B):
        for h in range(H):
            expected = [chosen_of(candidates, scores, b, h, row) for row in range(ROWS)]
            assert lists_of(indptr, indices, b * H + h, ROWS) == expected


def part_of(candidates: Candidates, part: range) -> Candidates:
    return Candidates(candidates.seen[:, part.start : part.stop], candidates.forced[:, part.start : part.stop])


@pytest.mark.parametrize("parts", [[(0, 1), (1, 4)], [(2, 4), (0, 2)], [(3, 4), (1, 2), (2, 3), (0, 1)]])
def test_parts_in_any_order_make_the_lists_of_one(parts: list[tuple[int, int]]) -> None:
    candidates, scores = drawn(0), scores_of(0)
    whole, pieces = (ListWriter(B, H, ROWS, WIDTH, CPU) for _ in range(2))
    whole.choose(range(ROWS), candidates, scores, TWO_BEST)
    for part in (range(*ends) for ends in parts):
        pieces.choose(part, part_of(candidates, part), scores[:, :, part.start : part.stop], TWO_BEST)
    for one, other in zip(whole.build(), pieces.build(), strict=True):
        assert torch.equal(one, other)


def test_rows_that_no_part_names_are_empty() -> None:
    writer = ListWriter(1, 1, 4, WIDTH, CPU)
    writer.take(range(2, 3), torch.tensor([[[2]]]), torch.tensor([1, 5], dtype=torch.int32))
    indptr, indices = writer.build()
    assert lists_of(indptr, indices, 0, 4) == [[], [], [1, 5], []]


def test_without_parts_all_lists_are_empty() -> None:
    indptr, indices = ListWriter(B, H, ROWS, WIDTH, CPU).build()
    assert indptr.tolist() == [0] * (B * H * ROWS + 1)
    assert (indices.numel(), indices.dtype) == (0, torch.int32)


@pytest.mark.parametrize(("first", "second"), [((0, 2), (1, 3)), ((1, 3), (0, 2)), ((0, 4), (2, 3)), ((2, 3), (2, 3))])
def test_a_row_that_comes_twice_is_named(first: tuple[int, int], second: tuple[int, int]) -> None:
    writer = ListWriter(1, 1, 4, WIDTH, CPU)
    nothing = torch.empty(0, dtype=torch.int32)
    writer.take(range(*first), torch.zeros(1, 1, first[1] - first[0], dtype=torch.int64), nothing)
    message = f"rows {second[0]} to {second[1] - 1} overlap rows {first[0]} to {first[1] - 1}"
    with pytest.raises(ValueError, match=message):
        writer.take(range(*second), torch.zeros(1, 1, second[1] - second[0], dtype=torch.int64), nothing)


def test_an_empty_part_overlaps_nothing() -> None:
    writer = ListWriter(1, 1, 4, WIDTH, CPU)
    nothing = torch.empty(0, dtype=torch.int32)
    writer.take(range(0, 4), torch.zeros(1, 1, 4, dtype=torch.int64), nothing)
    writer.take(range(2, 2), torch.zeros(1, 1, 0, dtype=torch.int64), nothing)
    assert writer.build()[0].tolist() == [0] * 5


# Plans

SIZE: dict[str, Any] = {"heads": 2, "query_len": 12, "key_len": 12, "extent": Extent.full(1, 12, 12)}


def written(width: int, rows: int, members: list[int]) -> ListWriter:
    """The same members in every row."""
    writer = ListWriter(1, 2, rows, width, CPU)
    counts = torch.full((1, 2, rows), len(members))
    writer.take(range(rows), counts, torch.tensor(members * 2 * rows, dtype=torch.int32))
    return writer


def test_a_finished_plan_has_both_lists_all_fields_and_its_pairs() -> None:
    blocks, columns = written(3, 3, [0]), written(12, 2, [5, 7])
    fields = {"block_q": 4, "block_k": 4, "column_group": 2, "sink": 1, "window": torch.tensor([0, 2])}
    plan = finish(blocks, columns, **SIZE, **fields)
    assert plan.block_mask()[0, 1].nonzero().tolist() == [[0, 0], [1, 0], [2, 0]]
    assert plan.column_mask()[0, 1].nonzero().tolist() == [[0, 5], [0, 7], [1, 5], [1, 7]]
    got = (
        plan.block_q,
        plan.block_k,
        plan.column_group,
        *(torch.as_tensor(x).tolist() for x in (plan.sink, plan.window)),
    )
    assert got == (4, 4, 2, [1, 1], [0, 2])
    assert plan._pairs is not None
    assert torch.equal(plan._pairs, plan.to_mask().sum(dim=(2, 3)))


def test_a_plan_may_have_columns_alone() -> None:
    plan = finish(None, written(12, 1, [5]), **SIZE)
    assert plan.block_indices.numel() == 0
    assert plan.count_pairs().tolist() == [[7, 7]]


def test_a_plan_may_have_bands_alone() -> None:
    assert finish(None, None, **SIZE, window=1).count_pairs().tolist() == [[12, 12]]


def test_the_count_is_of_what_the_mask_has() -> None:
    plan = finish(written(3, 3, [1]), None, **SIZE, block_q=4, block_k=4)
    assert torch.equal(count(plan), plan.to_mask().sum(dim=(2, 3)))
