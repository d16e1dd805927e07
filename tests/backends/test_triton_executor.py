"""The Triton executor against the definition: on a CUDA device where there is one, else interpreted on the CPU."""

import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import Extent, SparsePlan, methods
from gossamer.backends import torch as reference
from gossamer.backends import triton as executor
from gossamer.backends.triton import config
from gossamer.testing import SITUATIONS, Case, assert_accurate, make_case, random_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.skipif(not executor.is_available(), reason=f"{executor.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
launch: Any = pytest.importorskip("gossamer.backends.triton.launch", reason="Triton is not installed")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FULL_SIZE = 16 if ON_GPU else 1  # the interpreter is slow
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
DESCRIPTORS = config.Config(32, 32, 4, 2, descriptors=True)
METHODS: list[tuple[str, dict]] = [
    ("dense", {}),
    ("a_shape", {"sink": 9, "window": 50}),
    ("tri_shape", {"sink": 9, "window": 50, "last": 40}),
    ("vertical_slash", {"vertical_size": 40, "slash_size": 100}),
    ("vertical_slash", {"vertical_size": 40, "slash_size": 60, "exact": True}),
    ("block_sparse", {"blocks": 2}),
    ("minference", {"vertical_size": 40, "slash_size": 100}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 1, "last_rows": 64}),
]


