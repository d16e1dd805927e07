"""Auto against its formula, key by key and trial by trial in Python numbers; its knob."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import rows_of
from torch import Tensor

from gossamer import AttentionCall, backends
from gossamer.methods import Auto, XAttention
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")

SMALL = Auto(error=0.15, sink=3, window=5, group=3, block=8, threshold=0.6, fallback=0.8, rows=5)
ATTEMPTS = ("blocks", "keys", "more blocks", "everything")


def naive_keys(call: AttentionCall, b: int, h: int, method: Auto) -> list[tuple[list[int], set[int]]]:
    """Of each group its query positions and the keys that are chosen for all of them."""
    row, block, found = rows_of(call.extent)[b], method.block, []
    q = {i: call.q[b, h, i - row.query_start].double() for i in row.positions()}
    k = {j - row.key_start: call.k[b, h // call.share, j].double() for j in row.live_keys()}
    first = max(row.query_start, 0) // block
    groups: dict[int, list[int]] = {}
    for i in q:
        groups.setdefault((i // block - first) // method.group, []).append(i)
    for queries in groups.values():
        largest = dict.fromkeys(k, 0.0)
        for m in {i // block for i in queries}:
            rows = [i for i in queries if i // block == m]
            seen = [j for j in k if any(row.allows(i, j) for i in rows)]
            if seen:
                mean = torch.stack([q[i] for i in rows]).mean(0)
                shares = torch.tensor([call.scale * float(mean @ k[j]) for j in seen]).softmax(0).tolist()
                largest |= {j: max(largest[j], share) for j, share in zip(seen, shares, strict=True)}
        counted = {j: share for j, share in largest.items() if j >= method.sink}
        limit, before, chosen = (1 - method.left_out) * sum(counted.values()), 0.0, set()
        for j in sorted(counted, key=lambda j: (-counted[j], j)):
            if before >= limit:
                break
            chosen.add(j)
            before += counted[j]
        found.append((queries, chosen))
    return found


def naive_pairs(call: AttentionCall, b: int, h: int, method: Auto, attempt: str) -> dict[int, set[int]]:
    """Keys of each query position under one attempt, all heads having it."""
    row = rows_of(call.extent)[b]
    seen = {
        i: {j - row.key_start for j in row.live_keys() if row.allows(i, j - row.key_start)} for i in row.positions()
    }
    if attempt == "everything":
        return seen
    bands = {i: {j for j in seen[i] if abs(i - j) < method.window} for i in seen}
    if attempt == "keys":
        of_query = {i: chosen for queries, chosen in naive_keys(call, b, h, method) for i in queries}
        return {i: bands[i] | {j for j in seen[i] if j < method.sink or j in of_query[i]} for i in seen}
    # Antidiagonals have their own written-out test.
    threshold = method.threshold if attempt == "blocks" else method.fallback
    plan = XAttention(threshold, stride=math.gcd(16, method.block), block=method.block).plan(call)
    mask = plan.to_mask()[b, h]
    return {i: bands[i] | {j for j in seen[i] if bool(mask[i - row.query_start, j + row.key_start])} for i in seen}


def output(call: AttentionCall, b: int, h: int, i: int, keys: set[int]) -> Tensor:
    """Of the query at a position over some keys."""
    row = rows_of(call.extent)[b]
    if not keys:
        return torch.zeros(call.values.shape[-1], dtype=torch.float64)
    slots = [j + row.key_start for j in sorted(keys)]
    k, v = (x[b, h // call.share, slots].double() for x in (call.k, call.values))
    scores = call.scale * (k @ call.q[b, h, i - row.query_start].double())
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    rest = scores if call.sinks is None else torch.cat([scores, call.sinks[h : h + 1].double()])
    return torch.exp(scores - rest.logsumexp(0)) @ v


def naive(call: AttentionCall, b: int, h: int, method: Auto) -> tuple[str, dict[int, set[int]]]:
    """The first attempt whose outputs for the tried rows are near the exact ones, and its pairs."""
    live = list(rows_of(call.extent)[b].positions())
    tried = [live[(2 * n + 1) * len(live) // (2 * method.rows)] for n in range(method.rows)] if live else []
    exact_keys = naive_pairs(call, b, h, method, "everything")
    exact = [output(call, b, h, i, exact_keys[i]) for i in tried]
    for attempt in ATTEMPTS:
        pairs = naive_pairs(call, b, h, method, attempt)
        wrong = sum(
            float((output(call, b, h, i, pairs[i]) - o).square().sum()) for i, o in zip(tried, exact, strict=True)
        )
        if wrong**0.5 <= method.error * sum(float(o.square().sum()) for o in exact) ** 0.5:
            return attempt, pairs
    raise AssertionError("everything is exact")


def assert_as_written(call: AttentionCall, method: Auto) -> set[str]:
    mask, met = method.plan(call).to_mask(), set()
    for b, row in enumerate(rows_of(call.extent)):
        for h in range(call.heads):
            attempt, pairs = naive(call, b, h, method)
            met.add(attempt)
            for i, keys in pairs.items():
                got = {j - row.key_start for j in mask[b, h, i - row.query_start].nonzero().flatten().tolist()}
                assert got == keys, (attempt, b, h, i)
    return met


def drawn(situation: str = "no padding", heads: int = 4, groups: int = 2) -> AttentionCall:
    """Heads of different sharpness, so that each attempt is some head's; the last attends a past key of its own."""
    call = make_call(situation, length=130, heads=heads, groups=groups, dim=8)
    sharp = torch.linspace(0.05, 6.0, heads)[:, None, None].to(call.q)
    return replace(call, q=call.q * sharp)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str) -> None:
    assert_as_written(drawn(situation), SMALL)


