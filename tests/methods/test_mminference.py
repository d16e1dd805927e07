"""MMInference's boundaries against naive ones, written from the definition, and planted heads."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from prompts import of_weights, planted_boundary, prompt, weights

from gossamer import AttentionCall, Extent, backends, methods
from gossamer.layout import ModalityLayout
from gossamer.methods import AShape, GridLines, Method, MMInference, VerticalSlash
from gossamer.testing import assert_accurate

BLOCK = 64
_ROWS_OF = ("query_start", "query_count", "key_start", "key_count")
ROWS = ("t120 i150 t7 v250 t60", "i30 t200")
SLASH, OTHER = VerticalSlash(33, 128, last=20), VerticalSlash(40, 192)
PATTERNS: dict[str, tuple[str, tuple[Method, ...]]] = {
    "q, one pattern": ("q", (SLASH,)),
    "q": ("q", (SLASH, OTHER)),
    "q with a window": ("q", (AShape(5, 70), SLASH)),
    "2d": ("2d", (SLASH, AShape(3, 1), OTHER, VerticalSlash(31, 64))),
}


def naive_choice(
    pattern: Method, weight: torch.Tensor, queries: list[int], keys: list[int]
) -> tuple[set[int], set[int]]:
    """Single keys, and distances in blocks, of one head."""
    count = weight.shape[1]
    if isinstance(pattern, AShape):
        return set(keys[: pattern.sink]), set(range(-(-(pattern.window - 1) // BLOCK) + 1))
    assert isinstance(pattern, VerticalSlash)
    columns = {j: 0.0 for j in keys}
    bands = [0.0] * (-(-count // BLOCK) + 1)
    for i, j in itertools.product(queries[-pattern.last :], keys):
        if j <= i:
            columns[j] += float(weight[i, j])
            band, rest = divmod(i - j, BLOCK)
            bands[band] += float(weight[i, j]) * (1 - rest / BLOCK)
            bands[band + 1] += float(weight[i, j]) * rest / BLOCK
    for j in keys[:30]:
        columns[j] = float("inf")
    bands[:2] = [float("inf")] * len(bands[:2])
    best = sorted(columns, key=lambda j: (-columns[j], j))[: max(30, pattern.vertical_size)]
    most = -(-max(128, pattern.slash_size) // BLOCK)
    return set(best), set(sorted(range(len(bands)), key=lambda d: (-bands[d], d))[:most])


def naive_mask(method: MMInference, kinds: list[int], weight: torch.Tensor) -> torch.Tensor:
    """Pairs that a head computes, bool ``[N, N]``."""
    count, grouped = len(kinds), method.boundary == "2d"
    groups = [int(kind > 0) for kind in kinds]
    q_order = sorted(range(count), key=lambda i: (groups[i], i))
    k_order = q_order if grouped else list(range(count))
    of = {g: [i for i in range(count) if groups[i] == g] for g in (0, 1)}
    choices = {}
    for g, h in itertools.product((0, 1), (0, 1) if grouped else (None,)):
        pattern = method.pattern(g, h or 0)
        choices[g, h] = naive_choice(pattern, weight, of[g], of[h] if h is not None else list(range(count)))
    mask = torch.zeros(count, count, dtype=torch.bool)
    blocks = [[order[n : n + BLOCK] for n in range(0, count, BLOCK)] for order in (q_order, k_order)]
    for queries, keys in itertools.product(*blocks):
        kept = any(
            i // BLOCK - j // BLOCK in choices[groups[i], groups[j] if grouped else None][1]
            for i, j in itertools.product(queries, keys)
        )
        for i, j in itertools.product(queries, keys):
            mask[i, j] |= kept and j <= i
    for first in range(0, count, 4 * BLOCK):  # single keys of four blocks of queries
        rows = q_order[first : first + 4 * BLOCK]
        listed = set().union(*(choices[g, h][0] for g, h in choices if any(groups[i] == g for i in rows)))
        for i, j in itertools.product(rows, listed):
            mask[i, j] |= j <= i
    return mask


@pytest.mark.parametrize("case", PATTERNS)
def test_it_computes_what_a_naive_one_does(case: str) -> None:
    boundary, patterns = PATTERNS[case]
    call = prompt(*ROWS, left=5, heads=2, groups=1)
    method = MMInference(boundary, patterns)
    plan = method.plan(call)
    mask, layout = plan.to_mask(), call.layout
    assert isinstance(layout, ModalityLayout)
    assert torch.equal(plan.count_pairs(), mask.sum(dim=(2, 3)))
    assert 0.2 < plan.density() < 0.97
    for row, weight in enumerate(weights(call, row) for row in range(2)):
        start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
        own = mask[row, :, start:, start:]
        assert int(own.sum()) == int(mask[row].sum())
        for head in range(2):
            expected = naive_mask(method, layout.kinds[row, :count].tolist(), weight[head])
            assert torch.equal(own[head], expected), (row, head)


@pytest.mark.parametrize("boundary", ["q", "2d"])
def test_a_grid_inside_of_a_group_keeps_its_lines(boundary: str) -> None:
    """Columns and slashes key by key, horizontal lines by blocks of queries, and every query's own key."""
    call = prompt(*ROWS, heads=2, groups=1)
    for lines in ({"hline": False}, {"vline": False, "hline": False}, {}):
        grid = GridLines(stride=9, **lines)
        method = MMInference(boundary, (SLASH, grid) if boundary == "q" else (SLASH, SLASH, grid, grid))
        mask, layout = method.plan(call).to_mask(), call.layout
        assert isinstance(layout, ModalityLayout)
        for row in range(2):
            start, count = int(call.extent.key_start[row]), int(call.extent.key_count[row])
            kinds = layout.kinds[row, :count] > 0
            vision = kinds.nonzero().flatten()[-grid.last :]
            i, j = torch.arange(count)[:, None], torch.arange(count)
            for keys in (~kinds, kinds) if boundary == "2d" else (torch.ones_like(kinds),):
                found = grid.lines(call, row, vision, keys)
                for head in range(2):
                    wanted = i == j
                    if grid.vline:
                        wanted = wanted | (j % 9 == int(found.column[head]))
                    if grid.slash:
                        wanted = wanted | ((i - j) % 9 == int(found.distance[head]))
                    if grid.hline:
                        wanted = wanted | (i % 9 == int(found.row[head]))
                    wanted = wanted & kinds[:, None] & (keys | (i == j)) & (j <= i)
                    assert not bool((wanted & ~mask[row, head, start:, start:]).any()), (row, head)


