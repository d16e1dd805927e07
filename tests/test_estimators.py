"""Estimators against loops written from their formulas."""

import math

import pytest
import torch

from gossamer import estimators
from gossamer.backends.cpu import planning
from gossamer.plan import Extent, ceil_div
from gossamer.testing import SITUATIONS, make_case


@pytest.fixture(params=["", "torch"], ids=["cpp", "torch"], autouse=True)
def planner(request, monkeypatch) -> None:
    """Every estimator as it runs here, and by torch alone."""
    monkeypatch.setenv(planning.ENVIRONMENT, request.param)


def naive_probe(case, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Materialised softmax of the last live queries, summed by column and by distance."""
    batch, heads, query_len, _ = case.q.shape
    columns = torch.zeros(batch, heads, case.key_len)
    diagonals = torch.zeros(batch, heads, case.key_len)
    for b in range(batch):
        start, count, first = (
            int(t[b]) for t in (case.extent.key_start, case.extent.key_count, case.extent.query_start)
        )
        rows = range(query_len)[-last:]
        for h in range(heads):
            g = h * case.k.shape[1] // heads
            for i in rows:
                position = first + i
                keys = [j for j in range(start, start + count) if j - start <= position]
                if not keys:
                    continue
                logits = case.q[b, h, i].float() @ case.k[b, g, keys].float().T * case.scale
                for j, p in zip(keys, logits.softmax(0).tolist(), strict=True):
                    columns[b, h, j] += p
                    diagonals[b, h, position - (j - start)] += p
    return columns, diagonals


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(("length", "last"), [(1, 64), (50, 64), (130, 64), (90, 16)])
@pytest.mark.parametrize("chunk_bytes", [estimators.CHUNK_BYTES, 1])
def test_last_query_probe(monkeypatch, situation: str, length: int, last: int, chunk_bytes: int) -> None:
    monkeypatch.setattr(estimators, "CHUNK_BYTES", chunk_bytes)
    case = make_case(situation, length=length, heads=4, groups=2, dim=16)
    columns, diagonals = estimators.last_query_probe(case.q, case.k, scale=case.scale, extent=case.extent, last=last)
    expected_columns, expected_diagonals = naive_probe(case, last)
    torch.testing.assert_close(columns, expected_columns, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(diagonals, expected_diagonals, atol=1e-5, rtol=1e-4)


def test_probe_ends_at_the_last_live_query_under_right_padding() -> None:
    case = make_case("no padding", length=100, heads=1, groups=1, dim=8)
    padded = Extent([0], [0], [70])
    got = estimators.last_query_probe(case.q, case.k, scale=1.0, extent=padded, last=16)
    alone = estimators.last_query_probe(
        case.q[:, :, :70], case.k[:, :, :70], scale=1.0, extent=Extent.full(1, 70, 70), last=16
    )
    for padded_mass, mass in zip(got, alone, strict=True):
        torch.testing.assert_close(padded_mass[..., :70], mass)
        assert not bool(padded_mass[..., 70:].any())


@pytest.mark.parametrize("situation", SITUATIONS)
def test_pooling_means_live_tokens_only(situation: str) -> None:
    case = make_case(situation, length=100, heads=2, groups=2, dim=8)
    pooled = estimators.pool_keys(case.k, case.extent, 32)
    for b in range(case.k.shape[0]):
        start, count = int(case.extent.key_start[b]), int(case.extent.key_count[b])
        for n in range(pooled.shape[2]):
            live = [j for j in range(n * 32, min((n + 1) * 32, case.key_len)) if start <= j < start + count]
            expected = case.k[b, :, live].mean(1) if live else torch.zeros(2, 8)
            torch.testing.assert_close(pooled[b, :, n], expected)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("chunk_bytes", [estimators.CHUNK_BYTES, 1])
def test_pooled_scores(monkeypatch, situation: str, chunk_bytes: int) -> None:
    monkeypatch.setattr(estimators, "CHUNK_BYTES", chunk_bytes)
    case = make_case(situation, length=150, heads=4, groups=2, dim=8)
    chunks = list(estimators.pooled_scores(case.q, case.k, extent=case.extent, block_q=32, block_k=16))
    scores = torch.cat([s for _, s in chunks], dim=2)
    assert [at for at, _ in chunks] == [sum(s.shape[2] for _, s in chunks[:n]) for n in range(len(chunks))]
    queries = estimators.pool_queries(case.q, case.extent, 32)
    keys = estimators.pool_keys(case.k, case.extent, 16)
    for b in range(case.q.shape[0]):
        start, count, first = (
            int(t[b]) for t in (case.extent.key_start, case.extent.key_count, case.extent.query_start)
        )
        for m in range(scores.shape[2]):
            last = first + min((m + 1) * 32, case.query_len) - 1
            for n in range(scores.shape[3]):
                live = [j - start for j in range(n * 16, (n + 1) * 16) if start <= j < start + count]
                for h in range(4):
                    if live and min(live) <= last:
                        expected = float(queries[b, h, m] @ keys[b, h // 2, n])
                        assert float(scores[b, h, m, n]) == pytest.approx(expected, abs=1e-4)
                    else:
                        assert float(scores[b, h, m, n]) == -math.inf


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("chunk_bytes", [estimators.CHUNK_BYTES, 1])
def test_row_block_energy(monkeypatch, situation: str, chunk_bytes: int) -> None:
    monkeypatch.setattr(estimators, "CHUNK_BYTES", chunk_bytes)
    case = make_case(situation, length=150, heads=4, groups=2, dim=8)
    energy = torch.cat(
        [
            e
            for _, e in estimators.row_block_energy(
                case.q, case.k, scale=case.scale, extent=case.extent, block_q=32, block_k=16
            )
        ],
        dim=2,
    )
    keys = estimators.pool_keys(case.k, case.extent, 16)
    assert energy.shape == (case.q.shape[0], 2, ceil_div(case.query_len, 32), ceil_div(case.key_len, 16))
    for b in range(case.q.shape[0]):
        start, count, first = (
            int(t[b]) for t in (case.extent.key_start, case.extent.key_count, case.extent.query_start)
        )
        for g in range(2):
            for m in range(energy.shape[2]):
                rows = range(m * 32, min((m + 1) * 32, case.query_len))
                x: dict[int, list[float]] = {}
                for n in range(energy.shape[3]):
                    live = [j - start for j in range(n * 16, (n + 1) * 16) if start <= j < start + count]
                    if not live or (n + 1) * 16 - start > first + rows[-1] + 1:
                        continue  # the boundary block is not scored
                    x[n] = [
                        float(case.q[b, h, i] @ keys[b, g, n]) * case.scale
                        for h in (2 * g, 2 * g + 1)
                        for i in rows
                        if first + i >= min(live)
                    ]
                top = max((value for values in x.values() for value in values), default=0.0)
                for n in range(energy.shape[3]):
                    expected = sum(math.exp(value - top) for value in x.get(n, []))
                    assert float(energy[b, g, m, n]) == pytest.approx(expected, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("chunk_bytes", [estimators.CHUNK_BYTES, 1])
@pytest.mark.parametrize(("length", "stride"), [(150, 4), (7, 8), (90, 1)])
def test_antidiagonal_scores(monkeypatch, situation: str, chunk_bytes: int, length: int, stride: int) -> None:
    monkeypatch.setattr(estimators, "CHUNK_BYTES", chunk_bytes)
    monkeypatch.setattr(estimators, "ENERGY_BYTES", chunk_bytes)
    case = make_case(situation, length=length, heads=4, groups=2, dim=8)
    block_q, block_k = 32, 16
    sizes = {"extent": case.extent, "block_q": block_q, "block_k": block_k, "stride": stride}
    chunks = list(estimators.antidiagonal_scores(case.q, case.k, scale=case.scale, **sizes))
    scores = torch.cat([s for _, s in chunks], dim=2)
    assert [at for at, _ in chunks] == [sum(s.shape[2] for _, s in chunks[:n]) for n in range(len(chunks))]
    expected = torch.zeros(case.q.shape[0], 4, ceil_div(case.query_len, block_q), ceil_div(case.key_len, block_k))
    assert scores.shape == expected.shape
    for b in range(case.q.shape[0]):
        start, count, first = (
            int(t[b]) for t in (case.extent.key_start, case.extent.key_count, case.extent.query_start)
        )
        for h in range(4):
            for t in range(ceil_div(case.query_len, stride)):
                last = first + min((t + 1) * stride, case.query_len) - 1
                logits = {}
                for u in range(ceil_div(case.key_len, stride)):
                    live = [j for j in range(u * stride, (u + 1) * stride) if start <= j < start + count]
                    if not live or live[0] - start > last:
                        continue
                    pairs = [(t * stride + stride - 1 - (j - u * stride), j) for j in live]
                    logits[u] = sum(
                        float(case.q[b, h, i] @ case.k[b, h // 2, j])
                        for i, j in pairs
                        if i < case.query_len and first + i >= 0
                    ) * (case.scale / stride)
                total = sum(math.exp(x) for x in logits.values())
                for u, x in logits.items():
                    expected[b, h, t * stride // block_q, u * stride // block_k] += math.exp(x) / total
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-4)


def test_a_stride_that_does_not_divide_the_blocks_is_named() -> None:
    case = make_case("no padding", length=10, heads=1, groups=1, dim=8)
    with pytest.raises(ValueError, match="stride must divide block_q and block_k, got 5 for blocks 32 and 16"):
        next(
            estimators.antidiagonal_scores(
                case.q, case.k, scale=1.0, extent=case.extent, block_q=32, block_k=16, stride=5
            )
        )


def test_no_intermediate_exceeds_its_budget_at_a_million_keys() -> None:
    """Peak memory over a million keys stays far below 1 GiB beyond q and k."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    k = torch.zeros(1, 1, 1 << 20, 16)
    q = torch.randn(1, 4, 64, 16)
    extent = Extent.full(1, 64, 1 << 20)
    columns, _ = estimators.last_query_probe(q, k, scale=1.0, extent=extent)
    for _ in estimators.row_block_energy(q, k, scale=1.0, extent=extent, block_q=64, block_k=128):
        pass
    for _ in estimators.pooled_scores(q, k, extent=extent, block_q=64, block_k=64):
        pass
    for _ in estimators.antidiagonal_scores(q, k, scale=1.0, extent=extent, block_q=64, block_k=128):
        pass
    assert float(columns.sum()) == pytest.approx(4 * 64, rel=1e-3)
    inputs = k.numel() * 4
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    assert grown < inputs + (1 << 30)


@pytest.mark.parametrize(("batch", "query_len", "key_len"), [(0, 70, 70), (1, 0, 70), (2, 0, 0), (1, 70, 0)])
def test_nothing_to_score(batch: int, query_len: int, key_len: int) -> None:
    q, k = torch.randn(batch, 4, query_len, 16), torch.randn(batch, 2, key_len, 16)
    extent = Extent([max(0, key_len - query_len)] * batch, [0] * batch, [key_len] * batch)
    sizes = {"extent": extent, "block_q": 64, "block_k": 32}
    shape = (ceil_div(query_len, 64), ceil_div(key_len, 32))
    for mass in estimators.last_query_probe(q, k, scale=1.0, extent=extent):
        assert torch.equal(mass, torch.zeros(batch, 4, key_len))
    for heads, chunks in (
        (4, estimators.pooled_scores(q, k, **sizes)),
        (2, estimators.row_block_energy(q, k, scale=1.0, **sizes)),
        (4, estimators.antidiagonal_scores(q, k, scale=1.0, **sizes)),
    ):
        parts = [scores for _, scores in chunks]
        if query_len:
            assert torch.cat(parts, dim=2).shape == (batch, heads, *shape)
        else:
            assert not parts