def test_each_attempt_is_met() -> None:
    met = set()
    for error in (0.02, 0.1, 0.3, 0.7):
        met |= assert_as_written(drawn(heads=8, groups=4), replace(SMALL, error=error))
    assert met == set(ATTEMPTS)


@pytest.mark.parametrize(
    "fields",
    [
        {"error": 0.4},
        {"sink": 20},
        {"window": 30},
        {"group": 2},
        {"block": 6},
        {"threshold": 0.9},
        {"fallback": 0.99},
        {"rows": 1},
    ],
)
def test_every_field_counts(fields: dict) -> None:
    call, method = drawn(heads=8, groups=4), replace(SMALL, **fields)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), SMALL.plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.3, 0.05, 1.0])
def test_any_scale_will_do(scale: float) -> None:
    assert_as_written(replace(drawn("padded chunk", heads=2, groups=1), scale=scale), SMALL)


def test_rows_of_a_batch_choose_for_themselves() -> None:
    calls = [replace(drawn(heads=2, groups=1), q=drawn(heads=2, groups=1).q * factor) for factor in (0.02, 1.0)]
    masks = [SMALL.plan(call).to_mask() for call in calls]
    q, k, v = (torch.cat([getattr(call, name) for call in calls]) for name in ("q", "k", "v"))
    both = SMALL.plan(AttentionCall(q, k, v)).to_mask()
    assert torch.equal(both, torch.cat(masks))
    assert not torch.equal(masks[0], masks[1])


def test_no_error_is_dense() -> None:
    assert replace(SMALL, error=0.0).plan(drawn("left padding")).density() == 1.0
    assert replace(SMALL, error=1.0).left_out == 1.0


def test_less_error_is_more_pairs_and_less_error() -> None:
    call = drawn(heads=8, groups=4)
    dense, _ = backends.attend(call, replace(SMALL, error=0.0).plan(call))
    found = []
    for error in (0.6, 0.3, 0.1, 0.02):
        plan = replace(SMALL, error=error, rows=32).plan(call)
        out, _ = backends.attend(call, plan)
        found.append((plan.density(), float((out - dense).norm() / dense.norm())))
    assert found == sorted(found, key=lambda pair: pair[0])
    assert found[-1][1] < min(0.1, 0.5 * found[0][1])


def test_values_are_needed() -> None:
    call = replace(drawn(), v=None)
    assert Auto().lacks(call) == "values"
    with pytest.raises(ValueError, match="made for planning"):
        Auto().plan(call)


@pytest.mark.parametrize("error", [-0.1, 1.5, float("nan")])
def test_errors_are_shares(error: float) -> None:
    with pytest.raises(ValueError, match=r"auto\.error must lie in \[0, 1\]"):
        Auto(error)
