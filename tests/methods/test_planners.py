"""Planners against naive ones written from the papers' formulas, token by token in positions, on small inputs."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends.torch.slashes import exact_slashes, merged_ranges
from gossamer.methods import (
    PBS,
    AnchorAttention,
    AShape,
    BlockSparse,
    DuoAttention,
    FlexPrefill,
    LServe,
    MaxRelative,
    Method,
    MInference,
    MoA,
    SeerAttention,
    TriShape,
    VerticalSlash,
    XAttention,
)
from gossamer.plan import Grid
from gossamer.scores import last_query_probe, pool_keys, pool_queries, row_block_energy
from gossamer.testing import SITUATIONS, make_call

in_every_situation = pytest.mark.parametrize("situation", SITUATIONS)
# Work is cut into as many parts as it can be: what is lost or taken twice between them shows.
pytestmark = pytest.mark.usefixtures("smallest_constants")


class Row:
    """One batch row of a call, in positions."""

    def __init__(self, call: AttentionCall, b: int) -> None:
        extent = call.extent
        self.first_query = int(extent.first_query[b])
        self.first = int(extent.first_position[b])
        self.count = int(extent.query_count[b])
        self.keys = int(extent.key_count[b])
        self.key_start = int(extent.key_start[b])
        self.causal, self.limit = extent.causal, extent.limit

    @property
    def queries(self) -> range:
        return range(self.first, self.first + self.count)

    def allows(self, i: int, j: int) -> bool:
        return (j <= i or not self.causal) and (self.limit is None or abs(i - j) < self.limit)

    def seen(self, block_q: int, m: int, block_k: int) -> set[int]:
        """Key blocks of which some query of the global block m may attend some key."""
        found: set[int] = set()
        for i in self.queries:
            if i // block_q == m:
                first = 0 if self.limit is None else max(0, i - self.limit + 1)
                last = i if self.causal else self.keys - 1 if self.limit is None else i + self.limit - 1
                found.update(j // block_k for j in range(first, min(last, self.keys - 1) + 1))
        return found

    def row(self, position: int) -> int:
        return self.first_query + position - self.first


def attended(mask: Tensor, row: Row, position: int) -> set[int]:
    """Key positions that a query attends, of a mask ``[S, T]``."""
    keys = mask[row.row(position)].nonzero().flatten() - row.key_start
    return set(keys.tolist())


def assert_dead_rows_attend_nothing(call: AttentionCall, mask: Tensor) -> None:
    assert not bool(mask.any(-1)[(~call.extent.live_queries(call.query_len))[:, None].expand(mask.shape[:3])].any())


PUBLISHED = [
    (AShape(), {"sink": 128, "window": 3968}),
    (TriShape(), {"sink": 128, "window": 3968, "last": 100, "block": 64}),
    (VerticalSlash(), {"vertical_size": 1000, "slash_size": 6096, "last": 64, "exact": False}),
    (MInference(), {"layers": [], "vertical_size": 1000, "slash_size": 6096, "last": 64}),
    (BlockSparse(), {"blocks": 100, "block": 64}),
    (DuoAttention(), {"gates": (), "sparsity": 0.5, "sink": 64, "recent": 256}),
    (
        LServe(),
        {"gates": (), "sparsity": 0.5, "sink": 128, "local": 8192, "block": 128, "exact": True}
        | {"step_local": 256, "budget": 4096, "page": 64, "logical": 16, "interval": 4},
    ),
    (MoA(), {"alphas": (), "betas": (), "sink": 64, "least": 128, "block": 64, "new_tokens": 1024}),
    (SeerAttention(), {"gates": "", "threshold": 0.002, "share": 0.0, "last_blocks": 2}),
    (
        MaxRelative(),
        {"alpha": 0.1, "sink_blocks": 2, "window_blocks": 4, "last_rows": 1024, "block_q": 64, "block_k": 128},
    ),
    (
        FlexPrefill(),
        {"gamma": 0.9, "tau": 0.1, "min_budget": 512, "max_budget": None, "block": 128, "faithful": False},
    ),
    (AnchorAttention(), {"theta": 12.0, "step": 16, "first_blocks": 16, "block": 128}),
    (
        PBS(),
        {"threshold": 0.9, "segment": 256, "block": 128, "plus": False, "stride": 16, "shared": True},
    ),
    (XAttention(), {"threshold": 0.9, "stride": 16, "block": 128}),
]


@pytest.mark.parametrize(("method", "fields"), PUBLISHED, ids=lambda value: getattr(value, "name", ""))
def test_defaults_are_the_published_ones(method: Method, fields: dict[str, Any]) -> None:
    assert method.to_dict() == {"method": method.name, **fields}


@in_every_situation
def test_a_shape_is_exact_to_the_token(situation: str) -> None:
    call = make_call(situation, length=200, heads=4, groups=2, dim=8)
    mask = AShape(sink=5, window=20).plan(call).to_mask()
    assert_dead_rows_attend_nothing(call, mask)
    for b in range(call.batch):
        row = Row(call, b)
        for i in row.queries:
            expected = {j for j in range(row.keys) if row.allows(i, j) and (j < 5 or abs(i - j) < 20)}
            assert attended(mask[b, 0], row, i) == expected


def test_tri_shape_has_a_dense_tail_of_whole_blocks() -> None:
    call = make_call("no padding", length=300, heads=2, groups=2, dim=8)
    counts = TriShape(sink=4, window=10, last=50).plan(call).to_mask()[0, 0].sum(-1)
    # 50 last queries of 300 start at 250, in the block of rows 192..255
    assert counts[192:].tolist() == list(range(193, 301))
    assert counts[191] == 14


@in_every_situation
def test_tri_shape_is_a_shape_and_its_tail(situation: str) -> None:
    call = make_call(situation, length=200, heads=4, groups=2, dim=8)
    mask = TriShape(sink=5, window=20, last=30, block=32).plan(call).to_mask()
    for b in range(call.batch):
        row = Row(call, b)
        tail = {i // 32 for i in list(row.queries)[-30:]}
        for i in row.queries:
            expected = {
                j for j in range(row.keys) if row.allows(i, j) and (i // 32 in tail or j < 5 or abs(i - j) < 20)
            }
            # A block of the tail is whole, and what a window leaves of it is cut off by the model alone.
            assert attended(mask[b, 0], row, i) == expected == attended(mask[b, 1], row, i)


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_tri_shape_holds_no_mask_of_all_blocks(monkeypatch) -> None:
    """At 1M tokens that of eight heads has 2G entries."""
    monkeypatch.setattr("gossamer.blocks.MASK_BYTES", 1 << 20)
    length, heads = 1 << 16, 8
    q = torch.empty(1, heads, 1, 8).expand(1, heads, length, 8)
    with LargestTensor() as largest:
        plan = TriShape().plan(AttentionCall(q, q))
    everything = heads * plan.num_query_blocks * plan.num_key_blocks
    assert plan.block_indices.numel() > heads * plan.num_key_blocks
    assert largest.elements < everything // 4


def naive_vertical_slash(call: AttentionCall, b: int, h: int, vertical: int, slash: int) -> tuple[set[int], set[int]]:
    """Columns, and bands of 64: the best, with 30 and two forced."""
    columns, diagonals = last_query_probe(call)
    row = Row(call, b)
    score = {j: math.inf if j < 30 else float(columns[b, h, j]) for j in range(row.keys)}
    bands: dict[int, float] = {}
    for d in range(diagonals.shape[-1]):
        mass, r = float(diagonals[b, h, d]), d % 64
        bands[d // 64] = bands.get(d // 64, 0.0) + mass * (64 - r) / 64
        bands[d // 64 + 1] = bands.get(d // 64 + 1, 0.0) + mass * r / 64
    bands[0] = bands[1] = math.inf

    def best(scores: dict[int, float], count: int) -> set[int]:
        return set(sorted(scores, key=lambda n: (-scores[n], n))[:count])

    return best(score, max(vertical, 30)), best(bands, max(math.ceil(slash / 64), 2))


@in_every_situation
@pytest.mark.parametrize(("vertical", "slash"), [(40, 130), (0, 0)])
def test_vertical_slash_bands(situation: str, vertical: int, slash: int) -> None:
    call = make_call(situation, length=450, heads=2, groups=1, dim=8)
    mask = VerticalSlash(vertical, slash).plan(call).to_mask()
    for b in range(call.batch):
        row = Row(call, b)
        for h in range(2):
            columns, bands = naive_vertical_slash(call, b, h, vertical, slash)
            for i in row.queries:
                last = max(p for p in row.queries if p // 64 == i // 64)
                expected = set()
                for j in range(row.keys):
                    band = last // 64 - j // 64
                    if row.allows(i, j) and ((band if row.causal else abs(band)) in bands or j in columns):
                        expected.add(j)
                assert attended(mask[b, h], row, i) == expected


def test_the_exact_form_forces_the_first_hundred_diagonals(monkeypatch) -> None:
    call = make_call("no padding", length=450, heads=2, groups=1, dim=8)
    chosen: list[Tensor] = []

    def watched(columns: Tensor, slashes: Tensor, grid: Grid, part: range) -> Any:
        chosen.append(slashes)
        return exact_slashes(columns, slashes, grid, part)

    monkeypatch.setenv("GOSSAMER_PLANNER", "torch")
    monkeypatch.setattr("gossamer.backends.torch.exact_slashes", watched)
    VerticalSlash(30, 101, exact=True).plan(call)
    best = last_query_probe(call)[1][0, :, 100:].argmax(dim=-1) + 100
    assert bool((best > 100).all())
    for h in range(2):
        assert chosen[0][0, h].nonzero().flatten().tolist() == [*range(100), int(best[h])]


def test_vertical_slash_cost_equals_its_budget_on_scattered_slashes() -> None:
    call = make_call("no padding", length=4096, heads=1, groups=1, dim=8)
    budget, exact = VerticalSlash(100, 640).plan(call), VerticalSlash(100, 640, exact=True).plan(call)
    pairs = 4096 * 4097 / 2
    assert budget.density() <= (100 * 4096 + 640 * 4096) / pairs
    assert exact.density() > 2 * budget.density()


def test_the_probe_looks_at_the_last_queries_alone() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=8)
    plans = [VerticalSlash(40, 64, last).plan(call) for last in (1, 64)]
    assert not torch.equal(plans[0].column_indices, plans[1].column_indices)


@pytest.mark.parametrize(
    ("slashes", "verticals", "blocks", "columns"),
    [
        ([0], [5, 70, 130], [128], [5, 70]),
        ([100, 0], [10, 40, 50, 95], [28, 128], [10, 95]),
        ([130, 64, 0], [5, 70, 100], [0, 64, 128], []),
    ],
)
def test_worked_index_cases(slashes: list[int], verticals: list[int], blocks: list[int], columns: list[int]) -> None:
    """Row block 2 (end = 192) of MInference's index construction."""
    chosen = torch.zeros(1, 192, dtype=torch.bool)
    chosen[0, slashes] = True
    low, high = merged_ranges(chosen, torch.tensor([[192]]))
    ranges = sorted((a, b) for a, b in zip(low[0, 0].tolist(), high[0, 0].tolist(), strict=True) if b > a)
    assert [start for a, b in ranges for start in range(a, b, 64)] == blocks
    assert [v for v in verticals if not any(a <= v < b for a, b in ranges)] == columns


