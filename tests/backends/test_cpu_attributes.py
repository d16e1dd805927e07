"""A plan's attributes in C++ against the definition, on every instruction set."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from cpu_checks import (
    check,
    draw,
    every_isa,
    every_native_kernel,
    needs_kernels,
    poisoned,
    same_on_threads,
)

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import cpu
from gossamer.plan import Grid
from gossamer.plan.parts import plan_parts
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = [needs_kernels, poisoned]

ATTRIBUTES: dict[str, dict[str, Any]] = {
    "means": {"pruned_mean": True},
    "skip": {"skip": 0.7},
    "both": {"pruned_mean": True, "skip": 0.2},
}
each_attribute = pytest.mark.parametrize("attributes", ATTRIBUTES.values(), ids=ATTRIBUTES.keys())


@pytest.fixture
def force(monkeypatch):
    return lambda isa: monkeypatch.setenv(cpu.ENVIRONMENT, isa)


@every_native_kernel
@each_attribute
@pytest.mark.parametrize("seed", range(3))
def test_random_plans(force, isa: str, dtype: torch.dtype, attributes: dict[str, Any], seed: int) -> None:
    """Per query head and per key/value head; padding, chunks, a window of the model's own, a scale below 0."""
    force(isa)
    query_len, key_len = [(65, 300), (257, 257), (130, 333)][seed]
    plan = random_plan(
        seed,
        batch=2,
        heads=[2, 4][seed % 2],
        query_len=query_len,
        key_len=key_len,
        block_q=[40, 64, 32][seed],
        block_k=64 if "skip" in attributes else [64, 48, 16][seed],
        padded=seed != 1,
        causal=seed != 2,
        limit=150 if seed == 2 else None,
        **attributes,
    )
    fields = {"sinks": torch.randn(4) if seed == 1 else None, "softcap": 3.0 if seed == 2 else None}
    scale = [0.3, -0.2, 0.3][seed]
    check(draw(plan, heads=4, groups=2, dim=[64, 40, 96][seed], seed=seed, dtype=dtype, scale=scale, **fields), plan)


def blocks_of(call: AttentionCall, heads: int, share: float, **fields: Any) -> SparsePlan:
    grid = Grid(call.extent, fields["block_q"], fields["block_k"])
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(call.batch, heads, grid.query_blocks, grid.key_blocks, generator=generator) < share
    return SparsePlan.from_block_mask(mask, call.query_len, call.key_len, extent=call.extent, **fields)


@every_isa
@pytest.mark.parametrize("situation", SITUATIONS)
def test_every_situation(force, isa: str, situation: str) -> None:
    force(isa)
    for dtype in (torch.float32, torch.bfloat16):
        call = make_call(situation, length=150, heads=4, groups=2, dim=32, dtype=dtype)
        check(call, blocks_of(call, 2, 0.3, block_q=32, block_k=24, pruned_mean=True))
        check(replace(call, scale=0.5), blocks_of(call, 4, 0.8, block_q=32, block_k=64, skip=1.0))


@every_native_kernel
@each_attribute
def test_long_lists_and_wide_blocks(force, isa: str, dtype: torch.dtype, attributes: dict[str, Any]) -> None:
    """More means than a tile has places, and query blocks of more rows than run together."""
    force(isa)
    call = make_call("chunk", length=700, heads=4, groups=1, dim=32, dtype=dtype)
    sizes = {"block_q": 300, "block_k": 64 if "skip" in attributes else 5}
    check(replace(call, scale=0.4), blocks_of(call, 1, 0.5, **sizes, **attributes))
    sizes = {"block_q": 128, "block_k": 128 if "skip" in attributes else 9}
    check(replace(call, scale=0.4), blocks_of(call, 4, 0.5, **sizes, **attributes))


@every_isa
@each_attribute
def test_few_queries(force, isa: str, attributes: dict[str, Any]) -> None:
    """As in decoding, but not split over the keys: what a row leaves out depends on the keys before."""
    force(isa)
    for queries in (1, 7):
        plan = random_plan(4, batch=2, heads=2, query_len=queries, key_len=900, **attributes)
        check(draw(plan, heads=4, groups=2, dim=64, scale=0.3), plan)


@each_attribute
def test_threads_change_nothing(attributes: dict[str, Any]) -> None:
    plan = random_plan(7, batch=2, heads=2, query_len=300, key_len=400, padded=True, **attributes)
    call = draw(plan, heads=4, groups=2, dim=32, scale=0.4)
    same_on_threads(lambda: cpu.attend(call, plan))


def test_attributes_are_not_ignored() -> None:
    plan = random_plan(1, batch=1, heads=2, query_len=300, key_len=300, **ATTRIBUTES["both"])
    call = draw(plan, heads=4, groups=2, dim=32, scale=0.4)
    results = [cpu.attend(call, plan.with_attributes(**attributes))[0] for attributes in ({}, *ATTRIBUTES.values())]
    for n, one in enumerate(results):
        assert not any(torch.allclose(one, other, atol=1e-3) for other in results[n + 1 :])


def test_a_dead_value_of_a_block_s_tail_is_not_in_its_mean() -> None:
    """Right padding inside the last key block; the poison there would spoil the mean."""
    extent = Extent([0], [40], [3], [100], causal=False)
    plan = SparsePlan(2, 40, 120, extent, block_q=40, block_k=64, pruned_mean=True)
    check(draw(plan, heads=2, groups=2, dim=16), plan)


@pytest.mark.parametrize("name", ["sink", "window"])
@each_attribute
def test_bands_written_beside_an_attribute_are_named(attributes: dict[str, Any], name: str) -> None:
    plan = random_plan(1, batch=1, heads=2, query_len=130, key_len=130, **attributes)
    getattr(plan, name)[1] = 5
    with pytest.raises(ValueError, match="is for plans of blocks alone, and this one has columns, bands or an order"):
        cpu.attend(draw(plan, heads=2, groups=2, dim=16), plan)


@pytest.mark.parametrize(
    ("skip", "block_k", "message"),
    [(-1.0, 64, "skip must be at least 0"), (float("nan"), 64, "skip must be"), (1.0, 48, "a multiple of 64, got 48")],
)
def test_the_operator_refuses_what_a_plan_refuses(skip: float, block_k: int, message: str) -> None:
    plan = random_plan(1, batch=1, heads=2, query_len=130, key_len=130, block_k=block_k, pruned_mean=True)
    call = draw(plan, heads=2, groups=2, dim=16)
    given = (call.q, call.k, call.values, torch.empty(0), *plan_parts(plan), 1.0, 0.0)
    torch.ops.gossamer.cpu_attend(*given)
    with pytest.raises(ValueError, match=message):
        torch.ops.gossamer.cpu_attend(*given, skip)
