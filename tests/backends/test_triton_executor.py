"""The Triton executor against the definition: on a CUDA device where there is one, else interpreted on the CPU."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import triton_interpreter
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from gossamer import Extent, SparsePlan
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.triton import config, forward
from gossamer.call import AttentionCall
from gossamer.plan import Grid, ceil_div
from gossamer.testing import SITUATIONS, assert_accurate, make_call, random_plan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning"),  # the interpreter's NumPy
    pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
launch: Any = pytest.importorskip("gossamer.backends.triton.launch", reason="Triton is not installed")
triton_interpreter.hasten()
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
FULL_SIZE = 16 if ON_GPU else 1  # the interpreter is slow
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
DESCRIPTORS = config.Config(32, 32, 4, 2, descriptors=True)
SMALL = config.Config(32, 16, 4, 1)  # several tiles in each block


def draw(
    plan: SparsePlan,
    *,
    heads: int,
    groups: int,
    dim: int,
    value_dim: int | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    **fields: Any,
) -> AttentionCall:
    """A call for a plan; what is dead holds NaN."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(plan.batch, heads, plan.query_len, dim, generator=generator)
    k = torch.randn(plan.batch, groups, plan.key_len, dim, generator=generator)
    v = torch.randn(plan.batch, groups, plan.key_len, value_dim or dim, generator=generator)
    q.masked_fill_(~plan.extent.live_queries(plan.query_len)[:, None, :, None], math.nan)
    for tensor in (k, v):
        tensor.masked_fill_(~plan.extent.live_keys(plan.key_len)[:, None, :, None], math.nan)
    return AttentionCall(q.to(dtype), k.to(dtype), v.to(dtype), plan.extent, **fields)


def plan_for(
    call: AttentionCall, seed: int, *, heads: int, block_q: int = 32, block_k: int = 32, orders: str = ""
) -> SparsePlan:
    """Blocks, columns and bands of a call by chance, rows without any, and overlaps; ``orders`` may have q and k."""
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(call.extent, block_q, block_k)
    rows = ceil_div(call.query_len, block_q) if "q" in orders else grid.query_blocks
    width = ceil_div(call.key_len, block_k) if "k" in orders else grid.key_blocks
    group = [1, 2, max(1, rows)][seed % 3]

    def chance(share: float, *shape: int) -> Tensor:
        return torch.rand(call.batch, heads, *shape, generator=generator) < share

    def order(length: int) -> Tensor:
        return torch.rand(call.batch, heads, length, generator=generator).argsort(-1).int()

    listed = chance(0.2, ceil_div(rows, group), call.extent.longest) & chance(0.8, ceil_div(rows, group), 1)
    return SparsePlan.from_block_mask(
        chance(0.5, rows, width) & chance(0.8, rows, 1),
        call.query_len,
        call.key_len,
        extent=call.extent,
        block_q=block_q,
        block_k=block_k,
        column_group=group,
        column_indptr=F.pad(listed.sum(-1).flatten().cumsum(0), (1, 0)),
        column_indices=listed.flatten(0, 2).nonzero()[:, 1].int(),
        sink=[5, 0, 40, 0, 1, 2][:heads],
        window=[20, 0, 3, 45, 1, 0][:heads],
        q_order=order(call.query_len) if "q" in orders else None,
        k_order=order(call.key_len) if "k" in orders else None,
    )


def moved(call: AttentionCall) -> AttentionCall:
    sinks = None if call.sinks is None else call.sinks.to(DEVICE)
    return replace(call, q=call.q.to(DEVICE), k=call.k.to(DEVICE), v=call.values.to(DEVICE), sinks=sinks)


def given(call: AttentionCall, plan: SparsePlan) -> Any:
    return launch.Arguments(*forward._arguments(call, plan))


def run(call: AttentionCall, plan: SparsePlan, chosen: config.Config | None = None) -> tuple[Tensor, Tensor]:
    """``chosen`` overrides the table's configuration."""
    call = moved(call)
    out, lse = triton.attend(call, plan) if chosen is None else launch.launch(given(call, plan), config=chosen)
    return out.cpu(), lse.cpu()


