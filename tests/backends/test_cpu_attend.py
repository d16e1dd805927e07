"""Attention in C++ against the definition: all parts of a plan, every instruction set that this machine runs."""

import math
import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from cpu_checks import (
    DTYPES,
    check,
    draw,
    every_dtype,
    every_isa,
    every_kernel,
    needs_kernels,
    poisoned,
    same_on_threads,
)
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.plan import Grid
from gossamer.testing import SITUATIONS, assert_accurate, make_call, random_plan

pytestmark = [needs_kernels, poisoned]


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


def dense(heads: int, query_len: int, key_len: int, **extent) -> SparsePlan:
    return SparsePlan.dense(heads, query_len, key_len, Extent.full(1, query_len, key_len, **extent))


@every_kernel
@pytest.mark.parametrize("seed", range(6))
def test_random_plans(force, isa: str, dtype: torch.dtype, seed: int) -> None:
    """Blocks, columns, bands, overlaps and empty rows; per query head and per key/value head; padding, chunks."""
    force(isa)
    lengths = [(1, 1), (63, 63), (64, 200), (65, 65), (130, 333), (257, 257)][seed]
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=lengths[0],
        key_len=lengths[1],
        block_q=[64, 64, 128, 32, 40, 64][seed],
        block_k=[64, 128, 64, 32, 48, 100][seed],
        padded=seed % 2 == 0,
        causal=seed != 4,
        limit=50 if seed in (3, 4) else None,
    )
    fields = {"sinks": torch.randn(4) if seed in (1, 4) else None, "softcap": 5.0 if seed in (2, 4) else None}
    call = draw(plan, heads=4, groups=2, dim=[64, 128, 32, 80, 64, 96][seed], seed=seed, dtype=dtype, **fields)
    check(replace(call, scale=0.3) if seed == 5 else call, plan)


@every_isa
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation(force, isa: str, situation: str) -> None:
    """Padding on both sides, chunks that begin inside a block, all that the model may ask for."""
    force(isa)
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(situation, length=150, heads=4, groups=2, dim=32, dtype=dtype)
        grid = Grid(call.extent, 32, 48)
        generator = torch.Generator().manual_seed(0)
        mask = torch.rand(call.batch, 2, grid.query_blocks, grid.key_blocks, generator=generator) < 0.5
        sizes = {"extent": call.extent, "block_q": 32, "block_k": 48, "sink": 3, "window": 20}
        check(call, SparsePlan.from_block_mask(mask, call.query_len, call.key_len, **sizes))
        check(call, SparsePlan.dense(4, call.query_len, call.key_len, call.extent))


