"""DuoAttention and LServe's prefill, pair by pair from their formulas."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from definitions import call_in, everywhere, rows_of
from torch import Tensor

from gossamer import AttentionCall
from gossamer.methods import DuoAttention, LServe
from gossamer.methods.head_tables import full_heads
from gossamer.testing import make_call

GATES = ((0.3, 0.8), (0.9, 0.1), (0.5, 0.2))  # three layers of two key/value heads
BY_QUERY_HEAD = ((0.3, 0.8, 0.4, 0.6), (0.9, 0.1, 0.7, 0.0))


def naive_full(gates: Any, sparsity: float) -> list[list[bool]]:
    """At least the quantile of all gates, interpolated linearly; nothing at 1, everything at 0."""
    if sparsity >= 1:
        return [[False] * len(layer) for layer in gates]
    flat = sorted(gate for layer in gates for gate in layer)
    place = sparsity * (len(flat) - 1)
    low, high = flat[math.floor(place)], flat[math.ceil(place)]
    threshold = low + (place - math.floor(place)) * (high - low)
    return [[gate >= threshold for gate in layer] for layer in gates]


def pairs(call: AttentionCall, heads: int, attends: Callable[[int, int, int], bool]) -> Tensor:
    """bool ``[B, heads, S, T]`` of ``attends(head, query position, key position)``, as far as the model allows."""
    mask = torch.zeros(call.batch, heads, call.query_len, call.key_len, dtype=torch.bool)
    for b, row in enumerate(rows_of(call.extent)):
        for i in row.live_queries():
            for j in row.live_keys():
                query, key = row.query_start + i, j - row.key_start
                if row.allows(query, key):
                    mask[b, :, i, j] = torch.tensor([attends(head, query, key) for head in range(heads)])
    return mask


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.25, 0.5, 0.75, 0.99, 1.0])
@pytest.mark.parametrize("shape", [(1, 2), (3, 2), (4, 8), (1, 1)])
def test_heads_above_the_quantile_of_all_layers_are_full(shape: tuple[int, int], sparsity: float) -> None:
    rng = random.Random(7)
    for _ in range(20):
        gates = [[rng.random() for _ in range(shape[1])] for _ in range(shape[0])]
        assert [list(layer) for layer in full_heads(gates, sparsity)] == naive_full(gates, sparsity)


def test_equal_gates_are_cut_where_the_share_says() -> None:
    """Not all or none of them, as a threshold alone would."""
    gates = [[1.0] * 4] * 3
    assert sum(map(sum, full_heads(gates, 0.5))) == 6
    assert full_heads(gates, 0.5)[0] == (True,) * 4
    assert full_heads(gates, 0.5)[1] == (True, True, False, False)


def test_a_share_of_a_whole_number_of_heads_is_that_number() -> None:
    """0.07 * 100 is more than 7 in floating point."""
    gates = [[float(n) for n in range(101)]]
    assert sum(full_heads(gates, 0.07)[0]) == 101 - 7


@everywhere
@pytest.mark.parametrize("layer", [0, 1, 2])
def test_each_key_value_head_is_full_or_streams(situation: str, layer: int) -> None:
    call = in_layer(call_in(situation, length=40), layer)
    plan = DuoAttention(GATES, sparsity=0.5, sink=3, recent=6).plan(call)
    full = naive_full(GATES, 0.5)[layer]
    assert plan.heads == 2
    expected = pairs(call, 2, lambda h, i, j: full[h] or j < 3 or abs(i - j) < 6)
    assert same(call, plan.to_mask(), expected)


@everywhere
def test_gates_may_be_those_of_query_heads(situation: str) -> None:
    call = in_layer(call_in(situation, length=40), 1)
    plan = DuoAttention(BY_QUERY_HEAD, sparsity=0.5, sink=3, recent=6).plan(call)
    full = naive_full(BY_QUERY_HEAD, 0.5)[1]
    assert plan.heads == 4
    expected = pairs(call, 4, lambda h, i, j: full[h] or j < 3 or abs(i - j) < 6)
    assert same(call, plan.to_mask(), expected)


@everywhere
@pytest.mark.parametrize("layer", [0, 1])
def test_lserve_streams_by_tokens(situation: str, layer: int) -> None:
    call = in_layer(call_in(situation, length=40), layer)
    full = naive_full(GATES, 0.4)[layer]
    mask = LServe(GATES, sparsity=0.4, sink=3, local=7).plan(call).to_mask()
    assert same(call, mask, pairs(call, 2, lambda h, i, j: full[h] or j < 3 or abs(i - j) < 7))


@everywhere
@pytest.mark.parametrize(("sink", "local"), [(3, 9), (4, 8), (0, 1), (9, 13)])
def test_lserve_streams_by_blocks(situation: str, sink: int, local: int) -> None:
    """A query block attends whole key blocks: the first, its own, and those before it."""
    call = in_layer(call_in(situation, length=40), 1)
    plan = LServe(GATES, sparsity=0.4, sink=sink, local=local, block=4, exact=False).plan(call)
    full = naive_full(GATES, 0.4)[1]
    first, own = math.ceil(sink / 4), math.ceil(local / 4)
    nearest = [max(row.key_count - 1, 0) // 4 for row in rows_of(call.extent)]
    for b, row in enumerate(rows_of(call.extent)):
        # A query beyond all keys, as in cross-attention, has the last key block for its own.
        def near(i: int, j: int, last: int = nearest[b], causal: bool = row.causal) -> bool:
            block = i // 4 if causal else min(i // 4, last)
            return 0 <= block - j // 4 < own or (not causal and abs(block - j // 4) < own)

        expected = pairs(call, 2, lambda h, i, j, near=near: full[h] or j // 4 < first or near(i, j))
        assert torch.equal(plan.to_mask()[b], expected[b])


def in_layer(call: AttentionCall, layer: int) -> AttentionCall:
    return AttentionCall(call.q, call.k, call.v, call.extent, scale=-1.3, layer=layer)


def same(call: AttentionCall, mask: Tensor, expected: Tensor) -> bool:
    """But for queries beyond the keys whose bands hold none: those keep the last 64 keys."""
    lonely = ~expected.any(dim=-1, keepdim=True)
    assert not bool((mask & ~expected & ~lonely).any())
    return torch.equal(mask & ~lonely, expected)


def test_no_gates_and_a_sparsity_of_one_and_nought() -> None:
    call = in_layer(make_call("no padding", length=300, heads=4, groups=2, dim=8), 0)
    with pytest.raises(ValueError, match=r"duo_attention\.gates are for 0 layers of 0 heads, but layer 0 with 2 or 4"):
        DuoAttention().plan(call)
    assert DuoAttention(GATES, sparsity=0.0, sink=0, recent=1).plan(call).density() == 1.0
    mask = DuoAttention(GATES, sparsity=1.0, sink=0, recent=1).plan(call).to_mask()
    assert torch.equal(mask, torch.eye(300, dtype=torch.bool).expand(1, 2, -1, -1))


@pytest.mark.parametrize("kind", [DuoAttention, LServe])
@pytest.mark.parametrize(
    ("gates", "error", "message"),
    [
        ("0.5", TypeError, r"gates must be a list \(layers\) of lists \(heads\) of numbers, got str"),
        (0.5, TypeError, "got float"),
        ([0.5], TypeError, "gates must hold a list of numbers for layer 0, got float"),
        (["ab"], TypeError, "for layer 0, got str"),
        ([[0.5], [True]], TypeError, "gates, layer 1, head 0: expected a number, got True"),
        ([[0.5, math.nan]], ValueError, "gates, layer 0, head 1: expected a finite number, got nan"),
        ([[0.5], [1.0, 0.0]], ValueError, r"the same number of heads in each layer, got \[1, 2\]"),
        ([[]], ValueError, r"the same number of heads in each layer, got \[0\]"),
    ],
)
def test_tables_that_are_none_are_named(kind: Any, gates: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{kind.name}.*{message}"):
        kind(gates)


def test_a_table_of_another_model_is_refused() -> None:
    call = make_call("no padding", length=20, heads=4, groups=2, dim=8)
    with pytest.raises(ValueError, match="pass layer="):
        DuoAttention(GATES).plan(AttentionCall(call.q, call.k))
    with pytest.raises(ValueError, match="3 layers of 2 heads, but layer 3 with 2 or 4 heads"):
        DuoAttention(GATES).plan(in_layer(call, 3))
    with pytest.raises(ValueError, match="3 layers of 2 heads, but layer 0 with 1 or 3 heads"):
        LServe(GATES).plan(AttentionCall(call.q[:, :3], call.k[:, :1], layer=0))
