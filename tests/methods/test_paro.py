"""PAROAttention against a naive one, written from the formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from clips import FRAMES, HEIGHT, PATCHES, WIDTH, clip, ranks_of_tokens, text_of_blocks, weights

from gossamer import AttentionCall, backends
from gossamer.backends.torch import attend
from gossamer.layout import DenoisingStep
from gossamer.methods import PARO, PerHead
from gossamer.methods.denoising import ORDERS

BLOCK = 16


def ranks(axes: str) -> torch.Tensor:
    """Rank of each patch when they are sorted by these axes, the slowest first."""
    patch = torch.arange(PATCHES)
    place = {"F": patch // (HEIGHT * WIDTH), "H": patch // WIDTH % HEIGHT, "W": patch % WIDTH}
    sizes = {"F": FRAMES, "H": HEIGHT, "W": WIDTH}
    rank = torch.zeros(PATCHES, dtype=torch.int64)
    for axis in axes:
        rank = rank * sizes[axis] + place[axis]
    return rank


@pytest.mark.parametrize("axes", ORDERS)
def test_it_keeps_the_blocks_with_the_most_mass_in_its_order(axes: str) -> None:
    call = clip(before=(0,), after=(0,), dead=0)
    mask = PARO(axes, 0.3, BLOCK).plan(call).to_mask()
    block, mass, number = ranks(axes) // BLOCK, weights(call), PATCHES // BLOCK
    for head in range(4):
        total = torch.zeros(number, number, dtype=torch.float64)
        for m in range(number):
            for n in range(number):
                total[m, n] = mass[0, head][block == m][:, block == n].sum()
        flat = total.flatten()
        best = sorted(range(flat.numel()), key=lambda i, flat=flat: (-float(flat[i]), i))
        kept = torch.eye(number, dtype=torch.bool).flatten()
        kept[best[: math.ceil(0.3 * number * number)]] = True
        assert torch.equal(mask[0, head], kept.view(number, number)[block][:, block])


@pytest.mark.parametrize("axes", ["FHW", "WHF"])
def test_text_is_outside_of_the_budget_and_so_is_padding(axes: str) -> None:
    """Rows of different lengths; masks need not be square, nor is the last key block always kept as in their bench."""
    call = clip(before=(5, 3), after=(4, 40), dead=20)
    mask, mass = PARO(axes, 0.3, BLOCK).plan(call).to_mask(), weights(call)
    for row in range(2):
        live = int(call.extent.key_count[row])
        block = ranks_of_tokens(call, row, ranks(axes)) // BLOCK
        of_queries, of_keys = text_of_blocks(call, row, BLOCK)
        free = [(m, n) for m, text in enumerate(of_queries) for n, other in enumerate(of_keys) if not (text or other)]
        budget = math.ceil(0.3 * len(free))
        for head in range(4):
            total = {}
            for m, n in free:
                queries, keys = (block == m) & (torch.arange(call.query_len) < live), block == n
                total[m, n] = float(mass[row, head][queries][:, keys].sum())
            best = sorted(free, key=lambda pair, total=total: (-total[pair], pair))[:budget]
            kept = torch.zeros(len(of_queries), len(of_keys), dtype=torch.bool)
            kept[torch.tensor(of_queries)] = True
            kept[:, torch.tensor(of_keys)] = True
            for m, n in best:
                kept[m, n] = True
            for m in range(len(of_keys)):
                kept[m, m] = True
            expected = kept[block][:, block[:live]]
            assert torch.equal(mask[row, head, :, :live], expected)
            assert not mask[row, head, :, live:].any()


def test_the_last_key_block_is_no_exception() -> None:
    """The authors' kernel takes square masks alone, and their bench keeps the last key block always."""
    call = clip(before=(0,), after=(0,), dead=0)
    mask = PARO("FHW", 0.1, BLOCK).plan(call).block_mask()[0]
    assert not mask[:, :-1, -1].all(dim=1).any()


