"""Gradients of the Triton kernels against dense attention in fp64: on a CUDA device, else interpreted on the CPU."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import EVERYWHERE, call_in
from gradients import NAMES, Reaching, assert_near, plan_under, reaching, with_extras
from torch import Tensor
from triton_checks import draw
from triton_support import DEVICE, DTYPES, MARKS, moved

from gossamer import AttentionCall, Method, Policy, SparsePlan, backends, sparse_attention
from gossamer.backends import torch as definition
from gossamer.backends import triton
from gossamer.backends.torch.backward import ALL, Needs
from gossamer.backends.triton import backward, config
from gossamer.testing import random_plan

launch: Any = pytest.importorskip("gossamer.backends.triton.launch_backward", reason="Triton is not installed")
pytestmark = MARKS

SMALL = config.Config(16, 16, 4, 1)  # several tiles in each block
KINDS: dict[str, dict[str, Any]] = {
    "blocks, columns and bands": {"block": 16},
    "shared by heads": {"block": 32, "heads": 2},
    "permuted": {"block": 16, "permuted": True, "heads": 2},
    "means": {"block": 8, "pruned_mean": True},
    "keys in an order for each head": {"block": 17, "permuted": "k", "seed": 5},
    "queries in an order": {"block": 16, "permuted": "q", "seed": 1},
}


def gradients(
    call: AttentionCall,
    plan: SparsePlan,
    given: Reaching,
    needs: Needs = ALL,
    chosen: config.Config | None = None,
) -> dict[str, Tensor | None]:
    """``chosen`` overrides the table's configuration."""
    there = moved(call)
    out, lse = triton.attend(there, plan)
    reached = (given.out.to(DEVICE), None if given.lse is None else given.lse.to(DEVICE))
    if chosen is None:
        found = triton.attend_backward(there, plan, out, lse, *reached, needs)
    else:
        arguments = backward.arguments_of(there, plan)
        found = launch.launch_backward(there, plan, arguments, launch.Reached(out, lse, *reached), needs, config=chosen)
    return {name: None if x is None else x.cpu() for name, x in zip(NAMES, found, strict=True)}


def check(call: AttentionCall, plan: SparsePlan, given: Reaching, chosen: config.Config | None = None) -> None:
    """Where what reaches dead rows is NaN."""
    dead = ~call.extent.live_queries(call.query_len)[:, None]
    given.out.masked_fill_(dead[..., None], math.nan)
    if given.lse is not None:
        given.lse.masked_fill_(dead, math.nan)
    assert_near(call, plan, given, gradients(call, plan, given, chosen=chosen))


