"""Attention in Triton against the definition: on a CUDA device where there is one, else interpreted on the CPU."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from triton_checks import check, draw, plan_for, run
from triton_support import DTYPES, FULL_SIZE, MARKS, ON_GPU, moved

from gossamer import Extent, SparsePlan
from gossamer.backends import triton
from gossamer.backends.triton import config, forward
from gossamer.call import AttentionCall
from gossamer.plan import ceil_div
from gossamer.testing import SITUATIONS, assert_accurate, make_call, random_plan

pytestmark = MARKS
every_dtype = pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
SMALL = config.Config(32, 16, 4, 1)  # several tiles in each block


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


def test_a_sink_of_infinity_takes_all() -> None:
    call = make_call("no padding", length=60, heads=4, groups=2, dim=32)
    plan, sinks = plan_for(call, 1, heads=4), torch.tensor([math.inf, 0.0, 5.0, math.inf])
    out, lse = run(replace(call, sinks=sinks), plan)
    expected, expected_lse = run(replace(call, sinks=sinks.clamp(max=5.0)), plan)
    assert bool((out[:, [0, 3]] == 0).all())
    assert bool((lse[:, [0, 3]] == math.inf).all())
    assert torch.equal(out[:, 1:3], expected[:, 1:3])
    assert torch.equal(lse[:, 1:3], expected_lse[:, 1:3])


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
    return AttentionCall(change(call.q), change(call.k), change(call.values))


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


@pytest.mark.parametrize("name", ["block_indptr", "sink", "q_order"])
def test_a_plan_that_was_resized_is_named(name: str) -> None:
    plan = random_plan(2, batch=1, heads=2, query_len=70, key_len=70, permuted=True)
    call = moved(draw(plan, heads=2, groups=1, dim=8))
    getattr(plan, name).resize_(1)
    with pytest.raises(ValueError, match=rf"SparsePlan.{name} must .* \(1,\)"):
        triton.attend(call, plan)


@pytest.mark.parametrize("of", ["the plan", "the call"])
def test_an_extent_that_was_written_is_named(of: str) -> None:
    plan = random_plan(2, batch=1, heads=2, query_len=70, key_len=70)
    call = moved(draw(plan, heads=2, groups=1, dim=8))
    if of == "the plan":
        plan = replace(plan, extent=Extent.full(1, 70, 70))
    (plan if of == "the plan" else call).extent.key_count.add_(1)
    with pytest.raises(ValueError, match=r"names 71 keys in batch row 0, .* but there are 70"):
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


@pytest.mark.parametrize("orders", ["qk", "k"])
@pytest.mark.parametrize("block", [32, 24])
def test_axis_orders_in_both_directions(block: int, orders: str) -> None:
    """No pair is masked: of a call without padding, and of one where ranks hold keys that are dead."""
    for extent in (Extent.full(2, 100, 100, causal=False), Extent([0, -7], [100, 80], [0, 7], [100, 80], causal=False)):
        shape = AttentionCall(*(torch.zeros(2, 2, 100, 1) for _ in range(3)), extent)
        plan = replace(plan_for(shape, 4, heads=2, block_q=block, block_k=block, orders=orders), sink=0, window=0)
        call = draw(plan, heads=2, groups=2, dim=16)
        check(call, plan, SMALL)
        alone = replace(plan, column_indptr=None, column_indices=torch.empty(0, dtype=torch.int32))
        assert ON_GPU or _folds(call, alone) == {"BY_KEY"}


def _folds(call: AttentionCall, plan: SparsePlan) -> set[str]:
    """By what the tiles of a call's blocks are masked, as the interpreter runs them."""
    from gossamer.backends.triton.kernels import blocks, softmax

    names = {getattr(softmax, name).value: name for name in ("UNMASKED", "BY_KEY", "BY_PAIR")}
    seen: set[str] = set()
    fold: Any = blocks.fold

    def watched(*arguments: Any) -> Any:
        seen.add(names[int(getattr(arguments[-1], "value", arguments[-1]))])
        return fold(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "fold", watched)
        run(call, plan, SMALL)
    return seen
