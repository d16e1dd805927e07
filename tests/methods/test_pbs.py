"""PBS-Attn against its formula, token by token in Python numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row, rows_of
from torch import Tensor

from gossamer import AttentionCall, methods
from gossamer.methods import PBS, PerHead
from gossamer.plan.count import count_pairs
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")
SMALL = PBS(0.5, segment=16, block=8)


def probe(call: AttentionCall, row: Row, b: int, heads: list[int], last: int) -> dict[int, float]:
    """Mean mass of each key position under the last queries and some heads."""
    keys = [j - row.key_start for j in row.live_keys()]
    mass = dict.fromkeys(keys, 0.0)
    for h in heads:
        for i in row.positions()[-last:]:
            seen = [j for j in keys if row.allows(i, j)]
            if seen:
                k = call.k[b, h // call.share, [j + row.key_start for j in seen]].double()
                weights = (k @ call.q[b, h, i - row.query_start].double() * call.scale).softmax(-1)
                for j, weight in zip(seen, weights.tolist(), strict=True):
                    mass[j] += weight
    return mass


def sorted_keys(mass: dict[int, float], segment: int) -> list[int]:
    order: list[int] = []
    for begin in range(0, len(mass), segment):
        own = range(begin, min(begin + segment, len(mass)))
        order += sorted(own, key=lambda j: (-mass[j], j)) if len(own) == segment else own
    return order


def mean(x: Tensor, tokens: list[int]) -> Tensor:
    return torch.stack([x[t].double() for t in tokens]).mean(0)


def cells(
    call: AttentionCall, row: Row, b: int, h: int, order: list[int], method: PBS, m: int, outside: set[int]
) -> dict[int, float]:
    """Antidiagonal mass of the blocks outside the own segment, of keys by rank: any of a segment that is seen."""
    row = row if row.limit is None else replace(row, limit=row.limit + method.segment - 1)
    s, found = method.stride, dict.fromkeys(outside, 0.0)
    first = m * method.block // s
    for t in range(first, first + method.block // s):
        mine = [i for i in row.positions() if i // s == t]
        logits = {}
        for u in range(-(-len(order) // s)):
            if any(row.allows(i, r) for i in mine for r in range(u * s, min(u * s + s, len(order)))):
                total = 0.0
                for n in range(s):
                    i, r = t * s + s - 1 - n, u * s + n
                    if i in mine and r < len(order):
                        k = call.k[b, h // call.share, order[r] + row.key_start].double()
                        total += float(call.q[b, h, i - row.query_start].double() @ k)
                logits[u] = total * call.scale / s
        norm = sum(math.exp(x) for x in logits.values())
        for u, x in logits.items():
            if u * s // method.block in found:
                found[u * s // method.block] += math.exp(x) / norm
    total = sum(found.values())
    return {n: x / total for n, x in found.items()} if total else found


def shares(
    call: AttentionCall, row: Row, b: int, h: int, order: list[int], method: PBS, m: int, outside: set[int]
) -> dict[int, float]:
    """Of the blocks outside the own segment, by means."""
    if method.plus:
        return cells(call, row, b, h, order, method, m, outside)
    query = mean(call.q[b, h], [i - row.query_start for i in row.positions() if i // method.block == m])
    logits = {}
    for n in outside:
        keys = order[n * method.block : (n + 1) * method.block]
        key = mean(call.k[b, h // call.share], [j + row.key_start for j in keys])
        logits[n] = call.scale * float(query @ key)
    norm = sum(math.exp(x) for x in logits.values())
    return {n: math.exp(x) / norm for n, x in logits.items()}


def naive(call: AttentionCall, b: int, heads: list[int], method: PBS) -> dict[int, set[int]]:
    """Key positions that each query attends, for the query heads that share a head of the plan."""
    row, attended = rows_of(call.extent)[b], {}
    order = sorted_keys(probe(call, row, b, heads, method.block), method.segment)
    keys = range(-(-row.key_count // method.block))
    segment_of = {n: n * method.block // method.segment for n in keys}
    first = order.index(0) // method.block if order else 0
    for m in sorted({i // method.block for i in row.positions()}):
        queries = [i for i in row.positions() if i // method.block == m]
        own = min(m, max(keys, default=0)) * method.block // method.segment
        segments = {j // method.segment for j in range(row.key_count) if any(row.allows(i, j) for i in queries)}
        outside = {n for n in keys if segment_of[n] in segments and segment_of[n] != own}
        mass = dict.fromkeys(outside, 0.0)
        for h in heads:
            for n, x in shares(call, row, b, h, order, method, m, outside).items():
                mass[n] += x / len(heads)
        chosen, held = {n for n in keys if segment_of[n] == own}, 0.0
        for n in sorted(outside, key=lambda n: (-mass[n], n)):
            if held >= method.threshold * sum(mass.values()):
                break
            chosen.add(n)
            held += mass[n]
        if segment_of.get(first) in segments:
            chosen.add(first)
        for i in queries:
            attended[i] = {order[r] for r in range(len(order)) if r // method.block in chosen}
            attended[i] = {j for j in attended[i] if row.allows(i, j)}
    return attended


def assert_as_written(call: AttentionCall, method: PBS) -> None:
    plan = method.plan(call)
    assert plan.heads == (call.groups if method.shared else call.heads)
    mask, share = plan.to_mask(), call.heads // plan.heads
    for b, row in enumerate(rows_of(call.extent)):
        for head in range(plan.heads):
            for i, expected in naive(call, b, list(range(head * share, (head + 1) * share)), method).items():
                got = {j - row.key_start for j in mask[b, head, i - row.query_start].nonzero().flatten().tolist()}
                assert got == expected, (b, head, i)
    assert torch.equal(count_pairs(plan), mask.sum(dim=(2, 3)))


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str, shared: bool) -> None:
    assert_as_written(make_call(situation, length=75, heads=4, groups=2, dim=8), replace(SMALL, shared=shared))


@pytest.mark.parametrize("situation", ["no padding", "padded chunk", "model window", "bidirectional"])
def test_plans_with_antidiagonals_are_those_of_the_formula(situation: str) -> None:
    method = replace(SMALL, plus=True, stride=4)
    assert_as_written(make_call(situation, length=75, heads=2, groups=1, dim=8), method)


@pytest.mark.parametrize(
    "fields",
    [{"threshold": 0.8}, {"segment": 8}, {"block": 16}, {"plus": True, "stride": 4}, {"plus": True, "stride": 8}],
)
def test_every_field_counts(fields: dict) -> None:
    call, method = make_call("no padding", length=75, heads=2, groups=1, dim=8), replace(SMALL, **fields)
    assert_as_written(call, method)
    others = [SMALL] + ([replace(method, stride=2)] if method.plus else [])
    for other in others:
        assert not torch.equal(method.plan(call).to_mask(), other.plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.3, 0.05, 1.0])
def test_any_scale_will_do(scale: float) -> None:
    assert_as_written(replace(make_call("padded chunk", length=75, heads=2, groups=1, dim=8), scale=scale), SMALL)


def test_hot_keys_share_a_block() -> None:
    """One in each block of a segment: sorted, one block in each segment holds them all."""
    length = 128
    q, k = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    q[..., 0], k[0, 0, ::8, 0] = 3.0, 3.0
    call = AttentionCall(q, k, scale=1.0)
    plan = PBS(0.9, segment=32, block=8).plan(call)
    mask = plan.to_mask()[0, 0]
    hot = torch.arange(0, length, 8)
    assert bool(mask[96:, hot[:12]].all())
    assert plan.block_mask()[0, 0, 12].nonzero().flatten().tolist() == [0, 4, 8, 12, 13, 14, 15]
    assert PBS(0.9, segment=8, block=8).plan(call).density() > plan.density()  # one block a segment: nothing to sort


def test_the_probe_is_causal_inside_the_last_block() -> None:
    """A key that no query but the last may attend is not taken for one that all attend."""
    length = 64
    q, k = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    q[..., 0], k[0, 0, 63, 0], k[0, 0, 50, 0] = 2.0, 3.0, 2.5
    plan = PBS(0.9, segment=16, block=8).plan(AttentionCall(q, k, scale=1.0))
    assert plan.k_order is not None
    assert plan.k_order[0, 0, 48:50].tolist() == [50, 63]


def test_the_mean_of_a_short_block_is_of_the_tokens_that_there_are() -> None:
    length = 33  # one query in the last block
    q, k = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    q[0, 0, -1, 0], k[0, 0, 16:24, 0] = 2.0, 1.5
    call = AttentionCall(q, k, scale=1.0)
    # Divided by the block's size, the logit would be an eighth of 3, and no block of three hold nine tenths.
    chosen = PBS(0.85, segment=8, block=8).plan(call).block_mask()[0, 0, 4]
    assert chosen.nonzero().flatten().tolist() == [0, 2, 4]


def test_all_that_there_is_is_never_too_little() -> None:
    """In fp32 shares may sum to less than 1; the authors' code then keeps none."""
    call = make_call("no padding", length=700, heads=2, groups=1, dim=8)
    assert PBS(1.0, segment=64, block=32).plan(call).density() == 1.0