def draw(
    plan: SparsePlan,
    *,
    heads: int,
    groups: int,
    dim: int,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs for a plan; dead slots hold NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(plan.batch, heads, plan.query_len, dim, generator=generator)
    k = torch.randn(plan.batch, groups, plan.key_len, dim, generator=generator)
    v = torch.randn(plan.batch, groups, plan.key_len, value_dim or dim, generator=generator)
    kpos = plan.extent.key_positions(plan.key_len)
    dead = ((kpos < 0) | (kpos >= plan.extent.key_count[:, None]))[:, None, :, None]
    return q.to(dtype), k.masked_fill(dead, math.nan).to(dtype), v.masked_fill(dead, math.nan).to(dtype)


def given(*arguments) -> Any:
    return launch.Arguments(*executor._arguments(*arguments))


def run(q, k, v, plan, *, scale, sinks=None, softcap=None, chosen=None) -> tuple[Tensor, Tensor]:
    sinks = None if sinks is None else sinks.to(DEVICE)
    q, k, v = (t.to(DEVICE) for t in (q, k, v))
    if chosen is None:
        out, lse = executor.execute(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap)
    else:
        out, lse = launch.launch(given(q, k, v, plan, scale, sinks, softcap), config=chosen)
    return out.cpu(), lse.cpu()


def check(plan, q, k, v, *, scale=None, sinks=None, softcap=None, chosen=None) -> None:
    """``chosen`` overrides the table's configuration."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, lse = run(q, k, v, plan, scale=scale, sinks=sinks, softcap=softcap, chosen=chosen)
    expected, expected_lse = reference.execute(
        q.double(), k.double(), v.double(), plan, scale=scale, sinks=sinks, softcap=softcap
    )
    assert out.dtype == q.dtype
    assert lse.dtype == torch.float32
    # Of the largest output: fp32 rounding; P and an output in fp16, in bf16.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[q.dtype]
    assert bool(out.isfinite().all())
    worst = float((out.double() - expected).abs().max()) / float(expected.abs().max().clamp_min(1e-30))
    assert worst <= tolerance, f"error {worst:.2e} of the largest output"
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool(((lse.double() - expected_lse)[~empty].abs() <= 2e-5).all())


@every_dtype
@pytest.mark.parametrize("seed", range(6))
def test_random_plans(dtype: torch.dtype, seed: int) -> None:
    """Blocks, columns, bands, overlaps and empty rows; per query head and per key/value head; padding, chunks."""
    query_len, key_len = [(1, 1), (63, 63), (64, 150), (65, 65), (90, 200), (130, 130)][seed]
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=query_len * FULL_SIZE,
        key_len=key_len * FULL_SIZE,
        block_q=[64, 64, 128, 32, 40, 64][seed],
        block_k=[64, 128, 64, 32, 48, 100][seed],
        padded=seed % 2 == 0,
        causal=seed != 4,
        limit=50 if seed in (3, 4) else None,
    )
    q, k, v = draw(plan, heads=4, groups=2, dim=[64, 128, 32, 80, 64, 96][seed], seed=seed, dtype=dtype)
    sinks = torch.randn(4) if seed in (1, 4) else None
    check(plan, q, k, v, sinks=sinks, softcap=5.0 if seed in (2, 4) else None)


@pytest.mark.parametrize("part", ["blocks", "columns", "sink", "window"])
def test_each_part_alone(part: str) -> None:
    length = 150
    generator = torch.Generator().manual_seed(3)
    mask = torch.rand(1, 2, 5, 5, generator=generator) < (0.5 if part == "blocks" else 0.0)
    columns: dict = {}
    if part == "columns":
        rows = [torch.randperm(length, generator=generator)[:70].sort().values.int() for _ in range(2)]
        columns = {"column_group": 5, "column_indptr": torch.tensor([0, 70, 140]), "column_indices": torch.cat(rows)}
    bands: dict[str, Any] = {part: [7, 60]} if part in ("sink", "window") else {}
    plan = SparsePlan.from_block_mask(mask, length, length, block_q=32, block_k=32, **columns, **bands)
    check(plan, *draw(plan, heads=4, groups=2, dim=32))


@pytest.mark.parametrize("seed", range(4))
def test_permuted_plans(seed: int) -> None:
    plan = random_plan(
        100 + seed,
        batch=2,
        heads=[4, 2][seed % 2],
        query_len=100,
        key_len=[100, 170][seed // 2],
        permuted=True,
        padded=seed % 2 == 1,
        causal=seed != 3,
        limit=60 if seed == 2 else None,
    )
    q, k, v = draw(plan, heads=4, groups=2, dim=32, seed=seed)
    check(plan, q, k, v)
    check(replace(plan, k_order=None), q, k, v)
    check(replace(plan, q_order=None), q.bfloat16(), k.bfloat16(), v.bfloat16())


@pytest.mark.parametrize("dim", [1, 16, 40, 64, 80, 96, 128, 256])
def test_head_dimensions(dim: int) -> None:
    plan = random_plan(3, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        check(plan, *draw(plan, heads=2, groups=1, dim=dim, seed=dim, dtype=dtype))
    check(plan, *draw(plan, heads=2, groups=1, dim=dim, value_dim=24))


@pytest.mark.parametrize("share", [1, 3, 8])
@pytest.mark.parametrize("block_q", [17, 64, 1000])
def test_shared_heads_and_block_sizes(share: int, block_q: int) -> None:
    """A plan for key/value heads; query blocks of more rows than a tile."""
    plan = random_plan(share, batch=1, heads=2, query_len=100, key_len=100, block_q=block_q)
    check(plan, *draw(plan, heads=2 * share, groups=2, dim=16))


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_columns_count_once(group: int, permuted: bool) -> None:
    """Columns inside selected blocks, inside the bands and outside both; more than a tile of them."""
    generator = torch.Generator().manual_seed(group)
    length, blocks = 200, 7
    rows = 2 * -(-blocks // group)
    columns = [torch.randperm(length, generator=generator)[:130].sort().values.int() for _ in range(rows)]
    order = torch.rand(1, 2, length, generator=generator).argsort(-1).int()
    plan = replace(
        SparsePlan.from_block_mask(
            torch.rand(1, 2, blocks, blocks, generator=generator) < 0.3, length, length, block_q=32, block_k=32
        ),
        column_group=group,
        column_indptr=torch.arange(rows + 1) * 130,
        column_indices=torch.cat(columns),
        sink=[3, 0],
        window=[20, 0],
        k_order=order if permuted else None,
    )
    check(plan, *draw(plan, heads=4, groups=2, dim=32))


def test_more_key_blocks_than_a_word_has_bits() -> None:
    """Block 31 sets an int32's sign; later ones lie in the next words."""
    length = 80 * 8
    mask = torch.rand(1, 1, 1, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = replace(
        SparsePlan.from_block_mask(mask, 8, length, block_q=8, block_k=8),
        column_indptr=torch.tensor([0, length]),
        column_indices=torch.arange(length, dtype=torch.int32),
    )
    check(plan, *draw(plan, heads=1, groups=1, dim=16))


@pytest.mark.parametrize("dim", [64, 80, 128])
@pytest.mark.parametrize("part", ["blocks", "bands", "columns", "padded", "random"])
def test_descriptors(part: str, dim: int) -> None:
    """Runs of keys loaded through tensor descriptors: odd lengths, dead slots full of NaN, head dimensions that a tile
    pads, and columns, which never use them."""
    length = 121 * FULL_SIZE
    blocks = -(-length // 32)
    generator = torch.Generator().manual_seed(dim)
    mask = torch.rand(2, 2, blocks, blocks, generator=generator) < (0.6 if part in ("blocks", "columns") else 0.0)
    plan = SparsePlan.from_block_mask(mask, length, length, block_q=32, block_k=32)
    if part == "bands":
        plan = replace(plan, sink=[7, 40], window=[130, 30])
    elif part == "columns":
        listed = torch.arange(0, length, 3, dtype=torch.int32)
        rows = torch.arange(5) * listed.numel()
        plan = replace(plan, column_group=blocks, column_indptr=rows, column_indices=listed.repeat(4))
    elif part in ("padded", "random"):
        plan = random_plan(
            dim, batch=2, heads=2, query_len=length, key_len=length, block_q=32, block_k=32, padded=part == "padded"
        )
    for dtype in (torch.float16, torch.bfloat16):
        q, k, v = draw(plan, heads=4, groups=2, dim=dim, dtype=dtype, seed=dim)
        with mock.patch.object(launch, "_descriptor", wraps=launch._descriptor) as made:
            check(plan, q, k, v, chosen=DESCRIPTORS)
        assert made.call_count == (2 if not ON_GPU or torch.cuda.get_device_capability() >= (9, 0) else 0)


def test_tensors_that_no_descriptor_describes() -> None:
    """Rows whose distance is no multiple of 16 bytes, a base off that grid, four-byte elements: plain loads."""
    plan = random_plan(5, batch=1, heads=2, query_len=90, key_len=90, block_q=32, block_k=32)
    q, k, v = draw(plan, heads=2, groups=2, dim=60, dtype=torch.float16)
    shifted = [F.pad(t, (3, 5))[..., 3:-5] for t in draw(plan, heads=2, groups=2, dim=64, dtype=torch.float16)]
    for inputs in ((q, k, v), shifted, draw(plan, heads=2, groups=2, dim=64)):
        assert not launch.describable(inputs[1])
        check(plan, *inputs, chosen=DESCRIPTORS)
    assert launch.describable(torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16))
    assert not launch.describable(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 2, 5, 64))


def test_a_small_bitmap_at_a_time(monkeypatch) -> None:
    """Heads take turns with the bitmap of selected blocks when it would be large."""
    plan = random_plan(8, batch=2, heads=6, query_len=100, key_len=150, block_q=32, block_k=32)
    assert plan.block_indices.numel()
    assert plan.column_indices.numel()
    inputs = draw(plan, heads=6, groups=2, dim=16)
    expected = run(*inputs, plan, scale=0.25)
    for rows in (0, 2, 5, 7):
        monkeypatch.setattr(launch, "_MOST_BITMAP_BYTES", rows * plan.num_query_blocks * 4)
        for got, wanted in zip(run(*inputs, plan, scale=0.25), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("heads_that_fit", "expected"), [(1, (1, 1)), (3, (3, 3)), (5, (3, 3)), (7, (6, 6)), (12, (12, 6))]
)
def test_heads_of_a_group_share_a_launch(heads_that_fit: int, expected: tuple[int, int]) -> None:
    """Of 12 rows of the plan, 6 a key/value head."""
    assert launch._rows_at_once(12, 6, launch._MOST_BITMAP_BYTES // heads_that_fit) == expected


@every_dtype
@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_softcap(dtype: torch.dtype, softcap: float) -> None:
    plan = SparsePlan.dense(1, 70, 70, Extent.full(1, 70, 70))
    q, k, v = draw(plan, heads=2, groups=1, dim=32)
    check(plan, (q * 6).to(dtype), k.to(dtype), v.to(dtype), softcap=softcap)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    plan = random_plan(2, batch=1, heads=2, query_len=70, key_len=70)
    q, k, v = draw(plan, heads=2, groups=1, dim=32)
    check(plan, q, k, v, scale=scale)
    check(plan, q, k, v, scale=scale, softcap=2.0)


def test_sinks() -> None:
    """Sinks of any size; rows that attend nothing else have lse = sink."""
    plan = replace(random_plan(1, batch=1, heads=4, query_len=90, key_len=90), window=0, sink=0)
    q, k, v = draw(plan, heads=4, groups=2, dim=32)
    check(plan, q, k, v, sinks=torch.tensor([-100.0, 0.0, 5.0, 100.0]))
    nothing = SparsePlan(4, 90, 90, Extent.full(1, 90, 90))
    out, lse = run(q, k, v, nothing, scale=1.0, sinks=torch.tensor([-3.0, 0.0, 2.0, -math.inf]))
    assert bool((out == 0).all())
    torch.testing.assert_close(lse[0, :, 7], torch.tensor([-3.0, 0.0, 2.0, -math.inf]))


@every_dtype
def test_empty_rows(dtype: torch.dtype) -> None:
    plan = SparsePlan(2, 100, 100, Extent.full(1, 100, 100))
    out, lse = run(*draw(plan, heads=2, groups=1, dim=64, dtype=dtype), plan, scale=1.0)
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_no_tokens() -> None:
    plan = SparsePlan.dense(1, 0, 5, Extent([5], [0], [5]))
    out, lse = run(*draw(plan, heads=1, groups=1, dim=16), plan, scale=1.0)
    assert (out.shape, lse.shape) == ((1, 1, 0, 16), (1, 1, 0))


@every_dtype
@pytest.mark.parametrize("part", ["blocks", "window", "columns"])
def test_masked_keys_leave_no_trace(dtype: torch.dtype, part: str) -> None:
    """Replacing tokens from j on leaves every earlier output and lse bit-identical."""
    length = 150
    if part == "columns":
        plan = SparsePlan(
            1,
            length,
            length,
            Extent.full(1, length, length),
            column_group=3,
            column_indptr=torch.tensor([0, length]),
            column_indices=torch.arange(length, dtype=torch.int32),
        )
    else:
        mask = torch.full((1, 1, 3, 3), part == "blocks")
        plan = SparsePlan.from_block_mask(mask, length, length, window=2 * length if part == "window" else 0)
    q, k, v = draw(plan, heads=2, groups=1, dim=32, dtype=dtype)
    out, lse = run(q, k, v, plan, scale=0.2)
    for j in (1, 64, 130, 149):
        k2, v2 = k.clone(), v.clone()
        k2[:, :, j:] = 300.0
        v2[:, :, j:] = -1e4
        out2, lse2 = run(q, k2, v2, plan, scale=0.2)
        assert torch.equal(out[:, :, :j], out2[:, :, :j])
        assert torch.equal(lse[:, :, :j], lse2[:, :, :j])


def test_strided_inputs() -> None:
    """[B, S, H, D] storage seen as [B, H, S, D], gaps between rows, and a last dimension that is not contiguous."""
    plan = random_plan(7, batch=2, heads=2, query_len=70, key_len=70)
    q, k, v = draw(plan, heads=4, groups=2, dim=32)
    expected, expected_lse = run(q, k, v, plan, scale=0.1)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    gaps = [F.pad(t, (3, 5), value=math.nan)[..., 3:-5] for t in (q, k, v)]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in (q, k, v)]
    for q2, k2, v2 in (swapped, gaps, columns):
        out, lse = run(q2, k2, v2, plan, scale=0.1)
        assert out.is_contiguous()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@every_dtype
def test_error_is_like_sdpa(dtype: torch.dtype) -> None:
    """At most 1.5 times the error of torch's SDPA under the same mask, both against fp64."""
    blocks = 4 * FULL_SIZE
    mask = torch.rand(1, 2, blocks, blocks, generator=torch.Generator().manual_seed(1)) < 0.3
    length = blocks * 64 - 9
    plan = SparsePlan.from_block_mask(mask | torch.eye(blocks, dtype=torch.bool), length, length)
    q, k, v = draw(plan, heads=4, groups=2, dim=64, dtype=dtype)
    case = Case(q, k, v, plan.extent, 64**-0.5)
    assert_accurate(case, plan, *run(q, k, v, plan, scale=case.scale), most_rows=300)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry[0] + ("-exact" if "exact" in entry[1] else ""))
