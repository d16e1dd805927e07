"""Grid heads against naive ones, written from the definition, and planted grids."""

from __future__ import annotations

import itertools

import pytest
import torch
from prompts import layout_of, of_weights, planted_grid, prompt, weights

from gossamer import AttentionCall, backends, methods
from gossamer.methods import GridLines
from gossamer.methods.grid_lines import BLOCK, LINES

Mask = list[list[bool]]


def naive_lines(method: GridLines, weight: torch.Tensor, strides: list[int]) -> tuple[int, int, int, int]:
    """Stride, and phases of columns, rows and distances, of one head: ``weight`` is ``[N, N]`` of all its queries."""
    count = len(weight)
    rows = range(max(0, count - method.last), count)
    columns, distances = [0.0] * count, [0.0] * count
    for i in rows:
        for j in range(i + 1):
            columns[j] += float(weight[i, j])
            distances[i - j] += float(weight[i, j])

    def best_class(mass: list[float], s: int) -> tuple[float, int]:
        above = [sum(mass[p::s]) / sum(mass) - len(mass[p::s]) / count for p in range(s)]
        return max(above), above.index(max(above))

    found: tuple[float, int, int, int] | None = None
    for s in strides:
        of_columns, of_distances = best_class(columns, s), best_class(distances, s)
        score = (of_columns[0] if method.vline or not method.slash else 0.0) + (
            of_distances[0] if method.slash else 0.0
        )
        if found is None or score > found[0] + 1e-6:
            found = score, s, of_columns[1], of_distances[1]
    assert found is not None
    _, s, p_k, p_d = found
    spread: dict[int, list[float]] = {}
    for i in rows:
        spread.setdefault(i % s, []).append(sum(float(weight[i, j]) ** 2 for j in range(i + 1)))
    p_q = min(sorted(spread), key=lambda phase: sum(spread[phase]) / len(spread[phase])) if method.hline else 0
    return s, p_k, p_q, p_d


def naive_mask(method: GridLines, lines: tuple[int, int, int, int], count: int) -> Mask:
    """Pairs of the tiles that hold a line, in the order by class."""
    s, p_k, p_q, p_d = lines
    order = sorted(range(count), key=lambda i: ((i - p_k) % s, i))
    blocks = [order[first : first + BLOCK] for first in range(0, count, BLOCK)]
    mask = [[False] * count for _ in range(count)]
    for (m, queries), (n, keys) in itertools.product(enumerate(blocks), enumerate(blocks)):
        on = m == n
        on |= method.vline and any(j % s == p_k for j in keys)
        on |= method.hline and any(i % s == p_q for i in queries)
        on |= method.slash and bool({(i - p_d) % s for i in queries} & {j % s for j in keys})
        for i, j in itertools.product(queries, keys):
            mask[i][j] |= on and j <= i
    return mask


@pytest.mark.parametrize("lines", LINES, ids=lambda lines: "+".join(name for name, on in lines.items() if on))
def test_it_keeps_the_tiles_on_the_lines_that_it_finds(lines: dict[str, bool]) -> None:
    call = prompt("t150", "t201", left=9, sharp=3.0)
    method = GridLines(max_stride=9, last=20, **lines)
    mask = method.plan(call).to_mask()
    for row, count in enumerate((150, 201)):
        start = int(call.extent.key_start[row])
        own = mask[row, :, start:, start:]
        assert int(mask[row].sum()) == int(own.sum())
        for head, weight in enumerate(weights(call, row)):
            found = naive_lines(method, weight, list(range(2, 10)))
            expected = naive_mask(method, found, count)
            assert torch.equal(own[head], torch.tensor(expected)), (row, head)


@pytest.mark.parametrize("phases", [(5, None, None), (None, None, 3), (4, 9, None), (4, None, 0), (7, 2, 5)])
def test_a_planted_grid_is_found_and_executed_exactly(phases: tuple[int | None, int | None, int | None]) -> None:
    p_k, p_q, p_d = phases
    count, s = 640, 20
    wanted = planted_grid(count, s, p_k, p_q, p_d)
    call = of_weights(wanted)
    method = GridLines(hline=p_q is not None, vline=p_k is not None, slash=p_d is not None, max_stride=100)
    lines = method.lines(call, 0)
    assert int(lines.stride) == s
    for phase, found in zip(phases, (lines.column, lines.row, lines.distance), strict=True):
        assert phase is None or phase == int(found)
    plan = method.plan(call)
    missing = wanted & ~plan.to_mask()[0, 0]
    missing &= ~torch.eye(count, dtype=torch.bool)
    assert not bool(missing.any())
    assert plan.density() < 0.75
    out, _ = backends.attend(call, plan)
    torch.testing.assert_close(out[0, 0].double(), weights(call)[0] @ call.values[0, 0].double(), atol=1e-5, rtol=1e-4)
    # A negative control: the same lines elsewhere lose what was planted.
    other = GridLines(stride=s + 1, hline=method.hline, vline=method.vline, slash=method.slash).plan(call)
    assert float((backends.attend(call, other)[0] - out).abs().max()) > 0.01


def test_strides_of_frames_are_taken_from_the_layout() -> None:
    call = prompt("t9 v200", layout=layout_of("t9 v200", strides=((40, 8),)))
    free, frames = GridLines(), GridLines(frames=True)
    assert frames._strides(call, 0) == [8, 40]
    assert free._strides(call, 0) == list(range(2, 105))
    unknown = AttentionCall(call.q, call.k, call.v, call.extent)
    assert frames._strides(unknown, 0) == free._strides(unknown, 0)
    assert set(GridLines(frames=True).lines(call, 0).stride.tolist()) <= {8, 40}


def test_a_grid_of_stride_one_is_dense_and_short_prompts_are_too() -> None:
    assert GridLines(1).plan(prompt("t300")).density() == 1.0
    assert GridLines(1).least_density(prompt("t300")) == 1.0
    assert GridLines().plan(prompt("t3", "t1")).density() == 1.0


def test_fields_are_checked() -> None:
    with pytest.raises(ValueError, match="needs one of hline, vline and slash"):
        GridLines(hline=False, vline=False, slash=False)
    with pytest.raises(TypeError, match="hline must be true or false, got 1"):
        GridLines(hline=1)  # pyright: ignore[reportArgumentType]
    for field, least in {"stride": 0, "max_stride": 1, "last": 1}.items():
        with pytest.raises(ValueError, match=f"grid.{field} must be at least {least}, got {least - 1}"):
            methods.create("grid", **{field: least - 1})
