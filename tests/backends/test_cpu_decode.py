"""Few query rows against many keys: packed stretch by stretch, merged by their log-sum-exp."""

import math
from dataclasses import replace

import pytest
import torch
from cpu_checks import DTYPES, check, draw, every_isa, every_kernel, needs_kernels, poisoned, same_on_threads

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.testing import random_plan

pytestmark = [needs_kernels, poisoned]
# At these lengths every tile size makes several stretches; the emulation is too slow for more than one such case.
LONG = 3001


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


def dense(heads: int, query_len: int, key_len: int) -> SparsePlan:
    return SparsePlan.dense(heads, query_len, key_len, Extent.full(1, query_len, key_len))


@every_kernel
@pytest.mark.parametrize("query_len", [1, 3, 17])
def test_dense(force, isa: str, dtype: torch.dtype, query_len: int) -> None:
    force(isa)
    plan = dense(2, query_len, LONG)
    check(draw(plan, heads=4, groups=2, dim=64, dtype=dtype), plan)


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
    fields = {"sinks": torch.randn(4) if seed in (1, 4, 7) else None, "softcap": 5.0 if seed in (2, 4) else None}
    dim = [64, 128, 32, 80][seed % 4]
    check(draw(plan, heads=4, groups=2, dim=dim, seed=seed, dtype=dtype, **fields), plan)


@every_isa
@pytest.mark.parametrize("query_len", [2, 5, 40, 64])
def test_across_the_border_of_blocks(force, isa: str, query_len: int) -> None:
    """Queries in two blocks, with lists of their own: few are streamed, many run over packed keys."""
    force(isa)
    key_len = 640 + query_len // 2
    extent = Extent([key_len - query_len] * 2, [query_len, 1], [0, 3], [key_len, key_len - 3])
    mask = torch.rand(2, 4, 2, 11, generator=torch.Generator().manual_seed(query_len)) < 0.4
    plan = SparsePlan.from_block_mask(mask, query_len, key_len, extent=extent, window=10)
    for dtype in (torch.float32, torch.bfloat16):
        check(draw(plan, heads=4, groups=2, dim=64, dtype=dtype), plan)


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
    call = draw(plan, heads=4, groups=2, dim=64, dtype=torch.bfloat16)
    check(call, plan)
    out, lse = cpu.attend(call, plan)
    assert bool((out[0, 2] == 0).all())
    assert lse[0, 2].tolist() == [-math.inf]


@every_isa
def test_sinks_count_once(force, isa: str) -> None:
    force(isa)
    plan = dense(1, 1, LONG)
    check(draw(plan, heads=2, groups=1, dim=64, sinks=torch.tensor([9.0, -math.inf])), plan)
    nothing = SparsePlan(1, 1, LONG, Extent.full(1, 1, LONG))
    out, lse = cpu.attend(draw(nothing, heads=2, groups=1, dim=64, sinks=torch.tensor([2.0, -math.inf])), nothing)
    assert bool((out == 0).all())
    assert lse[0, :, 0].tolist() == [2.0, -math.inf]


@every_kernel
def test_results_do_not_depend_on_threads(force, isa: str, dtype: torch.dtype) -> None:
    force(isa)
    plan = dense(2, 2, LONG)
    call = draw(plan, heads=4, groups=2, dim=64, dtype=dtype)
    same_on_threads(lambda: cpu.attend(call, plan))


def test_nan_spoils_only_its_head() -> None:
    plan = dense(2, 1, LONG)
    call = draw(plan, heads=2, groups=2, dim=64)
    clean, _ = cpu.attend(call, plan)
    k = call.k.clone()
    k[:, 1, 2000] = math.nan
    out, lse = cpu.attend(replace(call, k=k), plan)
    assert torch.equal(out[:, 0], clean[:, 0])
    assert bool(out[:, 1].isnan().all())
    assert bool(lse[:, 1].isnan().all())


@every_isa
def test_values_where_they_lie(force, isa: str) -> None:
    """float32 values are read in place: strided, the same row for all tokens, or not a multiple of a vector."""
    force(isa)
    plan = SparsePlan.dense(2, 1, 500, Extent([496], [1], [3], [497]))
    call = draw(plan, heads=4, groups=2, dim=64)
    v = torch.randn(1, 2, 500, 64)
    for values in (v.transpose(1, 2).contiguous().transpose(1, 2), v[:, :, :1].expand_as(v), v[..., :40], v[..., ::2]):
        check(replace(call, v=values), plan)


@every_kernel
@pytest.mark.parametrize("spoilt", [0, 250, 541])
def test_rows_of_nan_have_an_lse_of_nan(force, isa: str, dtype: torch.dtype, spoilt: int) -> None:
    """Also where later stretches hold nothing that the row sees."""
    force(isa)
    plan = SparsePlan.dense(1, 64, 542, Extent.full(1, 64, 542))
    call = draw(plan, heads=1, groups=1, dim=128, dtype=dtype)
    k = call.k.clone()
    k[:, :, spoilt] = math.nan
    out, lse = cpu.attend(replace(call, k=k), plan)
    sees = torch.arange(478, 542) >= spoilt
    assert torch.equal(out[0, 0].isnan().all(-1), sees)
    assert torch.equal(lse[0, 0].isnan(), sees)