def two_pointer_merge(verticals: list[int], slashes: list[int], end: int) -> tuple[list[int], list[int]]:
    """The authors' merge for one row block, restated: block starts and column indices."""
    slashes = [s for s in sorted(slashes, reverse=True) if s < end]
    blocks: list[int] = []
    columns: list[int] = []

    def flush(low: int, high: int) -> None:
        blocks.extend(range(low, high, 64))

    if not slashes:
        return blocks, columns
    top = max(end - slashes[0], 64)
    low, high, s, v = top - 64, top, 1, 0
    while True:
        if v < len(verticals) and verticals[v] < high:
            if verticals[v] < low:
                columns.append(verticals[v])
            v += 1
        elif s < len(slashes):
            top = max(end - slashes[s], 64)
            s += 1
            if top > high + 64:
                flush(low, high)
                low, high = top - 64, top
            elif top > high:
                high += 64
        else:
            flush(low, high)
            return blocks, columns


@pytest.mark.parametrize("seed", range(10))
def test_exact_slashes_equal_the_two_pointer_merge(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    length = [64, 200, 321, 640][seed % 4]
    verticals = torch.rand(1, 2, length, generator=generator) < 0.05
    slashes = torch.rand(1, 2, length, generator=generator) < [0.01, 0.1][seed % 2]
    slashes[..., 0] = True
    grid = Grid(Extent.full(1, length, length), 64, 64)
    blocks, columns = exact_slashes(verticals, slashes, grid, range(grid.query_blocks))

    def listed(counts: Tensor, indices: Tensor) -> list[list[int]]:
        return [part.tolist() for part in indices.split(counts.flatten().tolist())]

    found_blocks, found_columns = listed(*blocks), listed(*columns)
    for h in range(2):
        lines = verticals[0, h].nonzero().flatten().tolist()
        for m in range(grid.query_blocks):
            starts, single = two_pointer_merge(lines, slashes[0, h].nonzero().flatten().tolist(), 64 * (m + 1))
            expected = {j for start in starts for j in range(start, start + 64)} | set(single)
            row = h * grid.query_blocks + m
            got = {j for n in found_blocks[row] for j in range(64 * n, 64 * n + 64)} | set(found_columns[row])
            for i in range(64 * m, min(64 * (m + 1), length)):
                assert {j for j in got if j <= i} == {j for j in expected if j <= i}


@in_every_situation
def test_block_sparse_keeps_the_best_blocks_and_the_diagonal(situation: str) -> None:
    call = make_call(situation, length=600, heads=4, groups=2, dim=8)
    plan = BlockSparse(blocks=3).plan(call)
    mask = plan.block_mask()
    queries, keys = pool_queries(call, plan.grid), pool_keys(call, plan.grid)
    for b in range(call.batch):
        row, first = Row(call, b), int(plan.grid.first_block[b])
        for h in range(4):
            for m in range(mask.shape[2]):
                seen = row.seen(64, first + m, 64)
                score = {n: float(queries[b, h, m] @ keys[b, h // 2, n]) for n in seen}
                best = set(sorted(score, key=lambda n: (-score[n], n))[:3])
                own = {n for n in seen if n == first + m}
                assert set(mask[b, h, m].nonzero().flatten().tolist()) == best | own


@in_every_situation
@pytest.mark.parametrize("alpha", [0.3, 0.95, 1.0])
def test_max_relative_keeps_blocks_near_the_best(situation: str, alpha: float) -> None:
    call = make_call(situation, length=700, heads=4, groups=2, dim=8)
    method = MaxRelative(alpha=alpha, sink_blocks=1, window_blocks=2, last_rows=100, block_q=32, block_k=64)
    plan = method.plan(call)
    mask = plan.block_mask()
    assert mask.shape[1] == 2
    energy = torch.cat([e for _, e in row_block_energy(call, plan.grid)], dim=2)
    for b in range(call.batch):
        row, first = Row(call, b), int(plan.grid.first_block[b])
        tail = {i // 32 for i in list(row.queries)[-50:]}  # 100 packed rows are 50 tokens of two heads
        for g in range(2):
            for m in range(mask.shape[2]):
                seen, own = row.seen(32, first + m, 64), (first + m) * 32 // 64
                score = {n: float(energy[b, g, m, n]) for n in seen}
                best = max(score.values(), default=0.0)
                keep = {n for n in seen if score[n] > 0 and score[n] >= alpha * best}
                near = {n for n in seen if own - 2 < n <= own + (0 if row.causal else 1)}
                keep |= {n for n in seen if n < 1} | near | (seen if first + m in tail else set())
                assert set(mask[b, g, m].nonzero().flatten().tolist()) == keep


def test_minference_without_layers_is_vertical_slash() -> None:
    call = make_call("no padding", length=500, heads=2, groups=1, dim=8)
    one, other = MInference(vertical_size=50, slash_size=64).plan(call), VerticalSlash(50, 64).plan(call)
    assert torch.equal(one.to_mask(), other.to_mask())
    assert (MInference().vertical_size, MInference().slash_size, MInference().last) == (1000, 6096, 64)


@pytest.mark.parametrize("method", [VerticalSlash(40, 64), BlockSparse(2), MaxRelative(0.95, 1, 1, 0, 64, 64)])
def test_the_scale_counts(method) -> None:
    """It sharpens the softmax of a probe and of energies; products of means are only ranked."""
    call = make_call("no padding", length=700, heads=4, groups=2, dim=16)
    plans = [method.plan(AttentionCall(call.q, call.k, scale=scale)) for scale in (0.02, 2.0)]
    same = torch.equal(plans[0].to_mask(), plans[1].to_mask())
    assert same == isinstance(method, BlockSparse)


def test_a_plan_of_bands_needs_no_lists() -> None:
    plan = AShape(1, 2).plan(make_call("no padding", length=200, heads=2, groups=1, dim=8))
    assert isinstance(plan, SparsePlan)
    assert plan.block_indices.numel() == plan.column_indices.numel() == 0
