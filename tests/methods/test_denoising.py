"""What every method for denoising models promises, and what is kept over steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from clips import FRAMES, HEIGHT, PATCHES, WIDTH, clip

from gossamer import AttentionCall, Extent, Policy, backends, methods, sparse_attention
from gossamer.backends import torch as definition
from gossamer.layout import DenoisingStep, TokenLayout
from gossamer.methods import Method, PerHead
from gossamer.methods.denoising import ORDERS, axis_order, layout_of, step_of, text_blocks
from gossamer.methods.merging import merge_plans
from gossamer.plan import Grid

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


@dataclass(frozen=True)
class Listed:
    """A method as it is tested; ``full`` are fields with which it computes everything."""

    name: str
    small: dict[str, Any]
    full: dict[str, Any] | None = None
    text: bool = True

    @property
    def method(self) -> Method:
        return methods.create(self.name, **self.small)


VDIT = {"share": 0.2, "block": 16}
LISTED = [
    Listed("adaspa", {"sparsity": 0.6, "block": 16}, {"sparsity": 0.0, "block": 16}),
    Listed("attention_tile", {"frames": 1, "block": 16}, {"frames": FRAMES, "block": 16}),
    Listed("sparsed", {"share": 0.2, "block": 16}, {"share": 1.0, "block": 16}, text=False),
    Listed("paro", {"order": "WHF", "density": 0.3, "block": 16}, {"order": "WHF", "density": 1.0, "block": 16}),
    Listed("sparse_vdit", VDIT | {"mode": "diagonal"}, {"mode": "dense"}),
    Listed("sparse_vdit", VDIT | {"mode": "multi_diagonal"}, VDIT | {"mode": "multi_diagonal", "block": 400}),
    Listed("sparse_vdit", VDIT | {"mode": "stripe", "every": 2}, VDIT | {"mode": "stripe", "share": 1.0}),
    Listed("sparse_vdit", {"mode": "skip"}, text=False),
    *(
        Listed(f"{kind}_blocks", {"density": 0.2, "block": 16}, {"density": 1.0, "block": 16})
        for kind in ("oracle", "window", "random")
    ),
]
IDS = [f"{one.name}-{one.small.get('mode', '')}".rstrip("-") for one in LISTED]


def test_every_method_is_listed() -> None:
    assert {one.name for one in LISTED} == set(methods.denoising())
    assert not set(methods.denoising()) & {*methods.available(), *methods.decoding()}


@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_it_runs_as_its_plan_says(listed: Listed) -> None:
    call = clip()
    assert listed.method.lacks(call) is None
    plan = listed.method.plan(call)
    plan.check()
    mask = plan.to_mask()
    assert 0 <= plan.density() < 0.85
    assert torch.equal(plan.count_pairs(), mask.sum(dim=(2, 3)))
    out, lse = backends.attend(call, plan)
    expected, of_rows = definition.attend(call, plan)
    torch.testing.assert_close(out, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(lse, of_rows, atol=1e-4, rtol=1e-4)
    if listed.small.get("mode") == "skip":
        assert not out.any()
        return
    assert bool((mask.sum(dim=-1) > 0).all())
    for row, before in enumerate(layout_of(call).before if listed.text else ()):
        live = int(call.extent.key_count[row])
        patches = slice(before, before + PATCHES)
        words = torch.ones(call.key_len, dtype=torch.bool)
        words[patches] = False
        assert bool(mask[row, :, :, :live][:, words[: call.query_len]].all()), "text attends all"
        assert bool(mask[row, :, :, words.nonzero()[:, 0][words.nonzero()[:, 0] < live]].all()), "all attend text"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_it_runs_in_sixteen_bits(listed: Listed, dtype: torch.dtype) -> None:
    call = clip()
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.values.to(dtype))
    plan = listed.method.plan(call)
    wide = replace(call, q=call.q.float(), k=call.k.float(), v=call.values.float(), state=[{}, {}])
    assert torch.equal(plan.to_mask(), listed.method.plan(wide).to_mask())  # scores are sums in float32
    out, _ = backends.attend(call, plan)
    assert out.dtype == dtype
    torch.testing.assert_close(out.float(), definition.attend(wide, plan)[0], atol=3e-2, rtol=3e-2)


@pytest.mark.parametrize("listed", [one for one in LISTED if one.full is not None], ids=lambda one: one.name)
def test_full_budget_is_dense(listed: Listed) -> None:
    assert listed.full is not None
    assert methods.create(listed.name, **listed.full).plan(clip()).density() == 1.0


@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_a_row_is_planned_as_by_itself(listed: Listed) -> None:
    call = clip()
    mask = listed.method.plan(call).to_mask()
    for row in range(2):
        one = slice(row, row + 1)
        given = {"layout": replace(layout_of(call), before=layout_of(call).before[one]), "state": [{}]}
        alone = replace(call, q=call.q[one], k=call.k[one], v=None, extent=call.extent.of_rows(one), **given)
        assert torch.equal(listed.method.plan(alone).to_mask()[0], mask[row])


@pytest.mark.parametrize(("before", "after"), [((9, 5), (0, 0)), ((0, 2), (12, 6)), ((3, 0), (0, 40))])
@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_padding_on_the_right_changes_nothing(listed: Listed, before: tuple[int, ...], after: tuple[int, ...]) -> None:
    """Padded queries share a block with the last patches, where text comes first, or with text."""
    call = clip(before=before, after=after, dead=19)
    mask = listed.method.plan(call).to_mask()
    for row in range(2):
        count = int(call.extent.key_count[row])
        one, live = slice(row, row + 1), slice(0, count)
        given: dict[str, Any] = {"layout": TokenLayout(before[one], FRAMES, HEIGHT, WIDTH), "state": [{}]}
        q, k = call.q[one, :, live], call.k[one, :, live]
        alone = replace(call, q=q, k=k, v=None, extent=Extent.full(1, count, count, causal=False), **given)
        assert torch.equal(listed.method.plan(alone).to_mask()[0], mask[row, :, live, live])


@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_padding_on_the_left_changes_nothing(listed: Listed) -> None:
    call, pad = clip(), 7
    mask = listed.method.plan(call).to_mask()
    q, k, v = (torch.nn.functional.pad(x, (0, 0, pad, 0), value=9.0) for x in (call.q, call.k, call.values))
    extent = Extent([-pad] * 2, call.extent.query_count, [pad] * 2, call.extent.key_count, causal=False)
    padded = replace(call, q=q, k=k, v=v, extent=extent, state=[{}, {}])
    assert listed.method.lacks(padded) is None
    plan = listed.method.plan(padded)
    plan.check()
    assert torch.equal(plan.to_mask()[:, :, pad:, pad:], mask)
    assert torch.equal(plan.count_pairs(), mask.sum(dim=(2, 3)))
    out, _ = backends.attend(padded, plan)
    torch.testing.assert_close(out, definition.attend(padded, plan)[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_it_is_saved_and_read(listed: Listed) -> None:
    assert methods.from_dict(json.loads(json.dumps(listed.method.to_dict()))) == listed.method


@pytest.mark.parametrize("listed", LISTED, ids=IDS)
def test_what_a_call_lacks_is_said(listed: Listed) -> None:
    call = clip()
    given = call.q, call.k, call.v
    rest: dict[str, Any] = {"layout": call.layout, "step": call.step, "state": call.state}
    cases = {
        "layout": AttentionCall(*given, call.extent, **{**rest, "layout": None}),
        "attention of every token to every other": AttentionCall(*given, **rest),
        "all tokens in one call": AttentionCall(
            call.q[:, :, 5:], call.k, call.v, Extent([5, 5], [199, 199], [0, 0], [200, 200], causal=False), **rest
        ),
    }
    for missing, lacking in cases.items():
        reasons: list[Any] = []
        sparse_attention(
            lacking.q, lacking.k, lacking.values, Policy(listed.method, min_tokens=0), record=reasons.append,
            extent=lacking.extent, causal=lacking.extent.causal, layout=lacking.layout, step=lacking.step,
            state=lacking.state,
        )  # fmt: skip
        assert reasons[0].reason == f"{listed.name} needs {missing}"


STEADY = [LISTED[1], LISTED[5], *LISTED[-2:]]


@pytest.mark.parametrize("listed", STEADY, ids=lambda one: one.name)
def test_a_plan_that_depends_on_the_layout_alone_is_made_once(listed: Listed) -> None:
    state: Any = [{}, {}]
    plan = listed.method.plan(clip(state=state))
    assert listed.method.plan(clip(step=13, seed=1, state=state)) is plan
    assert listed.method.plan(clip()) is not plan
    turned = clip(step=13, grid=(HEIGHT, FRAMES, WIDTH), state=state)  # as many patches, which lie otherwise
    assert torch.equal(listed.method.plan(turned).to_mask(), listed.method.plan(replace(turned, state=None)).to_mask())
    shifted = clip(before=(4, 3), after=(5, 9), state=state)
    fresh = listed.method.plan(replace(shifted, state=None))
    assert torch.equal(listed.method.plan(shifted).to_mask(), fresh.to_mask())


def test_a_gradient_without_kept_plans_is_of_the_plan_that_was_used() -> None:
    """Two searches lie between the call and its gradient, and none of them changes it."""
    method, gradients = methods.create("adaspa", sparsity=0.8, search=(2, 5, 7), block=16), []
    for keep_plans in (True, False):
        state: Any = [{}, {}]
        policy = Policy(method, min_tokens=0, max_density=2.0, keep_plans=keep_plans)
        outs = []
        for step in (2, 3, 5, 7):
            call = clip(step=step, seed=step, state=state)
            q = call.q.clone().requires_grad_()
            given: Any = {"layout": call.layout, "step": call.step, "state": state, "extent": call.extent}
            outs.append((q, sparse_attention(q, call.k, call.values, policy, causal=False, **given)))
        gradients.append([torch.autograd.grad(out.sum(), q)[0] for q, out in outs])
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


KEEPING = ["adaspa", "sparsed", "paro"]


@pytest.mark.parametrize("listed", [one for one in LISTED if one.name in KEEPING], ids=KEEPING)
def test_a_plan_is_kept_over_steps(listed: Listed) -> None:
    first = clip(step=12)
    states: Any = first.state
    plan = listed.method.plan(first)
    again = listed.method.plan(clip(step=13, seed=1, state=first.state))
    assert again is plan
    other = listed.method.plan(clip(step=13, seed=1))
    assert not torch.equal(other.to_mask(), plan.to_mask())
    coarse = replace(listed.method, block=32).plan(clip(step=13, state=first.state))
    assert not torch.equal(coarse.to_mask(), plan.to_mask())
    # In another batch: the second row by itself, and both the other way round.
    mask = plan.to_mask()
    for rows in ([1], [1, 0]):
        before, after = (tuple(x[row] for row in rows) for x in ((5, 3), (4, 9)))
        call = clip(step=13, before=before, after=after, dead=3, state=[states[row] for row in rows])
        moved = listed.method.plan(call)
        assert torch.equal(moved.to_mask(), mask[rows])
        assert torch.equal(moved.count_pairs(), plan.count_pairs()[rows])
    # Another length is another plan.
    longer = clip(step=13, after=(4, 10), state=first.state)
    assert listed.method.plan(longer).key_len == longer.key_len


@pytest.mark.parametrize("axes", ORDERS)
def test_an_order_of_axes_sorts_patches_alone(axes: str) -> None:
    call = clip()
    order = axis_order(call, axes)
    for row, before in enumerate(layout_of(call).before):
        assert torch.equal(order[row].sort().values, torch.arange(call.query_len))
        inside = order[row, before : before + PATCHES] - before
        others = torch.cat([order[row, :before], order[row, before + PATCHES :]])
        assert torch.equal(others, others.sort().values)
        places = {"F": inside // (HEIGHT * WIDTH), "H": inside // WIDTH % HEIGHT, "W": inside % WIDTH}
        rank = [tuple(int(places[axis][n]) for axis in axes) for n in range(PATCHES)]
        assert rank == sorted(rank)


def test_two_orders_undo_each_other() -> None:
    """HWF and WFH; every other one undoes itself, as the spec of PARO has it for a cube of axes."""
    cube = clip(before=(0,), after=(0,), grid=(4, 4, 4), dead=0)
    for axes in ORDERS:
        order = axis_order(cube, axes)[0]
        back = axis_order(cube, {"HWF": "WFH", "WFH": "HWF"}.get(axes, axes))[0]
        assert torch.equal(order[back], torch.arange(64))


def test_blocks_that_hold_text() -> None:
    call = clip(before=(16, 3), after=(0, 13), dead=16)
    rows, columns = text_blocks(call, Grid(call.extent, 16, 16))
    assert call.extent.key_count.tolist() == [208, 208]
    assert columns.nonzero().tolist() == [[0, 0], [1, 0], [1, 12]]
    assert rows.nonzero().tolist() == [[0, 0], [0, 13], [1, 0], [1, 12], [1, 13]]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_heads_of_different_modes_are_merged(groups: int) -> None:
    """Orders of queries and keys differ by head; each runs as it does by itself."""
    call = clip(groups=groups)
    kinds = [methods.create("sparse_vdit", **VDIT | {"mode": mode}) for mode in ("skip", "diagonal", "multi_diagonal")]
    kinds.append(methods.create("paro", order="WHF", density=0.3, block=16))
    plan = PerHead((kinds,)).plan(call)
    mask = plan.to_mask()
    assert torch.equal(plan.count_pairs(), mask.sum(dim=(2, 3)))
    for head, method in enumerate(kinds):
        alone = method.plan(replace(call.of_heads([head]), state=[{}, {}])).to_mask()[:, 0]
        assert torch.equal(mask[:, head], alone)
    out, _ = backends.attend(call, plan)
    torch.testing.assert_close(out, definition.attend(call, plan)[0], atol=1e-4, rtol=1e-4)


STATEFUL = [
    [methods.create("sparse_vdit", mode="stripe", share=share, block=16, every=2) for share in (0.1, 0.3, 0.1, 0.2)],
    [methods.create("paro", order=order, density=0.3, block=16) for order in ("WHF", "FHW", "WHF", "HFW")],
    [methods.create("sparsed", share=share, block=16) for share in (0.1, 0.3, 0.1, 0.2)],
    [methods.create("adaspa", sparsity=sparsity, block=16) for sparsity in (0.6, 0.8, 0.6, 0.9)],
]


@pytest.mark.parametrize("kinds", STATEFUL, ids=lambda kinds: kinds[0].name)
def test_heads_of_one_layer_keep_what_is_theirs(kinds: list[Method]) -> None:
    """All heads of a layer are given the same state, and heads of several settings are planned in groups."""
    state: Any = [{}, {}]
    for step in (20, 21):
        mask = PerHead((kinds,)).plan(clip(step=step, state=state, seed=step)).to_mask()
        for head, method in enumerate(kinds):
            first = clip(step=20, seed=20)  # what is found at step 20 holds at step 21
            assert torch.equal(mask[:, head], _heads_of(method.plan(first).to_mask(), first.heads)[:, head])


def _heads_of(mask: torch.Tensor, heads: int) -> torch.Tensor:
    return mask.repeat_interleave(heads // mask.shape[1], dim=1)


def test_orders_of_chunks_are_not_merged() -> None:
    call = clip(before=(0,), after=(0,), dead=0)
    plan = methods.create("paro", order="WHF", density=0.3, block=16).plan(call)
    later = replace(plan, extent=Extent([1], [190], [0], [192], causal=False))
    with pytest.raises(ValueError, match="rows' queries begin at position 0, got positions"):
        merge_plans([later, later], [0, 1, 0, 1])


def test_layouts_and_steps_are_checked() -> None:
    negative: dict[str, Any] = {"before": (0,), "frames": 1, "height": -1, "width": 1}
    wrong: list[dict[str, Any]] = [{"before": (-1,)}, {"before": (0,), "frames": 2}, negative]
    for fields in wrong:
        with pytest.raises(ValueError, match="a TokenLayout needs numbers of tokens from 0 on"):
            TokenLayout(**fields)
    assert TokenLayout((3,)).patches == 0
    assert DenoisingStep(3) == DenoisingStep(3, None, 0)
    with pytest.raises(ValueError, match="the layout is of 1 batch rows, but q has 2"):
        clip(layout=TokenLayout((3,)))
    call = AttentionCall(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2))
    with pytest.raises(ValueError, match="make it with layout="):
        layout_of(call)
    with pytest.raises(ValueError, match="make it with step="):
        step_of(call)
    assert HEIGHT * WIDTH * FRAMES == PATCHES
