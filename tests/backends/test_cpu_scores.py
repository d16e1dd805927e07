"""Scores in C++ against their definitions: every instruction set, dtype and situation."""

import functools
import math
from dataclasses import replace

import pytest
import torch
from cpu_checks import every_kernel, every_native_kernel, needs_kernels, poisoned, same_on_threads
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, make_call, random_extent

pytestmark = [needs_kernels, poisoned]
every_situation = pytest.mark.parametrize("situation", SITUATIONS)
EVERY_VERB = (
    "probe",
    "pool",
    "products",
    "energies",
    "antidiagonals",
    "peaks",
    "shares",
    "differences",
    "near",
    "maxima",
    "masses",
)
every_verb = pytest.mark.parametrize("verb", EVERY_VERB)
# block_q, block_k, stride of the antidiagonals, rows of the probe; query blocks that are grouped
SHAPES = {
    "small blocks": (32, 16, 8, 5),
    "wide keys": (64, 128, 16, 64),
    "odd blocks": (100, 70, 1, 70),
    "one cell a block": (64, 64, 64, 200),
}


GROUPS = {"small blocks": 3, "wide keys": 2, "odd blocks": 70, "one cell a block": 1}


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


@functools.cache
def case(situation: str, length: int, dim: int, dtype: torch.dtype) -> AttentionCall:
    return make_call(situation, length=length, heads=4, groups=2, dim=dim, dtype=dtype)


