"""Planning in C++ against its torch oracles: every instruction set, dtype and situation."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import Extent, SparsePlan, estimators, methods
from gossamer.backends import cpu
from gossamer.backends.cpu import planning
from gossamer.methods import _choice
from gossamer.plan import ceil_div
from gossamer.profiles import HeadPattern, Profile
from gossamer.selectors import CsrBuilder, relative_to_max, top_k
from gossamer.testing import SITUATIONS, Case, assert_keeps_diagonal, make_case

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
every_isa = pytest.mark.parametrize("isa", cpu.supported_isas() or ["portable"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
every_situation = pytest.mark.parametrize("situation", SITUATIONS)


def force(monkeypatch, isa: str) -> None:
    monkeypatch.setenv(cpu.ENVIRONMENT, isa)


def live_range(extent: Extent) -> Tensor:
    return torch.stack([extent.key_start, extent.key_start + extent.key_count], dim=1)


def with_strides(x: Tensor) -> Tensor:
    """The same values with tokens before heads in memory, between rows of NaN, as projections leave them."""
    holder = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 5), math.nan, dtype=x.dtype)
    holder[..., : x.shape[3]] = x.transpose(1, 2)
    return holder[..., : x.shape[3]].transpose(1, 2)


@every_isa
@every_dtype
@every_situation
@pytest.mark.parametrize(("length", "last", "dim"), [(1, 64, 16), (50, 64, 20), (130, 64, 80), (190, 100, 33)])
def test_probe(monkeypatch, isa: str, dtype: torch.dtype, situation: str, length: int, last: int, dim: int) -> None:
    force(monkeypatch, isa)
    case = make_case(situation, length=length, heads=4, groups=2, dim=dim, dtype=dtype)
    got = planning.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent, last=last)
    expected = estimators._probe_in_torch(case.q, case.k, case.scale, case.extent, last)
    for mass, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(mass, oracle, atol=2e-6, rtol=1e-5)


def test_probe_over_several_stretches_of_keys(monkeypatch) -> None:
    case = make_case("left padding", length=5000, heads=2, groups=1, dim=16)
    got = planning.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent)
    expected = estimators._probe_in_torch(case.q, case.k, case.scale, case.extent, 64)
    for mass, oracle in zip(got, expected, strict=True):
        torch.testing.assert_close(mass, oracle, atol=5e-6, rtol=1e-5)


def test_probe_of_logits_that_overflow_an_exponential() -> None:
    case = make_case("no padding", length=300, heads=2, groups=1, dim=16)
    columns, _ = planning.last_query_probe(case.q, case.k, scale=100.0, extent=case.extent)
    expected, _ = estimators._probe_in_torch(case.q, case.k, 100.0, case.extent, 64)
    torch.testing.assert_close(columns, expected, atol=1e-3, rtol=1e-3)  # logits of 1000 are exact to 1e-4


@every_isa
@every_dtype
@every_situation
@pytest.mark.parametrize("block", [1, 7, 64])
def test_pool(monkeypatch, isa: str, dtype: torch.dtype, situation: str, block: int) -> None:
    force(monkeypatch, isa)
    case = make_case(situation, length=150, heads=2, groups=2, dim=72, dtype=dtype)
    position = case.extent.key_positions(case.key_len)
    live = (position >= 0) & (position < case.extent.key_count[:, None])
    got = planning.pool(case.k, live_range(case.extent), block)
    torch.testing.assert_close(got, estimators._pool_in_torch(case.k, live, block), atol=1e-6, rtol=1e-6)


def energies(case: Case, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Ours, in two parts, and the oracle's, from the same pooled keys."""
    pooled = estimators.pool_keys(case.k, case.extent, block_k).to(case.q.dtype)
    blocks = ceil_div(case.query_len, block_q)
    sizes = {"scale": case.scale, "extent": case.extent, "block_q": block_q, "block_k": block_k}
    ours = [
        planning.row_block_energy(case.q, pooled, case.key_len, **sizes, at=at, stop=stop)
        for at, stop in ((0, blocks // 2), (blocks // 2, blocks))
    ]
    oracle = estimators._energy_in_torch(case.q, pooled, case.key_len, *sizes.values())
    return torch.cat(ours, dim=2), torch.cat([e for _, e in oracle], dim=2)


@every_isa
@every_dtype
@every_situation
@pytest.mark.parametrize(("length", "block_q", "block_k"), [(1, 64, 128), (150, 32, 16), (199, 100, 1), (333, 64, 128)])
def test_row_block_energy(
    monkeypatch, isa: str, dtype: torch.dtype, situation: str, length: int, block_q: int, block_k: int
) -> None:
    force(monkeypatch, isa)
    case = make_case(situation, length=length, heads=4, groups=2, dim=24, dtype=dtype)
    ours, oracle = energies(case, block_q, block_k)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=2e-5)


def test_energies_ignore_padding_queries_of_nan() -> None:
    case = make_case("left padding", length=300, heads=2, groups=1, dim=16)
    expected, _ = energies(case, 64, 32)
    padding = case.extent.query_positions(case.query_len) < 0
    spoilt = Case(case.q.masked_fill(padding[:, None, :, None], math.nan), case.k, case.v, case.extent, case.scale)
    got, _ = energies(spoilt, 64, 32)
    assert torch.equal(got, expected)


def test_results_do_not_depend_on_threads_or_strides() -> None:
    case = make_case("left padding", length=2500, heads=4, groups=2, dim=40, dtype=torch.bfloat16)
    before = torch.get_num_threads()

    def results(q: Tensor, k: Tensor) -> list[Tensor]:
        here = Case(q, k, case.v, case.extent, case.scale)
        pooled = planning.pool(k, live_range(case.extent), 64)
        mass = planning.last_query_probe(q, k, scale=case.scale, extent=case.extent)
        return [*mass, pooled, energies(here, 64, 64)[0]]

    try:
        torch.set_num_threads(1)
        expected = results(case.q, case.k)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            for got, one in zip(results(with_strides(case.q), with_strides(case.k)), expected, strict=True):
                assert torch.equal(got, one)
    finally:
        torch.set_num_threads(before)


def test_plans_do_not_depend_on_threads() -> None:
    case = make_case("left padding", length=3000, heads=4, groups=2, dim=40, dtype=torch.bfloat16)
    before = torch.get_num_threads()

    def results() -> list[Tensor]:
        found = []
        for name, fields in (("vertical_slash", {"slash_size": 500}), ("max_relative", {"alpha": 0.3})):
            plan = methods.create(name, **fields).plan(case.q, case.k, scale=case.scale, extent=case.extent)
            found += [plan.block_indptr, plan.block_indices, plan.column_indices, plan.count_pairs()]
        return found

    try:
        torch.set_num_threads(1)
        expected = results()
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert all(torch.equal(*pair) for pair in zip(results(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    csr = CsrBuilder()
    csr.add(mask)
    return csr.build()


@pytest.mark.parametrize("width", [1, 63, 64, 65, 300])
@pytest.mark.parametrize("rule", ["top", "relative"])
@pytest.mark.parametrize("seed", range(3))
def test_rules_with_ties(width: int, rule: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, rows = 2, 3, 70
    # Few values, so that there are ties; some of -inf or 0.
    scores = torch.randint(-1, 6, (batch, heads, rows, width), generator=generator).float()
    low = torch.randint(0, width + 1, (batch, rows, 2), generator=generator)
    seen = low.sort(dim=-1).values
    nothing = torch.zeros(batch, rows, 2, dtype=torch.int64)
    column = torch.arange(width)
    inside = ((column >= seen[..., :1]) & (column < seen[..., 1:]))[:, None]
    if rule == "top":
        budgets = torch.tensor([0, 5, width + 1])
        scores = scores.masked_fill((scores < 0) | ~inside, -math.inf)
        expected = top_k(scores, budgets[:, None].expand(scores.shape[:3]))
        kwargs: dict[str, Any] = {"budgets": budgets}
    else:
        scores = scores.clamp(min=0)
        expected = relative_to_max(scores, 0.5) & inside
        kwargs = {"alpha": 0.5}
    csr = CsrBuilder()
    csr.add_lists(
        *planning.choose(planning.Ranges(seen, nothing, nothing[:, 0]), heads, width, scores=scores, **kwargs)
    )
    for got, oracle in zip(csr.build(), lists_of(expected), strict=True):
        assert torch.equal(got, oracle)


@pytest.mark.parametrize(("name", "fields"), [("vertical_slash", {}), ("max_relative", {}), ("block_sparse", {})])
def test_plans_from_nan_keep_the_diagonal(name: str, fields: dict) -> None:
    case = make_case("no padding", length=1500, heads=2, groups=1, dim=16)
    q = torch.full_like(case.q, math.nan)
    plan = methods.create(name, **fields).plan(q, case.k, scale=case.scale, extent=case.extent)
    assert_keeps_diagonal(case, plan)


@every_situation
@pytest.mark.parametrize("length", [1, 65, 700])
@pytest.mark.parametrize("has_bands", [False, True])
def test_forced_blocks_and_bands(monkeypatch, situation: str, length: int, has_bands: bool) -> None:
    case = make_case(situation, length=length, heads=2, groups=1, dim=8)
    visible = estimators.BlockVisibility(case.extent, case.query_len, case.key_len, 64, 32, case.q.device)
    generator = torch.Generator().manual_seed(length)
    batch, blocks = visible.last_query.shape
    bands = torch.rand(batch, 2, 9, generator=generator) < 0.3

    def build(planner: str) -> tuple[Tensor, Tensor]:
        monkeypatch.setenv(planning.ENVIRONMENT, planner)
        choice = _choice.BlockChoice(
            visible,
            2,
            window=3,
            leading=2,
            tail=torch.arange(blocks).expand(batch, -1) >= blocks - 1,
            bands=bands if has_bands else None,
            forcing=torch.tensor([[True, False]]).expand(batch, 2),
        )
        choice.add(0, blocks // 2)
        choice.add(blocks // 2, blocks)
        return choice.build()

    for got, oracle in zip(build(""), build("torch"), strict=True):
        assert torch.equal(got, oracle)


MIXED = (
    HeadPattern("vertical_slash", (40, 200)),
    HeadPattern("block_sparse", (3,)),
    HeadPattern("a_shape", (8, 70)),
    HeadPattern("dense", ()),
)
PLANNERS = [
    ("vertical_slash", {"vertical_size": 60, "slash_size": 300}),
    ("vertical_slash", {"vertical_size": 0, "slash_size": 90, "exact": True}),
    ("minference", {"profile": Profile((MIXED,))}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 256}),
    ("max_relative", {"alpha": 0.0}),
    ("block_sparse", {"blocks": 4}),
]


@every_situation
@every_dtype
@pytest.mark.parametrize(("name", "fields"), PLANNERS)
@pytest.mark.parametrize("length", [65, 1000])
def test_methods_make_the_same_plans(
    monkeypatch, situation: str, dtype: torch.dtype, name: str, fields: dict, length: int
) -> None:
    case = make_case(situation, length=length, heads=4, groups=2, dim=32, dtype=dtype)
    method = methods.create(name, **fields)
    ours = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    monkeypatch.setenv(planning.ENVIRONMENT, "torch")
    oracle = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    for part in ("block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window"):
        assert torch.equal(getattr(ours, part), getattr(oracle, part)), part


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("causal", [True, False])
def test_counted_pairs(monkeypatch, seed: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, keys = (int(torch.randint(1, 400, (1,), generator=generator)) for _ in range(2))
    extent = Extent([keys - length - 3, 7], [3, 0], [max(0, keys - 3), keys // 2])
    shape = (2, 2, ceil_div(length, 32), ceil_div(keys, 16))
    groups = ceil_div(shape[2], 3)
    column_indptr, column_indices = lists_of(torch.rand(2, 2, groups, keys, generator=generator) < 0.2)
    plan = SparsePlan.from_block_mask(
        torch.rand(shape, generator=generator) < 0.3,
        length,
        keys,
        extent=Extent(extent.query_start, extent.key_start.clamp(max=keys), extent.key_count),
        block_q=32,
        block_k=16,
        column_group=3,
        column_indptr=column_indptr,
        column_indices=column_indices,
        sink=[0, seed % 5],
        window=[seed % 7 * 11, 0],
        causal=causal,
        limit=None if seed % 3 else 50,
    )
    assert torch.equal(planning.count_pairs(plan), plan.to_mask().sum(dim=(2, 3)))


def test_permuted_plans_are_still_counted() -> None:
    plan = SparsePlan(1, 4, 4, Extent.full(1, 4, 4), window=2, k_order=torch.tensor([[[3, 1, 0, 2]]]).int())
    assert int(plan.count_pairs().sum()) == int(plan.to_mask().sum())
    with pytest.raises(ValueError, match="permuted plan"):
        planning.count_pairs(plan)


def test_switch(monkeypatch) -> None:
    x = torch.zeros(1, 1, 4, 8)
    assert planning.serves(x)
    assert not planning.serves(x.double())
    assert not planning.serves(torch.zeros(1, 1, 4, 257))
    monkeypatch.setenv(planning.ENVIRONMENT, "torch")
    assert not planning.serves(x)
    monkeypatch.setenv(planning.ENVIRONMENT, "numpy")
    with pytest.raises(ValueError, match="GOSSAMER_PLANNER='numpy' is not known"):
        planning.serves(x)


def test_bad_input_is_named() -> None:
    case = make_case("no padding", length=10, heads=3, groups=2, dim=8)
    probe = {"scale": 1.0, "extent": case.extent}
    with pytest.raises(ValueError, match=r"G divides H, got \(1, 3, 10, 8\) and \(1, 2, 10, 8\)"):
        planning.last_query_probe(case.q, case.k, **probe)
    with pytest.raises(TypeError, match=r"got torch.float64 on cpu"):
        planning.last_query_probe(case.q[:, :2].double(), case.k.double(), **probe)
    with pytest.raises(ValueError, match="at least one row, got last=0"):
        planning.last_query_probe(case.q[:, :2], case.k, **probe, last=0)
    with pytest.raises(ValueError, match="live keys up to slot 11, but there are 10"):
        planning.last_query_probe(case.q[:, :2], case.k, scale=1.0, extent=Extent([0], [0], [11]))
    with pytest.raises(ValueError, match="2 batch rows"):
        planning.last_query_probe(case.q[:, :2], case.k, scale=1.0, extent=Extent.full(2, 10, 10))
    with pytest.raises(ValueError, match="do not give 2 pooled keys"):
        planning.row_block_energy(case.q[:, :2], case.k[:, :, :2], 10, **probe, block_q=4, block_k=4, at=0, stop=1)
    nothing = torch.zeros(1, 1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="exactly one rule"):
        planning.choose(planning.Ranges(nothing, nothing, nothing[:, 0]), 1, 4, scores=torch.zeros(1, 1, 1, 4))
