"""XAttention against its formula, cell by cell in Python numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row, rows_of

from gossamer import AttentionCall, methods
from gossamer.methods import PerHead, XAttention
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")

Method = XAttention


def naive_mass(call: AttentionCall, row: Row, b: int, h: int, stride: int, block: int) -> dict[int, dict[int, float]]:
    """Scores of the key blocks that each query block sees, by their numbers."""
    scores: dict[int, dict[int, float]] = {}
    queries, keys = row.positions(), [j - row.key_start for j in row.live_keys()]

    def product(t: int, u: int) -> float:
        total = 0.0
        for s in range(stride):
            i, j = t * stride + stride - 1 - s, u * stride + s
            if i in queries and j in keys:
                q = call.q[b, h, i - row.query_start].double()
                total += float(q @ call.k[b, h // call.share, j + row.key_start].double())
        return total * call.scale / stride

    for t in sorted({i // stride for i in queries}):
        mine = [i for i in queries if i // stride == t]
        seen = [
            u
            for u in sorted({j // stride for j in keys})
            if any(row.allows(i, j) for i in mine for j in keys if j // stride == u)
        ]
        weights = {u: math.exp(product(t, u)) for u in seen}
        cells = scores.setdefault(t * stride // block, {})
        for u, weight in weights.items():
            n = u * stride // block
            cells[n] = cells.get(n, 0.0) + weight / sum(weights.values())
    return scores


def naive_blocks(scores: dict[int, float], own: set[int], threshold: float) -> set[int]:
    """The first block and the own ones, then the best until the share is held."""
    kept = {n for n in scores if n == 0 or n in own}
    held, total = sum(scores[n] for n in kept), sum(scores.values())
    for n in sorted(scores.keys() - kept, key=lambda n: (-scores[n], n)):
        if held >= threshold * total:
            break
        kept.add(n)
        held += scores[n]
    return kept


def assert_as_written(call: AttentionCall, method: XAttention) -> None:
    plan = method.plan(call)
    mask = plan.block_mask()
    for b, row in enumerate(rows_of(call.extent)):
        first = int(plan.grid.first_block[b])
        keys = range(-(-row.key_count // method.block))
        for h in range(call.heads):
            scores = naive_mass(call, row, b, h, method.stride, method.block)
            for m in range(mask.shape[2]):
                own = {min(first + m, max(keys, default=0))}
                expected = naive_blocks(scores.get(first + m, {}), own, method.threshold)
                assert set(mask[b, h, m].nonzero().flatten().tolist()) == expected, (b, h, m)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str) -> None:
    call = make_call(situation, length=70, heads=2, groups=1, dim=8)
    assert_as_written(call, XAttention(0.6, stride=4, block=8))


@pytest.mark.parametrize("method", [Method(0.3, 4, 16), Method(0.8, 4, 16), Method(0.6, 8, 16), Method(0.6, 4, 12)])
def test_every_field_counts(method: XAttention) -> None:
    call = make_call("no padding", length=120, heads=2, groups=2, dim=8)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), XAttention(0.6, 4, 16).plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.3, 0.05, 1.4])
def test_any_scale_will_do(scale: float) -> None:
    call = make_call("padded chunk", length=70, heads=2, groups=1, dim=8)
    assert_as_written(replace(call, scale=scale), XAttention(0.6, 4, 8))


def planted(length: int, column: int, distance: int) -> AttentionCall:
    """One head whose queries all attend one column, and another whose queries attend at one distance."""
    q, k = torch.zeros(1, 2, length, length), torch.zeros(1, 2, length, length)
    place = torch.arange(length)
    q[0, 0, :, 0] = k[0, 0, column, 0] = 12.0
    k[0, 1, place, place] = 12.0
    q[0, 1, place[distance:], place[:-distance]] = 12.0
    return AttentionCall(q, k, scale=1.0)


def test_it_finds_a_column_and_a_slash() -> None:
    call = planted(256, column=70, distance=99)
    mask = XAttention(0.9, stride=8, block=16).plan(call).block_mask()[0]
    for m in range(7, 16):  # 7: the first whose queries all have a key at that distance
        column, slash = (set(mask[h, m].nonzero().flatten().tolist()) for h in range(2))
        assert column == {0, 70 // 16, m}
        assert slash == {0, (16 * m - 99) // 16, (16 * m + 15 - 99) // 16, m}


def test_an_even_stride_does_not_meet_slashes_at_even_distances() -> None:
    """The antidiagonal of a cell holds distances of one parity: the formula's own blind spot."""
    seen = {distance: planted(256, 70, distance) for distance in (98, 99)}
    density = {d: XAttention(0.9, stride=8, block=16).plan(call).density() for d, call in seen.items()}
    assert density[98] > 1.5 * density[99]


def test_the_first_column_is_kept_in_every_row() -> None:
    """The authors' code has an option for it that sets a row instead."""
    call = planted(256, column=70, distance=99)
    assert bool(XAttention(0.0, stride=8, block=16).plan(call).block_mask()[..., 0].all())


def test_a_threshold_of_one_leaves_out_only_what_has_no_mass() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=8)
    assert XAttention(1.0, stride=4, block=16).plan(call).density() == 1.0
    far = replace(call, q=call.q * 1e4)
    assert XAttention(1.0, stride=4, block=16).plan(far).density() < 1.0


def test_heads_have_thresholds_of_their_own() -> None:
    call = make_call("left padding", length=300, heads=4, groups=2, dim=8)
    chosen = [XAttention(threshold, stride=4, block=16) for threshold in (0.2, 0.9, 0.6, 0.9)]
    mask = PerHead((chosen,)).plan(call).to_mask()
    for head, method in enumerate(chosen):
        assert torch.equal(mask[:, head], method.plan(call).to_mask()[:, head])


def test_a_stride_that_does_not_divide_the_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"xattention\.stride must divide block, got 16 for blocks of 24 tokens"):
        methods.create("xattention", block=24)
    with pytest.raises(ValueError, match=r"xattention\.stride must be at least 1, got 0"):
        XAttention(stride=0)
    with pytest.raises(ValueError, match=r"xattention\.threshold must lie in \[0, 1\], got 1.2"):
        XAttention(1.2)
