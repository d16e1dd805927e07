"""Keys and values in pages: whatever the kernels compute of them is, bit for bit, what they compute of the same rows.

Pages are in no order, and NaN stands in every page of nobody and in every slot past the end.
"""

from __future__ import annotations

import pytest
import torch
from cpu_checks import KERNELS, draw, needs_kernels, poisoned, same_on_threads
from paged_calls import LAYOUTS, first_row, is_untouched, paged, untouched
from test_cpu_scores import EVERY_VERB, SHAPES, scores_of
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan, methods
from gossamer.backends import cpu
from gossamer.paged import Paged
from gossamer.plan import Grid
from gossamer.testing import make_call, random_plan

pytestmark = [needs_kernels, poisoned]
CASES = [
    pytest.param(isa, dtype, layout, id=f"{name}-{layout}")
    for isa, dtype, name in KERNELS
    for layout in LAYOUTS
    if layout != "tiles" or dtype != torch.float32
]
every_case = pytest.mark.parametrize(("isa", "dtype", "layout"), CASES)
# Tokens of a page and channels: whole vectors of all instruction sets, and what is left over beside them.
SIZES = {"columns": [(128, 32), (32, 80), (7, 33), (48, 20)], "tiles": [(128, 32), (32, 80), (48, 16)]}
# Energies and products are of pooled keys, which lie in no pages.
VERBS = [verb for verb in EVERY_VERB if verb not in ("energies", "products")]
SITUATIONS = ("chunk", "static cache", "model window", "bidirectional")


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def assert_same(got: list[Tensor] | tuple[Tensor, ...], expected: list[Tensor] | tuple[Tensor, ...]) -> None:
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


PLANS = {
    "blocks, columns and bands": {},
    "other blocks": {"block_q": 16, "block_k": 16},
    "window": {"limit": 70},
    "orders": {"permuted": True},
    "means": {"pruned_mean": True},
    "skips": {"skip": 3.0},
    "few queries": {"query_len": 5},
    "one query": {"query_len": 1},
    "padded": {"padded": True},
}


@every_case
@pytest.mark.parametrize("name", PLANS)
def test_attention(isa: str, dtype: torch.dtype, layout: str, name: str) -> None:
    for seed, (page, dim) in enumerate(SIZES[layout]):
        made_of = {"query_len": 150, "key_len": 330, "batch": 1, "heads": 2} | PLANS[name]
        plan = random_plan(seed, **made_of)
        call = draw(plan, heads=4, groups=2, dim=dim, dtype=dtype, scale=0.3, softcap=[None, 9.0][seed % 2])
        own = paged(call, layout, page, seed)
        assert_same(cpu.attend(own, plan), cpu.attend(call, plan))
        assert untouched(own)


