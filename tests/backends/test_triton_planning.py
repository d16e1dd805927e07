"""Planning in Triton against its torch oracles: on a CUDA device where there is one, else interpreted on the CPU."""

import itertools
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import Extent, Policy, SparsePlan, estimators, methods, sparse_attention
from gossamer.backends import planners
from gossamer.backends import triton as executor
from gossamer.backends.cpu import planning as cpu_planning
from gossamer.backends.triton import planning
from gossamer.methods import _choice
from gossamer.plan import ceil_div
from gossamer.profiles import HeadPattern, Profile
from gossamer.selectors import CsrBuilder, relative_to_max, top_k
from gossamer.testing import SITUATIONS, Case, assert_keeps_diagonal, make_case, random_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning"),
    pytest.mark.skipif(not executor.is_available(), reason=f"{executor.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
FULL_SIZE = 16 if ON_GPU else 1  # the interpreter is slow
every_situation = pytest.mark.parametrize("situation", SITUATIONS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
PLAN_PARTS = ("block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window")


@pytest.fixture(autouse=True)
def on_device() -> Iterator[None]:
    with nullcontext() if ON_GPU else planners.triton_on_cpu():
        yield


def case_of(situation: str, **sizes: Any) -> Case:
    """As `make_case`, on the device, with NaN in all dead slots and padding queries."""
    case = make_case(situation, **sizes)
    position = case.extent.key_positions(case.key_len)
    dead = ((position < 0) | (position >= case.extent.key_count[:, None]))[:, None, :, None]
    padding = (case.extent.query_positions(case.query_len) < 0)[:, None, :, None]
    q, k, v = case.q.masked_fill(padding, math.nan), case.k.masked_fill(dead, math.nan), case.v
    return Case(q.to(DEVICE), k.to(DEVICE), v.to(DEVICE), case.extent, case.scale)


def wide(case: Case) -> tuple[Tensor, Tensor]:
    """The inputs' values in fp32: an oracle that does not round logits to the dtype."""
    return case.q.float(), case.k.float()


def live_keys(case: Case) -> tuple[Tensor, Tensor]:
    """As the range that ours takes, and as the mask that the oracle takes."""
    position = case.extent.key_positions(case.key_len)
    live = (position >= 0) & (position < case.extent.key_count[:, None])
    return torch.stack([case.extent.key_start, case.extent.key_start + case.extent.key_count], dim=1), live


@every_dtype
@every_situation
@pytest.mark.parametrize(
    ("length", "last", "dim", "groups"), [(1, 64, 16, 1), (50, 7, 20, 4), (130, 64, 80, 1), (300, 100, 128, 4)]
)
def test_probe(dtype: torch.dtype, situation: str, length: int, last: int, dim: int, groups: int) -> None:
    case = case_of(situation, length=length * FULL_SIZE, heads=4, groups=groups, dim=dim, dtype=dtype)
    got = planning.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent, last=last)
    q, k = (t.nan_to_num() for t in wide(case))
    for mass, oracle in zip(got, estimators._probe_in_torch(q, k, case.scale, case.extent, last), strict=True):
        torch.testing.assert_close(mass, oracle, atol=2e-6, rtol=1e-5)


def test_probe_over_several_splits_of_keys() -> None:
    case = case_of("left padding", length=4200, heads=1, groups=1, dim=16)
    got = planning.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent)
    q, k = (t.nan_to_num() for t in wide(case))
    for mass, oracle in zip(got, estimators._probe_in_torch(q, k, case.scale, case.extent, 64), strict=True):
        torch.testing.assert_close(mass, oracle, atol=5e-6, rtol=1e-5)


def test_probe_of_logits_that_overflow_an_exponential() -> None:
    case = case_of("no padding", length=200, heads=2, groups=1, dim=16)
    columns, _ = planning.last_query_probe(case.q, case.k, scale=100.0, extent=case.extent)
    expected, _ = estimators._probe_in_torch(case.q, case.k, 100.0, case.extent, 64)
    torch.testing.assert_close(columns, expected, atol=1e-3, rtol=1e-3)  # logits of 1000 are exact to 1e-4


