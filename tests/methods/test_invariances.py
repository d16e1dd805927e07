"""What a batch row's plan and output do not depend on: its padding, its companions, the threads, and chunks.

On the CPU outputs are the same bits, on every instruction set; plans are the same on every backend.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from listed import LISTED, Listed
from torch import Tensor

from gossamer import AttentionCall, Extent, Method, SparsePlan
from gossamer.backends import cpu, triton
from gossamer.rotary import Rotary

HEADS, GROUPS, DIM = 4, 2, 64
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SOFTENED: dict[str, Any] = {"scale": 0.2, "softcap": 6.0}

every_method = pytest.mark.parametrize("listed", LISTED, ids=lambda listed: listed.id)
by_block = pytest.mark.parametrize("listed", [one for one in LISTED if one.by_block], ids=lambda listed: listed.id)


@functools.cache
def isas() -> tuple[str, ...]:
    return tuple(cpu.supported_isas()) if cpu.is_available() else ()


def tokens(length: int, seed: int, dtype: torch.dtype = torch.float32, dim: int = DIM) -> list[Tensor]:
    """q, k and v of one prompt."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, n, length, dim, generator=generator).to(dtype) * 1.5 for n in (HEADS, GROUPS, GROUPS)]


def lists(plan: SparsePlan, b: int) -> dict[Any, Any]:
    """The plan of one batch row: blocks by head and global query block, columns by head and group."""
    first = int(plan.grid.first_block[b])
    found: dict[Any, Any] = {
        "sink": torch.as_tensor(plan.sink).tolist(),
        "window": torch.as_tensor(plan.window).tolist(),
    }
    for head in range(plan.heads):
        for m in range(int(plan.grid.row_blocks[b])):
            row = (b * plan.heads + head) * plan.num_query_blocks + m
            blocks = plan.block_indices[int(plan.block_indptr[row]) : int(plan.block_indptr[row + 1])]
            group = (b * plan.heads + head) * plan.num_column_groups + m // plan.column_group
            columns = plan.column_indices[int(plan.column_indptr[group]) : int(plan.column_indptr[group + 1])]
            found[head, first + m] = (blocks.tolist(), columns.tolist())
    return found


class Row:
    """One prompt of a batch: its last ``queries`` tokens are asked for."""

    def __init__(self, seed: int, length: int, queries: int, left: int = 0, right: int = 0) -> None:
        self.seed, self.length, self.queries, self.left, self.right = seed, length, queries, left, right


def batch(rows: list[Row], dtype: torch.dtype, *, tail: int = 0, causal: bool = True, dim: int = DIM) -> AttentionCall:
    """Rows side by side; whatever is padding, or a spare slot in the ``tail``, is NaN."""
    query_len = max(row.queries + row.right for row in rows)
    key_len = max(row.left + row.length + row.right for row in rows) + tail
    q, k, v = (torch.full((len(rows), n, size, dim), float("nan"), dtype=dtype) for n, size in
               ((HEADS, query_len), (GROUPS, key_len), (GROUPS, key_len)))  # fmt: skip
    starts = []
    for b, row in enumerate(rows):
        own = tokens(row.length, row.seed, dtype, dim)
        # Queries that are the whole prompt stand behind its left padding, others at the front.
        before = query_len - row.queries - row.right if row.queries == row.length else 0
        q[b, :, before : before + row.queries] = own[0][0, :, row.length - row.queries :]
        k[b, :, row.left : row.left + row.length], v[b, :, row.left : row.left + row.length] = own[1][0], own[2][0]
        starts.append(row.length - row.queries - before)
    counts = [[row.queries for row in rows], [row.left for row in rows], [row.length for row in rows]]
    return AttentionCall(
        q, k, v, Extent(starts, *counts, causal=causal), layer=0, rotary=Rotary.of_base(dim), **SOFTENED
    )


def live(call: AttentionCall, b: int, x: Tensor) -> Tensor:
    first, count = int(call.extent.first_query[b]), int(call.extent.query_count[b])
    return x[b, :, first : first + count]


BATCHES = {
    "left padding": ([Row(1, 300, 300, left=70)], 0),
    "right padding": ([Row(1, 300, 300, right=45)], 0),
    "a spare tail of the cache": ([Row(1, 300, 300)], 100),
    "a longer companion": ([Row(2, 450, 450), Row(1, 300, 300, left=150)], 0),
    "shorter companions": ([Row(1, 300, 300), Row(3, 20, 20, right=9), Row(4, 1, 1)], 3),
    "everything": ([Row(2, 450, 450), Row(1, 300, 300, left=33, right=117), Row(3, 20, 20)], 37),
}
CHUNKS = {
    "left padding": ([Row(1, 300, 130, left=70)], 0),
    "right padding": ([Row(1, 300, 130, right=45)], 0),
    "companions": ([Row(1, 300, 130, left=5), Row(2, 450, 200), Row(3, 140, 130)], 11),
}