@every_isa
@pytest.mark.parametrize("seed", range(4))
def test_permuted_plans(force, isa: str, seed: int) -> None:
    force(isa)
    plan = random_plan(
        100 + seed,
        batch=2,
        heads=[4, 2][seed % 2],
        query_len=150,
        key_len=[150, 290][seed // 2],
        permuted=True,
        padded=seed % 2 == 1,
        causal=seed != 3,
        limit=90 if seed == 2 else None,
    )
    check(draw(plan, heads=4, groups=2, dim=64, seed=seed), plan)
    for order in ("q_order", "k_order"):
        given: dict[str, Any] = {"extent": plan.extent, "window": 9, order: getattr(plan, order)}
        shape = SparsePlan(plan.heads, 150, plan.key_len, **given)
        mask = torch.rand(2, plan.heads, shape.num_query_blocks, shape.num_key_blocks) < 0.4
        one = SparsePlan.from_block_mask(mask, 150, plan.key_len, **given)
        check(draw(plan, heads=4, groups=2, dim=64, seed=seed, dtype=torch.bfloat16), one)


@every_isa
@pytest.mark.parametrize("block", [64, 48])
def test_axis_orders_in_both_directions(force, isa: str, block: int) -> None:
    """The bits are those of the blocks by themselves, over tokens that lie in that order."""
    force(isa)
    order = torch.arange(240).view(4, 6, 10).permute(2, 0, 1).flatten()
    mask = torch.rand(1, 4, 240 // block + (240 % block > 0), 240 // block + (240 % block > 0)) < 0.5
    sizes: dict[str, Any] = {"extent": Extent.full(1, 240, 240, causal=False), "block_q": block, "block_k": block}
    orders: dict[str, Any] = dict.fromkeys(("q_order", "k_order"), order.int().expand(1, 4, 240))
    plain = SparsePlan.from_block_mask(mask, 240, 240, **sizes)
    plan = SparsePlan.from_block_mask(mask, 240, 240, **sizes, **orders)
    for dtype in (torch.float32, torch.bfloat16):
        call = draw(plan, heads=4, groups=2, dim=32, dtype=dtype)
        check(call, plan)
        in_order = replace(call, **{name: getattr(call, name)[:, :, order] for name in ("q", "k", "v")})
        for got, expected in zip(cpu.attend(call, plan), cpu.attend(in_order, plain), strict=True):
            assert torch.equal(got[:, :, order], expected)
    padded = Extent([-5], [200], [5], [200], causal=False)  # ranks of dead keys among those of live ones
    plan = SparsePlan.from_block_mask(mask, 240, 240, **{**sizes, **orders, "extent": padded})
    check(draw(plan, heads=4, groups=2, dim=32), plan)


@every_isa
@pytest.mark.parametrize("queries", [600, 200], ids=["prompt", "chunk"])
def test_keys_that_change_places_nearby(force, isa: str, queries: int) -> None:
    """Chunks before a query block are then whole, unless the model's window, a dead key or no block cuts into them."""
    force(isa)
    for limit, dtype, more in ((None, torch.float32, {}), (330, torch.bfloat16, {"sink": 3, "window": 9})):
        call = make_call("no padding", length=600, heads=4, groups=2, dim=32, dtype=dtype)
        extent = Extent([600 - queries], [queries], [5], [590 if limit else 595], limit=limit)
        call = replace(call, q=call.q[:, :, :queries], extent=extent)
        generator = torch.Generator().manual_seed(queries)
        order = torch.rand(1, 2, 5, 120, generator=generator).argsort(-1) + 120 * torch.arange(5)[:, None]
        given: dict[str, Any] = {"extent": extent, "k_order": order.flatten(2).int(), "block_k": 128, **more}
        mask = torch.rand(1, 2, Grid(extent, 64, 64).query_blocks, 5, generator=generator) < 0.7
        check(call, SparsePlan.from_block_mask(mask, queries, 600, **given))


@every_isa
@pytest.mark.parametrize("seed", range(4))
def test_fewer_queries_than_keys(force, isa: str, seed: int) -> None:
    """Only listed keys are packed then; the buffer holds NaN from the call before wherever they are not."""
    force(isa)
    dtype = [torch.float32, torch.bfloat16][seed % 2]
    plan = random_plan(
        200 + seed,
        batch=2,
        heads=[2, 4][seed // 2],
        query_len=130,
        key_len=1000,
        permuted=seed == 3,
        padded=seed == 1,
    )
    call = draw(plan, heads=4, groups=2, dim=64, seed=seed, dtype=dtype)
    everything = SparsePlan.dense(2, 130, 1000, Extent.full(2, 130, 1000))
    k, v = (torch.full_like(x, math.nan) for x in (call.k, call.values))
    spoilt = AttentionCall(torch.ones_like(call.q), k, v)
    assert bool(cpu.attend(spoilt, everything)[0].isnan().all())
    check(call, plan)


@every_isa
@pytest.mark.parametrize("dim", [1, 16, 32, 40, 64, 72, 80, 96, 128, 200, 256])
def test_head_dimensions(force, isa: str, dim: int) -> None:
    force(isa)
    plan = random_plan(3, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        check(draw(plan, heads=2, groups=1, dim=dim, seed=dim, dtype=dtype), plan)


@every_isa
def test_values_of_another_dimension(force, isa: str) -> None:
    force(isa)
    plan = random_plan(5, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in DTYPES.values():
        check(draw(plan, heads=2, groups=2, dim=96, value_dim=40, dtype=dtype), plan)


@every_isa
@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.parametrize("block_q", [17, 64, 128, 1000])
def test_shared_heads_and_block_sizes(force, isa: str, share: int, block_q: int) -> None:
    """A plan for key/value heads; panels of more rows than are processed at once."""
    force(isa)
    plan = random_plan(share, batch=1, heads=2, query_len=300, key_len=300, block_q=block_q)
    check(draw(plan, heads=2 * share, groups=2, dim=32), plan)


@every_isa
def test_a_thousand_tokens(force, isa: str) -> None:
    force(isa)
    mask = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = SparsePlan.from_block_mask(mask, 1000, 1000, window=30, sink=5)
    for dtype in (torch.float32, torch.bfloat16):
        check(draw(plan, heads=4, groups=1, dim=64, dtype=dtype), plan)


@every_isa
@pytest.mark.parametrize("group", [1, 3, 100])
def test_columns_count_once(force, isa: str, group: int) -> None:
    """Columns inside selected blocks, inside the bands and outside both; more than a tile of them.

    Whether lists are packed once or gathered by each query block.
    """
    force(isa)
    generator = torch.Generator().manual_seed(group)
    length, blocks = 500, 8
    rows = 2 * -(-blocks // group)
    columns = [torch.randperm(length, generator=generator)[:170].sort().values.int() for _ in range(rows)]
    plan = SparsePlan.from_block_mask(
        torch.rand(1, 2, blocks, blocks, generator=generator) < 0.2,
        length,
        length,
        column_group=group,
        column_indptr=torch.arange(rows + 1) * 170,
        column_indices=torch.cat(columns),
        sink=[3, 0],
        window=[20, 0],
    )
    check(draw(plan, heads=4, groups=2, dim=64), plan)


@every_isa
@every_dtype
def test_extreme_logits(force, isa: str, dtype: torch.dtype) -> None:
    """Logits of +-80 and beyond, all equal, and rows far apart from each other."""
    force(isa)
    plan = dense(1, 200, 200)
    call = draw(plan, heads=1, groups=1, dim=64, scale=0.8)
    k, q = call.k.clone(), call.q.clone()
    k[:, :, 5] *= 4
    q[:, :, 100:] *= 8
    call = replace(call, q=q.to(dtype), k=k.to(dtype), v=call.values.to(dtype))
    out, lse = cpu.attend(call, plan)
    wide = replace(call, q=call.q.double(), k=call.k.double(), v=call.values.double())
    expected, expected_lse = reference.attend(wide, plan)
    # A logit of size 500 carries 24 bits: 3e-5 of absolute error, which the exponential makes relative.
    tolerance = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)
    check(replace(call, scale=0.0), plan)


@every_isa
@every_dtype
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(force, isa: str, dtype: torch.dtype, softcap: float) -> None:
    force(isa)
    plan = dense(1, 90, 90)
    call = draw(plan, heads=2, groups=1, dim=32, softcap=softcap)
    check(replace(call, q=(call.q * 6).to(dtype), k=call.k.to(dtype), v=call.values.to(dtype)), plan)


@every_isa
def test_sinks(force, isa: str) -> None:
    """Sinks of any size; rows that attend nothing else, and dead ones, have lse = sink."""
    force(isa)
    mask = torch.rand(1, 4, 2, 2, generator=torch.Generator().manual_seed(1)) < 0.5
    plan = SparsePlan.from_block_mask(mask, 90, 90)
    check(draw(plan, heads=4, groups=2, dim=32, sinks=torch.tensor([-100.0, 0.0, 5.0, 100.0])), plan)
    nothing = SparsePlan(4, 90, 90, Extent([-3], [80], [3], [80]))
    sinks = torch.tensor([-3.0, 0.0, 2.0, -math.inf])
    out, lse = cpu.attend(draw(nothing, heads=4, groups=2, dim=32, sinks=sinks), nothing)
    assert bool((out == 0).all())
    assert torch.equal(lse, sinks[:, None].expand(1, 4, 90))


@every_isa
def test_empty_rows(force, isa: str) -> None:
    force(isa)
    plan = SparsePlan(2, 100, 100, Extent.full(1, 100, 100))
    for dtype in DTYPES.values():
        out, lse = cpu.attend(draw(plan, heads=2, groups=1, dim=64, dtype=dtype), plan)
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


@every_kernel
def test_masked_keys_leave_no_trace(force, isa: str, dtype: torch.dtype) -> None:
    """Replacing tokens from j on leaves every earlier output and lse bit-identical."""
    force(isa)
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 250, 250)
    call = draw(plan, heads=2, groups=1, dim=64, dtype=dtype)
    out, lse = cpu.attend(call, plan)
    for j in (1, 64, 130, 249):
        k, v = call.k.clone(), call.values.clone()
        k[:, :, j:] = 300.0
        v[:, :, j:] = -1e4
        out2, lse2 = cpu.attend(replace(call, k=k, v=v), plan)
        assert torch.equal(out[:, :, :j], out2[:, :, :j])
        assert torch.equal(lse[:, :, :j], lse2[:, :, :j])


@every_isa
def test_results_do_not_depend_on_threads(force, isa: str) -> None:
    force(isa)
    plan = random_plan(2, batch=2, heads=2, query_len=400, key_len=400)
    call = draw(plan, heads=4, groups=2, dim=64, dtype=torch.bfloat16)
    same_on_threads(lambda: cpu.attend(call, plan))


def test_two_python_threads_at_once() -> None:
    plans = [random_plan(n, batch=1, heads=2, query_len=300, key_len=[300, 500][n]) for n in range(2)]
    calls = [draw(plan, heads=2, groups=2, dim=[64, 128][n]) for n, plan in enumerate(plans)]
    expected = [cpu.attend(*pair) for pair in zip(calls, plans, strict=True)]
    same = [True, True]

    def work(n: int) -> None:
        for _ in range(10):
            out, lse = cpu.attend(calls[n], plans[n])
            same[n] = same[n] and torch.equal(out, expected[n][0]) and torch.equal(lse, expected[n][1])

    workers = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert same == [True, True]


@every_isa
def test_strided_inputs(force, isa: str) -> None:
    """[B, S, H, D] storage seen as [B, H, S, D], gaps between rows, and a last dimension that is not contiguous."""
    force(isa)
    plan = random_plan(7, batch=2, heads=2, query_len=100, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        call = draw(plan, heads=4, groups=2, dim=64, dtype=dtype)
        expected, expected_lse = cpu.attend(call, plan)
        given = (call.q, call.k, call.values)
        swapped = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
        gaps = [F.pad(x, (3, 5), value=math.nan)[..., 3:-5] for x in given]
        columns = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in given]
        for q, k, v in (swapped, gaps, columns):
            out, lse = cpu.attend(replace(call, q=q, k=k, v=v), plan)
            assert out.is_contiguous()
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)


@every_kernel
def test_error_is_like_sdpa(force, isa: str, dtype: torch.dtype) -> None:
    """At most 1.5 times the error of torch's SDPA under the same mask, both against fp64."""
    force(isa)
    mask = torch.rand(1, 2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.3
    plan = SparsePlan.from_block_mask(mask | torch.eye(11, dtype=torch.bool), 700, 700)
    call = draw(plan, heads=4, groups=2, dim=128, dtype=dtype)
    assert_accurate(call, plan, *cpu.attend(call, plan))


@every_isa
def test_nan_and_infinity_spoil_only_the_rows_that_see_them(force, isa: str) -> None:
    force(isa)
    plan = dense(1, 130, 130)
    call = draw(plan, heads=1, groups=1, dim=32)
    clean, clean_lse = cpu.attend(call, plan)
    for bad in (math.nan, math.inf):
        k = call.k.clone()
        k[:, :, 100] = bad
        out, lse = cpu.attend(replace(call, k=k), plan)
        assert torch.equal(out[:, :, :100], clean[:, :, :100])
        assert torch.equal(lse[:, :, :100], clean_lse[:, :, :100])
        # Products with infinity of either sign sum to NaN.
        assert bool(out[:, :, 100:].isnan().all())
        assert bool(lse[:, :, 100:].isnan().all())


def test_operator_is_registered_properly() -> None:
    """Where a gradient is asked for, and while torch compiles, the call is one operator."""
    plan = dense(1, 9, 9)
    call = draw(plan, heads=1, groups=1, dim=8)
    call = replace(call, q=call.q.requires_grad_())
    captured = []

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.gossamer.cpu_attend.default:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    with Capture():
        cpu.attend(call, plan)
    q, *others = captured[0]
    torch.library.opcheck(torch.ops.gossamer.cpu_attend.default, (q.detach(), *others))


def test_a_gradient_is_refused() -> None:
    plan = dense(1, 9, 9)
    call = draw(plan, heads=1, groups=1, dim=8)
    call = replace(call, q=call.q.requires_grad_())
    out, _ = cpu.attend(call, plan)
    with pytest.raises(NotImplementedError, match="no backward"):
        out.sum().backward()
    with torch.no_grad():
        assert not cpu.attend(call, plan)[0].requires_grad


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda x: x.double(), TypeError, "takes float32, bfloat16 or float16"),
        (lambda x: F.pad(x, (0, 300)), ValueError, "head dimensions 1 to 256, got 308"),
        (lambda x: x.to("meta"), ValueError, "takes CPU tensors, got meta"),
    ],
)
def test_bad_inputs_are_named(change, error, message: str) -> None:
    plan = dense(1, 4, 4)
    call = draw(plan, heads=1, groups=1, dim=8)
    call = replace(call, q=change(call.q), k=change(call.k), v=change(call.values), scale=1.0)
    with pytest.raises(error, match=message):
        cpu.attend(call, plan)


def test_a_plan_of_another_call_is_named() -> None:
    plan = dense(1, 4, 4)
    with pytest.raises(ValueError, match="the plan is for batch 1, 4 queries and 4 keys"):
        cpu.attend(draw(dense(1, 3, 4), heads=1, groups=1, dim=8), plan)