@every_dtype
@every_situation
@pytest.mark.parametrize("block", [1, 7, 64])
def test_pool(dtype: torch.dtype, situation: str, block: int) -> None:
    case = case_of(situation, length=75 * FULL_SIZE, heads=2, groups=2, dim=72, dtype=dtype)
    range_of, live = live_keys(case)
    expected = estimators._pool_in_torch(case.k, live.to(DEVICE), block)
    torch.testing.assert_close(planning.pool(case.k, range_of, block), expected, atol=1e-6, rtol=1e-6)


def energies(case: Case, block_q: int, block_k: int) -> tuple[Tensor, Tensor]:
    """Ours, in two parts, and the oracle's, from the same pooled keys."""
    pooled = estimators.pool_keys(case.k, case.extent, block_k).to(case.q.dtype)
    blocks = ceil_div(case.query_len, block_q)
    sizes = {"scale": case.scale, "extent": case.extent, "block_q": block_q, "block_k": block_k}
    ours = [
        planning.row_block_energy(case.q, pooled, case.key_len, **sizes, at=at, stop=stop)
        for at, stop in ((0, blocks // 2), (blocks // 2, blocks))
    ]
    oracle = estimators._energy_in_torch(case.q.float(), pooled.float(), case.key_len, *sizes.values())
    return torch.cat(ours, dim=2), torch.cat([e for _, e in oracle], dim=2)


@every_dtype
@every_situation
@pytest.mark.parametrize(
    ("length", "block_q", "block_k", "groups"), [(1, 64, 128, 4), (150, 32, 16, 1), (199, 100, 3, 2), (333, 64, 128, 1)]
)
def test_row_block_energy(
    dtype: torch.dtype, situation: str, length: int, block_q: int, block_k: int, groups: int
) -> None:
    case = case_of(situation, length=length * FULL_SIZE, heads=4, groups=groups, dim=24, dtype=dtype)
    ours, oracle = energies(case, block_q, block_k)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=2e-5)


def test_energies_of_more_blocks_than_a_tile_and_more_rows() -> None:
    """The largest logit changes from tile to tile, of keys and of rows."""
    case = case_of("no padding", length=400, heads=8, groups=1, dim=16)
    case.k[:, :, 300:] *= 5
    for block_q in (17, 64):
        ours, oracle = energies(case, block_q, 4)
        torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=5e-5)


@every_dtype
def test_wide_heads(dtype: torch.dtype) -> None:
    """Head dimensions above 128 have tiles of their own."""
    case = case_of("left padding", length=200, heads=4, groups=2, dim=144, dtype=dtype)
    ours, oracle = energies(case, 32, 4)
    torch.testing.assert_close(ours, oracle, atol=1e-6, rtol=2e-5)
    got = planning.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent, last=40)
    q, k = (t.nan_to_num() for t in wide(case))
    for mass, oracle in zip(got, estimators._probe_in_torch(q, k, case.scale, case.extent, 40), strict=True):
        torch.testing.assert_close(mass, oracle, atol=2e-6, rtol=1e-5)


@every_situation
@pytest.mark.parametrize(("block_q", "block_k", "stride", "dim"), [(64, 128, 16, 64), (24, 40, 8, 80), (4, 6, 2, 20)])
def test_antidiagonal_scores(situation: str, block_q: int, block_k: int, stride: int, dim: int) -> None:
    case = case_of(situation, length=101 * FULL_SIZE, heads=4, groups=2, dim=dim)
    sizes = {"block_q": block_q, "block_k": block_k, "stride": stride}
    ours = estimators.antidiagonal_scores(case.q, case.k, scale=case.scale, extent=case.extent, **sizes)
    oracle = estimators._antidiagonals_in_torch(case.q, case.k, case.scale, case.extent, **sizes)
    got, expected = (torch.cat([mass for _, mass in parts], dim=2) for parts in (ours, oracle))
    torch.testing.assert_close(got, expected, atol=2e-6, rtol=1e-5)