@pytest.mark.parametrize("kind", ["k", "q", "2d"])
def test_a_planted_boundary_is_executed_exactly(kind: str) -> None:
    wanted, layout, method = planted_boundary(kind)
    call = of_weights(wanted, layout)
    plan = method.plan(call)
    assert not bool((wanted & ~plan.to_mask()[0, 0]).any())
    assert plan.density() < 0.7
    out, _ = backends.attend(call, plan)
    dense = weights(call)[0] @ call.values[0, 0].double()
    torch.testing.assert_close(out[0, 0].double(), dense, atol=1e-5, rtol=1e-4)


def test_without_its_boundary_a_planted_head_loses_what_text_does_not_ask_for() -> None:
    """The negative control: the last queries are text, and say nothing of what queries of images attend."""
    wanted, layout, method = planted_boundary("q")
    call = of_weights(wanted, layout)
    lost = wanted & ~MMInference("none", method.patterns[:1]).plan(call).to_mask()[0, 0]
    assert int(lost.sum()) > 300
    blind = replace(call, layout=None)
    assert torch.equal(method.plan(blind).to_mask(), method.patterns[0].plan(blind).to_mask())


@pytest.mark.parametrize("limit", [None, 150])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("boundary", ["q", "2d"])
def test_plans_are_executed_as_they_are_defined(boundary: str, dtype: torch.dtype, limit: int | None) -> None:
    """By the fastest backend, in a model's own window too; what is padding is NaN."""
    call = prompt(*ROWS, left=5)
    extent = Extent(*(getattr(call.extent, name) for name in _ROWS_OF), limit=limit)
    call = replace(call, q=call.q.to(dtype), k=call.k.to(dtype), v=call.values.to(dtype), extent=extent)
    for patterns in ((SLASH,), (GridLines(max_stride=20),)):
        plan = MMInference(boundary, patterns).plan(call)
        assert torch.equal(plan.count_pairs(), plan.to_mask().sum(dim=(2, 3)))
        assert_accurate(call, plan, *backends.attend(call, plan), most_rows=60)


