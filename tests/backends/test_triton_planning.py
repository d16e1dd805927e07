"""Whole plans by the Triton backend: those of torch, with one wait for the device, whatever surrounds a batch row."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from triton_support import MARKS, ON_GPU, moved

from gossamer import Extent, SparsePlan, methods
from gossamer.backends import PLAN, backend_of, triton
from gossamer.backends.triton import choose, device, pairs
from gossamer.call import AttentionCall
from gossamer.methods import Method
from gossamer.testing import SITUATIONS, assert_keeps_diagonal, make_call

pytestmark = MARKS
PLAN_PARTS = ("block_indptr", "block_indices", "column_indptr", "column_indices", "sink", "window")
PLANNERS = [
    ("vertical_slash", {"vertical_size": 30, "slash_size": 90}),
    ("max_relative", {"alpha": 0.3, "sink_blocks": 1, "window_blocks": 2, "last_rows": 64, "block_k": 16}),
    ("block_sparse", {"blocks": 2, "block": 32}),
]
every_planner = pytest.mark.parametrize(("name", "fields"), PLANNERS, ids=[name for name, _ in PLANNERS])


@pytest.fixture(autouse=True)
def planned_in_triton(monkeypatch) -> None:
    monkeypatch.setenv(PLAN, "triton")


def in_torch(monkeypatch, method: Method, call: AttentionCall) -> SparsePlan:
    with monkeypatch.context() as patched:
        patched.setenv(PLAN, "torch")
        return method.plan(call)


def assert_same_plans(ours: SparsePlan, expected: SparsePlan) -> None:
    for part in PLAN_PARTS:
        assert torch.equal(getattr(ours, part), getattr(expected, part)), part
    assert torch.equal(ours.count_pairs(), expected.count_pairs())


@pytest.mark.parametrize("situation", SITUATIONS)
@every_planner
def test_plans_are_those_of_torch(monkeypatch, situation: str, name: str, fields: dict) -> None:
    """And valid. Heads and their shares take turns; lengths are no multiple of a block."""
    turn = SITUATIONS.index(situation)
    heads, groups = [(2, 1), (4, 2), (2, 2)][turn % 3]
    call = moved(make_call(situation, length=150, heads=heads, groups=groups, dim=[16, 40][turn % 2]))
    method = methods.create(name, **fields)
    ours = method.plan(call)
    assert_same_plans(ours, in_torch(monkeypatch, method, call))
    given: dict[str, Any] = {part: getattr(ours, part) for part in PLAN_PARTS}
    sizes = {"block_q": ours.block_q, "block_k": ours.block_k, "column_group": ours.column_group}
    SparsePlan(ours.heads, ours.query_len, ours.key_len, ours.extent, **sizes, **given)  # what passes is valid


@pytest.mark.parametrize("length", [1, 64])
@every_planner
def test_short_prompts(monkeypatch, length: int, name: str, fields: dict) -> None:
    method, call = (
        methods.create(name, **fields),
        moved(make_call("left padding", length=length, heads=2, groups=1, dim=8)),
    )
    assert_same_plans(method.plan(call), in_torch(monkeypatch, method, call))


@every_planner
def test_planning_waits_once(monkeypatch, name: str, fields: dict) -> None:
    """And the density that follows does not wait for the device at all."""
    waits = []

    def counted(numbers: Tensor) -> list[int]:
        waits.append(numbers.shape)
        before = torch.cuda.get_sync_debug_mode() if ON_GPU else 0
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
        try:
            return device.fetch(numbers)
        finally:
            if ON_GPU:
                torch.cuda.set_sync_debug_mode(before)

    for module in (choose, pairs):
        monkeypatch.setattr(module, "fetch", counted)
    call = moved(make_call("left padding", length=100, heads=4, groups=2, dim=16))
    if ON_GPU:
        torch.cuda.set_sync_debug_mode("error")
    try:
        methods.create(name, **fields).plan(call).density()
    finally:
        if ON_GPU:
            torch.cuda.set_sync_debug_mode("default")
    assert len(waits) == 1


@pytest.mark.parametrize("situation", ["left padding", "right padding", "padded chunk"])
@every_planner
def test_plans_depend_neither_on_padding_nor_on_companions(situation: str, name: str, fields: dict) -> None:
    call = moved(make_call(situation, length=100, heads=2, groups=1, dim=16, dtype=torch.bfloat16))
    method, extent = methods.create(name, **fields), call.extent
    together = method.plan(call)
    for b in range(call.batch):
        first, queries = int(extent.first_query[b]), int(extent.query_count[b])
        start, keys = int(extent.key_start[b]), int(extent.key_count[b])
        own = Extent([int(extent.first_position[b])], [queries], [0], [keys])
        q, k = call.q[b : b + 1, :, first : first + queries], call.k[b : b + 1, :, start : start + keys]
        alone = method.plan(AttentionCall(q, k, k, own, scale=call.scale))
        mask = together.to_mask()[b : b + 1, :, first : first + queries, start : start + keys]
        assert torch.equal(alone.to_mask(), mask)
        assert torch.equal(alone.count_pairs()[0], together.count_pairs()[b])


@every_planner
def test_plans_from_nan_keep_the_diagonal(name: str, fields: dict) -> None:
    call = moved(make_call("no padding", length=100, heads=2, groups=1, dim=16))
    call = replace(call, q=torch.full_like(call.q, math.nan))
    assert_keeps_diagonal(call, methods.create(name, **fields).plan(call).to("cpu"))


def test_bands_alone_are_planned_on_the_cpu(monkeypatch) -> None:
    call = moved(make_call("left padding", length=100, heads=2, groups=1, dim=16))
    method = methods.create("a_shape", sink=9, window=50)
    plan = method.plan(call)
    assert plan.device.type == "cpu"
    assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)))


def test_the_environment_chooses_it() -> None:
    call = moved(make_call("no padding", length=4, heads=1, groups=1, dim=8))
    for verb in ("last_query_probe", "pool_keys", "row_block_energy", "antidiagonal_scores", "ListWriter", "count"):
        assert backend_of(call, verb) is triton
    assert backend_of(call, "exact_slashes").__name__ == "gossamer.backends.torch"