def test_scores_repeat_and_do_not_depend_on_strides() -> None:
    case = case_of("left padding", length=150 * FULL_SIZE, heads=4, groups=2, dim=40, dtype=torch.bfloat16)

    def results(q: Tensor, k: Tensor) -> list[Tensor]:
        here = Case(q, k, case.v, case.extent, case.scale)
        pooled = planning.pool(k, live_keys(case)[0], 64)
        mass = planning.last_query_probe(q, k, scale=case.scale, extent=case.extent)
        return [*mass, pooled, energies(here, 64, 64)[0]]

    def spread(x: Tensor) -> Tensor:
        """Tokens before heads in memory, between rows of NaN, as projections leave them."""
        holder = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 5), math.nan, dtype=x.dtype)
        holder = holder.to(DEVICE)
        holder[..., : x.shape[3]] = x.transpose(1, 2)
        return holder[..., : x.shape[3]].transpose(1, 2)

    expected = results(case.q, case.k)
    for q, k in ((case.q, case.k), (spread(case.q), spread(case.k))):
        assert all(torch.equal(*pair) for pair in zip(results(q, k), expected, strict=True))


def lists_of(mask: Tensor) -> tuple[Tensor, Tensor]:
    csr = CsrBuilder()
    csr.add(mask)
    return csr.build()


@pytest.mark.parametrize("width", [1, 31, 33, 300, 5000])
@pytest.mark.parametrize("rule", ["top", "relative", "all"])
@pytest.mark.parametrize("seed", range(2))
def test_rules_with_ties(width: int, rule: str, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batch, heads, rows = 2, 3, 5 * FULL_SIZE
    # Few values, so that there are ties; of both signs, both zeros, some of -inf.
    scores = torch.randint(-2, 6, (batch, heads, rows, width), generator=generator).float()
    scores = torch.where((scores == 0) & (torch.rand(scores.shape, generator=generator) < 0.5), -0.0, scores)
    seen = torch.randint(0, width + 1, (batch, rows, 2), generator=generator).sort(dim=-1).values
    nothing = torch.zeros(batch, rows, 2, dtype=torch.int64)
    column = torch.arange(width)
    inside = ((column >= seen[..., :1]) & (column < seen[..., 1:]))[:, None]
    kwargs: dict[str, Any]
    if rule == "top":
        budgets = torch.tensor([0, 5, width + 1])
        scores = scores.masked_fill((scores == -2) | ~inside, -math.inf)
        expected = top_k(scores, budgets[:, None].expand(scores.shape[:3]))
        kwargs = {"budgets": budgets}
    else:
        alpha = 0.0 if rule == "all" else 0.5
        scores = scores.clamp(min=0)
        expected = relative_to_max(scores, alpha) & inside
        kwargs = {"alpha": alpha}
    ranges = planning.Ranges(seen.to(DEVICE), nothing, nothing[:, 0])
    counts, indices = planning.choose(ranges, heads, width, scores=scores.to(DEVICE), **kwargs)
    assert torch.equal(counts.cpu(), expected.sum(-1))
    assert torch.equal(indices.cpu(), lists_of(expected)[1])


@pytest.mark.parametrize("width", [40, 5000])
def test_nan_takes_from_the_budget_and_is_not_chosen(width: int) -> None:
    scores = torch.randn(1, 1, 3, width, generator=torch.Generator().manual_seed(width))
    scores[..., 0, 3:8] = math.nan
    scores[..., 1, :30] = -math.nan
    scores[..., 2, :] = math.nan
    everything = torch.tensor([0, width]).expand(1, 3, 2)
    ranges = planning.Ranges(everything.to(DEVICE), everything * 0, everything[:, 0] * 0)
    expected = top_k(scores, torch.tensor(12))
    counts, indices = planning.choose(ranges, 1, width, scores=scores.to(DEVICE), budgets=torch.tensor([12]))
    assert torch.equal(counts.cpu(), expected.sum(-1))
    assert torch.equal(indices.cpu(), lists_of(expected)[1])


@every_situation
@pytest.mark.parametrize("length", [1, 65, 700])
@pytest.mark.parametrize("has_bands", [False, True])
def test_forced_blocks_and_bands(monkeypatch, situation: str, length: int, has_bands: bool) -> None:
    case = case_of(situation, length=length, heads=2, groups=1, dim=8)
    visible = estimators.BlockVisibility(case.extent, case.query_len, case.key_len, 64, 16, DEVICE)
    generator = torch.Generator().manual_seed(length)
    batch, blocks = visible.last_query.shape
    bands = (torch.rand(batch, 2, 9, generator=generator) < 0.3).to(DEVICE)

    def build(planner: str) -> tuple[Tensor, Tensor]:
        monkeypatch.setenv(cpu_planning.ENVIRONMENT, planner)
        choice = _choice.BlockChoice(
            visible,
            2,
            window=3,
            leading=2,
            tail=torch.arange(blocks, device=DEVICE).expand(batch, -1) >= blocks - 1,
            bands=bands if has_bands else None,
            forcing=torch.tensor([[True, False]], device=DEVICE).expand(batch, 2),
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
    ("minference", {"profile": Profile((MIXED[2:] * 2,))}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 128}),
    ("max_relative", {"alpha": 0.0}),
    ("block_sparse", {"blocks": 4}),
]