def test_the_output_is_the_same_in_any_order() -> None:
    call = make_call("left padding", length=75, heads=2, groups=1, dim=8)
    plan = PBS(1.0, 16, 8).plan(call)
    assert plan.k_order is not None
    assert not torch.equal(plan.k_order[0, 0], torch.arange(75))
    assert plan.density() == 1.0


def test_an_order_cannot_be_merged() -> None:
    call = make_call("no padding", length=75, heads=2, groups=1, dim=8)
    with pytest.raises(ValueError, match="without an order"):
        PerHead(((SMALL, replace(SMALL, threshold=0.9)),)).plan(call)


def test_fields_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match="block one of stride where plus is set, got 200, 128"):
        PBS(segment=200)
    with pytest.raises(ValueError, match="got 256, 128 and 24"):
        PBS(plus=True, stride=24)
    assert PBS(stride=24).stride == 24
    with pytest.raises(ValueError, match=r"pbs\.threshold must lie in \[0, 1\], got 2"):
        PBS(2)
    with pytest.raises(TypeError, match=r"pbs\.plus must be true or false, got 1"):
        methods.create("pbs", plus=1)
    for field in ("segment", "block", "stride"):
        with pytest.raises(ValueError, match=rf"pbs\.{field} must be at least 1, got 0"):
            methods.create("pbs", **{field: 0})
