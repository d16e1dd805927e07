"""AdaSpa against a naive one, written from the formulas."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from clips import PATCHES, clip, weights
from torch import Tensor

from gossamer import AttentionCall
from gossamer.layout import TokenLayout
from gossamer.methods import AdaSpa, PerHead, SparseVDiT
from gossamer.methods.denoising import layout_of

BLOCK = 16


def block_masses(call: AttentionCall, mass: Tensor, row: int) -> Tensor:
    """``W[h, m, n]`` of pair masses ``[B, H, S, T]``."""
    live = int(call.extent.key_count[row])
    rows, columns = math.ceil(call.query_len / BLOCK), math.ceil(live / BLOCK)
    total = torch.zeros(call.heads, rows, columns, dtype=torch.float64)
    for m in range(rows):
        for n in range(columns):
            tile = mass[row, :, m * BLOCK : (m + 1) * BLOCK, n * BLOCK : min(live, (n + 1) * BLOCK)]
            total[:, m, n] = tile.sum(dim=(1, 2))
    return total


def naive(call: AttentionCall, mass: Tensor, sparsity: float, *, adaptive: bool, bar: float = 0.8) -> list[Tensor]:
    """Blocks that are kept, bool ``[H, M, N]`` of each batch row."""
    kept = []
    for row, before in enumerate(layout_of(call).before):
        total = block_masses(call, mass, row)
        live = int(call.extent.key_count[row])

        def is_text(block: int, end: int, before: int = before) -> bool:
            tokens = range(block * BLOCK, min(end, (block + 1) * BLOCK))
            return any(not before <= token < before + PATCHES for token in tokens)

        text_rows = [m for m in range(total.shape[1]) if is_text(m, call.query_len)]
        text_columns = [n for n in range(total.shape[2]) if is_text(n, live)]
        free = [n for n in range(total.shape[2]) if n not in text_columns]

        def choose(head: int, s: float, total: Tensor = total, free: list[int] = free) -> Tensor:
            mask = torch.zeros(total.shape[1:], dtype=torch.bool)
            budget = max(1, math.ceil(round((1 - s) * len(free), 9)))
            for m in range(total.shape[1]):
                scores = total[head, m].tolist()
                best = sorted(free, key=lambda place, of=scores: (-of[place], place))[:budget]
                mask[m, best] = True
            return mask

        shares = [sparsity] * call.heads
        if adaptive:
            patches = [m for m in range(total.shape[1]) if m not in text_rows]
            recalls = []
            for head in range(call.heads):
                mask = choose(head, sparsity)
                mask[:, text_columns] = True
                own = total[head][patches]
                recalls.append(float((own * mask[patches]).sum() / own.sum()))
            n = min(sum(recall > bar for recall in recalls), call.heads // 2)
            ranked = sorted(range(call.heads), key=lambda head: (-recalls[head], head))
            for head in ranked[:n]:
                shares[head] = (1 + sparsity) / 2
            for head in ranked[call.heads - n :]:
                shares[head] = (3 * sparsity - 1) / 2
        masks = torch.stack([choose(head, shares[head]) for head in range(call.heads)])
        masks[:, text_rows] = True
        masks[:, :, text_columns] = True
        for m in range(total.shape[1]):
            masks[:, m, min(m, total.shape[2] - 1)] = True
        kept.append(masks)
    return kept


def check(plan: Tensor, expected: list[Tensor]) -> None:
    for row, masks in enumerate(expected):
        assert torch.equal(plan[row, :, :, : masks.shape[2]], masks)
        assert not plan[row, :, :, masks.shape[2] :].any()


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("sparsity", [0.4, 0.6, 0.8])
def test_it_plans_as_the_formulas_say(sparsity: float, adaptive: bool) -> None:
    call = clip(scale=0.9)
    plan = AdaSpa(sparsity, block=BLOCK, adaptive=adaptive, bar=0.5).plan(call)
    check(plan.block_mask(), naive(call, weights(call), sparsity, adaptive=adaptive, bar=0.5))


def test_mass_is_an_exponential_and_rows_sum_to_their_tokens() -> None:
    """Algorithms 1 and 2 of the paper print Log for Exp."""
    from gossamer.oracle import block_mass, log_sum_exp
    from gossamer.plan import Grid

    call = clip()
    mass = block_mass(call, log_sum_exp(call), Grid(call.extent, BLOCK, BLOCK))
    rows = torch.full((mass.shape[2],), float(BLOCK))
    rows[-1] = call.query_len - (mass.shape[2] - 1) * BLOCK
    torch.testing.assert_close(mass.sum(dim=-1), rows.expand(2, 4, -1), atol=1e-3, rtol=1e-4)


@pytest.mark.parametrize("bar", [0.0, 0.2])
def test_at_most_half_of_the_heads_are_good(bar: float) -> None:
    """All are above the bar: best and worst would overlap. The mean of what is kept stays, but for rounding."""
    call = clip(before=(0,), after=(0,), dead=0, heads=5, groups=5)
    adapted, uniform = (AdaSpa(0.5, block=BLOCK, adaptive=a, bar=bar) for a in (True, False))
    check(adapted.plan(call).block_mask(), naive(call, weights(call), 0.5, adaptive=True, bar=bar))
    kept = adapted.plan(clip(before=(0,), after=(0,), dead=0, heads=5, groups=5)).block_mask().sum(dim=(0, 2, 3))
    # 12 key blocks: 3, 6 and 9 of them, and here and there the block of the queries themselves.
    assert (kept < 12 * 5).sum() == 2
    assert (kept >= 12 * 9).sum() == 2
    assert len(uniform.plan(clip(before=(0,), after=(0,), dead=0, heads=5, groups=5)).block_mask().shape) == 4


def test_steps_before_the_first_search_are_dense_and_so_is_it() -> None:
    method = AdaSpa(0.6, search=(2, 5), block=BLOCK)
    for step in range(2):
        assert method.lacks(clip(step=step)) == "step 2 or later"
    call = clip(step=2)
    assert method.lacks(call) is None
    assert method.plan(call).density() == 1.0
    later = method.plan(clip(step=3, seed=1, state=call.state))
    check(later.block_mask(), naive(call, weights(call), 0.6, adaptive=True))  # what the dense step had


@pytest.mark.parametrize("cached", [True, False])
def test_later_searches_use_the_lse_of_the_first(cached: bool) -> None:
    method = AdaSpa(0.6, search=(2, 5), block=BLOCK, cached=cached)
    first = clip(step=2)
    method.plan(first)
    old = method.plan(clip(step=4, seed=1, state=first.state))
    call = clip(step=5, seed=1, sharp=3.0, state=first.state)
    new = method.plan(call)
    assert not torch.equal(new.block_mask(), old.block_mask())
    keys = call.k.double().repeat_interleave(2, dim=1)
    logits = (call.q.double() @ keys.transpose(-1, -2)) * call.scale
    before = first.k.double().repeat_interleave(2, dim=1)
    of_first = (first.q.double() @ before.transpose(-1, -2)) * first.scale
    dead = ~call.extent.live_keys(call.key_len)[:, None, None]
    lse = (of_first if cached else logits).masked_fill(dead, float("-inf")).logsumexp(dim=-1, keepdim=True)
    check(new.block_mask(), naive(call, (logits - lse).exp(), 0.6, adaptive=True))
    assert method.plan(clip(step=6, seed=2, state=first.state)) is new


def test_the_step_that_searches_first_is_dense_however_often_it_runs() -> None:
    """A gradient's checkpoint runs a layer again, as does the second stage of a step."""
    method = AdaSpa(0.6, search=(2, 5), block=BLOCK)
    call = clip(step=2)
    assert [method.plan(call).density() for _ in range(2)] == [1.0, 1.0]
    assert method.plan(clip(step=3, state=call.state)).density() < 1