def test_methods(entry: tuple[str, dict], situation: str) -> None:
    method = methods.create(entry[0], **entry[1])
    for dtype, dim in ((torch.float32, 16), (torch.bfloat16, 80)):
        case = make_case(situation, length=201 * FULL_SIZE, heads=4, groups=2, dim=dim, dtype=dtype)
        plan = method.plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
        assert_accurate(case, plan, *run(case.q, case.k, case.v, plan, scale=case.scale))


def test_every_available_method_is_in_the_list() -> None:
    assert {name for name, _ in METHODS} == set(methods.available())


def test_operator_is_registered_properly() -> None:
    plan = SparsePlan.dense(1, 9, 9, Extent.full(1, 9, 9))
    q, k, v = (t.to(DEVICE) for t in draw(plan, heads=1, groups=1, dim=8))
    arguments = executor._arguments(q, k, v, plan, 1.0, None, None)
    torch.library.opcheck(torch.ops.gossamer.triton_execute.default, arguments)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda q, k, v: (q.double(), k.double(), v.double()), TypeError, "takes float32, bfloat16 or float16"),
        (lambda q, k, v: (q.half(), k, v), TypeError, "must share a dtype"),
        (lambda q, k, v: (q[:, :, :3], k, v), ValueError, "the plan is for batch 1, 4 queries"),
        (lambda q, k, v: tuple(F.pad(t, (0, 300)) for t in (q, k, v)), ValueError, "head dimensions 1 to 256, got 308"),
        (lambda q, k, v: tuple(t.to("meta") for t in (q, k, v)), ValueError, "takes CUDA tensors, got meta"),
    ],
)
def test_bad_inputs_are_named(change, error, message: str) -> None:
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    inputs = change(*draw(plan, heads=1, groups=1, dim=8))
    q, k, v = (t if t.is_meta else t.to(DEVICE) for t in inputs)
    with pytest.raises(error, match=message):
        executor.execute(q, k, v, plan, scale=1.0)


