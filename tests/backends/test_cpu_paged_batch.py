"""Several sequences in the pages of one cache: bounds of their keys, scores by these, and attention where they lie."""

from __future__ import annotations

import pytest
import torch
from cpu_checks import KERNELS, every_kernel, needs_kernels, poisoned, same_on_threads
from paged_calls import LAYOUTS, of_sequences
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.paged import Paged, Table

pytestmark = [needs_kernels, poisoned]
COUNTS = [70, 200, 5, 129]
SIZE, PAGE = 16, 32
CASES = [
    pytest.param(isa, dtype, layout, id=f"{name}-{layout}")
    for isa, dtype, name in KERNELS
    for layout in LAYOUTS
    if layout != "tiles" or dtype != torch.float32
]
every_case = pytest.mark.parametrize(("isa", "dtype", "layout"), CASES)


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def drawn(
    dtype: torch.dtype, layout: str = "columns", counts: list[int] = COUNTS, dim: int = 64, groups: int = 2
) -> tuple[AttentionCall, AttentionCall]:
    """A step of so many sequences in pages, and of the same as rows."""
    source = torch.Generator().manual_seed(sum(counts) + dim)
    batch, longest = len(counts), max(counts)
    each = -(-longest // PAGE)
    number = batch * each + 3
    table = torch.randperm(number, generator=source)[: batch * each].view(batch, each)
    q = torch.randn(batch, 4 * groups, 1, dim, generator=source).to(dtype)
    k, v = (torch.randn(batch, groups, longest, dim, generator=source).to(dtype) for _ in range(2))
    extent = Extent([n - 1 for n in counts], [1] * batch, [0] * batch, counts)
    keys, values = (
        of_sequences(x, counts, form, PAGE, table, number) for x, form in zip((k, v), LAYOUTS[layout], strict=True)
    )
    return AttentionCall(q, keys, values, extent, 0.2, layer=3), AttentionCall(q, k, v, extent, 0.2, layer=3)


def blank(keys: Paged, size: int = SIZE) -> tuple[Tensor, Tensor]:
    """Of a cache of which nothing is known: bounds, and how many tokens they are of."""
    dtype = torch.float16 if keys.dtype == torch.float16 else torch.bfloat16
    number, groups, _ = keys.pages.shape
    bounds = torch.full((number, groups, keys.page // size, 2 * keys.shape[3]), torch.nan, dtype=dtype)
    return bounds, torch.zeros(number, dtype=torch.int32)


def kept(backend, keys: Tensor, counts: list[int], size: int = SIZE) -> tuple[Tensor, Tensor]:
    assert isinstance(keys, Paged)
    bounds, held = blank(keys, size)
    backend.keep_bounds(keys, torch.tensor(counts), bounds, held)
    return bounds, held


def assert_same(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=0, rtol=0, equal_nan=True)


@every_case
@pytest.mark.parametrize(("dim", "groups", "size"), [(64, 2, 16), (80, 1, 8), (128, 3, 32), (32, 1, 2)])
def test_bounds_are_those_of_the_definition(isa: str, dtype, layout: str, dim: int, groups: int, size: int) -> None:
    call, rows = drawn(dtype, layout, dim=dim, groups=groups)
    found = kept(cpu, call.k, COUNTS, size)
    assert_same(found, kept(reference, call.k, COUNTS, size))
    assert isinstance(call.k, Paged)
    for b, count in enumerate(COUNTS):  # and, written out, bounds: of 16 bits exactly
        for first in range(0, count, size):
            page = found[0][call.k.table[b, first // PAGE], :, first % PAGE // size].float()
            keys = rows.k[b, :, first : min(first + size, count)].float()
            above, below = page[:, :dim] - keys.amax(dim=1), keys.amin(dim=1) - page[:, dim:]
            assert above.min() >= 0
            assert below.min() >= 0
            most = 0.0 if dtype != torch.float32 else 2**-7 * float(keys.abs().max())
            assert max(float(above.max()), float(below.max())) <= most


@every_kernel
def test_bounds_grow_with_the_sequences(isa: str, dtype) -> None:
    """Token by token as at once; only pages of which more is known than before are looked at."""
    call, _ = drawn(dtype)
    assert isinstance(call.k, Paged)
    bounds, held = blank(call.k)
    for counts in ([1, 1, 1, 1], [15, 100, 2, 33], [16, 101, 3, 127], [17, 130, 5, 128], COUNTS):
        cpu.keep_bounds(call.k, torch.tensor(counts), bounds, held)
    assert_same((bounds, held), kept(reference, call.k, COUNTS))
    call.k.pages.fill_(torch.nan)
    before = bounds.clone()
    cpu.keep_bounds(call.k, torch.tensor(COUNTS), bounds, held)
    assert_same((bounds,), (before,))


@pytest.mark.parametrize("backend", [cpu, reference])
def test_what_was_written_is_worked_out_anew_and_nothing_else(backend) -> None:
    """A page that changed hands, one that was written from the middle on, and slots that are none."""
    call, _ = drawn(torch.float32)
    keys = call.k
    assert isinstance(keys, Paged)
    bounds, held = kept(backend, keys, COUNTS)
    given_on, continued = (int(keys.table[1, place]) for place in (0, 2))
    untouched = int(keys.table[1, 1])
    keys.pages[[given_on, continued]] = torch.randn(
        2, *keys.pages.shape[1:], generator=torch.Generator().manual_seed(5)
    )
    slots = torch.tensor([-1, given_on * PAGE + 3, given_on * PAGE, continued * PAGE + 18, -1])
    backend.forget_slots(slots, PAGE, held)
    assert [int(held[page]) for page in (given_on, continued, untouched)] == [0, 18, 32]
    before = bounds.clone()
    backend.keep_bounds(keys, torch.tensor(COUNTS), bounds, held)
    wanted, _ = kept(reference, keys, COUNTS)
    assert_same((bounds[given_on], bounds[continued, :, 1]), (wanted[given_on], wanted[continued, :, 1]))
    # Its first tokens were not written, so nobody looked at them again.
    assert_same((bounds[continued, :, 0], bounds[untouched]), (before[continued, :, 0], before[untouched]))
    assert int(held[continued]) == 32


@pytest.mark.parametrize("backend", [cpu, reference])
@pytest.mark.parametrize("counts", [[40, 43, 41], [43, 40, 42]])
def test_sequences_may_share_pages(backend, counts: list[int]) -> None:
    """As drafts do, each of which sees a token more; and sequences with a prefix in common."""
    call, _ = drawn(torch.float32, counts=[43])
    assert isinstance(call.k, Paged)
    shared = Paged(call.k.pages, call.k.table.expand(3, -1), 43, PAGE, call.k.form)
    bounds, held = blank(shared)
    backend.keep_bounds(shared, torch.tensor(counts), bounds, held)
    assert_same((bounds, held), kept(reference, call.k, [43]))


@every_kernel
def test_scores_are_those_of_bounds_as_rows(isa: str, dtype) -> None:
    call, _ = drawn(dtype)
    assert isinstance(call.k, Paged)
    bounds, _ = kept(cpu, call.k, COUNTS)
    where = Paged(bounds.flatten(2), Table(call.k.table), -(-max(COUNTS) // SIZE), PAGE // SIZE, "rows")
    found = cpu.page_scores(call, where, SIZE)
    assert where.at_hand() is where
    as_rows = cpu.page_scores(call, where.rows().contiguous(), SIZE)
    assert_same((found,), (as_rows,))
    torch.testing.assert_close(found, reference.page_scores(call, where, SIZE), atol=1e-4, rtol=1e-4)


PLANS = {
    "columns": lambda call: columns(call),
    "everything": lambda call: SparsePlan.dense(call.groups, 1, call.key_len, call.extent),
    "a band": lambda call: SparsePlan(
        heads=call.groups, query_len=1, key_len=call.key_len, extent=call.extent, sink=3, window=20
    ),
}


def columns(call: AttentionCall) -> SparsePlan:
    """Every third token of each row, and its newest."""
    lists = [[*range(b % 3, n - 1, 3), n - 1] for b, n in enumerate(COUNTS) for _ in range(call.groups)]
    ends = torch.tensor([0, *[len(one) for one in lists]]).cumsum(0)
    return SparsePlan(
        heads=call.groups,
        query_len=1,
        key_len=call.key_len,
        extent=call.extent,
        column_indptr=ends,
        column_indices=torch.tensor([t for one in lists for t in one], dtype=torch.int32),
    )


@every_case
@pytest.mark.parametrize("name", PLANS)
def test_attention_is_that_of_the_same_rows(isa: str, dtype, layout: str, name: str) -> None:
    call, rows = drawn(dtype, layout)
    plan = PLANS[name](call)
    found = cpu.attend(call, plan)
    assert_same(found, cpu.attend(rows, plan))
    assert call.k.at_hand() is call.k  # type: ignore[attr-defined]
    assert call.values.at_hand() is call.v  # type: ignore[attr-defined]
    same_on_threads(lambda: cpu.attend(call, plan))
    wanted = reference.attend(rows, plan)
    exact = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    torch.testing.assert_close(found[0], wanted[0], atol=exact, rtol=exact)


def test_the_definition_reads_a_batch_of_pages() -> None:
    call, rows = drawn(torch.float32)
    for b, count in enumerate(COUNTS):
        assert torch.equal(call.k[b, :, :count], rows.k[b, :, :count])
    second = call.k.of_heads(1, 2)  # type: ignore[attr-defined]
    assert torch.equal(second[2, :, :5], rows.k[2, 1:, :5])


class TestRefusals:
    def test_tables(self) -> None:
        pages = torch.zeros(5, 1, PAGE * 16)
        with pytest.raises(ValueError, match="2 pages of 32 tokens cannot hold 65 tokens"):
            Paged(pages, torch.tensor([[0, 1], [2, 3]]), 65, PAGE, "rows")
        with pytest.raises(ValueError, match="the table names pages 0 to 5 of 5"):
            Paged(pages, Table(torch.tensor([[0, 1], [2, 5]])), 33, PAGE, "rows")

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"counts": torch.tensor(COUNTS[:3])}, "counts"),
            ({"counts": torch.tensor([*COUNTS[:3], 201])}, "tokens of a sequence"),
            ({"counts": torch.tensor([*COUNTS[:3], -1])}, "tokens of a sequence"),
            ({"held": torch.zeros(9, dtype=torch.int32)}, "bounds"),
            ({"bounds": torch.zeros(1, dtype=torch.bfloat16).expand(31, 2, 5, 128).contiguous()}, "must divide"),
            ({"bounds": torch.zeros(31, 2, 2, 128)}, "16 bits"),
        ],
    )
    def test_bounds(self, change: dict[str, Tensor], message: str) -> None:
        call, _ = drawn(torch.float32)
        bounds, held = blank(call.k)  # type: ignore[arg-type]
        assert len(held) == 31
        given = {"keys": call.k, "counts": torch.tensor(COUNTS), "bounds": bounds, "held": held} | change
        with pytest.raises(ValueError, match=message):
            cpu.keep_bounds(**given)  # type: ignore[arg-type]

    def test_slots_beyond_the_cache_are_none(self) -> None:
        held = torch.full((2,), 7, dtype=torch.int32)
        cpu.forget_slots(torch.tensor([2 * PAGE, 1 << 40, PAGE + 2]), PAGE, held)
        assert held.tolist() == [7, 2]
