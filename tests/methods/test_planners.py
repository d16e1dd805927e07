"""Planners against naive ones written from the papers' formulas, on small inputs."""

import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import Extent, HeadPattern, Profile, SparsePlan
from gossamer.estimators import last_query_probe, pool_keys, pool_queries, row_block_energy
from gossamer.methods import AShape, BlockSparse, MaxRelative, MInference, TriShape, VerticalSlash
from gossamer.methods._exact_slash import merged_ranges
from gossamer.testing import SITUATIONS, make_case


def plan_of(method, case, layer=None) -> SparsePlan:
    return method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=layer)


def positions(case, b: int):
    return int(case.extent.query_start[b]), int(case.extent.key_start[b]), int(case.extent.key_count[b])


@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_shape_is_exact_to_the_token(situation: str) -> None:
    case = make_case(situation, length=200, heads=4, groups=2, dim=8)
    mask = plan_of(AShape(sink=5, window=20), case).to_mask()
    for b in range(mask.shape[0]):
        first, start, count = positions(case, b)
        for i in range(case.query_len):
            p = first + i
            expected = {start + j for j in range(count) if j <= p and (j < 5 or p - j < 20)}
            assert set(mask[b, 0, i].nonzero().flatten().tolist()) == expected


def test_tri_shape_has_a_dense_tail_of_whole_blocks() -> None:
    case = make_case("no padding", length=300, heads=2, groups=2, dim=8)
    mask = plan_of(TriShape(sink=4, window=10, last=50), case).to_mask()[0, 0]
    counts = mask.sum(-1)
    # 50 last queries of 300 start at 250, in the block of rows 192..255
    assert counts[192:].tolist() == list(range(193, 301))
    assert counts[191] == 14


