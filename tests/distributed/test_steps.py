"""What ranks compute at their steps is, together, what the plan names, and nothing twice."""

import pytest
import torch
from test_layout import layout

from gossamer import Extent, SparsePlan
from gossamer.distributed import KINDS, Layout, Selection, VerticalSlashes, pieces_of, selection_of
from gossamer.testing import random_plan

HEADS = 2


def computed(selection: Selection, dealt: Layout) -> torch.Tensor:
    """How often each pair is computed, int64 ``[B, heads, N, N]``."""
    total = torch.zeros(selection.batch, selection.heads, dealt.length, dealt.length, dtype=torch.int64)
    for rank in range(dealt.ranks):
        for source in range(dealt.ranks):
            own, theirs = dealt.positions(rank), dealt.positions(source)
            for piece in pieces_of(selection, dealt, rank, source):
                mask = piece.plan.to_mask().unflatten(0, (selection.batch, -1))
                spans = zip(piece.queries.spans, piece.keys.spans, strict=True)
                for n, ((q, q_len), (k, k_len)) in enumerate(spans):
                    rows, columns = own[q : q + q_len], theirs[k : k + k_len]
                    total[:, :, rows[:, None], columns] += mask[:, n]
    return total


def plans(seed: int, length: int, **more) -> SparsePlan:
    return random_plan(seed, batch=1, heads=HEADS, query_len=length, key_len=length, **more)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_pieces_make_up_random_plans(kind: str, seed: int) -> None:
    sizes = [(4, 4), (8, 4), (2, 8), (8, 8)][seed % 4]
    limit = 19 if seed % 5 == 4 else None
    length, ranks = [(61, 2), (64, 3), (90, 4), (7, 3)][seed // 3]
    plan = plans(seed, length, block_q=sizes[0], block_k=sizes[1], limit=limit)
    found = computed(selection_of(plan, 8), layout(kind, length, ranks, 8))
    assert torch.equal(found, plan.to_mask().long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 7, 9, 20, 60])
def test_pieces_make_up_windows_and_sinks(kind: str, window: int) -> None:
    extent = Extent.full(1, 90, 90)
    plan = SparsePlan(HEADS, 90, 90, extent, block_q=4, block_k=4, sink=[window // 3, 0], window=[window, window // 2])
    assert torch.equal(computed(selection_of(plan, 8), layout(kind, 90, 3, 8)), plan.to_mask().long())


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_dense_plans_of_batches_of_uneven_length(kind: str) -> None:
    lengths = [51, 90, 0, 7]
    extent = Extent([0] * 4, lengths, [0] * 4, lengths)
    plan = SparsePlan.dense(HEADS, 90, 90, extent)
    assert torch.equal(computed(selection_of(plan, 8), layout(kind, 90, 4, 8)), plan.to_mask().long())


@pytest.mark.parametrize("kind", KINDS)
def test_pieces_make_up_padded_sparse_plans(kind: str) -> None:
    lengths = [51, 90]
    extent = Extent([0] * 2, lengths, [0] * 2, lengths)
    generator = torch.Generator().manual_seed(0)
    listed = torch.rand(2 * HEADS * 6, 90, generator=generator) < 0.1
    plan = SparsePlan.from_block_mask(
        torch.rand(2, HEADS, 23, 23, generator=generator) < 0.2,
        90,
        90,
        extent=extent,
        block_q=4,
        block_k=4,
        column_group=4,
        column_indptr=torch.nn.functional.pad(listed.sum(1).cumsum(0), (1, 0)),
        column_indices=listed.nonzero()[:, 1].to(torch.int32),
        sink=[3, 0],
        window=[0, 11],
    )
    assert torch.equal(computed(selection_of(plan, 8), layout(kind, 90, 3, 8)), plan.to_mask().long())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [64, 91])
def test_pieces_make_up_verticals_and_slashes(kind: str, length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    slashes = torch.rand(1, HEADS, -(-length // 4), generator=generator) < 0.2
    columns = torch.rand(1, HEADS, length, generator=generator) < 0.1
    numbers = torch.zeros(HEADS, dtype=torch.int64)
    fields = (HEADS, torch.tensor([length]), 4, numbers, numbers, None)
    selection = VerticalSlashes(*fields, slashes, columns.nonzero()[:, 2], columns.sum(-1))
    before = torch.arange(length)[:, None] // 4 - torch.arange(length) // 4
    expected = (slashes[:, :, before.clamp(min=0)] & (before >= 0)) | columns[:, :, None]
    expected = expected & torch.ones(length, length, dtype=torch.bool).tril()
    assert torch.equal(computed(selection, layout(kind, length, 3, 8)), expected.long())


def test_a_stripe_of_a_dense_plan_is_one_piece_a_step() -> None:
    selection = selection_of(SparsePlan.dense(HEADS, 256, 256, Extent.full(1, 256, 256)), 16)
    for kind in ("striped", "zigzag", "contiguous"):
        counts = [len(pieces_of(selection, Layout(kind, 256, 2, 16), 1, source)) for source in range(2)]
        assert counts == [1, 1]


@pytest.mark.parametrize(
    ("plan", "unit", "message"),
    [
        (plans(0, 32, permuted=True), 64, "without q_order"),
        (plans(0, 32, causal=False), 64, "causal self-attention"),
        (plans(0, 32, pruned_mean=True), 64, "pruned_mean"),
        (random_plan(0, batch=1, heads=1, query_len=8, key_len=32), 64, "from the first token on"),
        (plans(0, 32, block_q=12, block_k=12), 32, "blocks of 12 tokens must divide"),
    ],
)
def test_plans_that_a_ring_cannot_take_are_refused(plan: SparsePlan, unit: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        selection_of(plan, unit)
