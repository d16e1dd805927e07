"""Auto against its formula, key by key in Python numbers; its knob."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from definitions import rows_of

from gossamer import AttentionCall, backends
from gossamer.methods import Auto
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")

SMALL = Auto(error=0.15, sink=3, window=5, group=3, block=8)


def naive(call: AttentionCall, b: int, h: int, method: Auto) -> list[tuple[list[int], set[int]]]:
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


def assert_as_written(call: AttentionCall, method: Auto) -> None:
    mask, chosen_beside_bands = method.plan(call).to_mask(), 0
    for b, row in enumerate(rows_of(call.extent)):
        for h in range(call.heads):
            for queries, chosen in naive(call, b, h, method):
                for i in queries:
                    seen = {j - row.key_start for j in row.live_keys() if row.allows(i, j - row.key_start)}
                    bands = {j for j in seen if j < method.sink or abs(i - j) < method.window}
                    got = {j - row.key_start for j in mask[b, h, i - row.query_start].nonzero().flatten().tolist()}
                    assert got == bands | chosen & seen, (b, h, i)
                    chosen_beside_bands += len(got - bands)
    assert chosen_beside_bands


@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str) -> None:
    assert_as_written(make_call(situation, length=130, heads=2, groups=1, dim=8), SMALL)


@pytest.mark.parametrize("fields", [{"error": 0.05}, {"sink": 20}, {"window": 30}, {"group": 2}, {"block": 6}])
def test_every_field_counts(fields: dict) -> None:
    call, method = make_call("no padding", length=130, heads=2, groups=2, dim=8), replace(SMALL, **fields)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), SMALL.plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.3, 0.05, 1.0])
def test_any_scale_will_do(scale: float) -> None:
    assert_as_written(replace(make_call("padded chunk", length=130, heads=2, groups=1, dim=8), scale=scale), SMALL)


def test_no_error_is_dense_and_any_error_leaves_the_first_keys_and_the_window() -> None:
    call = make_call("left padding", length=130, heads=2, groups=1, dim=8)
    assert replace(SMALL, error=0.0).plan(call).density() == 1.0
    assert replace(SMALL, error=1.0).left_out == 1.0
    plan = replace(SMALL, error=1.0).plan(call)
    assert set(plan.column_indices.tolist()) == set(range(SMALL.sink))


def test_less_error_is_more_keys_and_less_error() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 700, 16, generator=generator) for n in (2, 1, 1))
    call = AttentionCall(3 * q, k, v)
    dense, _ = backends.attend(call, replace(SMALL, error=0.0).plan(call))
    found = []
    for error in (0.3, 0.2, 0.1, 0.05):
        plan = Auto(error, window=16, group=2, block=16).plan(call)
        out, _ = backends.attend(call, plan)
        found.append((plan.density(), float((out - dense).norm() / dense.norm())))
    assert found == sorted(found, key=lambda pair: pair[0])
    assert [error for _, error in found] == sorted((error for _, error in found), reverse=True)
    assert found[-1][1] < 0.5 * found[0][1]


@pytest.mark.parametrize("error", [-0.1, 1.5, float("nan")])
def test_errors_are_shares(error: float) -> None:
    with pytest.raises(ValueError, match=r"auto\.error must lie in \[0, 1\]"):
        Auto(error)