def plans(monkeypatch, case: Case, name: str, fields: dict) -> tuple[SparsePlan, SparsePlan]:
    """Ours and the torch planner's."""
    method = methods.create(name, **fields)
    ours = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    monkeypatch.setenv(cpu_planning.ENVIRONMENT, "torch")
    q = case.q.nan_to_num() if name != "max_relative" else case.q
    oracle = method.plan(q, case.k.nan_to_num(), scale=case.scale, extent=case.extent, layer=0)
    return ours, oracle


@every_situation
@pytest.mark.parametrize(("groups", "dim", "length"), [(1, 64, 260), (4, 80, 130), (4, 128, 65)])
@pytest.mark.parametrize(("name", "fields"), PLANNERS)
def test_methods_make_the_same_plans(
    monkeypatch, situation: str, groups: int, dim: int, length: int, name: str, fields: dict
) -> None:
    case = case_of(situation, length=length * FULL_SIZE, heads=4, groups=groups, dim=dim)
    ours, oracle = plans(monkeypatch, case, name, fields)
    for part in PLAN_PARTS:
        assert torch.equal(getattr(ours, part), getattr(oracle, part)), part
    assert ours.density() == oracle.density()
    # What the constructor would have found.
    given = {part: getattr(ours, part) for part in PLAN_PARTS}
    SparsePlan(
        ours.heads,
        ours.query_len,
        ours.key_len,
        ours.extent,
        block_q=ours.block_q,
        block_k=ours.block_k,
        column_group=ours.column_group,
        **given,
    )


