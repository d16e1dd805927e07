"""Numbers at the edge of their ranges, by every door through which they come: taken for what they are, or refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import allowed_pairs, attention, call_in
from torch import Tensor

from gossamer import AttentionCall, Extent, Policy, Profile, SparsePlan, backends, methods, sparse_attention
from gossamer.attention import CallRecord
from gossamer.backends import cpu
from gossamer.backends import torch as reference
from gossamer.blocks import Blocks
from gossamer.cli.specs import parse_method
from gossamer.plan import Grid

MOST = (1 << 31) - 1
BEYOND = [1 << 31, 1 << 32, (1 << 32) + 1, (1 << 63) - 1]

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
kernels_or_torch = pytest.mark.parametrize(
    "attend",
    [reference.attend, *([cpu.attend] if cpu.is_available() else [])],
    ids=["torch", "cpu"][: 1 + cpu.is_available()],
)


def tensors(tokens: int = 90, *, heads: int = 2) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, heads, tokens, 16, generator=generator) for _ in range(3))  # type: ignore[return-value]


# Bands


def plan_with(make: Any, name: str, band: Any) -> SparsePlan:
    return make(heads=1, query_len=4, key_len=4, extent=Extent.full(1, 4, 4), **{name: band})


DOORS: dict[str, Callable[[str, int], Any]] = {
    "a method": lambda name, n: methods.create("a_shape", **{name: n}),
    "a dictionary": lambda name, n: methods.from_dict({"method": "a_shape", name: n}),
    "the command line": lambda name, n: parse_method(f"a_shape({name}={n})"),
    "a profile": lambda name, n: Profile.from_dict({"schema": 2, "methods": [[{"method": "a_shape", name: n}]]}),
    "a published profile": lambda name, n: Profile.from_minference(
        [{"0": ["stream_llm", *((n, 64) if name == "sink" else (64, n)), 1.0]}]
    ),
    "a plan": lambda name, n: plan_with(SparsePlan, name, n),
    "a plan, as a tensor": lambda name, n: plan_with(SparsePlan, name, torch.tensor([n])),
    "an unchecked plan": lambda name, n: plan_with(SparsePlan.unchecked, name, n),
    "an unchecked plan, as a tensor": lambda name, n: plan_with(SparsePlan.unchecked, name, torch.tensor([n])),
    "a builder": lambda name, n: Blocks(AttentionCall(*tensors(4))).plan(**{name: n}),  # pyright: ignore[reportArgumentType]
}


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["sink", "window"])
@pytest.mark.parametrize("number", BEYOND)
def test_bands_beyond_the_range_are_refused(door: str, name: str, number: int) -> None:
    field = "" if door == "a published profile" else f"{name} "  # whose entries have no names
    with pytest.raises(ValueError, match=rf"{field}.*at most {MOST}, got .*{number}"):
        DOORS[door](name, number)


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("name", ["sink", "window"])
def test_the_largest_band_is_taken(door: str, name: str) -> None:
    made = DOORS[door](name, MOST)
    if isinstance(made, SparsePlan):
        assert made.density() == 1.0


@pytest.mark.parametrize("bands", [{"window": MOST, "sink": 0}, {"window": 1, "sink": MOST}])
def test_the_largest_bands_attend_everything(bands: dict[str, int]) -> None:
    q, k, v = tensors()
    records: list[CallRecord] = []
    policy = Policy(methods.create("a_shape", **bands), min_tokens=0, max_density=1.0)
    out = sparse_attention(q, k, v, policy, record=records.append)
    torch.testing.assert_close(out, sparse_attention(q, k, v, "dense"), atol=1e-5, rtol=1e-5)
    assert (records[0].path, records[0].density) == ("sparse", 1.0)


# Blocks and column groups


@pytest.mark.parametrize("name", ["block_q", "block_k", "column_group", "heads"])
@pytest.mark.parametrize("make", [SparsePlan, SparsePlan.unchecked])
@pytest.mark.parametrize("number", [*BEYOND, 0, -1])
def test_blocks_beyond_the_range_are_refused(make: Any, name: str, number: int) -> None:
    given: dict[str, Any] = {"heads": 1, "query_len": 4, "key_len": 4, "extent": Extent.full(1, 4, 4)}
    with pytest.raises(ValueError, match=rf"SparsePlan.{name} must be at least 1 and at most {MOST}, got {number}"):
        make(**given | {name: number})


@kernels_or_torch
@pytest.mark.parametrize("name", ["block_q", "block_k", "column_group"])
def test_the_largest_blocks_attend_what_others_do(attend: Any, name: str) -> None:
    """The bug was an output that nothing had written."""
    q, k, v = tensors()
    columns = {"column_indptr": torch.tensor([0, 2, 5]), "column_indices": torch.tensor([0, 9, 1, 2, 3]).int()}
    groups: dict[str, Any] = {"column_group": MOST, **columns}
    sizes: dict[str, Any] = groups if name == "column_group" else {name: MOST, **columns, "column_group": 2}
    if name != "column_group":
        rows = Grid(Extent.full(1, 90, 90), sizes.get("block_q", 64), 64).query_blocks
        assert rows <= 2  # one column group a head
    plan = SparsePlan(2, 90, 90, Extent.full(1, 90, 90), window=MOST, **sizes)
    out, lse = attend(AttentionCall(q, k, v), plan)
    expected, expected_lse = attend(AttentionCall(q, k, v), SparsePlan.dense(2, 90, 90, plan.extent))
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert plan.density() == 1.0
    if cpu.is_available():
        assert torch.equal(cpu.count(plan), plan.count_pairs())


@pytest.mark.parametrize("name", ["block_q", "block_k"])
@pytest.mark.parametrize("ordered", [False, True])
def test_pairs_in_the_largest_blocks_are_counted_in_the_memory_of_the_call(name: str, ordered: bool) -> None:
    """The bug was a list as long as a block: 16 GiB."""
    order = torch.arange(89, -1, -1).int().expand(1, 2, 90).contiguous() if ordered else None
    extent, mask = Extent.full(1, 90, 90), torch.ones(1, 2, 1, 1).bool()
    sizes: dict[str, Any] = {"extent": extent, "block_q": 128, "block_k": 128, "k_order": order}
    whole = SparsePlan.from_block_mask(mask, 90, 90, **sizes)
    largest: dict[str, Any] = {name: MOST}
    large = SparsePlan.from_block_mask(mask, 90, 90, **sizes | largest)
    assert torch.equal(large.count_pairs(), whole.count_pairs())
    band = SparsePlan(2, 90, 90, extent, window=10, **largest)
    assert band.count_pairs().tolist() == [[sum(min(row + 1, 10) for row in range(90))] * 2]


# Extents


@pytest.mark.parametrize("number", BEYOND)
def test_limits_beyond_the_range_are_refused(number: int) -> None:
    q, k, v = tensors()
    with pytest.raises(ValueError, match=f"Extent.limit must be at least 1 and at most {MOST}, got {number}"):
        sparse_attention(q, k, v, limit=number)


@pytest.mark.parametrize("method", ["a_shape", "max_relative", "block_sparse", "vertical_slash"])
def test_the_largest_limit_is_none(method: str) -> None:
    q, k, v = tensors(400)
    policy = Policy(methods.create(method), min_tokens=0, max_density=1.0)
    records: list[CallRecord] = []
    limited, free = (sparse_attention(q, k, v, policy, limit=n, record=records.append) for n in (MOST, None))
    assert torch.equal(limited, free)
    assert (records[0].density, records[0].path) == (records[1].density, records[1].path)


@kernels_or_torch
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("start", [(1 << 29) - 45, 1 << 30, MOST - 90])
def test_queries_may_stand_anywhere_below_the_largest_position(attend: Any, start: int, causal: bool) -> None:
    call = AttentionCall(*tensors(), extent=Extent([start], [90], [0], [90], causal=causal))
    expected, _ = attention(call, torch.ones(1, 2, 90, 90, dtype=torch.bool))
    dense = SparsePlan.dense(2, 90, 90, call.extent)
    blocks = SparsePlan.from_block_mask(
        torch.ones(1, 2, Grid(call.extent, 64, 64).query_blocks, 2, dtype=torch.bool), 90, 90, extent=call.extent
    )
    for plan in (dense, blocks):
        assert plan.count_pairs().tolist() == [[90 * 90, 90 * 90]]
        torch.testing.assert_close(attend(call, plan)[0].double(), expected, atol=1e-5, rtol=1e-5)
        if cpu.is_available():
            assert cpu.count(plan).tolist() == [[90 * 90, 90 * 90]]


@pytest.mark.parametrize(("start", "count"), [(MOST, 1), (MOST - 89, 90), (1, MOST)])
def test_queries_beyond_the_largest_position_are_refused(start: int, count: int) -> None:
    message = (
        f"positions of queries must lie below {MOST}, got {count} queries from query_start {start} on in batch row 1"
    )
    with pytest.raises(ValueError, match=message):
        Extent([0, start], [1, count], [0, 0], [90, 90])


def test_the_sum_of_two_large_numbers_of_keys_is_not_wrapped() -> None:
    with pytest.raises(ValueError, match=f"names {2 * MOST} keys in batch row 0, .* but there are 90"):
        sparse_attention(*tensors(), extent=Extent([0], [90], [MOST], [MOST]))


# Sinks


@pytest.mark.parametrize("keys", [90, 3000])
@pytest.mark.parametrize("queries", [1, 90])
@kernels_or_torch
def test_a_sink_of_infinity_takes_all(attend: Any, queries: int, keys: int) -> None:
    _, k, v = tensors(keys)
    q, sinks = tensors()[0][:, :, :queries], torch.tensor([math.inf, 0.5])
    call = AttentionCall(q, k, v, sinks=sinks)
    plan = SparsePlan.dense(2, queries, keys, call.extent)
    out, lse = attend(call, plan)
    assert bool((out[:, 0] == 0).all())
    assert bool((lse[:, 0] == math.inf).all())
    expected, expected_lse = attention(call, allowed_pairs(call.extent, queries, keys)[:, None].expand(-1, 2, -1, -1))
    torch.testing.assert_close(out[:, 1].double(), expected[:, 1], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse[:, 1].double(), expected_lse[:, 1], atol=1e-5, rtol=1e-5)


def test_a_sink_of_infinity_takes_all_of_dense_attention_and_its_gradients() -> None:
    q, k, v = (x.requires_grad_() for x in tensors())
    out = sparse_attention(q, k, v, sinks=torch.tensor([math.inf, 0.5]))
    assert bool((out[:, 0] == 0).all())
    out.sum().backward()
    assert q.grad is not None
    assert bool((q.grad[:, 0] == 0).all())
    assert bool(q.grad.isfinite().all())
    assert bool((q.grad[:, 1] != 0).any())


# What kernels do not take


@pytest.mark.parametrize("wide", ["q and k", "v"])
def test_wide_heads_run_elsewhere_and_are_right(wide: str) -> None:
    """Above the kernels' limit of 256."""
    generator = torch.Generator().manual_seed(0)
    dims = (300, 16) if wide == "q and k" else (16, 300)
    q, k, v = (torch.randn(1, 2, 60, dim, generator=generator) for dim in (dims[0], dims[0], dims[1]))
    call = AttentionCall(q, k, v)
    policy = Policy(methods.create("a_shape", sink=4, window=20), min_tokens=0, max_density=1.0)
    pairs = SparsePlan(2, 60, 60, call.extent, sink=4, window=20).to_mask()
    out, lse = sparse_attention(q, k, v, policy, return_lse=True)
    expected, expected_lse = attention(call, pairs)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(lse.double(), expected_lse, atol=1e-5, rtol=1e-5)
    assert backends.name_of(call) == "torch"


