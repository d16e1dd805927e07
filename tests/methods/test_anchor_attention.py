"""AnchorAttention against its formula, key by key in Python numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from definitions import allowed_pairs, lists_of, rows_of

from gossamer import AttentionCall, Extent, methods
from gossamer.methods import AnchorAttention, PerHead
from gossamer.testing import SITUATIONS, make_call

# Work is cut into as many parts as it can be.
pytestmark = pytest.mark.usefixtures("smallest_constants")

SMALL = AnchorAttention(1.0, step=3, first_blocks=2, block=8)


def naive(call: AttentionCall, b: int, h: int, method: AnchorAttention) -> list[tuple[list[int], set[int], set[int]]]:
    """Of each group its query positions, its dense keys and its stripes."""
    row, block, found = rows_of(call.extent)[b], method.block, []
    q = {i: call.q[b, h, i - row.query_start].double() for i in row.positions()}
    keys = [j - row.key_start for j in row.live_keys()]
    k = {j: call.k[b, h // call.share, j + row.key_start].double() for j in keys}
    first = max(row.query_start, 0) // block  # the block of the first query
    groups: dict[int, list[int]] = {}
    for i in q:
        groups.setdefault((i // block - first) // method.step, []).append(i)
    for group, queries in groups.items():
        begin = (first + group * method.step) * block
        local = set(range(begin, begin + method.step * block))
        dense = {j for j in keys if j < method.first_blocks * block or j in local}
        chosen = set()
        for m in {i // block for i in queries}:
            rows = [i for i in queries if i // block == m]
            tops = []
            for i in rows:
                logits = [call.scale * float(q[i] @ k[j]) for j in dense if row.allows(i, j)]
                tops += [max(logits)] if logits else []
            anchor = sum(tops) / len(tops) if tops else -math.inf
            mean = torch.stack([q[i] for i in rows]).mean(0)
            for j in set(keys) - dense:
                if any(row.allows(i, j) for i in rows) and call.scale * float(mean @ k[j]) >= anchor - method.theta:
                    chosen.add(j)
        found.append((queries, dense, chosen))
    return found


def assert_as_written(call: AttentionCall, method: AnchorAttention) -> None:
    plan = method.plan(call)
    mask, number = plan.to_mask(), 0
    for b, row in enumerate(rows_of(call.extent)):
        for h in range(call.heads):
            for queries, dense, chosen in naive(call, b, h, method):
                number += len(chosen)
                for i in queries:
                    own = {max(row.key_count - 1, 0) // method.block} if i >= row.key_count else set()
                    got = {j - row.key_start for j in mask[b, h, i - row.query_start].nonzero().flatten().tolist()}
                    expected = {
                        j
                        for j in (*(n - row.key_start for n in row.live_keys()),)
                        if row.allows(i, j) and (j in dense or j in chosen or j // method.block in own)
                    }
                    assert got == expected, (b, h, i)
    assert number


@pytest.mark.parametrize("situation", SITUATIONS)
def test_plans_are_those_of_the_formula(situation: str) -> None:
    assert_as_written(make_call(situation, length=130, heads=2, groups=1, dim=8), SMALL)


@pytest.mark.parametrize("fields", [{"theta": 0.2}, {"step": 2}, {"first_blocks": 1}, {"block": 6}])
def test_every_field_counts(fields: dict) -> None:
    call, method = make_call("no padding", length=130, heads=2, groups=2, dim=8), replace(SMALL, **fields)
    assert_as_written(call, method)
    assert not torch.equal(method.plan(call).to_mask(), SMALL.plan(call).to_mask())


@pytest.mark.parametrize("scale", [-0.3, 0.05, 1.0])
def test_any_scale_will_do(scale: float) -> None:
    assert_as_written(replace(make_call("padded chunk", length=130, heads=2, groups=1, dim=8), scale=scale), SMALL)


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [96, 131])
def test_infinite_theta_counts_each_visible_key_once(situation: str, length: int) -> None:
    """Dense regions and stripes share no key and leave none, also at lengths that are no multiple of a group."""
    call = make_call(situation, length=length, heads=2, groups=1, dim=8)
    plan = replace(SMALL, theta=math.inf).plan(call)
    assert plan.density() == 1.0
    blocks = plan.block_mask()
    for b in range(call.batch):
        keys = int(call.extent.key_count[b])
        for h in range(2):
            columns = lists_of(plan.column_indptr, plan.column_indices, 2 * b + h, plan.num_column_groups)
            for m in range(int(plan.grid.row_blocks[b])):
                listed = [j for n in blocks[b, h, m].nonzero().flatten().tolist() for j in range(8 * n, 8 * n + 8)]
                listed = [j for j in listed if j < keys] + columns[m // 3]
                if situation != "cross-attention":  # queries beyond the keys have the last key block besides
                    assert len(listed) == len(set(listed))


def test_the_hole_of_the_release_is_closed() -> None:
    """The last block before a group, where the best key of all queries lies."""
    length, block = 192, 8
    q = torch.zeros(1, 1, length, 4)
    k = torch.zeros(1, 1, length, 4)
    q[..., 0], k[0, 0, 0, 0], k[0, 0, 140, 0] = 4.0, 2.5, 4.0  # the groups have 48 tokens, and the fourth begins at 144
    plan = AnchorAttention(1.0, step=6, first_blocks=1, block=block).plan(AttentionCall(q, k, scale=1.0))
    assert bool(plan.to_mask()[0, 0, 144:, 140].all())
    assert plan.column_mask()[0, 0].nonzero().tolist() == [[3, 140]]


def test_an_anchor_in_the_dense_regions_hides_weaker_keys() -> None:
    length = 96
    q, k = torch.zeros(1, 1, length, 2), torch.zeros(1, 1, length, 2)
    q[..., 0] = 1.0
    k[0, 0, 0, 0], k[0, 0, 40, 0], k[0, 0, 41, 0] = 10.0, 7.9, 8.1
    plan = AnchorAttention(2.0, step=2, first_blocks=1, block=8).plan(AttentionCall(q, k, scale=1.0))
    assert plan.column_mask()[0, 0].nonzero().tolist() == [[3, 41], [4, 41], [5, 41]]


def test_a_query_that_sees_no_dense_key_has_all_it_sees() -> None:
    """As may be across, with a window: there is no anchor to be near."""
    extent = Extent([60], [30], [0], [70], causal=False, limit=40)
    call = AttentionCall(torch.randn(1, 2, 30, 8), torch.randn(1, 1, 70, 8), extent=extent)
    mask = replace(SMALL, theta=0.0, step=1).plan(call).to_mask()
    allowed = allowed_pairs(extent, 30, 70)[0]
    beyond = slice(12, 30)  # of position 72 and on, in blocks without keys
    assert torch.equal(mask[0, :, beyond], allowed[beyond].expand(2, -1, -1))


def test_heads_have_a_theta_of_their_own() -> None:
    call = make_call("left padding", length=130, heads=4, groups=2, dim=8)
    chosen = [replace(SMALL, theta=theta) for theta in (0.2, 2.0, 1.0, 0.5)]
    mask = PerHead((chosen,)).plan(call).to_mask()
    for head, method in enumerate(chosen):
        assert torch.equal(mask[:, head], method.plan(call).to_mask()[:, head])


def test_fields_out_of_range_are_named() -> None:
    with pytest.raises(ValueError, match=r"anchor_attention\.theta must be at least 0, got -1"):
        AnchorAttention(-1)
    with pytest.raises(ValueError, match=r"anchor_attention\.theta must be at least 0, got nan"):
        AnchorAttention(math.nan)
    with pytest.raises(TypeError, match=r"anchor_attention\.theta must be a number, got 'far'"):
        methods.create("anchor_attention", theta="far")
    for field in ("step", "first_blocks", "block"):
        with pytest.raises(ValueError, match=rf"anchor_attention\.{field} must be at least 1, got 0"):
            methods.create("anchor_attention", **{field: 0})