def check(call: AttentionCall, plan: SparsePlan, chosen: config.Config | None = None) -> None:
    out, lse = run(call, plan, chosen)
    q, k, v = (torch.where(t.isnan(), 0.0, t.double()) for t in (call.q, call.k, call.values))
    expected, expected_lse = definition.attend(replace(call, q=q, k=k, v=v), plan)
    assert out.dtype == call.q.dtype
    assert lse.dtype == torch.float32
    # Of the largest output: fp32 rounding; P and an output in fp16, in bf16.
    tolerance = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1.2e-2}[call.q.dtype]
    assert bool(out.isfinite().all())
    worst = float((out.double() - expected).abs().max()) / float(expected.abs().max().clamp_min(1e-30))
    assert worst <= tolerance, f"error {worst:.2e} of the largest output"
    empty = expected_lse == -math.inf
    assert torch.equal(lse == -math.inf, empty)
    assert bool(((lse.double() - expected_lse)[~empty].abs() <= 2e-5).all())


@pytest.mark.parametrize("permuted", [False, True], ids=["in order", "permuted"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation(situation: str, permuted: bool) -> None:
    """A plan for each query head, or for each key/value head; dtypes and tiles take turns."""
    turn = SITUATIONS.index(situation)
    dtype = list(DTYPES.values())[(turn + permuted) % 3]
    call = make_call(situation, length=100 * FULL_SIZE, heads=4, groups=2, dim=[16, 40][turn % 2], dtype=dtype)
    block_q, block_k = [(32, 32), (17, 48), (64, 16)][turn % 3]
    orders = "qk" if permuted else ""
    plan = plan_for(call, turn, heads=[2, 4][turn // 2 % 2], block_q=block_q, block_k=block_k, orders=orders)
    check(call, plan, None if turn % 2 else SMALL)


@pytest.mark.parametrize("seed", [3, 5, 13, 14, 21, 38, 39])
def test_random_plans(seed: int) -> None:
    """Of extents by chance: queries far from their keys, a few keys, a few queries."""
    sizes = {"batch": 2, "heads": 2, "query_len": 90, "key_len": 120, "block_q": 32, "block_k": 16, "padded": True}
    causal, limit = seed % 2 == 0, 30 if seed % 3 == 0 else None
    plan = random_plan(seed, **sizes, causal=causal, limit=limit)
    sinks = torch.randn(4) if seed % 4 == 1 else None
    check(draw(plan, heads=4, groups=2, dim=16, seed=seed, sinks=sinks, softcap=5.0 if seed % 5 == 0 else None), plan)


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
    check(draw(plan, heads=4, groups=2, dim=32), plan)


@pytest.mark.parametrize("order", ["q", "k"])
def test_one_order_alone(order: str) -> None:
    call = make_call("padded chunk", length=100, heads=2, groups=1, dim=16)
    check(call, plan_for(call, 1, heads=2, orders=order))


@pytest.mark.parametrize("dim", [1, 40, 80, 128, 256])
def test_head_dimensions(dim: int) -> None:
    plan = random_plan(3, batch=1, heads=2, query_len=70, key_len=100)
    for dtype in (torch.float32, torch.bfloat16):
        check(draw(plan, heads=2, groups=1, dim=dim, seed=dim, dtype=dtype), plan)
    check(draw(plan, heads=2, groups=1, dim=dim, value_dim=24), plan)


@pytest.mark.parametrize(("share", "block_q"), [(1, 17), (3, 64), (8, 64), (3, 1000)])
def test_shared_heads_and_block_sizes(share: int, block_q: int) -> None:
    """A plan for key/value heads; query blocks of more rows than a tile."""
    plan = random_plan(share, batch=1, heads=2, query_len=80, key_len=100, block_q=block_q)
    check(draw(plan, heads=2 * share, groups=2, dim=16), plan)


@pytest.mark.parametrize("permuted", [False, True])
@pytest.mark.parametrize("group", [1, 3, 100])
def test_columns_count_once(group: int, permuted: bool) -> None:
    """Columns inside selected blocks, inside the bands and outside both; more than a tile of them."""
    generator = torch.Generator().manual_seed(group)
    length, blocks = 130, 5
    rows = 2 * ceil_div(blocks, group)
    columns = [torch.randperm(length, generator=generator)[:90].sort().values.int() for _ in range(rows)]
    order = torch.rand(1, 2, length, generator=generator).argsort(-1).int()
    plan = replace(
        SparsePlan.from_block_mask(
            torch.rand(1, 2, blocks, blocks, generator=generator) < 0.3, length, length, block_q=32, block_k=32
        ),
        column_group=group,
        column_indptr=torch.arange(rows + 1) * 90,
        column_indices=torch.cat(columns),
        sink=[3, 0],
        window=[20, 0],
        k_order=order if permuted else None,
    )
    check(draw(plan, heads=4, groups=2, dim=32), plan)


def test_more_key_blocks_than_a_word_has_bits() -> None:
    """Block 31 sets an int32's sign; later ones lie in the next words."""
    length = 80 * 8
    mask = torch.rand(1, 1, 1, 80, generator=torch.Generator().manual_seed(0)) < 0.5
    plan = replace(
        SparsePlan.from_block_mask(mask, 8, length, block_q=8, block_k=8),
        column_indptr=torch.tensor([0, length]),
        column_indices=torch.arange(length, dtype=torch.int32),
    )
    check(draw(plan, heads=1, groups=1, dim=16), plan)


@pytest.mark.parametrize(
    ("part", "dim"), [("blocks", 80), ("bands", 64), ("columns", 80), ("left padding", 128), ("static cache", 64)]
)
def test_descriptors(part: str, dim: int) -> None:
    """Runs of keys loaded through tensor descriptors: odd lengths, dead slots full of NaN, head dimensions that a tile
    pads, and columns, which never use them."""
    situation = part if part in SITUATIONS else "no padding"
    dtype = torch.float16 if part in ("blocks", "left padding") else torch.bfloat16
    call = make_call(situation, length=121 * FULL_SIZE, heads=4, groups=2, dim=dim, dtype=dtype)
    plan = plan_for(call, dim, heads=2)
    nothing = torch.zeros(1, dtype=torch.int32)[:0]
    if part == "bands":
        plan = replace(plan, block_indptr=None, block_indices=nothing, sink=[7, 40], window=[130, 30])
    if part != "columns":
        plan = replace(plan, column_indptr=None, column_indices=nothing)
    with mock.patch.object(launch, "_descriptor", wraps=launch._descriptor) as made:
        check(call, plan, DESCRIPTORS)
    assert made.call_count == (2 if not ON_GPU or torch.cuda.get_device_capability() >= (9, 0) else 0)


def test_tensors_that_no_descriptor_describes() -> None:
    """Rows whose distance is no multiple of 16 bytes, a base off that grid, four-byte elements: plain loads."""
    plan = random_plan(5, batch=1, heads=2, query_len=70, key_len=70, block_q=32, block_k=32)
    call = draw(plan, heads=2, groups=2, dim=64, dtype=torch.float16)
    k, v = (F.pad(t, (3, 5))[..., 3:-5] for t in (call.k, call.values))
    uneven = draw(plan, heads=2, groups=2, dim=60, dtype=torch.float16)
    for other in (uneven, replace(call, k=k, v=v), draw(plan, heads=2, groups=2, dim=64)):
        assert not launch.describable(other.k)
        check(other, plan, DESCRIPTORS)
    assert launch.describable(torch.zeros(1, 2, 5, 64, dtype=torch.bfloat16))
    assert not launch.describable(torch.zeros(1, 1, 1, 64, dtype=torch.bfloat16).expand(1, 2, 5, 64))


def test_a_small_bitmap_at_a_time(monkeypatch) -> None:
    """Heads take turns with the bitmap of selected blocks when it would be large."""
    call = make_call("left padding", length=70, heads=6, groups=2, dim=16)
    plan = plan_for(call, 8, heads=6)
    expected = run(call, plan)
    for rows in (0, 2, 5):
        monkeypatch.setattr(launch, "_MOST_BITMAP_BYTES", rows * plan.num_query_blocks * 4)
        for got, wanted in zip(run(call, plan), expected, strict=True):
            assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("heads_that_fit", "expected"), [(1, (1, 1)), (3, (3, 3)), (5, (3, 3)), (7, (6, 6)), (12, (12, 6))]
)
def test_heads_of_a_group_share_a_launch(heads_that_fit: int, expected: tuple[int, int]) -> None:
    """Of 12 rows of the plan, 6 a key/value head."""
    assert launch._rows_at_once(12, 6, launch._MOST_BITMAP_BYTES // heads_that_fit) == expected


@pytest.mark.parametrize(("softcap", "dtype"), [(0.5, "fp32"), (0.5, "bf16"), (50.0, "fp16")])
def test_softcap(softcap: float, dtype: str) -> None:
    plan = SparsePlan.dense(1, 70, 70, Extent.full(1, 70, 70))
    call = draw(plan, heads=2, groups=1, dim=32, dtype=DTYPES[dtype], softcap=softcap)
    check(replace(call, q=call.q * 6), plan)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    plan = random_plan(2, batch=1, heads=2, query_len=70, key_len=70)
    check(draw(plan, heads=2, groups=1, dim=32, scale=scale), plan)
    check(draw(plan, heads=2, groups=1, dim=32, scale=scale, softcap=2.0), plan)


def test_sinks() -> None:
    """Sinks of any size; rows that attend nothing else have lse = sink, and so have dead ones."""
    call = make_call("left padding", length=60, heads=4, groups=2, dim=32)
    sinks = torch.tensor([-100.0, 0.0, 5.0, 100.0])
    check(replace(call, sinks=sinks), replace(plan_for(call, 1, heads=4), window=0, sink=0))
    nothing = SparsePlan(4, 60, 60, call.extent)
    sinks[3] = -math.inf
    out, lse = run(replace(call, sinks=sinks), nothing)
    assert bool((out == 0).all())
    assert torch.equal(lse.isinf(), (sinks == -math.inf)[:, None].expand(2, 4, 60))
    torch.testing.assert_close(lse[0, :, 7], sinks)
    torch.testing.assert_close(lse[0, :, 57], sinks)


@pytest.mark.parametrize("situation", ["no padding", "right padding"])
def test_rows_that_attend_nothing(situation: str) -> None:
    call = make_call(situation, length=70, heads=2, groups=1, dim=64, dtype=torch.bfloat16)
    out, lse = run(call, SparsePlan(2, 70, 70, call.extent))
    assert bool((out == 0).all())
    assert bool((lse == -math.inf).all())


def test_no_live_queries_and_no_tokens() -> None:
    for extent, rows in ((Extent([5], [0], [0], [5]), 0), (Extent([0, -3], [0, 0], [0, 2], [5, 0]), 3)):
        plan = SparsePlan.dense(1, rows, 5, extent)
        out, lse = run(draw(plan, heads=1, groups=1, dim=16), plan)
        assert (out.shape, lse.shape) == ((extent.batch, 1, rows, 16), (extent.batch, 1, rows))
        assert bool((out == 0).all())
        assert bool((lse == -math.inf).all())


@pytest.mark.parametrize(("part", "dtype"), [("blocks", "fp32"), ("window", "bf16"), ("columns", "fp16")])
def test_masked_keys_leave_no_trace(dtype: str, part: str) -> None:
    """Replacing tokens from j on leaves every earlier output and lse bit-identical."""
    length = 100
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
        mask = torch.full((1, 1, 2, 2), part == "blocks")
        plan = SparsePlan.from_block_mask(mask, length, length, window=2 * length if part == "window" else 0)
    call = draw(plan, heads=2, groups=1, dim=32, dtype=DTYPES[dtype], scale=0.2)
    out, lse = run(call, plan)
    for j in (1, 64, 99):
        k, v = call.k.clone(), call.values.clone()
        k[:, :, j:] = 300.0
        v[:, :, j:] = -1e4
        changed, changed_lse = run(replace(call, k=k, v=v), plan)
        assert torch.equal(out[:, :, :j], changed[:, :, :j])
        assert torch.equal(lse[:, :, :j], changed_lse[:, :, :j])


def test_strided_inputs() -> None:
    """[B, S, H, D] storage seen as [B, H, S, D], gaps between rows, and a last dimension that is not contiguous."""
    call = make_call("left padding", length=60, heads=4, groups=2, dim=32)
    plan = plan_for(call, 7, heads=2)
    expected, expected_lse = run(call, plan)
    tensors = (call.q, call.k, call.values)
    swapped = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in tensors]
    gaps = [F.pad(t, (3, 5), value=math.nan)[..., 3:-5] for t in tensors]
    columns = [t.transpose(2, 3).contiguous().transpose(2, 3) for t in tensors]
    for q, k, v in (swapped, gaps, columns):
        out, lse = run(replace(call, q=q, k=k, v=v), plan)
        assert out.is_contiguous()
        assert torch.equal(out, expected)
        assert torch.equal(lse, expected_lse)


@every_dtype
def test_error_is_like_that_of_dense_attention(dtype: torch.dtype) -> None:
    """At most 1.5 times the error of torch's attention under the same mask, both against fp64."""
    call = make_call("no padding", length=183 * FULL_SIZE, heads=4, groups=2, dim=64, dtype=dtype)
    plan = replace(plan_for(call, 1, heads=2, block_q=64, block_k=64), window=1)
    assert_accurate(call, plan, *run(call, plan), most_rows=300)


def test_operator_is_registered_properly() -> None:
    plan = SparsePlan.dense(1, 9, 9, Extent.full(1, 9, 9))
    arguments = forward._arguments(moved(draw(plan, heads=1, groups=1, dim=8)), plan)
    torch.library.opcheck(torch.ops.gossamer.triton_attend.default, arguments)


def resized(call: AttentionCall, change: Callable[[Tensor], Tensor]) -> AttentionCall:
    return AttentionCall(*(change(t) for t in (call.q, call.k, call.values)))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t: t.double(), TypeError, "take float32, bfloat16 or float16, got torch.float64"),
        (lambda t: t[:, :, :3], ValueError, "the plan is for batch 1, 4 queries"),
        (lambda t: F.pad(t, (0, 300)), ValueError, "head dimensions 1 to 256, got 308"),
        (lambda t: t.to("meta"), ValueError, "take CUDA tensors, got meta"),
    ],
)
def test_bad_inputs_are_named(change, error, message: str) -> None:
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    call = resized(moved(draw(plan, heads=1, groups=1, dim=8)), change)
    with pytest.raises(error, match=message):
        triton.attend(call, plan)