@every_case
@pytest.mark.parametrize(("query_len", "group"), [(150, 1), (150, 3), (330, 1), (330, 2)])
def test_plans_of_many_single_keys(isa: str, dtype: torch.dtype, layout: str, query_len: int, group: int) -> None:
    """Enough of them that a head's keys are laid out as rows first; by query block, and shared by several."""
    extent = Extent([330 - query_len], [query_len], [0], [330])
    blocks = Grid(extent, 64, 64).query_blocks
    for seed, share in enumerate((0.4, 0.03)):
        chosen = torch.rand(4, -(-blocks // group), 330, generator=torch.Generator().manual_seed(seed)) < share
        plan = SparsePlan.from_block_mask(
            torch.zeros(1, 4, blocks, 6, dtype=torch.bool),
            query_len,
            330,
            extent=extent,
            block_q=64,
            block_k=64,
            column_group=group,
            column_indptr=torch.nn.functional.pad(chosen.sum(-1).flatten().cumsum(0), (1, 0)),
            column_indices=chosen.flatten(0, 1).nonzero()[:, 1].to(torch.int32),
            window=3,
        )
        call = draw(plan, heads=4, groups=2, dim=32, dtype=dtype)
        own = paged(call, layout, 32)
        assert_same(cpu.attend(own, plan), cpu.attend(call, plan))
        assert untouched(own)


@every_case
def test_some_rows(isa: str, dtype: torch.dtype, layout: str) -> None:
    plan = random_plan(3, batch=1, heads=2, query_len=150, key_len=330)
    call = draw(plan, heads=4, groups=2, dim=32, dtype=dtype)
    rows = torch.tensor([[0, 3, 77, 149]])
    own = paged(call, layout, 32)
    assert_same(cpu.attend_rows(own, plan, rows), cpu.attend_rows(call, plan, rows))
    assert untouched(own)


@every_case
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("verb", VERBS)
def test_scores(isa: str, dtype: torch.dtype, layout: str, situation: str, verb: str) -> None:
    for shape, (page, dim) in zip(("odd blocks", "small blocks"), SIZES[layout][:2], strict=True):
        call = first_row(make_call(situation, length=190, heads=4, groups=2, dim=dim, dtype=dtype))
        own = paged(call, layout, page)
        assert_same(scores_of(cpu, verb, own, shape), scores_of(cpu, verb, call, shape))
        assert untouched(own)


@every_case
@pytest.mark.parametrize("shape", SHAPES)
def test_scores_of_pages_and_blocks_of_any_size(isa: str, dtype: torch.dtype, layout: str, shape: str) -> None:
    for page, dim in SIZES[layout][2:]:
        call = make_call("chunk", length=170, heads=4, groups=2, dim=dim, dtype=dtype)
        own = paged(call, layout, page)
        for verb in ("probe", "pool", "antidiagonals"):
            assert_same(scores_of(cpu, verb, own, shape), scores_of(cpu, verb, call, shape))


@every_case
def test_pools_before_the_rotary_embedding(isa: str, dtype: torch.dtype, layout: str) -> None:
    for situation in SITUATIONS:
        call = first_row(make_call(situation, length=150, heads=4, groups=2, dim=32, dtype=dtype))
        own, grid = paged(call, layout, 32), Grid(call.extent, 24, 40)
        assert_same(cpu.pool_before_rotary(own, grid), cpu.pool_before_rotary(call, grid))
        assert untouched(own)


@every_case
def test_threads_do_not_matter(isa: str, dtype: torch.dtype, layout: str) -> None:
    plan = random_plan(5, batch=1, heads=2, query_len=200, key_len=900)
    own = paged(draw(plan, heads=4, groups=2, dim=32, dtype=dtype), layout, 64)
    same_on_threads(lambda: cpu.attend(own, plan))
    same_on_threads(
        lambda: [x for verb in ("probe", "pool", "antidiagonals") for x in scores_of(cpu, verb, own, "wide keys")]
    )


# Whose planning reads the keys in torch; and those that need numbers of a model's heads.
READERS = ("pbs", "sparge", "grid")
OF_HEADS = ("duo_attention", "lserve", "moa", "per_head")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in methods.available() if name not in OF_HEADS])
def test_plans_of_every_method(name: str, layout: str) -> None:
    call = make_call("chunk", length=400, heads=4, groups=2, dim=32, dtype=torch.bfloat16)
    own = paged(call, layout, 32)
    method = methods.create(name)
    found, expected = method.plan(own), method.plan(call)
    for part in ("block_indptr", "block_indices", "column_indptr", "column_indices"):
        assert torch.equal(getattr(found, part), getattr(expected, part))
    assert untouched(own) == (name not in READERS)
    assert_same(cpu.attend(own, found), cpu.attend(call, expected))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_some_of_the_heads(layout: str) -> None:
    """Neighbours stay where they are."""
    call = make_call("chunk", length=190, heads=8, groups=4, dim=32, dtype=torch.bfloat16)
    plan = SparsePlan.dense(2, call.query_len, call.key_len, call.extent)
    own = paged(call, layout, 32)
    some = own.of_groups([1, 2])
    assert_same(cpu.attend(some, plan), cpu.attend(call.of_groups([1, 2]), plan))
    assert untouched(some)
    assert untouched(own)
    apart = own.of_groups([0, 3])
    assert_same(cpu.attend(apart, plan), cpu.attend(call.of_groups([0, 3]), plan))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_with_keys_in_pages_and_values_in_rows(layout: str) -> None:
    plan = random_plan(7, batch=1, heads=2, query_len=150, key_len=330)
    call = draw(plan, heads=4, groups=2, dim=32, dtype=torch.bfloat16)
    own = paged(call, layout, 32)
    expected = cpu.attend(call, plan)
    own.k.abs()  # asks for the rows of the keys
    assert not is_untouched(own.k)
    assert_same(cpu.attend(own, plan), expected)
    assert is_untouched(own.values)


def table_of(x: Tensor) -> Tensor:
    assert isinstance(x, Paged)
    return x.table


class TestBounds:
    """What is not checked as pages are made is checked as the kernels take them."""

    def call(self) -> AttentionCall:
        return paged(make_call("no padding", length=100, heads=2, groups=1, dim=32, dtype=torch.bfloat16), "tiles", 32)

    @pytest.mark.parametrize("number", [-1, 7, 1 << 30])
    def test_a_page_that_is_not_there(self, number: int) -> None:
        call = self.call()
        plan = SparsePlan.dense(1, 100, 100, call.extent)
        table_of(call.k)[0, 2] = number
        for compute in (lambda: cpu.attend(call, plan), lambda: cpu.pool_keys(call, Grid(call.extent, 64, 64))):
            with pytest.raises(ValueError, match=f"a page of the block table must be .* at most 6, got {number}"):
                compute()

    def test_a_table_that_was_cut(self) -> None:
        call = self.call()
        table_of(call.values).resize_(3)
        with pytest.raises(ValueError, match="3 pages of 32 tokens cannot hold 100 tokens"):
            cpu.attend(call, SparsePlan.dense(1, 100, 100, call.extent))

    @pytest.mark.parametrize(("name", "value"), [("page", 24), ("page", 0), ("form", "value_tiles")])
    def test_a_form_that_does_not_fit(self, name: str, value: object) -> None:
        call = paged(make_call("no padding", length=100, heads=2, groups=1, dim=32), "columns", 32)
        setattr(call.k, name, value)
        with pytest.raises(ValueError, match=r"got pages of 32 tokens of 32|cannot hold 100|must be at least 1"):
            cpu.attend(call, SparsePlan.dense(1, 100, 100, call.extent))
