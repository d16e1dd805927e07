"""Few query rows against many keys: packed stretch by stretch, merged by their log-sum-exp."""

import math

import pytest
import torch
from executor_checks import DTYPES, check, draw

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.testing import random_plan

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
ISAS = cpu.supported_isas() or ["portable"]
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
# At these lengths every tile size makes several stretches; the emulation is too slow for more than one such case.
LONG = 3001


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


@every_isa
@every_dtype
@pytest.mark.parametrize("query_len", [1, 3, 17])
def test_dense(force, isa: str, dtype: torch.dtype, query_len: int) -> None:
    force(isa)
    plan = SparsePlan.dense(2, query_len, LONG, Extent.full(1, query_len, LONG))
    check(plan, *draw(plan, heads=4, groups=2, dim=64, dtype=dtype))


@every_isa
@pytest.mark.parametrize("seed", range(8))
def test_random_plans(force, isa: str, seed: int) -> None:
    """All parts of a plan, per query head and per key/value head, padded or not."""
    force(isa)
    dtype = list(DTYPES.values())[seed % 3]
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=[1, 1, 2, 5, 1, 16, 64, 40][seed],
        key_len=[700, LONG, 1500, 900, 65, 1030, 1200, 2000][seed],
        block_k=[64, 128, 100, 64, 64, 32, 64, 64][seed],
        padded=seed % 2 == 0,
        causal=seed != 3,
        limit=200 if seed in (3, 5) else None,
    )
    q, k, v = draw(plan, heads=4, groups=2, dim=[64, 128, 32, 80][seed % 4], seed=seed, dtype=dtype)
    sinks = torch.randn(4) if seed in (1, 4, 7) else None
    check(plan, q, k, v, sinks=sinks, softcap=5.0 if seed in (2, 4) else None)


@every_isa
def test_columns_across_stretches(force, isa: str) -> None:
    """Thousands of gathered keys, each list of its own."""
    force(isa)
    generator = torch.Generator().manual_seed(0)
    lists = [torch.randperm(LONG, generator=generator)[:n].sort().values.to(torch.int32) for n in (1500, 1, 0, 700)]
    indptr = torch.tensor([0, *(len(x) for x in lists)]).cumsum(0)
    plan = SparsePlan(
        4, 1, LONG, Extent.full(1, 1, LONG), column_indptr=indptr, column_indices=torch.cat(lists), sink=[0, 0, 0, 3]
    )
    q, k, v = draw(plan, heads=4, groups=2, dim=64, dtype=torch.bfloat16)
    check(plan, q, k, v)
    out, lse = cpu.execute(q, k, v, plan, scale=1.0)
    assert bool((out[0, 2] == 0).all())
    assert lse[0, 2].tolist() == [-math.inf]


@every_isa
def test_sinks_count_once(force, isa: str) -> None:
    force(isa)
    plan = SparsePlan.dense(1, 1, LONG, Extent.full(1, 1, LONG))
    q, k, v = draw(plan, heads=2, groups=1, dim=64)
    check(plan, q, k, v, sinks=torch.tensor([9.0, -math.inf]))
    nothing = SparsePlan(1, 1, LONG, Extent.full(1, 1, LONG))
    out, lse = cpu.execute(q, k, v, nothing, scale=1.0, sinks=torch.tensor([2.0, -math.inf]))
    assert bool((out == 0).all())
    assert lse[0, :, 0].tolist() == [2.0, -math.inf]


@every_isa
@every_dtype
def test_results_do_not_depend_on_threads(force, isa: str, dtype: torch.dtype) -> None:
    force(isa)
    plan = SparsePlan.dense(2, 2, LONG, Extent.full(1, 2, LONG))
    q, k, v = draw(plan, heads=4, groups=2, dim=64, dtype=dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(cpu.execute(q, k, v, plan, scale=0.1))
    finally:
        torch.set_num_threads(before)
    for out, lse in results[1:]:
        assert torch.equal(out, results[0][0])
        assert torch.equal(lse, results[0][1])


def test_nan_spoils_only_its_head() -> None:
    plan = SparsePlan.dense(2, 1, LONG, Extent.full(1, 1, LONG))
    q, k, v = draw(plan, heads=2, groups=2, dim=64)
    clean, _ = cpu.execute(q, k, v, plan, scale=0.1)
    k[:, 1, 2000] = math.nan
    out, lse = cpu.execute(q, k, v, plan, scale=0.1)
    assert torch.equal(out[:, 0], clean[:, 0])
    assert bool(out[:, 1].isnan().all())
    assert bool(lse[:, 1].isnan().all())


@every_isa
def test_values_where_they_lie(force, isa: str) -> None:
    """float32 values are read in place: strided, the same row for all tokens, or not a multiple of a vector."""
    force(isa)
    plan = SparsePlan.dense(2, 1, 500, Extent([499], [0], [500]))
    q, k, v = draw(plan, heads=4, groups=2, dim=64)
    check(plan, q, k, v.transpose(1, 2).contiguous().transpose(1, 2))
    check(plan, q, k, v[:, :, :1].expand(-1, -1, 500, -1))
    check(plan, q, k, v[..., :40])
    check(plan, q, k, v[..., ::2])


@every_isa
@every_dtype
@pytest.mark.parametrize("at", [0, 250, 541])
def test_rows_of_nan_have_an_lse_of_nan(force, isa: str, dtype: torch.dtype, at: int) -> None:
    """Also where later stretches hold nothing that the row sees."""
    force(isa)
    plan = SparsePlan.dense(1, 64, 542, Extent.full(1, 64, 542))
    q, k, v = draw(plan, heads=1, groups=1, dim=128, dtype=dtype)
    k[:, :, at] = math.nan
    out, lse = cpu.execute(q, k, v, plan, scale=0.1)
    sees = torch.arange(478, 542) >= at
    assert torch.equal(out[0, 0].isnan().all(-1), sees)
    assert torch.equal(lse[0, 0].isnan(), sees)