@pytest.mark.parametrize("boundary", ["none", "q", "2d"])
def test_full_budget_is_dense(boundary: str) -> None:
    call = prompt(*ROWS)
    for pattern in (VerticalSlash(30, 10_000), VerticalSlash(10_000, 64), AShape(0, 10_000), GridLines(1)):
        method = MMInference(boundary, (pattern,))
        assert method.plan(call).density() == 1.0, pattern
        assert method.least_density(call) in (0.0, 1.0)


@pytest.mark.parametrize("boundary", ["q", "2d"])
@pytest.mark.parametrize(("batch", "tokens", "live"), [(0, 70, 0), (1, 0, 0), (2, 70, 0), (1, 1, 1)])
def test_prompts_of_nothing_are_planned(batch: int, tokens: int, live: int, boundary: str) -> None:
    q = torch.randn(batch, 2, tokens, 8)
    row = torch.ones(batch, dtype=torch.int64)
    layout = ModalityLayout(torch.ones(batch, tokens, dtype=torch.int8), ((3,),) * batch)
    call = AttentionCall(q, q, q, Extent(0 * row, live * row, 0 * row, live * row), layer=0, layout=layout)
    for pattern in (SLASH, AShape(), GridLines()):
        plan = MMInference(boundary, (pattern,)).plan(call)
        assert int(plan.count_pairs().sum()) == batch * 2 * live
        assert backends.attend(call, plan)[0].shape == q.shape


def test_rows_do_not_depend_on_their_companions() -> None:
    call = prompt(*ROWS, left=3)
    for boundary in ("q", "2d"):
        method = MMInference(boundary, (SLASH,))
        both = method.plan(call).to_mask()
        for row in range(2):
            layout = call.layout
            assert isinstance(layout, ModalityLayout)
            alone: dict[str, Any] = {"extent": call.extent.of_rows(slice(row, row + 1)), "layer": 0}
            alone["layout"] = ModalityLayout(layout.kinds[row : row + 1])
            q, k, v = (x[row : row + 1] for x in (call.q, call.k, call.values))
            one = AttentionCall(q, k, v, **alone)
            assert torch.equal(method.plan(one).to_mask()[0], both[row])


def test_it_needs_the_whole_prompt_where_queries_are_grouped() -> None:
    call = prompt("t30 i40 t5")
    later = AttentionCall(call.q[:, :, 40:], call.k, call.v, layout=call.layout)
    assert MMInference("q").lacks(later) == "whole prompt"
    assert MMInference("none").lacks(later) is None
    assert MMInference("q").lacks(replace(later, layout=None)) is None


def test_fields_are_checked_and_survive_a_dictionary() -> None:
    method = MMInference("2d", (SLASH, OTHER, AShape(), GridLines(frames=True)))
    assert methods.from_dict(method.to_dict()) == method
    with pytest.raises(ValueError, match=r"boundary must be one of none, q, 2d, got 'k'"):
        MMInference("k")
    with pytest.raises(ValueError, match=r"patterns must be 1 or 2 for boundary='q', got 4"):
        MMInference("q", method.patterns)
    with pytest.raises(TypeError, match=r"patterns must be a_shape, .*, got block_sparse"):
        MMInference("q", (methods.BlockSparse(),))
    with pytest.raises(TypeError, match="vertical_slash"):
        MMInference("q", (VerticalSlash(exact=True),))


def test_layouts_are_checked() -> None:
    with pytest.raises(TypeError, match=r"int8 tensor, got torch\.int64"):
        ModalityLayout(torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match="from 0 on"):
        ModalityLayout(torch.full((1, 3), -1, dtype=torch.int8))
    with pytest.raises(ValueError, match="strides must be numbers from 1 on"):
        ModalityLayout(torch.zeros(1, 3, dtype=torch.int8), ((0,),))
    q = torch.zeros(2, 1, 3, 4)
    with pytest.raises(ValueError, match="layout is of 1 batch rows, but q has 2"):
        AttentionCall(q, q, q, layout=ModalityLayout(torch.zeros(1, 3, dtype=torch.int8)))