@every_situation
@pytest.mark.parametrize("rule", ["top_p", "top_p_forced", "top_p_below", "top_p_of_all_rows"])
def test_shares_come_as_masks(monkeypatch, situation: str, rule: str) -> None:
    """Rules that have no kernel are chosen in torch, in two parts but for the one over all rows."""
    case = case_of(situation, length=230, heads=2, groups=1, dim=16)

    def chosen() -> tuple[Tensor, Tensor]:
        visible = estimators.BlockVisibility(case.extent, case.query_len, case.key_len, 32, 16, DEVICE)
        choice = _choice.BlockChoice(visible, 2)
        blocks, key_blocks = ceil_div(case.query_len, 32), ceil_div(case.key_len, 16)
        generator = torch.Generator().manual_seed(0)
        scores = torch.rand(case.extent.batch, 2, blocks, key_blocks, generator=generator)
        parts = (0, blocks) if rule == "top_p_of_all_rows" else (0, blocks // 2, blocks)
        for at, stop in itertools.pairwise(parts):
            choice.add(at, stop, scores[:, :, at:stop].to(DEVICE), **{rule: 0.5})
        indptr, indices = choice.build()
        return indptr.cpu(), indices.cpu()

    ours = chosen()
    monkeypatch.setenv(cpu_planning.ENVIRONMENT, "torch")
    expected = chosen()
    assert expected[1].numel() > 0
    assert torch.equal(ours[0], expected[0])
    assert torch.equal(ours[1], expected[1])


def test_poisoned_memory_minds_no_sum_of_an_order_of_its_own() -> None:
    """What torch warns of on CUDA, where a running sum does not repeat bit for bit."""
    assert bool(torch.empty(8, device=DEVICE).isnan().all())
    message = "cumsum_cuda_kernel does not have a deterministic implementation, but you set a flag"
    warnings.warn_explicit(message, UserWarning, "selectors.py", 1, module="gossamer.selectors")
    with pytest.raises(UserWarning, match="another"):
        warnings.warn_explicit("another", UserWarning, "selectors.py", 1, module="gossamer.selectors")


@pytest.mark.parametrize(("name", "fields"), [("vertical_slash", {}), ("max_relative", {}), ("block_sparse", {})])
def test_plans_from_nan_keep_the_diagonal(name: str, fields: dict) -> None:
    case = make_case("no padding", length=200, heads=2, groups=1, dim=16)
    q = torch.full_like(case.q, math.nan).to(DEVICE)
    plan = methods.create(name, **fields).plan(q, case.k.to(DEVICE), scale=case.scale, extent=case.extent)
    assert_keeps_diagonal(case, plan)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("causal", [True, False])
def test_counted_pairs(seed: int, causal: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    length, keys = (int(torch.randint(1, 250, (1,), generator=generator)) for _ in range(2))
    length = length if seed % 2 == 0 else min(length, keys)
    plan = random_plan(
        seed,
        batch=2,
        heads=2,
        query_len=length,
        key_len=keys,
        block_q=[32, 64, 17][seed % 3],
        block_k=[16, 64, 40, 100][seed % 4],
        padded=seed % 2 == 0,
        causal=causal,
        limit=None if seed % 3 else 50,
    )
    moved: dict[str, Any] = {part: torch.as_tensor(getattr(plan, part)).to(DEVICE) for part in PLAN_PARTS}
    here = SparsePlan.unchecked(
        heads=2,
        query_len=length,
        key_len=keys,
        extent=plan.extent,
        block_q=plan.block_q,
        block_k=plan.block_k,
        column_group=plan.column_group,
        causal=causal,
        limit=plan.limit,
        **moved,
    )
    assert torch.equal(planning.count_pairs(here), plan.to_mask().sum(dim=(2, 3)))


def test_density_under_a_limit_is_counted_anew() -> None:
    case = case_of("no padding", length=200, heads=2, groups=1, dim=16)
    method = methods.create("vertical_slash", vertical_size=30, slash_size=64)
    plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent)
    limited = plan.with_limit(70)
    dense = SparsePlan.dense(2, 200, 200, case.extent, limit=70)
    pairs = [int(p.to_mask().sum()) for p in (limited, dense)]
    assert limited.density() == pairs[0] / pairs[1]


def test_a_model_window_is_counted_in_the_same_wait(monkeypatch) -> None:
    case = case_of("left padding", length=200, heads=4, groups=2, dim=16)
    q, k, v = (t.nan_to_num() for t in (case.q, case.k, case.v))
    waits, calls = [], []
    fetch = planning.fetch
    monkeypatch.setattr(planning, "fetch", lambda numbers: waits.append(numbers.shape) or fetch(numbers))
    for name, fields in PLANNERS:
        if "exact" in fields:  # for studies
            continue
        waits.clear()
        policy = Policy(methods.create(name, **fields), min_tokens=0, max_density=2.0)
        options: dict[str, Any] = {"scale": case.scale, "extent": case.extent, "layer": 0}
        sparse_attention(q, k, v, policy, limit=70, record=calls.append, **options)
        assert len(waits) <= 1, name
        plan = policy.method.plan(q, k, **options)
        assert plan.limit is None
        dense = SparsePlan.dense(plan.heads, q.shape[2], k.shape[2], case.extent, limit=70)
        pairs = [int(p.to_mask().sum()) for p in (plan.with_limit(70), dense)]
        assert calls[-1].density == pairs[0] / pairs[1], name


def test_planning_waits_once(monkeypatch) -> None:
    """And the density that follows does not wait for the device at all."""
    waits = []
    fetch = planning.fetch

    def counted(numbers: Tensor) -> list[int]:
        waits.append(numbers.shape)
        before = torch.cuda.get_sync_debug_mode() if ON_GPU else 0
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
        try:
            return fetch(numbers)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode(before)

    case = case_of("left padding", length=200 * FULL_SIZE, heads=4, groups=2, dim=16)
    monkeypatch.setattr(planning, "fetch", counted)
    for name, fields in PLANNERS:
        if "exact" in fields:  # for studies
            continue
        waits.clear()
        method = methods.create(name, **fields)
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("error")
        try:
            plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0).with_limit(None)
            assert len(waits) <= 1, name
            plan.density()
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode("default")
        assert len(waits) <= 1, name