@pytest.mark.skipif(ON_GPU, reason="needs to run without a GPU")
def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        executor.execute(*draw(plan, heads=1, groups=1, dim=8), plan, scale=1.0)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="Triton brings its assembler for Linux")
@pytest.mark.parametrize("capability", [80, 90])
def test_compiles_without_a_gpu(capability: int, tmp_path: Path) -> None:
    """Matrix products on tensor cores, and keys and values copied asynchronously; by descriptors only when asked."""
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    script = Path(__file__).with_name("compile_triton.py")
    done = subprocess.run(
        [sys.executable, str(script), str(capability)], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = {name: set(words) for name, *words in (line.split() for line in done.stdout.splitlines())}
    matrix = "warpgroup-matrix" if capability >= 90 else "warp-matrix"
    expected = {"bf16": {"asynchronous-copy", matrix}, "everything": {"asynchronous-copy", matrix}}
    expected["fp32"] = {"asynchronous-copy"}
    if capability >= 90:
        # Gathered columns are no run of keys, and stay asynchronous copies by pointers.
        expected["descriptors"] = {"asynchronous-copy", "tensor-copy", matrix}
    assert found == expected


@pytest.mark.parametrize("part", ["dense", "bands", "columns"])
def test_tiles_larger_than_a_block(part: str) -> None:
    """The configuration of the table for Hopper, on a plan of smaller blocks that lists none."""
    length = 200
    plan = SparsePlan.dense(1, length, length, Extent.full(1, length, length))
    if part == "bands":
        plan = replace(plan, sink=9, window=70)
    elif part == "columns":
        listed = torch.arange(0, length, 3, dtype=torch.int32)
        plan = replace(
            plan,
            window=5,
            column_group=plan.num_query_blocks,
            column_indptr=torch.tensor([0, listed.numel()]),
            column_indices=listed,
        )
    q, k, v = draw(plan, heads=2, groups=1, dim=32, dtype=torch.float16)
    chosen = config.choose(
        config.Problem((9, 0), 128, 2, 128, plan.block_k, 17, blocks=False, columns=part == "columns")
    )
    assert chosen.tile_n == (64 if part == "columns" else 128)
    check(plan, q, k, v, chosen=chosen)


class BlockingCopies(TorchDispatchMode):
    """Counts copies between devices that wait for them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and target != args[0].device:
            self.count += not kwargs.get("non_blocking", False)
        return func(*args, **kwargs)


@pytest.mark.parametrize("entry", METHODS, ids=lambda entry: entry[0] + ("-exact" if "exact" in entry[1] else ""))
def test_plans_on_the_cpu_move_without_waiting(entry: tuple[str, dict]) -> None:
    case = make_case("left padding", length=100, heads=2, groups=1, dim=16)
    plan = methods.create(entry[0], **entry[1]).plan(case.q, case.k, scale=case.scale, extent=case.extent, layer=0)
    q, k, v = (t.to("meta") for t in (case.q, case.k, case.v))
    with BlockingCopies() as copies:
        moved = executor._arguments(q, k, v, plan, case.scale, None, None)
        assert plan.to("meta").device.type == "meta"
    assert all(part.is_meta for part in moved if isinstance(part, Tensor))
    assert copies.count == 0
