"""From equal scores, C++ chooses exactly the sets of the torch definitions, and counts exactly the pairs of a plan."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cpu_checks import needs_kernels, poisoned, same_on_threads
from torch import Tensor

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.backends.torch.choose import members
from gossamer.plan import Grid
from gossamer.plan.count import count_pairs
from gossamer.rules import (
    Above,
    AtLeast,
    Besides,
    Candidates,
    Either,
    RelativeToMax,
    Rule,
    TopK,
    TopP,
    TopPBelow,
    TopPInTiers,
    TopPOfAllRows,
    TopPReaching,
    count_top_p,
)
from gossamer.testing import random_extent, random_plan

pytestmark = [needs_kernels, poisoned]
BATCH, HEADS, ROWS = 2, 4, 70
DEVICE = torch.device("cpu")
SHARES = [0.0, 0.5, 0.9, 1.0]
RULES: dict[str, Rule] = {
    "relative": RelativeToMax(0.5),
    "all": RelativeToMax(0.0),
    "top k": TopK([0, 5, 40, 10_000]),
    "top p": TopP(SHARES),
    "top p, forced first": TopP(SHARES, forced_first=True),
    "reaching": TopPReaching(SHARES),
    "below": TopPBelow(SHARES),
    "of all rows": TopPOfAllRows(SHARES),
    "at least": AtLeast(0.02),
    "all but -inf": AtLeast(-math.inf),
    "at least, by head": AtLeast([0.0, 0.5, math.inf, -1.0]),
    "above": Above(0.02),
    "above, by head": Above([0.0, 0.5, 0.1, 1e-9]),
}
# Those that are made for each part, of flags and scores as large as its own.
RULES_OF_PARTS: dict[str, Callable[[Tensor, Tensor], Rule]] = {
    "in tiers": lambda flags, _: TopPInTiers(SHARES, flags),
    "besides": lambda flags, _: Besides(TopPBelow(SHARES), flags),
    "besides, by head": lambda flags, _: Besides(RelativeToMax(0.5), flags[:1, :, :1]),
    "either": lambda _, others: Either(TopP(SHARES), TopP([0.9, 0.5, 0.0, 1.0], forced_first=True), others),
}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())


def draw(kind: str, width: int, generator: torch.Generator, rows: int = ROWS) -> Tensor:
    shape = (BATCH, HEADS, rows, width)
    if kind == "ties":  # few values, whole rows of 0 among them
        some = torch.randint(0, 4, (rows, 1), generator=generator).clamp(max=1)
        return torch.randint(0, 6, shape, generator=generator).float() * some
    scores = torch.rand(shape, generator=generator).pow(30)  # as softmaxed scores are: many decades
    if kind == "spoilt":
        scores[torch.rand(shape, generator=generator) < 1 / width] = math.nan
        scores[torch.rand(shape, generator=generator) < 1 / width] = math.inf
        return torch.where(scores < 1e-20, -0.0, scores)
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)


def candidates(width: int, generator: torch.Generator, rows: int = ROWS, **fields: Any) -> Candidates:
    """Ranges of any length, half of them ending at the last candidate."""
    ends = torch.randint(0, width + 1, (2, BATCH, rows, 2), generator=generator).sort(dim=-1).values
    ends[0, ..., 1] = torch.where(torch.rand(BATCH, rows, generator=generator) < 0.5, width, ends[0, ..., 1])
    ends[1] += torch.randint(-2, 3, ends[1].shape, generator=generator)  # forced ranges may lie outside
    return Candidates(ends[0], ends[1], **fields)


def lists_of(backend, width: int, parts: dict[range, tuple[Any, ...]], rows: int = ROWS) -> tuple[Tensor, Tensor]:
    writer = backend.ListWriter(BATCH, HEADS, rows, width, DEVICE)
    for part, chosen in parts.items():
        writer.choose(part, *chosen)
    return writer.build()


def assert_same(width: int, parts: dict[range, tuple[Any, ...]], rows: int = ROWS) -> None:
    ours, expected = lists_of(cpu, width, parts, rows), lists_of(reference, width, parts, rows)
    for got, one in zip(ours, expected, strict=True):
        assert got.dtype == one.dtype
        assert torch.equal(got, one)


@every_rule
@pytest.mark.parametrize("kind", ["ties", "softmax", "spoilt"])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 300])
def test_rules(rule: Rule, kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    forced_heads = torch.tensor([[True, False, True, False], [True, True, False, True]])
    chosen = candidates(width, generator, first=2, forced_heads=forced_heads)
    assert_same(width, {range(ROWS): (chosen, draw(kind, width, generator), rule)})


@every_rule
@pytest.mark.parametrize("kind", ["ties", "softmax", "spoilt", "flat"])
def test_rules_on_thousands_of_candidates(rule: Rule, kind: str) -> None:
    generator = torch.Generator().manual_seed(0)
    chosen = candidates(3000, generator, rows=5)
    scores = torch.ones(BATCH, HEADS, 5, 3000) if kind == "flat" else draw(kind, 3000, generator, rows=5)
    assert_same(3000, {range(5): (chosen, scores, rule)}, rows=5)


@pytest.mark.parametrize("make", RULES_OF_PARTS.values(), ids=RULES_OF_PARTS.keys())
@pytest.mark.parametrize("kind", ["ties", "softmax", "spoilt"])
@pytest.mark.parametrize(("width", "rows"), [(1, ROWS), (64, ROWS), (130, ROWS), (3000, 5)])
def test_rules_of_parts(make: Callable[[Tensor, Tensor], Rule], kind: str, width: int, rows: int) -> None:
    generator = torch.Generator().manual_seed(width)
    fields: dict[str, Any] = {
        "forced_heads": torch.tensor([[True, False, True, False], [True, True, False, True]]),
        "ruled_heads": torch.tensor([[True, True, True, False], [True, True, True, True]]),
    }
    chosen = candidates(width, generator, rows, first=2, **fields)
    scores, others = (draw(kind, width, generator, rows) for _ in range(2))
    # What a row does not see counts nothing, in either scores.
    seen, _ = members(chosen, BATCH, HEADS, width, DEVICE)
    flags = torch.rand(scores.shape, generator=generator) < 0.1
    assert_same(width, {range(rows): (chosen, scores, make(flags, others.masked_fill(~seen, 0.0)))}, rows)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("rule", [None, TopK(3)], ids=["forced alone", "with a rule"])
def test_diagonals_and_forced_ranges(rule: Rule | None, mirrored: bool) -> None:
    generator = torch.Generator().manual_seed(1)
    width = 130
    fields = {
        "first": 1,
        "forced_heads": torch.tensor([[True, False, True, True]]).expand(BATCH, HEADS),
        "diagonals": torch.rand(BATCH, HEADS, 9, generator=generator) < 0.3,
        "origin": torch.randint(-3, width + 3, (BATCH, ROWS), generator=generator),
        "mirrored": mirrored,
    }
    scores = None if rule is None else draw("softmax", width, generator)
    assert_same(width, {range(ROWS): (candidates(width, generator, **fields), scores, rule)})


@every_rule
@pytest.mark.parametrize("width", [1, 64, 130])
def test_candidates_everywhere_and_heads_without_a_rule(rule: Rule, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    fields: dict[str, Any] = {
        "everywhere": torch.rand(BATCH, HEADS, width, generator=generator) < 0.3,
        "ruled_heads": torch.tensor([[True, False, True, False], [False, True, True, True]]),
    }
    scores = draw("softmax", width, generator)
    assert_same(width, {range(ROWS): (candidates(width, generator, **fields), scores, rule)})


class Odd(Rule):
    """A third party's."""

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return ((torch.arange(scores.shape[-1]) % 2 == 1) & (scores > 0)) | forced