def test_which_planner_serves(monkeypatch) -> None:
    x = torch.zeros(1, 1, 4, 8, device=DEVICE)
    assert planners.planner_for(x, x) is planning
    assert planners.planner_for(x.double()) is None
    assert planners.planner_for(torch.zeros(1, 1, 4, 257, device=DEVICE)) is None
    monkeypatch.setenv(cpu_planning.ENVIRONMENT, "torch")
    assert planners.planner_for(x) is None
    assert planners.device_planner(DEVICE) is None


def test_cpu_tensors_keep_to_cpp() -> None:
    token = planners._TRITON_ON_CPU.set(False)
    try:
        assert planners.device_planner(torch.device("cpu")) is None
        assert planners.planner_for(torch.zeros(1, 1, 4, 8)) in (cpu_planning, None)
    finally:
        planners._TRITON_ON_CPU.reset(token)


def test_bad_input_is_named() -> None:
    case = case_of("no padding", length=10, heads=3, groups=2, dim=8)
    probe = {"scale": 1.0, "extent": case.extent}
    with pytest.raises(ValueError, match=r"G divides H, got \(1, 3, 10, 8\) and \(1, 2, 10, 8\)"):
        planning.last_query_probe(case.q, case.k, **probe)
    with pytest.raises(TypeError, match=r"planning in Triton takes .* got torch.float64"):
        planning.last_query_probe(case.q[:, :2].double(), case.k.double(), **probe)
    with pytest.raises(ValueError, match="at least one row, got last=0"):
        planning.last_query_probe(case.q[:, :2], case.k, **probe, last=0)
    with pytest.raises(ValueError, match="live keys up to slot 11, but there are 10"):
        planning.last_query_probe(case.q[:, :2], case.k, scale=1.0, extent=Extent([0], [0], [11]))
    with pytest.raises(ValueError, match="2 batch rows"):
        planning.last_query_probe(case.q[:, :2], case.k, scale=1.0, extent=Extent.full(2, 10, 10))
    with pytest.raises(ValueError, match="do not give 2 pooled keys"):
        planning.row_block_energy(case.q[:, :2], case.k[:, :, :2], 10, **probe, block_q=4, block_k=4, at=0, stop=1)
    nothing = torch.zeros(1, 1, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match="one rule"):
        planning.choose(planning.Ranges(nothing, nothing, nothing[:, 0]), 1, 4, scores=torch.zeros(1, 1, 1, 4))
    plan = SparsePlan(1, 4, 4, Extent.full(1, 4, 4), window=2, k_order=torch.tensor([[[3, 1, 0, 2]]]).int())
    with pytest.raises(ValueError, match="permuted plan"):
        planning.count_pairs(plan)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton_planning.py")
    command = [sys.executable, str(script), str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("matrix") == 12  # four kernels, but in fp32
