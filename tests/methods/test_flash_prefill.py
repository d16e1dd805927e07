"""FlashPrefill against its formula, row by row; and means and skipped tiles for any method."""

import math
from typing import Any

import pytest
import torch
from definitions import Row, rows_of

from gossamer import AttentionCall, methods
from gossamer.backends.torch import attend
from gossamer.methods import (
    AShape,
    BlockSparse,
    Corrected,
    FlashPrefill,
    MaxRelative,
    PerHead,
    VerticalSlash,
)
from gossamer.testing import SITUATIONS, make_call

BLOCK_K = 16
SMALL: dict[str, Any] = {"sink_blocks": 1, "window_blocks": 2, "last_tiles": 1, "tile_rows": 64, "block_k": BLOCK_K}


def kept(call: AttentionCall, row: Row, b: int, heads: range, queries: list[int], method: FlashPrefill) -> set[int]:
    """What a tile keeps: the formulas, for its query positions in some heads."""
    x: dict[int, list[float]] = {}
    seen = set()
    for j in range(-(-row.key_count // BLOCK_K)):
        keys = [key for key in range(j * BLOCK_K, (j + 1) * BLOCK_K) if key < row.key_count]
        if any(row.allows(query, key) for query in queries for key in keys):
            seen.add(j)
        last = j * BLOCK_K + BLOCK_K - 1
        if row.causal and last > queries[-1]:
            continue
        mean = call.k[b, heads[0] // call.share, [key + row.key_start for key in keys]].double().mean(0)
        for query in queries:
            sees = any(row.allows(query, key) for key in keys)
            if not sees or (row.causal and method.version == 1 and query < last):
                continue
            for h in heads:
                q = call.q[b, h, query - row.query_start].double()
                x.setdefault(j, []).append(float(q @ mean) * call.scale)
    top = max((value for values in x.values() for value in values), default=0.0)
    energy = {j: sum(math.exp(value - top) for value in values) for j, values in x.items()}
    best = max(energy.values(), default=0.0)
    chosen = {j for j, one in energy.items() if one >= method.alpha * best}
    chosen |= set(range(method.sink_blocks))
    low, high = queries[0] // BLOCK_K, queries[-1] // BLOCK_K
    if not row.causal:
        last_block = (row.key_count - 1) // BLOCK_K
        low, high = min(low, last_block), min(high, last_block) + method.window_blocks - 1
    chosen |= set(range(low - method.window_blocks + 1, high + 1))
    return chosen & seen


def planted(call: AttentionCall) -> AttentionCall:
    """With one block of keys that all queries look at."""
    k = call.k.clone()
    k[:, :, 2 * BLOCK_K : 3 * BLOCK_K] += 2 * call.q.nan_to_num().mean(dim=(1, 2), keepdim=True)[..., :]
    return AttentionCall(call.q, k, call.v, call.extent, scale=-0.7 * call.scale)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_blocks_are_those_of_the_formula(situation: str, version: Any) -> None:
    length = 150
    for seed, share in ((0, 2), (1, 4)):
        call = make_call(situation, length=length, heads=4, groups=4 // share, dim=8, seed=seed)
        call = planted(call) if seed else call
        method = FlashPrefill(version, [0.97, 0.6][seed], **SMALL)
        plan = method.plan(call)
        assert plan.heads == (4 if version == 1 else 4 // share)
        assert plan.block_q == (64 if version == 1 else 64 // share)
        assert plan.pruned_mean == (version == 2)
        mask = plan.block_mask()
        share_of_plan = 4 // plan.heads
        for b, row in enumerate(rows_of(call.extent)):
            positions = row.positions()
            tail = positions[-(64 if version == 1 else 64 // share) :] if positions else []
            for m in range(plan.num_query_blocks):
                of_block = (max(row.query_start, 0) // plan.block_q + m) * plan.block_q
                queries = [p for p in positions if of_block <= p < of_block + plan.block_q]
                for g in range(plan.heads):
                    got = set(mask[b, g, m].nonzero().flatten().tolist())
                    if not queries:
                        assert not got
                        continue
                    heads = range(g * share_of_plan, (g + 1) * share_of_plan)
                    expected = kept(call, row, b, heads, queries, method)
                    if set(queries) & set(tail):
                        expected = set(range(*plan.grid.seen[b, m].tolist()))
                    assert got == expected, (b, g, m)


def test_the_defaults_are_those_of_the_second_version() -> None:
    assert FlashPrefill().to_dict() == {
        "method": "flash_prefill",
        "version": 2,
        "alpha": 0.1,
        "sink_blocks": 2,
        "window_blocks": 4,
        "last_tiles": 8,
        "tile_rows": 128,
        "block_k": 128,
        "pruned_mean": None,
        "skip": None,
    }


@pytest.mark.parametrize(("share", "tokens"), [(1, 128), (2, 64), (3, 32), (4, 32), (7, 16), (8, 16), (16, 16)])
def test_a_tile_has_as_many_tokens_as_fit(share: int, tokens: int) -> None:
    call = make_call("no padding", length=300, heads=share, groups=1, dim=8)
    assert FlashPrefill().plan(call).block_q == tokens
    assert FlashPrefill(1).plan(call).block_q == 128


@pytest.mark.parametrize("change", [
    {"alpha": 0.2}, {"sink_blocks": 3}, {"window_blocks": 4}, {"last_tiles": 3}, {"tile_rows": 128}, {"block_k": 32},
    {"version": 1},
])  # fmt: skip
def test_every_field_matters(change: dict[str, Any]) -> None:
    call = make_call("no padding", length=500, heads=4, groups=2, dim=8)
    given: dict[str, Any] = {"alpha": 0.97, **SMALL}
    one, other = FlashPrefill(**given).plan(call), FlashPrefill(**given | change).plan(call)
    assert one.count_pairs().tolist() != other.count_pairs().tolist()


def test_attributes_of_the_plan_are_the_fields() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=8)
    given: dict[str, Any] = SMALL | {"block_k": 64}
    for method, means in ((FlashPrefill(2), True), (FlashPrefill(1), False), (FlashPrefill(1, pruned_mean=True), True)):
        assert method.plan(call).pruned_mean == means
    plan = FlashPrefill(pruned_mean=False, skip=3.0, **given).plan(call)
    assert (plan.pruned_mean, plan.skip) == (False, 3.0)


def test_the_means_come_closer_to_dense_attention() -> None:
    """On keys that lie near the means of their blocks, as the correction supposes."""
    call = make_call("no padding", length=600, heads=4, groups=2, dim=16)
    levels = torch.randn(1, 2, 38, 16, generator=torch.Generator().manual_seed(1)).repeat_interleave(16, dim=2)
    call = AttentionCall(call.q, 0.3 * call.k + levels[:, :, :600], call.v)
    dense, _ = attend(call, FlashPrefill(alpha=0.0, **SMALL).plan(call))
    errors = [
        float((attend(call, FlashPrefill(alpha=0.99, pruned_mean=means, **SMALL).plan(call))[0] - dense).norm())
        for means in (False, True)
    ]
    assert errors[1] < 0.5 * errors[0]


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"version": 3}, ValueError, "flash_prefill.version must be 1 or 2, got 3"),
        ({"alpha": 1.5}, ValueError, r"flash_prefill.alpha must lie in \[0, 1\], got 1.5"),
        ({"skip": -1.0}, ValueError, "flash_prefill.skip must be at least 0 and finite"),
        (
            {"skip": 2.0, "block_k": 32},
            ValueError,
            "flash_prefill.skip needs a block_k that is a multiple of 64, got 32",
        ),
        ({"pruned_mean": 1}, TypeError, "flash_prefill.pruned_mean must be true or false, got 1"),
    ],
)
def test_values_out_of_range_are_named(fields: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        FlashPrefill(**fields)


# Any method


@pytest.mark.parametrize(
    "base", [BlockSparse(3, 64), MaxRelative(0.9, 1, 1, 64, 32, 64), FlashPrefill(1, 0.9, 1, 1, 1)]
)
def test_any_method_of_blocks_takes_the_attributes(base: Any) -> None:
    call = make_call("padded chunk", length=500, heads=4, groups=2, dim=16)
    alone, plan = base.plan(call), Corrected(base, skip=2.0).plan(call)
    assert (plan.pruned_mean, plan.skip) == (True, 2.0)
    assert torch.equal(plan.block_indices, alone.block_indices)
    assert torch.equal(plan.count_pairs(), alone.count_pairs())
    assert Corrected(base, pruned_mean=False).plan(call).pruned_mean is False


def test_a_quantised_base_stays_so() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=16)
    base = Corrected(BlockSparse(3, 64), pruned_mean=False, quantised=True)
    plan = Corrected(base, pruned_mean=False, skip=2.0).plan(call)
    assert (plan.quantised, plan.skip) == (True, 2.0)
    with pytest.raises(ValueError, match="has pruned_mean and quantised"):
        Corrected(base).plan(call)


@pytest.mark.parametrize("base", [AShape(4, 60), VerticalSlash(20, 64)])
def test_methods_of_more_than_blocks_are_refused(base: Any) -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=16)
    with pytest.raises(ValueError, match="pruned_mean is for plans of blocks alone, and this one has"):
        Corrected(base).plan(call)


def test_what_the_base_needs_is_needed() -> None:
    call = make_call("bidirectional", length=300, heads=2, groups=1, dim=16)
    assert Corrected(VerticalSlash(20, 64, exact=True)).lacks(call) == "causal"
    assert Corrected(BlockSparse(3)).lacks(call) is None


def test_it_is_written_and_read_with_its_base() -> None:
    method = Corrected(MaxRelative(0.3), pruned_mean=False, skip=4.0)
    assert methods.from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match="corrected has pruned_mean and quantised"):
        Corrected(quantised=True)
    with pytest.raises(TypeError, match=r"corrected\.base must be a method, got str"):
        Corrected("max_relative")  # pyright: ignore[reportArgumentType]


def test_heads_share_their_attributes() -> None:
    call = make_call("no padding", length=300, heads=2, groups=1, dim=16)
    both = PerHead(((Corrected(BlockSparse(2)), Corrected(BlockSparse(3))),)).plan(call)
    assert both.pruned_mean
    with pytest.raises(ValueError, match="heads of one layer must share pruned_mean and skip"):
        PerHead(((Corrected(BlockSparse(2)), BlockSparse(3)),)).plan(call)
