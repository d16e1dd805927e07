"""Some rows' attention in C++ against the definition in fp64, on every instruction set."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from cpu_checks import draw, every_kernel, every_native_kernel, needs_kernels, poisoned, same_on_threads
from torch import Tensor

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = [needs_kernels, poisoned]


@pytest.fixture(autouse=True)
def force(monkeypatch, request):
    if "isa" in request.fixturenames:
        monkeypatch.setenv(cpu.ENVIRONMENT, request.getfixturevalue("isa"))


def some_rows(call: AttentionCall, count: int, seed: int = 0) -> Tensor:
    """In any order, some of them twice, some dead where there are any."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(call.query_len, (call.batch, count), generator=generator)


def check(call: AttentionCall, plan: SparsePlan, rows: Tensor) -> None:
    out, lse = cpu.attend_rows(call, plan, rows)
    q, k, v = (x.double() for x in (call.q, call.k, call.values))
    expected, expected_lse = reference.attend_rows(replace(call, q=q, k=k, v=v), plan, rows)
    assert (out.dtype, lse.dtype) == (torch.float32, torch.float32)
    assert out.shape == expected.shape
    coarse = call.q.dtype == torch.bfloat16  # weights are rounded
    size = float(expected.abs().max().clamp_min(1e-30))
    assert float((out - expected).abs().max()) <= (4e-3 if coarse else 1e-5) * size
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool((out[empty] == 0).all())
    off = (lse - expected_lse)[~empty].abs()
    assert bool((off <= (1e-3 if coarse else 2e-5)).all())


@every_kernel
@pytest.mark.parametrize("situation", SITUATIONS)
def test_dense(isa: str, dtype: torch.dtype, situation: str) -> None:
    call = make_call(situation, length=190, heads=4, groups=2, dim=33, dtype=dtype)
    check(call, SparsePlan.dense(2, call.query_len, call.key_len, call.extent), some_rows(call, 9))


@every_native_kernel
@pytest.mark.parametrize("seed", range(8))
def test_random_plans(isa: str, dtype: torch.dtype, seed: int) -> None:
    """Blocks, columns and bands, of query heads and of key/value heads."""
    query_len, key_len = [(65, 300), (257, 257), (130, 333)][seed % 3]
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=query_len,
        key_len=key_len,
        block_q=[40, 64, 32][seed % 3],
        block_k=[64, 48, 16, 130][seed % 4],
        padded=seed > 3,
        causal=seed % 5 != 2,
        limit=150 if seed % 4 == 2 else None,
    )
    fields = {"sinks": torch.randn(4) if seed % 3 == 1 else None, "softcap": 3.0 if seed % 3 == 2 else None}
    scale = [0.3, -0.2, 0.3][seed % 3]
    call = draw(plan, heads=4, groups=2, dim=[64, 40, 96][seed % 3], seed=seed, dtype=dtype, scale=scale, **fields)
    check(call, plan, some_rows(call, 17, seed))


@every_native_kernel
def test_more_rows_and_keys_than_run_together(isa: str, dtype: torch.dtype) -> None:
    call = make_call("padded chunk", length=2300, heads=4, groups=1, dim=16, dtype=dtype)
    plan = SparsePlan(4, call.query_len, call.key_len, call.extent, sink=[0, 70, 5000, 3], window=[200, 1, 1, 3000])
    for count in (70, 270):
        check(call, plan, some_rows(call, count))


def test_rows_may_be_the_same_for_all_batch_rows() -> None:
    call = make_call("left padding", length=100, heads=2, groups=1, dim=8)
    plan, rows = SparsePlan.dense(1, 100, 100, call.extent), torch.tensor([99, 3, 50])
    out, lse = cpu.attend_rows(call, plan, rows)
    again, again_lse = cpu.attend_rows(call, plan, rows.expand(2, -1))
    assert torch.equal(out, again)
    assert torch.equal(lse, again_lse)


@pytest.mark.parametrize("rows", [torch.zeros(0, dtype=torch.int64), torch.zeros(2, 0, dtype=torch.int64)])
def test_no_rows(rows: Tensor) -> None:
    call = make_call("left padding", length=20, heads=2, groups=1, dim=8)
    out, lse = cpu.attend_rows(call, SparsePlan.dense(1, 20, 20, call.extent), rows)
    assert (out.shape, lse.shape) == ((2, 2, 0, 8), (2, 2, 0))


@pytest.mark.parametrize("row", [-7, 20, 1 << 40])
def test_rows_outside_the_call_attend_nothing(row: int) -> None:
    call = make_call("no padding", length=20, heads=2, groups=1, dim=8)
    out, lse = cpu.attend_rows(call, SparsePlan.dense(1, 20, 20, call.extent), torch.tensor([row, 5]))
    assert bool((out[:, :, 0] == 0).all())
    assert bool((lse[:, :, 0] == -math.inf).all())
    assert bool(lse[:, :, 1].isfinite().all())


@pytest.mark.parametrize("fields", [{"permuted": True}, {"pruned_mean": True}, {"skip": 0.5}])
def test_orders_and_attributes_are_left_to_torch(fields: dict) -> None:
    plan = random_plan(5, batch=2, heads=2, query_len=130, key_len=130, **fields)
    call = draw(plan, heads=4, groups=2, dim=16)
    rows = some_rows(call, 9)
    out, lse = cpu.attend_rows(call, plan, rows)
    expected, expected_lse = reference.attend_rows(call, plan, rows)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)


def test_what_is_not_a_number_stays_so() -> None:
    call = make_call("no padding", length=200, heads=2, groups=1, dim=8)
    call.values[0, 0, 5, 3] = math.nan
    out, _ = cpu.attend_rows(call, SparsePlan.dense(1, 200, 200, call.extent), torch.tensor([2, 150]))
    assert bool(out[0, :, 1, 3].isnan().all())


@every_native_kernel
def test_a_row_depends_on_nothing_else(isa: str, dtype: torch.dtype) -> None:
    """The same bits with padding, beside a longer batch row, and on any number of threads."""
    alone = make_call("no padding", length=300, heads=4, groups=2, dim=32, dtype=dtype)
    longer = make_call("no padding", length=2200, heads=4, groups=2, dim=32, dtype=dtype)
    tensors = [torch.full((2, x.shape[1], 2200, 32), math.nan, dtype=dtype) for x in (alone.q, alone.k, alone.k)]
    for x, one, other in zip(
        tensors, (alone.q, alone.k, alone.values), (longer.q, longer.k, longer.values), strict=True
    ):
        x[0, :, 60:360], x[1] = one[0], other[0]
    q, k, v = tensors
    both = AttentionCall(q, k, v, Extent([-60, 0], [300, 2200], [60, 0], [300, 2200]))
    rows = torch.tensor([[299, 7, 120]])

    def attended(call: AttentionCall, rows: Tensor) -> tuple[Tensor, Tensor]:
        plan = SparsePlan(4, call.query_len, call.key_len, call.extent, sink=9, window=[30, 64, 5, 500])
        return cpu.attend_rows(call, plan, rows)

    expected = same_on_threads(lambda: attended(alone, rows))
    got = same_on_threads(lambda: attended(both, torch.cat([rows + 60, rows + 1800])))
    assert all(torch.equal(one[0], other[0]) for one, other in zip(expected, got, strict=True))