def compare_with_alone(method: Method, rows: list[Row], tail: int, queries: int, **options: Any) -> None:
    """The row with seed 1 is as it would be without padding and companions."""
    alone = batch([Row(1, 300, queries)], **options)
    together = batch(rows, tail=tail, **options)
    if method.lacks(alone) is not None:
        return
    b = next(n for n, row in enumerate(rows) if row.seed == 1)
    plans = method.plan(alone), method.plan(together)
    assert lists(plans[1], b) == lists(plans[0], 0)
    assert torch.equal(plans[1].count_pairs()[b], plans[0].count_pairs()[0])
    if cpu.is_available():
        for expected, got in zip(cpu.attend(alone, plans[0]), cpu.attend(together, plans[1]), strict=True):
            assert torch.equal(live(together, b, got), live(alone, 0, expected))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("isa", isas() or ("",))
@pytest.mark.parametrize("dtype", DTYPES)
@every_method
def test_nothing_depends_on_padding_or_companions(
    monkeypatch, listed: Listed, dtype: str, isa: str, causal: bool
) -> None:
    # How work is cut is the same for all instruction sets; those that are not chosen here meet less of it.
    few = bool(isa) and isa != cpu.active_isa(DTYPES[dtype])
    monkeypatch.setenv("GOSSAMER_CPU_ISA", isa)
    for name, (rows, tail) in BATCHES.items():
        if not (few and name != "shorter companions") and (causal or name != "everything"):
            compare_with_alone(listed.create(HEADS), rows, tail, 300, dtype=DTYPES[dtype], causal=causal)
    for name, (rows, tail) in CHUNKS.items():
        if not (few and name != "companions"):
            compare_with_alone(listed.create(HEADS), rows, tail, 130, dtype=DTYPES[dtype], causal=causal)


@pytest.mark.parametrize("queries", [1, 5, 64])
@pytest.mark.parametrize("isa", isas() or ("",))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "listed", [one for one in LISTED if one.name in ("dense", "block_sparse")], ids=lambda one: one.id
)
def test_few_queries_do_not_depend_on_padding_or_companions(
    monkeypatch, listed: Listed, dtype: str, isa: str, queries: int
) -> None:
    """They run split over the keys, as in decoding."""
    monkeypatch.setenv("GOSSAMER_CPU_ISA", isa)
    rows = [Row(2, 450, 200, left=3), Row(1, 300, queries, left=70, right=6), Row(3, 290, 1)]
    compare_with_alone(listed.create(HEADS), rows, 20, queries, dtype=DTYPES[dtype])
    compare_with_alone(listed.create(HEADS), rows[1:], 0, queries, dtype=DTYPES[dtype])


@pytest.mark.skipif(not cpu.is_available(), reason="no C++ kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@every_method
def test_nothing_depends_on_the_number_of_threads(listed: Listed, dtype: str) -> None:
    rows, tail = BATCHES["everything"]
    call, before, seen = batch(rows, DTYPES[dtype], tail=tail), torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            plan = listed.create(HEADS).plan(call)
            seen.append((plan.block_indices, plan.column_indices, *cpu.attend(call, plan)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(one, other) for one, other in zip(*seen, strict=True))


PLANNERS = ["", "torch", "triton"]


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2:RuntimeWarning")  # the interpreter's NumPy
@pytest.mark.parametrize("planner", PLANNERS, ids=lambda name: name or "fastest")
@by_block
def test_chunks_are_planned_as_one_piece(monkeypatch, listed: Listed, planner: str) -> None:
    """But for the tail that belongs to the call: the last rows of every chunk."""
    if planner == "triton" and not (triton.is_available() and triton.interprets()):
        pytest.skip("Triton is not interpreted here")
    monkeypatch.setenv("GOSSAMER_PLANNER", planner)
    length, block, dim = (700, 128, 16) if planner != "triton" else (450, 128, 16)
    q, k, v = tokens(length, 5, dim=dim)
    method, tail = listed.create(HEADS), listed.tail(HEADS // GROUPS)

    def plan(first: int, stop: int) -> SparsePlan:
        extent = Extent([first], [stop - first], [0], [stop])
        tensors = q[:, :, first:stop], k[:, :, :stop], v[:, :, :stop]
        return method.plan(AttentionCall(*tensors, extent, layer=0, rotary=Rotary.of_base(dim)))

    whole, compared = lists(plan(0, length), 0), 0
    for first in range(0, length, 2 * block):
        stop = min(first + 2 * block, length)
        chunk = plan(first, stop)
        for key, got in lists(chunk, 0).items():
            in_tail = isinstance(key, tuple) and (key[1] + 1) * chunk.block_q > min(stop, length) - tail
            if not in_tail:
                assert got == whole[key], key
                compared += 1
    assert compared > 2 or tail >= 2 * block


def test_a_chunk_at_no_multiple_of_the_block_is_planned_otherwise() -> None:
    """The negative control: a border inside a block splits it."""
    q, k, v = tokens(900, 5)
    method = next(one for one in LISTED if one.name == "block_sparse").create(HEADS)
    whole = lists(method.plan(AttentionCall(q, k, v)), 0)
    chunk = method.plan(AttentionCall(q[:, :, 612:], k, v))
    assert any(got != whole[key] for key, got in lists(chunk, 0).items())