class Half(TopK):
    """It inherits from a rule that the kernels know, and means another."""

    def select(self, scores: Tensor, forced: Tensor) -> Tensor:
        return super().select(scores[..., ::2].repeat_interleave(2, dim=-1)[..., : scores.shape[-1]], forced)


@pytest.mark.parametrize("rule", [Odd(), Half(7)], ids=["third party", "inherited"])
def test_other_rules_run_by_their_definition(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(2)
    assert_same(65, {range(ROWS): (candidates(65, generator, first=1), draw("softmax", 65, generator), rule)})


@pytest.mark.parametrize("kind", ["ties", "softmax", "spoilt", "flat", "nothing"])
@pytest.mark.parametrize("width", [0, 1, 64, 3000])
def test_budgets_by_a_share(kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    shape = (BATCH, HEADS, 5, width)
    same = {"flat": torch.ones(shape), "nothing": torch.zeros(shape)}
    scores = same[kind] if kind in same else draw(kind, max(1, width), generator, rows=5)[..., :width]
    for p in (SHARES, 0.3):
        got = same_on_threads(lambda p=p: cpu.count_top_p(scores, p))
        assert torch.equal(got, count_top_p(scores, p))


def test_parts_in_any_order() -> None:
    """Rows that never come are empty; parts of bits and of lists stand side by side."""
    generator = torch.Generator().manual_seed(3)
    parts: dict[range, tuple[Any, ...]] = {}
    for part, rule in {range(40, 60): TopK(4), range(0, 7): None, range(7, 9): Odd(), range(60, 69): TopP(0.5)}.items():
        rows = len(part)
        scores = None if rule is None else draw("softmax", 130, generator, rows)
        parts[part] = (candidates(130, generator, rows), scores, rule)
    assert_same(130, parts)


def test_a_row_twice_is_named() -> None:
    generator = torch.Generator().manual_seed(4)
    writer = cpu.ListWriter(BATCH, HEADS, ROWS, 10, DEVICE)
    writer.choose(range(10, 20), candidates(10, generator, 10))
    with pytest.raises(ValueError, match="rows 19 to 20 overlap rows 10 to 19"):
        writer.choose(range(19, 21), candidates(10, generator, 2))


def test_shares_at_the_edge_of_an_exact_sum() -> None:
    """2^-k sums to 1 - 2^-n exactly: p is met to the last bit, and the sums run from the best entry down."""
    scores = torch.tensor([0.0625, 0.5, 0.125, 0.25, 0.0625]).expand(1, 1, 1, 5)
    everything, nothing = torch.tensor([[[0, 5]]]), torch.zeros(1, 1, 2, dtype=torch.int64)

    def chosen(rule: Rule) -> list[int]:
        writer = cpu.ListWriter(1, 1, 1, 5, DEVICE)
        writer.choose(range(1), Candidates(everything, nothing), scores, rule)
        return writer.build()[1].tolist()

    above = math.nextafter(0.875, 1.0)
    assert chosen(TopP(0.875)) == chosen(TopPBelow(0.875)) == chosen(TopPReaching(0.875)) == [1, 2, 3]
    assert chosen(TopP(above)) == chosen(TopPReaching(above)) == [0, 1, 2, 3]  # of equals the lower index
    assert chosen(TopPBelow(above)) == [1, 2, 3]


def test_a_share_is_taken_in_fp64() -> None:
    """Ten entries hold 2 less than 0.9 of 160 million: below 0.9, but above what 0.9 is in fp32."""
    scores = torch.tensor([14_400_000.0] * 9 + [14_399_998.0, 4_000_002.0] + [4_000_000.0] * 3).view(1, 1, 1, 14)
    writer = cpu.ListWriter(1, 1, 1, 14, DEVICE)
    everything, nothing = torch.tensor([[[0, 14]]]), torch.zeros(1, 1, 2, dtype=torch.int64)
    writer.choose(range(1), Candidates(everything, nothing), scores, TopP(0.9))
    assert writer.build()[1].numel() == 11


@every_rule
def test_choices_do_not_depend_on_threads(rule: Rule) -> None:
    generator = torch.Generator().manual_seed(5)
    parts: dict[range, Any] = {
        range(300): (candidates(100, generator, 300), draw("softmax", 100, generator, 300), rule)
    }
    same_on_threads(lambda: lists_of(cpu, 100, parts, rows=300))


def test_bad_input_is_named() -> None:
    generator = torch.Generator().manual_seed(6)
    writer, chosen = cpu.ListWriter(BATCH, HEADS, ROWS, 10, DEVICE), candidates(10, generator, 2)
    scores = draw("softmax", 10, generator, 2)
    with pytest.raises(ValueError, match=r"must have shape \(2, 4, 3, 10\), got \(2, 4, 2, 10\)"):
        writer.choose(range(3), chosen, scores, TopK(1))
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        writer.choose(range(2), chosen, scores, TopP(1.5))
    with pytest.raises(ValueError, match="one for each of 4 heads"):
        writer.choose(range(2), chosen, scores, TopK([1, 2]))
    with pytest.raises(ValueError, match="diagonals need an origin"):
        writer.choose(range(2), Candidates(chosen.seen, chosen.forced, diagonals=torch.ones(2, 4, 1).bool()))


@pytest.mark.parametrize("seed", range(24))
def test_counted_pairs(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, keys = (int(torch.randint(1, 200, (1,), generator=generator)) for _ in range(2))
    plan = random_plan(
        seed,
        batch=2,
        heads=3,
        query_len=length,
        key_len=keys,
        block_q=32,
        block_k=16,
        padded=seed % 3 > 0,
        causal=seed % 2 == 0 and (seed % 3 > 0 or length <= keys),
        limit=[None, 50, 1][seed % 4 % 3],
    )
    assert torch.equal(cpu.count(plan), plan.to_mask().sum(dim=(2, 3)))


def test_permuted_plans_are_counted_by_the_definition() -> None:
    plan = random_plan(1, batch=2, heads=2, query_len=40, key_len=40, permuted=True)
    assert torch.equal(cpu.count(plan), count_pairs(plan))


def test_a_finished_plan_knows_its_pairs() -> None:
    generator = torch.Generator().manual_seed(7)
    extent = Extent([0, -20], [150, 100], [0, 20], [150, 120])
    grid = Grid(extent, 32, 16)
    writer = cpu.ListWriter(2, 3, grid.query_blocks, grid.key_blocks, DEVICE)
    scores = torch.rand(2, 3, grid.query_blocks, grid.key_blocks, generator=generator)
    writer.choose(range(grid.query_blocks), Candidates(grid.seen, grid.own()), scores, TopK(2))
    sizes: dict[str, Any] = {
        "heads": 3,
        "query_len": 150,
        "key_len": 150,
        "extent": extent,
        "block_q": 32,
        "block_k": 16,
    }
    plan = cpu.finish(writer, None, **sizes, window=5)
    assert plan._pairs is not None
    assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)))
    listed: dict[str, Any] = {"block_indptr": plan.block_indptr, "block_indices": plan.block_indices}
    assert torch.equal(SparsePlan(**sizes, window=5, **listed).to_mask(), plan.to_mask())