@pytest.mark.parametrize("side", ["left padding", "right padding"])
def test_training_with_a_soft_cap_leaves_padding_at_zero(side: str) -> None:
    call = replace(call_in(side, dim=8), softcap=2.0)
    leaves = [x.clone().requires_grad_() for x in (call.q, call.k, call.values)]
    out = sparse_attention(leaves[0], leaves[1], leaves[2], extent=call.extent, softcap=2.0, scale=call.scale)
    dead = ~call.extent.live_queries(call.query_len)[:, None, :, None].expand_as(out)
    assert bool(dead.any())
    assert bool((out[dead] == 0).all())
    out.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("method", ["a_shape", "max_relative", "vertical_slash"])
def test_tensors_without_values_are_refused_where_values_choose(method: str) -> None:
    q, k, v = (torch.empty(1, 2, 3000, 16, device="meta") for _ in range(3))
    with pytest.raises(ValueError, match=f"{method} chooses by values, but tensors on the meta device hold no values"):
        sparse_attention(q, k, v, method)
    assert sparse_attention(q, k, v, "dense").shape == q.shape


@kernels_or_torch
def test_a_sink_that_is_nan_leaves_padding_rows_zero(attend: Any) -> None:
    q, k, v = tensors(12)
    extent = Extent.from_key_mask(torch.tensor([[False] * 4 + [True] * 8]), 12)
    call = AttentionCall(q, k, v, extent, sinks=torch.full((2,), float("nan")))
    out, _ = attend(call, SparsePlan.dense(2, 12, 12, extent))
    assert out[:, :, :4].eq(0).all()
    assert out[:, :, 4:].isnan().all()