@pytest.mark.parametrize(("cached", "kept"), [(True, [True, False]), (False, [False, False])])
def test_the_lse_is_kept_for_as_long_as_a_search_is_to_come(cached: bool, kept: list[bool]) -> None:
    method, state = AdaSpa(0.6, search=(2, 5), block=BLOCK, cached=cached), [{}, {}]
    found = []
    for step in (2, 5):
        method.plan(clip(step=step, state=state))
        found.append([one.extra is not None for row in state for one in row.values()])
    assert found == [[has] * 2 for has in kept]


def test_a_search_that_was_missed_is_made_up_for() -> None:
    method = AdaSpa(0.6, search=(2, 5), block=BLOCK)
    first = clip(step=3)
    plan = method.plan(first)  # enabled in the middle of a sampling
    assert plan.density() < 1
    assert method.plan(clip(step=7, seed=1, state=first.state)) is not plan


def test_it_finds_the_blocks_that_were_planted() -> None:
    """Each query block has its mass in one other key block; heads have others."""
    patches = 12 * BLOCK
    call = clip(before=(0,), after=(0,), grid=(12, 4, 4), dead=0, heads=2, groups=2)
    codes = torch.nn.functional.one_hot(torch.arange(patches) // BLOCK, 16).double() * 8
    k = torch.stack([codes, codes.roll(BLOCK * 5, dims=0)])[None].float()
    call = AttentionCall(codes.expand(1, 2, -1, -1).float(), k, k, call.extent, step=call.step, state=[{}],
                         layout=TokenLayout((0,), 12, 4, 4))  # fmt: skip
    mask = AdaSpa(0.9, block=BLOCK, adaptive=False).plan(call).block_mask()[0]
    block = torch.arange(12)
    assert mask[0, block, block].all()
    assert mask[1, block, (block + 5) % 12].all()
    assert mask.sum() <= 12 * 2 + 12 * 3


def test_heads_are_ranked_among_all_of_a_layer_also_where_others_have_other_methods() -> None:
    method, other = AdaSpa(0.6, block=BLOCK, bar=0.5), SparseVDiT("diagonal", 0.2, BLOCK)
    mixed = PerHead(((method, other, method, other),)).plan(clip()).to_mask()
    alone, others = method.plan(clip()).to_mask(), other.plan(clip()).to_mask()
    assert torch.equal(mixed[:, [0, 2]], alone[:, [0, 2]])
    assert torch.equal(mixed[:, [1, 3]], others)


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="sparsity must be 0, or at least 1/3 where heads adapt"):
        AdaSpa(0.2)
    AdaSpa(0.2, adaptive=False)
    wrong: list[Any] = [(), (3, 3), (5, 2), (-1,), (1.5,)]
    for search in wrong:
        with pytest.raises(ValueError, match="search must be steps from 0 on, ascending"):
            AdaSpa(search=search)