def scores_of(backend, verb: str, call: AttentionCall, shape: str, whole: bool = False) -> list[Tensor]:
    """By one backend; in two parts, as they may be asked for. Means come from the definition, so that errors do not
    add up."""
    block_q, block_k, stride, last = SHAPES[shape]
    grid = Grid(call.extent, block_q, block_k)
    rows = grid.query_blocks
    parts = [range(rows)] if whole else [range(rows // 2), range(rows // 2, rows)]
    if verb == "probe":
        return list(backend.last_query_probe(call, last))
    if verb == "pool":
        return [backend.pool_queries(call, grid), backend.pool_keys(call, grid)]
    if verb == "antidiagonals":
        return [torch.cat([backend.antidiagonal_scores(call, grid, stride, part) for part in parts], dim=2)]
    if verb == "peaks":
        peaks = [backend.antidiagonal_peaks(call, grid, stride, part, 0.999) for part in parts]
        return [torch.cat([sums for sums, _ in peaks], dim=2), torch.cat([near.float() for _, near in peaks], dim=2)]
    if verb in ("shares", "differences"):
        group = GROUPS[shape]
        queries, groups = reference.pool_queries(call, grid).to(call.q.dtype), -(-rows // group)
        parts = [range(groups)] if whole else [range(groups // 2), range(groups // 2, groups)]
        if verb == "shares":
            return [torch.cat([backend.group_shares(call, grid, queries, group, part) for part in parts], dim=2)]
        anchors = torch.linspace(-1, 1, queries[..., 0].numel()).view(queries.shape[:3])
        return [
            torch.cat([backend.group_differences(call, grid, queries, one, group, part) for part in parts], dim=2)
            for one in (anchors, None)
        ]
    if verb == "near":
        return [x.float() for x in near_lists(backend, call, grid, GROUPS[shape], parts)]
    if verb == "maxima":
        near = grid.queries.unflatten(1, (-1, 1)) + torch.tensor([-last, 3])  # not where blocks or tiles begin
        regions = torch.cat([torch.tensor([-5, 70]).expand_as(near), near], dim=2)
        return [torch.cat([backend.mean_row_maxima(call, grid, regions, part) for part in parts], dim=2)]
    if verb == "masses":
        return [torch.cat([backend.block_mass(call, lse_of(call), grid, part) for part in parts], dim=2)]
    keys = reference.pool_keys(call, grid)
    if verb == "energies":
        keys = keys.to(call.q.dtype)
        return [
            torch.cat([backend.row_block_energy(call, grid, keys, part, **tiles) for part in parts], dim=2)
            for tiles in ({}, {"per_head": True, "ended": True})
        ]
    queries = reference.pool_queries(call, grid)
    return [torch.cat([backend.pooled_scores(call, grid, queries, keys, part) for part in parts], dim=2)]


def lse_of(call: AttentionCall) -> Tensor:
    """Of some other logits; rows whose LSE is -inf are left out."""
    lse = torch.linspace(3, 6, call.q[..., 0].numel()).view(call.q.shape[:3]).clone()
    lse[:, :, ::7] = -math.inf
    return lse


def near_lists(backend, call: AttentionCall, grid: Grid, group: int, parts: list[range]) -> list[Tensor]:
    """Whether keys lie near anchors, some of which are -inf, and near the largest logit; with a bar for each head."""
    queries = reference.pool_queries(call, grid).to(call.q.dtype)
    rows = [range(-(-part.start // group), -(-part.stop // group)) for part in parts]
    anchors = torch.linspace(-1, 1, queries[..., 0].numel()).view(queries.shape[:3])
    anchors[:, ::2, ::5] = -math.inf
    left_out = grid.queries[:, ::group, None] + torch.tensor([[-9, 0], [70, 99]])
    bars = torch.linspace(-0.6, 0.1, call.heads)
    found = []
    for one, bar in ((anchors, bars), (None, 0.0), (None, -math.inf)):
        masks = []
        for part in rows:
            counts, indices = backend.near_keys(call, grid, queries, one, group, part, bar, left_out)
            mask = torch.zeros(*counts.shape, call.extent.longest, dtype=torch.bool)
            row = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
            mask.flatten(0, 2)[row, indices.long()] = True
            assert torch.equal(mask.sum(-1), counts)
            masks.append(mask)
        found.append(torch.cat(masks, dim=2))
    return found


@functools.cache
def defined(verb: str, shape: str, *which) -> list[Tensor]:
    return scores_of(reference, verb, case(*which), shape)


def assert_agrees(verb: str, ours: list[Tensor], expected: list[Tensor]) -> None:
    for got, one in zip(ours, expected, strict=True):
        # Sums of up to some hundred exponentials of mass 1 and fewer.
        torch.testing.assert_close(
            got, one, atol=1e-5 if verb in ("products", "maxima", "differences") else 2e-6, rtol=3e-5
        )


@every_kernel
@every_situation
@every_verb
def test_scores(isa: str, dtype: torch.dtype, situation: str, verb: str) -> None:
    for length, dim, shape in ((1, 16, "wide keys"), (190, 33, "odd blocks"), (190, 20, "small blocks")):
        which = (situation, length, dim, dtype)
        assert_agrees(verb, scores_of(cpu, verb, case(*which), shape), defined(verb, shape, *which))


@every_native_kernel
@every_verb
def test_scores_of_many_tiles(isa: str, dtype: torch.dtype, verb: str) -> None:
    """More keys than the probe sums at once, and more blocks than a tile holds."""
    which = ("padded chunk", 2200, 24, dtype)
    assert_agrees(verb, scores_of(cpu, verb, case(*which), "small blocks"), defined(verb, "small blocks", *which))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("seed", range(6))
def test_random_extents(seed: int, shape: str) -> None:
    """Queries anywhere, before, among and after the keys; with and without causality and limits."""
    rules = {"causal": seed % 2 == 0, "limit": [None, 1, 40, 300][seed % 4]}
    extent = random_extent(seed, batch=3, query_len=230, key_len=400, **rules)
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(3, n, size, 24, generator=generator) for n, size in ((6, 230), (2, 400)))
    call = AttentionCall(q, k, None, extent, scale=0.7)
    for verb in EVERY_VERB:
        if Grid(extent, 64, 64).key_blocks:
            assert_agrees(verb, scores_of(cpu, verb, call, shape), scores_of(reference, verb, call, shape))


@every_verb
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (8, 1), (3, 1)])
def test_ways_to_share_keys(verb: str, heads: int, groups: int) -> None:
    call = make_call("left padding", length=700, heads=heads, groups=groups, dim=24)
    assert_agrees(verb, scores_of(cpu, verb, call, "wide keys"), scores_of(reference, verb, call, "wide keys"))


@every_verb
def test_the_largest_head_dimension(verb: str) -> None:
    call = make_call("right padding", length=200, heads=2, groups=1, dim=256)
    assert_agrees(verb, scores_of(cpu, verb, call, "small blocks"), scores_of(reference, verb, call, "small blocks"))


def test_mass_of_a_probe() -> None:
    """Both sums hold each row's 1; in causal attention no distance is left out."""
    call = make_call("padded chunk", length=3000, heads=2, groups=1, dim=16)
    columns, diagonals = cpu.last_query_probe(call, 64)
    assert columns.sum(-1).flatten().tolist() == pytest.approx([64] * 4, rel=1e-5)
    assert diagonals.sum(-1).flatten().tolist() == pytest.approx([64] * 4, rel=1e-5)


def test_rows_that_see_nothing_hold_nothing() -> None:
    call = make_call("no padding", length=100, heads=1, groups=1, dim=8)
    extent = Extent([0, 30, 0], [60, 0, 100], [40, 0, 100], [60, 100, 0])
    q, k = call.q.expand(3, -1, -1, -1), call.k.expand(3, -1, -1, -1)
    call = AttentionCall(q, k, None, extent)
    got = cpu.antidiagonal_scores(call, Grid(extent, 32, 32), 4, range(4))
    assert bool((got[1:] == 0).all())
    assert float(got[0].sum()) == pytest.approx(15)
    assert bool((got[0, :, 2:] == 0).all())


def test_logits_that_overflow_an_exponential() -> None:
    call = replace(make_call("no padding", length=1000, heads=2, groups=1, dim=16), scale=100.0)
    for verb in ("probe", "energies", "antidiagonals", "shares"):
        for got, expected in zip(
            scores_of(cpu, verb, call, "wide keys"), scores_of(reference, verb, call, "wide keys"), strict=True
        ):
            torch.testing.assert_close(got, expected, atol=2e-3, rtol=2e-3)


@every_native_kernel
def test_scores_do_not_depend_on_threads_strides_or_parts(isa: str, dtype: torch.dtype) -> None:
    call = case("padded chunk", 700, 40, dtype)
    moved = replace(call, q=with_strides(call.q), k=with_strides(call.k))

    def scores(call: AttentionCall, whole: bool) -> list[Tensor]:
        return [one for verb in EVERY_VERB for one in scores_of(cpu, verb, call, "small blocks", whole)]

    expected = same_on_threads(lambda: scores(call, whole=False))
    for got, one in zip(scores(moved, whole=True), expected, strict=True):
        assert torch.equal(got, one)


def with_strides(x: Tensor) -> Tensor:
    """As ``[B, S, H, D]`` in memory, with NaN between the rows."""
    wide = torch.full((x.shape[0], x.shape[2], x.shape[1], x.shape[3] + 8), math.nan, dtype=x.dtype)
    wide[..., :-8] = x.transpose(1, 2)
    return wide[..., :-8].transpose(1, 2)


def test_bad_input_is_named() -> None:
    call = make_call("no padding", length=10, heads=2, groups=2, dim=8)
    grid = Grid(call.extent, 4, 4)
    queries, keys = cpu.pool_queries(call, grid), cpu.pool_keys(call, grid)
    with pytest.raises(TypeError, match=r"takes float32, bfloat16 or float16, got torch.float64"):
        cpu.last_query_probe(AttentionCall(call.q.double(), call.k.double()), 64)
    with pytest.raises(ValueError, match="at least one row, got last=0"):
        cpu.last_query_probe(call, 0)
    with pytest.raises(ValueError, match=r"pooled keys must be torch.float32 of shape \(1, 2, 3, 8\), got .* 2, 8\)"):
        cpu.row_block_energy(call, grid, keys[:, :, :2], range(1))
    with pytest.raises(ValueError, match=r"regions must be \(1, 3, any number, 2\), got \(1, 2, 1, 2\)"):
        cpu.mean_row_maxima(call, grid, torch.zeros(1, 2, 1, 2, dtype=torch.int64), range(1))
    with pytest.raises(ValueError, match=r"pooled queries must be torch.float32 of shape \(1, 2, 3, 8\)"):
        cpu.pooled_scores(call, grid, queries[:, :1], keys, range(1))
    with pytest.raises(ValueError, match=r"consecutive rows of the plan's 3, got range\(0, 4\)"):
        cpu.antidiagonal_scores(call, grid, 2, range(4))
    with pytest.raises(ValueError, match=r"lse must be \[batch, heads, queries\] = \(1, 2, 10\), got \(1, 2, 9\)"):
        cpu.block_mass(call, torch.zeros(1, 2, 9), grid, range(1))
    with pytest.raises(ValueError, match="stride must divide block_q and block_k, got 3 for blocks 4 and 4"):
        cpu.antidiagonal_scores(call, grid, 3, range(1))