def test_positions_beyond_32_bits_are_refused() -> None:
    plan = SparsePlan.dense(1, 4, 4, Extent([1 << 29], [4], [0], [4], causal=False))
    with pytest.raises(ValueError, match="fewer than 536870912 tokens, got 4 queries up to position 536870916"):
        triton.attend(moved(draw(plan, heads=1, groups=1, dim=8)), plan)


@pytest.mark.skipif(ON_GPU, reason="needs to run without a GPU")
def test_a_cpu_tensor_without_the_interpreter_is_refused(monkeypatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    plan = SparsePlan.dense(1, 4, 4, Extent.full(1, 4, 4))
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        triton.attend(draw(plan, heads=1, groups=1, dim=8), plan)


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
    chosen = config.choose(
        config.Problem((9, 0), 128, 2, 128, plan.block_k, 17, blocks=False, columns=part == "columns")
    )
    assert chosen.tile_n == (64 if part == "columns" else 128)
    check(draw(plan, heads=2, groups=1, dim=32, dtype=torch.float16), plan, chosen)


class BlockingCopies(TorchDispatchMode):
    """Counts copies between devices that wait for them."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        target = kwargs.get("device")
        if func is torch.ops.aten._to_copy.default and target is not None and target != args[0].device:
            self.count += not kwargs.get("non_blocking", False)
        return func(*args, **kwargs)


@pytest.mark.parametrize("permuted", [False, True])
def test_plans_on_the_cpu_move_without_waiting(monkeypatch, permuted: bool) -> None:
    monkeypatch.setattr(forward, "check_call", lambda call: None)
    call = make_call("left padding", length=100, heads=2, groups=1, dim=16)
    plan = plan_for(call, 0, heads=2, orders="qk" if permuted else "")
    there = replace(call, q=call.q.to("meta"), k=call.k.to("meta"), v=call.values.to("meta"))
    with BlockingCopies() as copies:
        arguments = forward._arguments(there, plan)
        assert plan.to("meta").device.type == "meta"
    assert all(part.is_meta for part in arguments if isinstance(part, Tensor))
    assert copies.count == 0