def slashes(length: int, share: float, seed: int, batch: int = 2) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    columns, distances = (torch.rand(batch, 3, length, generator=generator) < share for _ in range(2))
    distances[0, 1] = False  # a head without any
    return columns, distances


@pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 1.0])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200, 1000])
def test_slashes_are_those_of_torch(share: float, length: int) -> None:
    for extent in (
        Extent.full(2, length, length),
        Extent([-(length // 3), 0], [length - length // 3, length], [length // 3, 0], [length - length // 3, length]),
        Extent([length // 2, 0], [length - length // 2, 1], [0, 0], [length, length]),
        random_extent(length, batch=2, query_len=length, key_len=length),
    ):
        columns, distances = slashes(extent.longest, share, length)
        grid = Grid(extent, 64, 64)
        rows = grid.query_blocks
        for part in (range(rows), range(rows // 2, rows)):
            ours = cpu.exact_slashes(columns, distances, grid, part)
            expected = reference.exact_slashes(columns, distances, grid, part)
            for got, one in zip((*ours[0], *ours[1]), (*expected[0], *expected[1]), strict=True):
                assert torch.equal(got, one)


def test_slashes_do_not_depend_on_threads() -> None:
    columns, distances = slashes(700, 0.05, 0)
    grid = Grid(Extent.full(2, 700, 700), 64, 64)

    def found() -> list[Tensor]:
        blocks, singles = cpu.exact_slashes(columns, distances, grid, range(grid.query_blocks))
        return [*blocks, *singles]

    same_on_threads(found)


def test_bad_slashes_are_named() -> None:
    columns, distances = slashes(64, 0.1, 0)
    with pytest.raises(ValueError, match=r"bool \[B, H, positions\] for the extent's 1 batch rows"):
        cpu.exact_slashes(columns, distances, Grid(Extent.full(1, 64, 64), 64, 64), range(1))
    with pytest.raises(ValueError, match="take blocks of 64, got 32 and 64"):
        cpu.exact_slashes(columns, distances, Grid(Extent.full(2, 64, 64), 32, 64), range(1))