@pytest.mark.parametrize("situation", EVERYWHERE)
def test_gradients_everywhere(situation: str) -> None:
    """Kinds of plans, dtypes, tiles, sinks, soft-cap and the gradient of the LSE take turns."""
    turn = EVERYWHERE.index(situation)
    call = call_in(situation, length=40, dim=8, dtype=list(DTYPES.values())[turn % 3])
    if turn % 4 in (1, 2):
        call = with_extras(call, bias=False, softcap=turn % 4 == 2)
    plan = plan_under(call, **list(KINDS.values())[(turn + turn // 3) % len(KINDS)])
    check(call, plan, reaching(call, lse=turn % 5 != 0), SMALL if turn % 7 == 3 else None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_plan_in_every_dtype(kind: str, dtype: str) -> None:
    call = call_in("padded chunk", length=48, dim=16, dtype=DTYPES[dtype])
    check(call, plan_under(call, **KINDS[kind]), reaching(call, lse=dtype == "fp32"))


@pytest.mark.parametrize("seed", [1, 3, 5, 6])
def test_random_plans(seed: int) -> None:
    """Of parts by chance, of which some are absent; blocks of several sizes, heads in groups of two."""
    sizes: dict[str, Any] = {
        "query_len": 50,
        "key_len": 60,
        "block_q": [16, 32][seed % 2],
        "block_k": [32, 16, 20][seed % 3],
    }
    plan = random_plan(seed, batch=1, heads=2, **sizes, permuted=seed == 5, causal=seed % 2 == 1, padded=seed == 6)
    call = draw(plan, heads=4, groups=2, dim=16, seed=seed)
    check(call, plan, reaching(call), SMALL if seed == 3 else None)


@pytest.mark.parametrize("part", ["blocks", "columns", "sink", "window"])
def test_each_part_alone(part: str) -> None:
    """Several tiles of keys; more columns than a tile holds."""
    length, generator = 150, torch.Generator().manual_seed(3)
    mask = torch.rand(1, 1, 3, 3, generator=generator) < (0.6 if part == "blocks" else 0.0)
    columns: dict[str, Any] = {}
    if part == "columns":
        rows = [torch.randperm(length, generator=generator)[:90].sort().values.int() for _ in range(2)]
        columns = {"column_group": 2, "column_indptr": torch.tensor([0, 90, 180]), "column_indices": torch.cat(rows)}
    bands: dict[str, Any] = {part: [70]} if part in ("sink", "window") else {}
    plan = SparsePlan.from_block_mask(mask, length, length, **columns, **bands)
    call = draw(plan, heads=2, groups=1, dim=16)
    check(call, plan, reaching(call))


@pytest.mark.parametrize(("dim", "value_dim", "dtype"), [(1, 24, "fp32"), (80, 80, "bf16"), (256, 40, "fp16")])
def test_head_dimensions(dim: int, value_dim: int, dtype: str) -> None:
    plan = random_plan(3, batch=1, heads=1, query_len=40, key_len=60, block_q=32, block_k=32)
    call = draw(plan, heads=2, groups=1, dim=dim, value_dim=value_dim, dtype=DTYPES[dtype])
    check(call, plan, reaching(call, lse=False))


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_of_any_sign(scale: float) -> None:
    plan = random_plan(2, batch=1, heads=1, query_len=40, key_len=40, block_q=32, block_k=32)
    call = draw(plan, heads=2, groups=1, dim=16, scale=scale)
    check(replace(call, softcap=2.0 if scale else None), plan, reaching(call))


@pytest.mark.parametrize("sinks", [False, True])
def test_rows_that_attend_nothing_have_no_gradient(sinks: bool) -> None:
    """NaN that reaches their outputs goes nowhere; with sinks, what reaches their LSE is the sinks'."""
    call = call_in("right padding", length=40, dim=8)
    call = with_extras(call, softcap=False, bias=False, sinks=sinks)
    mask = torch.zeros(2, 4, 3, 3, dtype=torch.bool)
    mask[:, :, 2] = True
    plan = SparsePlan.from_block_mask(mask, 40, 40, extent=call.extent, block_q=16, block_k=16)
    given = reaching(call)
    expected = gradients(call, plan, given)
    given.out[:, :, :32] = math.nan
    found = gradients(call, plan, given)
    assert found["q"] is not None
    assert bool((found["q"][:, :, :32] == 0).all())
    for name in "qkv":
        assert torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name]))
    assert (found["sinks"] is not None) == sinks
    assert_near(call, plan, Reaching(given.out.nan_to_num(), given.lse), found)
    nothing = gradients(call, SparsePlan(4, 40, 40, call.extent), Reaching(torch.full_like(given.out, math.nan), None))
    assert all(bool((x == 0).all()) for x in nothing.values() if x is not None)


def test_no_queries_and_no_keys() -> None:
    call = call_in("rows without tokens", length=20, dim=16)
    empty = replace(call, q=call.q[:, :, :0], extent=call.extent.of_queries(0, 0))
    plan = SparsePlan.dense(4, 0, call.key_len, empty.extent)
    found = gradients(empty, plan, reaching(empty))
    assert [found[name] is None or found[name].shape == getattr(empty, name).shape for name in "qkv"] == [True] * 3  # pyright: ignore
    assert all(bool((x == 0).all()) for x in found.values() if x is not None)


def test_results_repeat_and_do_not_depend_on_companions() -> None:
    """Bit for bit, alone or beside another batch row, with columns of several lists that share keys."""
    call = call_in("left padding", length=48, dim=8, dtype=torch.bfloat16)
    plan, given = plan_under(call, block=16, heads=2), reaching(call)
    first = gradients(call, plan, given)
    again = gradients(call, plan, given)
    assert all(torch.equal(torch.as_tensor(first[name]), torch.as_tensor(again[name])) for name in "qkv")
    lists = plan.block_mask(), plan.column_mask()
    alone = replace(
        call, q=call.q[:1], k=call.k[:1], v=call.values[:1], extent=call.extent.of_rows(slice(0, 1))
    )  # fmt: skip
    rows = int(plan.grid.row_blocks[0])
    columns = lists[1][:1, :, : -(-rows // plan.column_group), : alone.extent.longest]
    own = SparsePlan.from_block_mask(
        lists[0][:1, :, :rows, : -(-alone.extent.longest // 16)], 48, 48, extent=alone.extent, block_q=16, block_k=16,
        column_group=plan.column_group, sink=plan.sink, window=plan.window,
        column_indptr=torch.nn.functional.pad(columns.sum(-1).flatten().cumsum(0), (1, 0)),
        column_indices=columns.flatten(0, 2).nonzero()[:, 1].int(),
    )  # fmt: skip
    assert given.lse is not None
    found = gradients(alone, own, Reaching(given.out[:1], given.lse[:1]))
    assert all(torch.equal(torch.as_tensor(first[name])[:1], torch.as_tensor(found[name])) for name in "qkv")


@pytest.mark.parametrize("chosen", NAMES[:4])
def test_what_is_not_asked_for_is_not_made(chosen: str) -> None:
    call = with_extras(call_in("no padding", length=40, dim=8), bias=False)
    plan, given = plan_under(call, block=16, heads=2), reaching(call)
    whole = gradients(call, plan, given)
    some = gradients(call, plan, given, Needs(*(name == chosen for name in NAMES)))
    assert [name for name in NAMES if some[name] is not None] == [chosen]
    assert torch.equal(torch.as_tensor(some[chosen]), torch.as_tensor(whole[chosen]))


def test_tensors_of_any_strides() -> None:
    call = call_in("no padding", length=40, dim=8)
    plan, given = plan_under(call, block=16, heads=2), reaching(call)
    expected = gradients(call, plan, given)
    turned = {name: getattr(call, name).transpose(1, 2).contiguous().transpose(1, 2) for name in "qkv"}
    for order in ((1, 2), (2, 3)):
        odd = Reaching(given.out.transpose(*order).contiguous().transpose(*order), given.lse)
        found = gradients(replace(call, **turned), plan, odd)
        assert all(torch.equal(torch.as_tensor(found[name]), torch.as_tensor(expected[name])) for name in "qkv")


def test_a_bias_runs_on_the_definition() -> None:
    call = with_extras(call_in("padded chunk", length=30, dim=8), sinks=False, softcap=False)
    plan, given = plan_under(call), reaching(call)
    out, lse = definition.attend(call, plan)
    mine = triton.attend_backward(call, plan, out, lse, *given)
    right = definition.attend_backward(call, plan, out, lse, *given)
    assert mine.bias is not None
    assert all(
        torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(mine, right, strict=True) if x is not None
    )


def test_plans_that_skip_are_refused() -> None:
    call = moved(call_in("no padding", length=70, dim=16))
    plan = SparsePlan(2, 70, 70, call.extent).with_attributes(skip=1.0)
    out, lse = triton.attend(call, plan)
    with pytest.raises(ValueError, match="a plan with skip has no gradient"):
        triton.attend_backward(call, plan, out, lse, out)


@pytest.mark.parametrize("name", ["q", "k", "v", "sinks"])
def test_a_wrong_gradient_is_caught(name: str) -> None:
    call = with_extras(call_in("no padding", length=40, dim=8), bias=False)
    plan, given = plan_under(call, block=16, heads=2), reaching(call)
    found = gradients(call, plan, given)
    with pytest.raises(AssertionError, match=f"d{name}: error"):
        assert_near(call, plan, given, found | {name: torch.as_tensor(found[name]) * 1.001})


class Planted(Method):
    """The plan that it is given."""

    name = "planted by a test"

    def __init__(self, given: SparsePlan) -> None:
        object.__setattr__(self, "given", given)

    def plan(self, call: AttentionCall) -> SparsePlan:
        return self.given  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_autograd_runs_the_kernels(monkeypatch: pytest.MonkeyPatch, keep_plans: bool) -> None:
    """Through `sparse_attention`, on the backend that is chosen."""
    monkeypatch.setenv(backends.ATTEND, "triton")
    launched: list[Any] = []
    whole = launch.launch_backward
    monkeypatch.setattr(launch, "launch_backward", lambda *given: launched.append(given) or whole(*given))
    call = with_extras(call_in("no padding", length=40, dim=8), bias=False)
    plan, given = plan_under(call, block=16, heads=2), reaching(call)
    leaves = {name: getattr(call, name).to(DEVICE).requires_grad_() for name in NAMES[:4]}
    policy = Policy(Planted(plan), min_tokens=0, max_density=1.0, keep_plans=keep_plans)
    q, k, v, sinks = leaves.values()
    fields: dict[str, Any] = {"scale": call.scale, "softcap": call.softcap}
    out, lse = sparse_attention(q, k, v, policy, return_lse=True, sinks=sinks, **fields)
    assert given.lse is not None
    ((out * given.out.to(DEVICE)).sum() + (lse * given.lse.to(DEVICE)).sum()).backward()
    assert len(launched) == 1
    found: dict[str, Tensor | None] = {name: torch.as_tensor(leaf.grad).cpu() for name, leaf in leaves.items()}
    assert_near(call, plan, given, found)
