"""FlexPrefill against its formula, in Python numbers: the probe, the switch, budgets and both patterns."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row, rows_of
from torch import Tensor

from gossamer import AttentionCall, methods
from gossamer.methods import FlexPrefill, PerHead
from gossamer.scores import probed_blocks
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")

Method = FlexPrefill
SMALL = FlexPrefill(0.43, 0.2, min_budget=16, block=16)


class Head:
    """One query head of a batch row, in positions."""

    def __init__(self, call: AttentionCall, b: int, h: int) -> None:
        self.row: Row = rows_of(call.extent)[b]
        self.q = {i: call.q[b, h, i - self.row.query_start].double() for i in self.row.positions()}
        keys = call.k[b, h // call.share].double()
        self.k = {j - self.row.key_start: keys[j] for j in self.row.live_keys()}
        self.scale = call.scale

    def softmax(self, query: Tensor, keys: dict[int, Tensor]) -> dict[int, float]:
        weights = {n: math.exp(self.scale * float(query @ key)) for n, key in keys.items()}
        return {n: weight / sum(weights.values()) for n, weight in weights.items()}

    def probe(self, last: int) -> tuple[dict[int, float], dict[int, float]]:
        """Mass by key position and by distance of the last queries, over their number."""
        columns, distances = dict.fromkeys(self.k, 0.0), dict.fromkeys(self.k, 0.0)
        probing = self.row.positions()[-last:]
        for i in probing:
            seen = {j: key for j, key in self.k.items() if self.row.allows(i, j)}
            for j, weight in self.softmax(self.q[i], seen).items():
                columns[j] += weight / len(probing)
                if abs(i - j) in distances:
                    distances[abs(i - j)] += weight / len(probing)
        return columns, distances

    def means(self, tokens: dict[int, Tensor], block: int) -> dict[int, Tensor]:
        numbers = sorted({n // block for n in tokens})
        return {n: torch.stack([x for i, x in tokens.items() if i // block == n]).mean(0) for n in numbers}

    def seen(self, queries: list[int], block: int) -> set[int]:
        return {j // block for i in queries for j in self.k if self.row.allows(i, j)}


def by_block(mass: dict[int, float], block: int, before: int = 0) -> dict[int, float]:
    found: dict[int, float] = {}
    for n, x in mass.items():
        found[(n + before) // block] = found.get((n + before) // block, 0.0) + x
    return found


def divergence(p: dict[int, float], q: dict[int, float]) -> float:
    total = 0.0
    for n in p:
        middle = (p[n] + q[n]) / 2
        total += sum(x / 2 * math.log(x / middle) for x in (p[n], q[n]) if x > 0)
    return math.sqrt(max(total, 0.0))


def covered(mass: dict[int, float], share: float) -> int:
    """How many of the best hold at most the share of all."""
    count, held = 0, 0.0
    for x in sorted(mass.values(), reverse=True):
        held += x
        if held > share * sum(mass.values()):
            break
        count += 1
    return count


def naive(call: AttentionCall, b: int, h: int, method: FlexPrefill) -> tuple[dict[int, set[int]], bool]:
    """Key blocks of each query block, by their numbers; and whether the head is query-aware."""
    head, block = Head(call, b, h), method.block
    positions = head.row.positions()
    if not positions or not head.k:
        return {}, False
    columns, distances = head.probe(block)
    probing = positions[-block:]
    keys = head.means(head.k, block)
    visible = head.seen(probing, block)
    mean = torch.stack([head.q[i] for i in probing]).mean(0)
    estimated = head.softmax(mean, {n: keys[n] for n in visible})
    vertical = by_block(columns, block)
    aware = divergence({n: vertical[n] for n in visible}, estimated) < method.tau

    def best(blocks: dict[int, float], tokens: dict[int, float]) -> set[int]:
        budget = (covered(tokens, method.gamma) + 1) // block + 1
        budget = 0 if aware else budget
        budget = max(budget, math.ceil(method.min_budget / block))
        budget = min(budget, math.inf if method.max_budget is None else math.ceil(method.max_budget / block))
        order = sorted(blocks, key=lambda n: (n > 0, -blocks[n], n))
        return set(order[: int(min(budget, len(order)))])

    before = -(positions[-1] + 1) % block if method.faithful else 0
    slashes, verticals = best(by_block(distances, block, before), distances), best(vertical, columns)
    if not method.faithful:
        slashes |= {d + 1 for d in slashes}
    rows = {m: [i for i in positions if i // block == m] for m in {i // block for i in positions}}
    seen = {m: head.seen(queries, block) for m, queries in rows.items()}
    chosen = {m: set() for m in rows}
    for m, visible in seen.items():
        own = min(m, max(keys))
        for n in visible:
            distance = m - n if head.row.causal else abs(m - n)
            if n in verticals or distance in slashes or n == own:
                chosen[m].add(n)
    if aware:
        queries = head.means(head.q, block)
        flat = {}
        for m, visible in seen.items():
            if visible:
                flat |= {(m, n): x for n, x in head.softmax(queries[m], {n: keys[n] for n in visible}).items()}
        order = sorted(flat, key=lambda pair: (-flat[pair], pair))
        for m, n in order[: covered(flat, method.gamma)]:
            chosen[m].add(n)
    return chosen, aware


def assert_as_written(call: AttentionCall, method: FlexPrefill) -> set[bool]:
    """Which kinds of heads there were."""
    plan, kinds = method.plan(call), set()
    mask = plan.block_mask()
    for b in range(call.batch):
        first = int(plan.grid.first_block[b])
        for h in range(call.heads):
            expected, aware = naive(call, b, h, method)
            kinds.add(aware)
            for m in range(mask.shape[2]):
                assert set(mask[b, h, m].nonzero().flatten().tolist()) == expected.get(first + m, set()), (b, h, m)
    return kinds


def mixed(situation: str, length: int = 150) -> AttentionCall:
    """Heads that attend evenly, and heads that do not."""
    call = make_call(situation, length=length, heads=4, groups=2, dim=8, seed=3)
    return replace(call, q=call.q * torch.tensor([0.02, 2.0, 4.0, 0.2])[:, None, None], softcap=None)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str) -> None:
    kinds = assert_as_written(mixed(situation), SMALL)
    assert kinds == {False} if situation in ("padded chunk", "model window") else {False, True}


@pytest.mark.parametrize("length", [96, 101, 150])
def test_as_the_authors_have_it(length: int) -> None:
    """Budgets of 128 tokens a block differ; see below."""
    method = replace(SMALL, faithful=True, gamma=0.02, tau=0.4, min_budget=48)
    call = mixed("no padding", length)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), replace(method, faithful=False).plan(call).to_mask())


@pytest.mark.parametrize(
    "fields",
    [
        {"gamma": 0.7},
        {"tau": 0.0},
        {"tau": 1.0},
        {"min_budget": 33},
        {"max_budget": 15},
        {"block": 24},
    ],
)
def test_every_field_counts(fields: dict) -> None:
    call, method = mixed("no padding"), replace(SMALL, **fields)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), SMALL.plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.4, 0.02, 1.1])
def test_any_scale_will_do(scale: float) -> None:
    assert_as_written(replace(mixed("padded chunk"), scale=scale), SMALL)


def slash(length: int, distance: int) -> AttentionCall:
    """Each query attends one key, so many tokens before."""
    place = torch.arange(length)
    q, k = torch.zeros(1, 1, length, length), torch.eye(length)[None, None]
    q[0, 0, place[distance:], place[:-distance]] = 30.0
    return AttentionCall(q, k, scale=1.0)


def kept(call: AttentionCall, method: FlexPrefill, distance: int) -> float:
    """Share of the queries that attend the key of the slash, of those where it lies in no block column."""
    return float(method.plan(call).to_mask()[0, 0].diagonal(-distance)[16:-32].float().mean())


@pytest.mark.parametrize("distance", [40, 47, 55])
def test_a_slash_is_whole_or_half_lost_as_in_the_authors_code(distance: int) -> None:
    call, method = slash(192, distance), FlexPrefill(0.9, 0.0, min_budget=32, block=16)
    assert kept(call, method, distance) == 1.0
    share = (16 - distance % 16) / 16
    assert kept(call, replace(method, faithful=True), distance) == pytest.approx(share, abs=0.1)


def test_the_authors_budgets_are_blocks_of_128() -> None:
    call = mixed("no padding", 300)
    method = FlexPrefill(0.5, 0.0, min_budget=1, block=16)
    narrow = replace(method, faithful=True).plan(call).block_mask()
    assert narrow.sum() < 0.7 * method.plan(call).block_mask().sum()


def test_a_share_of_nothing_is_no_obstacle() -> None:
    """To the authors the distance is then NaN, and the head is never query-aware."""
    call = mixed("no padding")
    k = call.k.clone()
    k[:, :, 16:32] = -400 * call.q[:, ::2, -16:].mean(dim=2, keepdim=True).sign()
    call = replace(call, k=k)
    method = replace(SMALL, tau=1.0)
    exact, by_means = probed_blocks(call, method.plan(call).grid, torch.ones(1, 4, 150), 16)
    assert not bool((by_means == 0).any() and (exact == 0).any())
    assert bool(method._is_aware(exact, by_means).all())
    exact[..., 3] = 0.0
    assert bool(method._is_aware(exact, by_means).all())
    assert not bool(replace(method, faithful=True)._is_aware(exact, by_means).any())


def test_heads_have_shares_of_their_own() -> None:
    call = mixed("left padding")
    chosen = [replace(SMALL, gamma=gamma) for gamma in (0.2, 0.9, 0.6, 0.9)]
    mask = PerHead((chosen,)).plan(call).to_mask()
    for head, method in enumerate(chosen):
        assert torch.equal(mask[:, head], method.plan(call).to_mask()[:, head])


def test_fields_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"flexprefill\.tau must lie in \[0, 1\], got 2"):
        FlexPrefill(tau=2)
    for field in ("min_budget", "max_budget", "block"):
        with pytest.raises(ValueError, match=rf"flexprefill\.{field} must be at least 1, got 0"):
            methods.create("flexprefill", **{field: 0})
    with pytest.raises(TypeError, match=r"flexprefill\.faithful must be true or false, got 1"):
        methods.create("flexprefill", faithful=1)