def test_the_order_that_was_planted_holds_the_most() -> None:
    """Attention to patches near in a hidden order, whose order alone makes blocks of it."""
    for planted in ORDERS:
        call = clip(before=(0,), after=(0,), dead=0, heads=1, groups=1)
        codes = torch.nn.functional.one_hot(ranks(planted) // BLOCK, 16).float()[None, None] * 6
        call = AttentionCall(codes, codes, codes, call.extent, layout=call.layout, step=call.step, state=[{}])
        recall = {}
        for axes in ORDERS:
            plan = PARO(axes, 1 / 12, BLOCK).plan(AttentionCall(codes, codes, codes, call.extent, layout=call.layout,
                                                                step=call.step, state=[{}]))  # fmt: skip
            recall[axes] = float((weights(call) * plan.to_mask()).sum() / PATCHES)
        assert max(recall, key=lambda axes: recall[axes]) == planted
        assert recall[planted] > 0.99
        assert sorted(recall.values())[-2] < 0.9


def test_queries_and_keys_are_turned_back() -> None:
    """What comes out stands where it stood: with all blocks kept it is dense attention."""
    call = clip()
    for axes in ORDERS:
        plan = PARO(axes, 1.0, BLOCK).plan(clip())
        assert plan.q_order is not None
        out, _ = backends.attend(call, plan)
        values = call.values.double().repeat_interleave(2, dim=1)
        torch.testing.assert_close(out.double(), weights(call) @ values, atol=1e-5, rtol=1e-4)


def test_queries_and_keys_in_int8_are_asked_of_the_executor() -> None:
    """Of the plan that is made, and of one put together of what two rows kept."""
    state: list = [{}, {}]
    method = PARO(density=0.5, block=BLOCK, quantised=True)
    call = clip(before=(5, 5), after=(4, 4), step=0, total=30, state=state)
    plans = [method.plan(call), method.plan(replace(call, state=state[::-1]))]
    ordinary = PARO(density=0.5, block=BLOCK).plan(replace(call, state=[{}, {}]))
    assert [plan.quantised for plan in (*plans, ordinary)] == [True, True, False]
    assert torch.equal(plans[0].block_mask(), ordinary.block_mask())
    exact = attend(call, ordinary)[0]
    error = float((attend(call, plans[0])[0] - exact).norm() / exact.norm())
    assert 1e-5 < error < 0.05


def test_parts_of_the_sampling_have_masks_of_their_own() -> None:
    method = PARO(density=0.3, block=BLOCK)
    assert [method.bucket(step, 30) for step in (0, 1, 2, 4, 5, 12, 13, 14, 15, 29)] == [0, 0, 1, 1, 2, 4, 4, 5, 5, 5]
    by_code = PARO(density=0.3, block=BLOCK, halves=False)
    assert [by_code.bucket(step, 30) for step in range(30)] == [min(9, int((step + 1) / 30 * 10)) for step in range(30)]
    state: list = [{}, {}]
    masks = []
    for step in range(30):
        call = clip(step=step, total=30, state=state, seed=step)
        masks.append(method.plan(call))
    changes = [step for step in range(1, 30) if masks[step] is not masks[step - 1]]
    assert changes == [2, 5, 8, 11, 14]


def test_heads_of_several_orders_are_merged_once_for_each_mask() -> None:
    heads = [PARO(order, density=0.3, block=16, halves=False) for order in ("WHF", "FHW", "HWF", "WHF")]
    method, state = PerHead([heads]), [{}, {}]
    plans = [method.plan(clip(step=step, state=state)) for step in (0, 1, 3, 4)]
    assert plans[0] is plans[1] is plans[2]
    assert plans[3] is not plans[0]
    fresh = method.plan(clip(step=4))
    assert torch.equal(plans[3].to_mask(), fresh.to_mask())


def test_quantised_plans_are_kept_as_others_are() -> None:
    heads = PerHead([[PARO(order, density=0.3, block=BLOCK, quantised=True) for order in ORDERS[:4]]])
    state: list[dict] = [{}, {}]
    plans = [heads.plan(clip(step=step, state=state)) for step in (0, 1)]
    assert plans[0] is plans[1]
    assert plans[0].quantised


def test_it_needs_the_number_of_steps_and_checks_its_fields() -> None:
    assert PARO().lacks(clip(total=None)) == "the number of steps"
    with pytest.raises(ValueError, match=r"order must be one of FHW, .*, got 'HHW'"):
        PARO("HHW")
    assert PARO().lacks(clip(step=DenoisingStep(0, 4).number, total=4)) is None
