"""The C++ executor against the definition: all parts of a plan, every instruction set that this machine runs."""

import math
import os
import subprocess
import sys
import threading
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from executor_checks import DTYPES, check, draw
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.testing import Case, assert_accurate, random_plan

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
ISAS = cpu.supported_isas() or ["portable"]
BF16_ISAS = ("avx512_bf16", "amx", "amx_emulated")
every_isa = pytest.mark.parametrize("isa", ISAS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


@every_isa
@every_dtype
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
    q, k, v = draw(plan, heads=4, groups=2, dim=[64, 128, 32, 80, 64, 96][seed], seed=seed, dtype=dtype)
    sinks = torch.randn(4) if seed in (1, 4) else None
    check(plan, q, k, v, sinks=sinks, softcap=5.0 if seed in (2, 4) else None)


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
    q, k, v = draw(plan, heads=4, groups=2, dim=64, seed=seed)
    check(plan, q, k, v)
    check(replace(plan, k_order=None), q, k, v)
    check(replace(plan, q_order=None), q.bfloat16(), k.bfloat16(), v.bfloat16())


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
    q, k, v = draw(plan, heads=4, groups=2, dim=64, seed=seed, dtype=dtype)
    everything = SparsePlan.dense(2, 130, 1000, Extent.full(2, 130, 1000))
    spoiled, _ = cpu.execute(q, torch.full_like(k, math.nan), torch.full_like(v, math.nan), everything, scale=0.1)
    assert bool(spoiled.isnan().all())
    check(plan, q, k, v)


@every_isa
@pytest.mark.parametrize("dim", [1, 16, 32, 40, 64, 72, 80, 96, 128, 200, 256])
def test_head_dimensions(force, isa: str, dim: int) -> None:
    force(isa)
    plan = random_plan(3, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = draw(plan, heads=2, groups=1, dim=dim, seed=dim, dtype=dtype)
        check(plan, q, k, v)


@every_isa
def test_values_of_another_dimension(force, isa: str) -> None:
    force(isa)
    plan = random_plan(5, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in DTYPES.values():
        check(plan, *draw(plan, heads=2, groups=2, dim=96, value_dim=40, dtype=dtype))


@every_isa
@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.parametrize("block_q", [17, 64, 128, 1000])
def test_shared_heads_and_block_sizes(force, isa: str, share: int, block_q: int) -> None:
    """A plan for key/value heads; panels of more rows than are processed at once."""
    force(isa)
    length = 300
    plan = random_plan(share, batch=1, heads=2, query_len=length, key_len=length, block_q=block_q)
    check(plan, *draw(plan, heads=2 * share, groups=2, dim=32))


@every_isa
def test_a_thousand_tokens(force, isa: str) -> None:
    force(isa)
    mask = torch.rand(1, 1, 16, 16, generator=torch.Generator().manual_seed(0)) < 0.4
    plan = SparsePlan.from_block_mask(mask, 1000, 1000, window=30, sink=5)
    q, k, v = draw(plan, heads=4, groups=1, dim=64)
    check(plan, q, k, v)
    check(plan, q.bfloat16(), k.bfloat16(), v.bfloat16())


@every_isa
@pytest.mark.parametrize("group", [1, 3, 100])
def test_columns_count_once(force, isa: str, group: int) -> None:
    """Columns inside selected blocks, inside the bands and outside both; more than a tile of them."""
    force(isa)
    generator = torch.Generator().manual_seed(group)
    length, blocks = 500, 8
    rows = 2 * -(-blocks // group)
    columns = [torch.randperm(length, generator=generator)[:170].sort().values.int() for _ in range(rows)]
    plan = replace(
        SparsePlan.from_block_mask(torch.rand(1, 2, blocks, blocks, generator=generator) < 0.2, length, length),
        column_group=group,
        column_indptr=torch.arange(rows + 1) * 170,
        column_indices=torch.cat(columns),
        sink=[3, 0],
        window=[20, 0],
    )
    check(plan, *draw(plan, heads=4, groups=2, dim=64))


@every_isa
@every_dtype
def test_extreme_logits(force, isa: str, dtype: torch.dtype) -> None:
    """Logits of +-80 and beyond, all equal, and rows far apart from each other."""
    force(isa)
    plan = SparsePlan.dense(1, 200, 200, Extent.full(1, 200, 200))
    q, k, v = draw(plan, heads=1, groups=1, dim=64)
    k[:, :, 5] *= 4
    q[:, :, 100:] *= 8
    q, k, v = (t.to(dtype) for t in (q, k, v))
    out, lse = cpu.execute(q, k, v, plan, scale=0.8)
    expected, expected_lse = reference.execute(q.double(), k.double(), v.double(), plan, scale=0.8)
    # A logit of size 500 carries 24 bits: 3e-5 of absolute error, which the exponential makes relative.
    tolerance = {torch.float32: 2e-4, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-3, rtol=1e-5)
    check(plan, q, k, v, scale=0.0)


@every_isa
@every_dtype
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(force, isa: str, dtype: torch.dtype, softcap: float) -> None:
    force(isa)
    plan = SparsePlan.dense(1, 90, 90, Extent.full(1, 90, 90))
    q, k, v = draw(plan, heads=2, groups=1, dim=32)
    check(plan, (q * 6).to(dtype), k.to(dtype), v.to(dtype), softcap=softcap)


@every_isa
def test_sinks(force, isa: str) -> None:
    """Sinks of any size; rows that attend nothing else have lse = sink."""
    force(isa)
    plan = replace(random_plan(1, batch=1, heads=4, query_len=90, key_len=90), window=0, sink=0)
    q, k, v = draw(plan, heads=4, groups=2, dim=32)
    check(plan, q, k, v, sinks=torch.tensor([-100.0, 0.0, 5.0, 100.0]))
    nothing = SparsePlan(4, 90, 90, Extent.full(1, 90, 90))
    out, lse = cpu.execute(q, k, v, nothing, scale=1.0, sinks=torch.tensor([-3.0, 0.0, 2.0, -math.inf]))
    assert bool((out == 0).all())
    assert lse[0, :, 7].tolist() == [-3.0, 0.0, 2.0, -math.inf]


@every_isa
def test_empty_rows(force, isa: str) -> None:
    force(isa)
    plan = SparsePlan(2, 100, 100, Extent.full(1, 100, 100))
    for dtype in DTYPES.values():
        out, lse = cpu.execute(*draw(plan, heads=2, groups=1, dim=64, dtype=dtype), plan, scale=1.0)
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


@every_isa
@every_dtype
def test_masked_keys_leave_no_trace(force, isa: str, dtype: torch.dtype) -> None:
    """Replacing tokens from j on leaves every earlier output and lse bit-identical."""
    force(isa)
    plan = SparsePlan.from_block_mask(torch.ones(1, 1, 4, 4, dtype=torch.bool), 250, 250)
    q, k, v = draw(plan, heads=2, groups=1, dim=64, dtype=dtype)
    out, lse = cpu.execute(q, k, v, plan, scale=0.2)
    for j in (1, 64, 130, 249):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j:] = 300.0
        v2[:, :, j:] = -1e4
        out2, lse2 = cpu.execute(q, k2, v2, plan, scale=0.2)
        assert torch.equal(out[:, :, :j], out2[:, :, :j])
        assert torch.equal(lse[:, :, :j], lse2[:, :, :j])


@every_isa
def test_results_do_not_depend_on_threads(force, isa: str) -> None:
    force(isa)
    plan = random_plan(2, batch=2, heads=2, query_len=400, key_len=400)
    q, k, v = draw(plan, heads=4, groups=2, dim=64, dtype=torch.bfloat16)
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


def test_two_python_threads_at_once() -> None:
    plans = [random_plan(n, batch=1, heads=2, query_len=300, key_len=[300, 500][n]) for n in range(2)]
    inputs = [draw(plan, heads=2, groups=2, dim=[64, 128][n]) for n, plan in enumerate(plans)]
    expected = [cpu.execute(*inputs[n], plans[n], scale=0.1) for n in range(2)]
    same = [True, True]

    def work(n: int) -> None:
        for _ in range(10):
            out, lse = cpu.execute(*inputs[n], plans[n], scale=0.1)
            same[n] = same[n] and torch.equal(out, expected[n][0]) and torch.equal(lse, expected[n][1])

    threads = [threading.Thread(target=work, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert same == [True, True]


@every_isa
def test_strided_inputs(force, isa: str) -> None:
    """[B, S, H, D] storage seen as [B, H, S, D], gaps between rows, and a last dimension that is not contiguous."""
    force(isa)
    plan = random_plan(7, batch=2, heads=2, query_len=100, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = draw(plan, heads=4, groups=2, dim=64, dtype=dtype)
        expected, expected_lse = cpu.execute(q, k, v, plan, scale=0.1)
        swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
        gaps = [F.pad(t, (3, 5), value=math.nan)[..., 3:-5] for t in (q, k, v)]
        columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
        for q2, k2, v2 in (swapped, gaps, columns):
            out, lse = cpu.execute(q2, k2, v2, plan, scale=0.1)
            assert out.is_contiguous()
            assert torch.equal(out, expected)
            assert torch.equal(lse, expected_lse)


@every_isa
@every_dtype
def test_error_is_like_sdpa(force, isa: str, dtype: torch.dtype) -> None:
    """At most 1.5 times the error of torch's SDPA under the same mask, both against fp64."""
    force(isa)
    length = 700
    mask = torch.rand(1, 2, 11, 11, generator=torch.Generator().manual_seed(1)) < 0.3
    plan = SparsePlan.from_block_mask(mask | torch.eye(11, dtype=torch.bool), length, length)
    q, k, v = draw(plan, heads=4, groups=2, dim=128)
    case = Case(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, 128**-0.5)
    out, lse = cpu.execute(case.q, case.k, case.v, plan, scale=case.scale)
    assert_accurate(case, plan, out, lse, most_rows=length)


@every_isa
def test_nan_and_infinity_spoil_only_the_rows_that_see_them(force, isa: str) -> None:
    force(isa)
    plan = SparsePlan.dense(1, 130, 130, Extent.full(1, 130, 130))
    for bad in (math.nan, math.inf):
        q, k, v = draw(plan, heads=1, groups=1, dim=32)
        clean, clean_lse = cpu.execute(q, k, v, plan, scale=0.1)
        k[:, :, 100] = bad
        out, lse = cpu.execute(q, k, v, plan, scale=0.1)
        assert torch.equal(out[:, :, :100], clean[:, :, :100])
        assert torch.equal(lse[:, :, :100], clean_lse[:, :, :100])
        # Products with infinity of either sign sum to NaN.
        assert bool(out[:, :, 100:].isnan().all())
        assert bool(lse[:, :, 100:].isnan().all())


def test_runs_under_compile_in_one_graph() -> None:
    plan = SparsePlan.dense(2, 70, 70, Extent.full(1, 70, 70))
    q, k, v = draw(plan, heads=4, groups=2, dim=32)

    def attend(q, k, v):
        out, lse = cpu.execute(q * 2, k, v, plan, scale=0.1)
        return out + 1, lse

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for got, expected in zip(compiled(q, k, v), attend(q, k, v), strict=True):
        torch.testing.assert_close(got, expected)


def test_operator_is_registered_properly() -> None:
    plan = SparsePlan.dense(1, 9, 9, Extent.full(1, 9, 9))
    q, k, v = draw(plan, heads=1, groups=1, dim=8)
    captured = []

    class Capture(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.gossamer.cpu_execute.default:
                captured.append(args)
            return func(*args, **(kwargs or {}))

    with Capture():
        cpu.execute(q, k, v, plan, scale=1.0)
    torch.library.opcheck(torch.ops.gossamer.cpu_execute.default, captured[0])


def test_unknown_instruction_set_is_named(force) -> None:
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    force("sse9")
    with pytest.raises(ValueError, match=r"GOSSAMER_CPU_ISA='sse9' is not supported here; use one of: portable"):
        cpu.execute(*draw(plan, heads=1, groups=1, dim=8), plan, scale=1.0)


@every_isa
def test_forced_instruction_set_is_used(force, isa: str) -> None:
    force(isa)
    assert cpu.active_isa(torch.bfloat16) == isa
    assert (cpu.active_isa(torch.float32) == isa) == (isa not in BF16_ISAS)


def test_emulation_is_never_chosen() -> None:
    assert "amx_emulated" not in {cpu.active_isa(dtype) for dtype in DTYPES.values()}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError, "takes float32, bfloat16 or float16"),
        (lambda q, k, v: (q.half(), k, v), TypeError, "must share a dtype"),
        (lambda q, k, v: (q[0], k, v), ValueError, r"must be \[batch"),
        (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "the plan is for batch 1, 4 queries"),
        (lambda q, k, v: tuple(F.pad(t, (0, 300)) for t in (q, k, v)), ValueError, "head dimensions 1 to 256, got 308"),
        (lambda q, k, v: tuple(t.to("meta") for t in (q, k, v)), ValueError, "takes CPU tensors and plans, got meta"),
    ],
)
def test_bad_inputs_are_named(change, error, message: str) -> None:
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    q, k, v = change(*draw(plan, heads=1, groups=1, dim=8))
    with pytest.raises(error, match=message):
        cpu.execute(q, k, v, plan, scale=1.0)


@pytest.mark.skipif(sys.platform != "linux" or not cpu.has_openmp(), reason="reads /proc; needs OpenMP")
@pytest.mark.parametrize("first", ["torch", "gossamer.backends.cpu"])
def test_shares_the_openmp_runtime_of_torch(first: str) -> None:
    code = (
        f"import {first}, torch, gossamer.backends.cpu\n"
        "from gossamer import SparsePlan, Extent\n"
        "torch.randn(300, 300) @ torch.randn(300, 300)\n"
        "x = torch.randn(1, 1, 9, 16)\n"
        "gossamer.backends.cpu.execute(x, x, x, SparsePlan.dense(1, 9, 9, Extent.full(1, 9, 9)), scale=1.0)\n"
        "print(len({line.split()[-1] for line in open('/proc/self/maps') if 'libgomp' in line or 'libomp' in line}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=dict(os.environ), check=True
    )
    assert done.stdout.strip() == "1"