@pytest.mark.parametrize("situation", SITUATIONS)
def test_tri_shape_is_a_shape_and_its_tail(situation: str) -> None:
    case = make_case(situation, length=200, heads=4, groups=2, dim=8)
    mask = plan_of(TriShape(sink=5, window=20, last=30, block=32), case).to_mask()
    for b in range(mask.shape[0]):
        first, start, count = positions(case, b)
        rows = [i for i in range(case.query_len) if 0 <= first + i < count]
        blocks = {i // 32 for i in rows[-30:]}
        for i in range(case.query_len):
            p = first + i
            expected = {start + j for j in range(count) if j <= p and (i // 32 in blocks or j < 5 or p - j < 20)}
            for head in range(2):
                assert set(mask[b, head, i].nonzero().flatten().tolist()) == expected


class LargestTensor(TorchDispatchMode):
    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def test_tri_shape_holds_no_mask_of_all_blocks() -> None:
    """At 1M tokens that of eight heads has 2G entries."""
    length, heads = 1 << 17, 8
    q = torch.empty(1, heads, length, 16, device="meta")
    with LargestTensor() as largest:
        plan = TriShape().plan(q, q, scale=1.0, extent=Extent.full(1, length, length))
    assert plan.block_indices.numel() > heads * plan.num_key_blocks
    assert largest.elements < 4 * heads * plan.num_key_blocks


def naive_vertical_slash(case, vertical: int, slash: int) -> torch.Tensor:
    """Block-aligned vertical-slash, head by head: top columns with 30 forced, top bands of 64 with two forced."""
    columns, diagonals = last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent)
    batch, heads = case.q.shape[:2]
    mask = torch.zeros(batch, heads, case.query_len, case.key_len, dtype=torch.bool)
    for b in range(batch):
        first, start, count = positions(case, b)
        for h in range(heads):
            score = {j: math.inf if j < 30 else float(columns[b, h, start + j]) for j in range(count)}
            chosen = sorted(score, key=lambda j: (-score[j], j))[: max(vertical, 30)]
            bands: dict[int, float] = {}
            for d in range(case.key_len):
                mass, r = float(diagonals[b, h, d]), d % 64
                bands[d // 64] = bands.get(d // 64, 0.0) + mass * (64 - r) / 64
                bands[d // 64 + 1] = bands.get(d // 64 + 1, 0.0) + mass * r / 64
            bands[0] = bands[1] = math.inf
            best = sorted(bands, key=lambda n: (-bands[n], n))[: max(math.ceil(max(slash, 50) / 64), 2)]
            for i in range(case.query_len):
                slot = first + start + i
                last_slot = first + start + min((i // 64 + 1) * 64, case.query_len) - 1
                for j in range(max(0, slot + 1)):
                    if not 0 <= j - start < count:
                        continue
                    band = last_slot // 64 - j // 64
                    mask[b, h, i, j] = band in best or (j - start) in chosen
    return mask


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("vertical", "slash"), [(40, 130), (0, 0)])
def test_vertical_slash_bands(situation: str, vertical: int, slash: int) -> None:
    case = make_case(situation, length=450, heads=2, groups=1, dim=8)
    mask = plan_of(VerticalSlash(vertical, slash), case).to_mask()
    expected = naive_vertical_slash(case, vertical, slash)
    assert torch.equal(mask, expected)


def test_vertical_slash_cost_equals_its_budget_on_scattered_slashes() -> None:
    case = make_case("no padding", length=4096, heads=1, groups=1, dim=8)
    budget = VerticalSlash(100, 640).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    exact = VerticalSlash(100, 640, exact=True).plan(case.q, case.k, scale=case.scale, extent=case.extent)
    pairs = 4096 * 4097 / 2
    assert budget.density() <= (100 * 4096 + 640 * 4096) / pairs
    assert exact.density() > 2 * budget.density()


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
    from gossamer.methods._exact_slash import exact_slash_blocks

    generator = torch.Generator().manual_seed(seed)
    length = [64, 200, 321, 640][seed % 4]
    case = make_case("no padding", length=length, heads=2, groups=1, dim=8)
    verticals = torch.rand(1, 2, length, generator=generator) < 0.05
    slashes = torch.rand(1, 2, length, generator=generator) < [0.01, 0.1][seed % 2]
    slashes[..., 0] = True
    plan = exact_slash_blocks(verticals, slashes, case.extent, length)
    mask = plan.to_mask()
    expected = torch.zeros_like(mask)
    for h in range(2):
        lines = verticals[0, h].nonzero().flatten().tolist()
        for m in range(plan.num_query_blocks):
            blocks, columns = two_pointer_merge(lines, slashes[0, h].nonzero().flatten().tolist(), 64 * (m + 1))
            keys = {j for start in blocks for j in range(start, start + 64)} | set(columns)
            for i in range(64 * m, min(64 * (m + 1), length)):
                expected[0, h, i, [j for j in keys if j <= i]] = True
    assert torch.equal(mask, expected)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_block_sparse_keeps_the_best_blocks_and_the_diagonal(situation: str) -> None:
    case = make_case(situation, length=600, heads=4, groups=2, dim=8)
    mask = plan_of(BlockSparse(blocks=3), case).block_mask()
    queries, keys = pool_queries(case.q, case.extent, 64), pool_keys(case.k, case.extent, 64)
    for b, h, m in [(b, h, m) for b in range(mask.shape[0]) for h in range(4) for m in range(mask.shape[2])]:
        first, start, count = positions(case, b)
        row_first = first + m * 64
        row_last = first + min((m + 1) * 64, case.query_len) - 1
        visible = {
            n: float(queries[b, h, m] @ keys[b, h // 2, n])
            for n in range(mask.shape[3])
            if max(n * 64 - start, 0) < min((n + 1) * 64 - start, count) and max(n * 64 - start, 0) <= row_last
        }
        best = set(sorted(visible, key=lambda n: (-visible[n], n))[:3])
        own = {n for n in visible if (row_first + start) // 64 <= n <= (row_last + start) // 64}
        assert set(mask[b, h, m].nonzero().flatten().tolist()) == best | own


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("alpha", [0.3, 1.0])
def test_max_relative_keeps_blocks_near_the_best(situation: str, alpha: float) -> None:
    case = make_case(situation, length=700, heads=4, groups=2, dim=8)
    method = MaxRelative(alpha=alpha, sink_blocks=1, window_blocks=2, last_rows=100, block_q=32, block_k=64)
    mask = plan_of(method, case).block_mask()
    assert mask.shape[1] == 2
    energy = torch.cat(
        [e for _, e in row_block_energy(case.q, case.k, scale=case.scale, extent=case.extent, block_q=32, block_k=64)],
        dim=2,
    )
    for b, g, m in [(b, g, m) for b in range(mask.shape[0]) for g in range(2) for m in range(mask.shape[2])]:
        first, start, count = positions(case, b)
        row_first, row_last = first + m * 32, first + min((m + 1) * 32, case.query_len) - 1
        row = energy[b, g, m].tolist()
        seen = {
            n
            for n in range(mask.shape[3])
            if max(n * 64 - start, 0) < min((n + 1) * 64 - start, count) and max(n * 64 - start, 0) <= row_last
        }
        keep = {n for n in seen if row[n] > 0 and row[n] >= alpha * max(row)}
        keep |= {n for n in seen if n < start // 64 + 1}
        keep |= {n for n in seen if (row_first + start) // 64 - 2 < n <= (row_last + start) // 64}
        if row_last >= min(count, first + case.query_len) - 50:  # 100 packed rows are 50 tokens of two heads
            keep |= seen
        assert set(mask[b, g, m].nonzero().flatten().tolist()) == keep


def test_minference_without_a_profile_is_vertical_slash() -> None:
    case = make_case("no padding", length=500, heads=2, groups=1, dim=8)
    one = plan_of(MInference(vertical_size=50, slash_size=64), case)
    other = plan_of(VerticalSlash(50, 64), case)
    assert torch.equal(one.to_mask(), other.to_mask())
    assert (MInference().vertical_size, MInference().slash_size) == (1000, 6096)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_minference_gives_each_head_its_own_pattern(situation: str) -> None:
    case = make_case(situation, length=600, heads=4, groups=2, dim=8)
    patterns = (
        HeadPattern("vertical_slash", (40, 130)),
        HeadPattern("a_shape", (7, 33)),
        HeadPattern("block_sparse", (2,)),
        HeadPattern("dense"),
    )
    other = HeadPattern("a_shape", (1, 1))
    mask = plan_of(MInference(profile=Profile(((other,) * 4, patterns))), case, layer=1).to_mask()
    methods = [VerticalSlash(40, 130), AShape(7, 33), BlockSparse(2)]
    for head, method in enumerate(methods):
        alone = plan_of(method, case)
        share = 4 // alone.heads
        assert torch.equal(mask[:, head], alone.to_mask()[:, head // share]), method.name
    dense = SparsePlan.dense(1, case.query_len, case.key_len, case.extent).to_mask()
    assert torch.equal(mask[:, 3], dense[:, 0])


def test_a_profile_of_another_shape_is_refused() -> None:
    case = make_case("no padding", length=64, heads=2, groups=1, dim=8)
    method = MInference(profile=Profile.uniform(2, 4, HeadPattern("dense")))
    with pytest.raises(ValueError, match="2 layers of 4 heads, but layer 0 with 2 heads"):
        plan_of(method, case, layer=0)
    with pytest.raises(ValueError, match="pass layer="):
        plan_of(method, case)
