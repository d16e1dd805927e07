"""What the simulator says of a ring, beside what a ring does."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import ranks
import torch
from test_layout import layout
from test_steps import plans

from gossamer import Extent, SparsePlan
from gossamer.distributed import KINDS, Layout, RingPlan, pieces_of, planted, ring_attention, selection_of, simulate
from gossamer.distributed.simulate import Layer, Machine, work_of, work_of_units

LAYER = Layer(heads=2, groups=2, head_dim=8, itemsize=4)


def counted(selection, dealt: Layout) -> torch.Tensor:
    """Pairs of what ranks really compute, ``[ranks, steps]``."""
    pairs = torch.zeros(dealt.ranks, dealt.ranks, dtype=torch.float64)
    for rank, step in itertools.product(range(dealt.ranks), repeat=2):
        for piece in pieces_of(selection, dealt, rank, dealt.source(rank, step)):
            pairs[rank, step] += int(piece.plan.count_pairs().sum())
    return pairs


def dense(length: int, limit: int | None = None) -> SparsePlan:
    return SparsePlan.dense(2, length, length, Extent.full(1, length, length, limit=limit))


@pytest.mark.parametrize("kind", KINDS)
def test_work_of_dense_plans_and_blocks_is_exact(kind: str) -> None:
    dealt = layout(kind, 96, 4, 8)
    mask = torch.rand(1, 2, 24, 24, generator=torch.Generator().manual_seed(0)) < 0.3
    for plan in (dense(96), SparsePlan.from_block_mask(mask, 96, 96, block_q=4, block_k=4)):
        selection = selection_of(plan, 8)
        assert torch.equal(work_of(selection, dealt), counted(selection, dealt))


@pytest.mark.parametrize("kind", KINDS)
def test_work_of_bands_and_columns_is_exact_where_they_do_not_meet(kind: str) -> None:
    dealt = layout(kind, 96, 3, 8)
    for plan in (
        SparsePlan(2, 96, 96, Extent.full(1, 96, 96), block_q=4, block_k=4, window=[13, 5]),
        SparsePlan(2, 96, 96, Extent.full(1, 96, 96), block_q=4, block_k=4, sink=[8, 4]),
        dense(96, limit=17),
    ):
        selection = selection_of(plan, 8)
        diagonal = 0 if plan.extent.limit or int(torch.as_tensor(plan.window).max()) else 2 * 3 * 4 * 4
        assert (work_of(selection, dealt) - counted(selection, dealt)).abs().sum() <= diagonal


@pytest.mark.parametrize("seed", range(4))
def test_work_of_random_plans_is_near(seed: int) -> None:
    dealt = layout("striped", 160, 4, 8)
    selection = selection_of(plans(seed, 160, block_q=8, block_k=8), 8)
    exact = counted(selection, dealt)
    assert float((work_of(selection, dealt) - exact).abs().sum()) <= 0.15 * float(exact.sum())


def test_planted_plans_are_balanced_in_stripes_and_not_in_pieces() -> None:
    selection = planted(65536, heads=8, verticals=500, slashes=64)
    machine = Machine(1e9, 5e8, 1e10)

    def imbalance(kind: str) -> float:
        layer = Layer(heads=8, groups=2, head_dim=8)
        return simulate(selection, Layout(kind, 65536, 32), layer, machine).mean_imbalance

    assert imbalance("striped") <= 1.1
    assert imbalance("zigzag") >= 1.5
    assert imbalance("contiguous") >= 1.3


def test_bytes_are_those_of_keys_and_of_their_sums() -> None:
    dealt = Layout("striped", 128, 4, 8)
    found = simulate(selection_of(dense(128), 8), dealt, LAYER, Machine(1e6, 1e6, 1e6))
    keys = 2 * 2 * 8 * 4 * 32
    assert found.sent_forward == 3 * keys
    assert found.sent_backward == 3 * keys + 4 * keys  # sums are fp32 too, and go home


def sent(rank: int, dealt: Layout) -> tuple[int, int]:
    """Bytes that a rank really sends, forward and backward."""
    total, send = [0], torch.distributed.batch_isend_irecv

    def counting(operations):
        total[0] += sum(one.tensor.nbytes for one in operations if one.op is torch.distributed.isend)
        return send(operations)

    torch.distributed.batch_isend_irecv = counting
    q, k, v = (torch.randn(1, 2, dealt.tokens(rank), 8, requires_grad=True) for _ in range(3))
    out, _ = ring_attention(q, k, v, RingPlan.dense(dealt, rank, heads=2))
    forward = total[0]
    out.sum().backward()
    return forward, total[0] - forward


@pytest.mark.parametrize(("count", "kind"), [(2, "striped"), (4, "hierarchical")])
def test_bytes_are_those_that_a_ring_sends(count: int, kind: str, tmp_path: Path) -> None:
    dealt = layout(kind, 88, count, 8)
    found = simulate(selection_of(dense(88), 8), dealt, LAYER, Machine(1e6, 1e6, 1e6))
    really = [torch.load(path) for path in ranks.run(sent, count, tmp_path, dealt)]
    assert found.sent_forward == max(forward for forward, _ in really)
    assert found.sent_backward == max(backward for _, backward in really)


def test_a_plan_of_other_heads_is_refused() -> None:
    with pytest.raises(ValueError, match="the plan has 2 heads"):
        simulate(selection_of(dense(64), 8), Layout("striped", 64, 2, 8), Layer(4, 1, 8), Machine(1.0, 1.0, 1.0))


def test_an_infinitely_fast_network_leaves_the_work() -> None:
    dealt = Layout("striped", 128, 4, 8)
    selection = selection_of(dense(128), 8)
    found = simulate(selection, dealt, LAYER, Machine(1e3, 5e2, 1e18))
    work = work_of(selection, dealt)
    assert found.forward_s == pytest.approx(float(work.sum(dim=1).max()) / 1e3, rel=0.2)
    assert found.forward_s >= float(work.sum(dim=1).max()) / 1e3 - 1e-9
    assert found.backward_s >= 2 * found.forward_s - 1e-9
    assert 0.8 <= found.efficiency <= 1


def test_a_slow_network_is_waited_for_and_a_nested_ring_hides_the_slow_part() -> None:
    slow = Machine(1e9, 1e9, 1e6, between_nodes=2.5e5)
    selection = selection_of(dense(128), 8)
    keys = 2 * 2 * 8 * 4 * 32
    flat = simulate(selection, Layout("striped", 128, 4, 8), LAYER, slow)
    assert flat.forward_s == pytest.approx(3 * keys / 1e6, rel=0.01)
    nested = simulate(selection, Layout("hierarchical", 128, 4, 8, 2), LAYER, slow)
    apart = simulate(selection, Layout("hierarchical", 128, 4, 8, 1), LAYER, slow)
    # Two nodes: one slow message beside one fast, then a fast one; else three slow ones.
    assert nested.forward_s == pytest.approx((4 + 1) * keys / 1e6, rel=0.01)
    assert apart.forward_s == pytest.approx(12 * keys / 1e6, rel=0.01)


@pytest.mark.parametrize("field", ["pairs_per_second", "pairs_per_second_backward", "bandwidth", "between_nodes"])
def test_a_machine_that_does_nothing_is_refused(field: str) -> None:
    numbers = {"pairs_per_second": 1.0, "pairs_per_second_backward": 1.0, "bandwidth": 1.0} | {field: 0.0}
    with pytest.raises(ValueError, match=field):
        Machine(**numbers)


def test_the_page_gives_the_imbalance_of_planted_plans() -> None:
    selection, machine = planted(65536, heads=8, verticals=500, slashes=64), Machine(1e9, 5e8, 1e10)
    units, layer = work_of_units(selection, 128), Layer(heads=8, groups=2, head_dim=8)
    striped, zigzag, contiguous = (
        simulate(selection, Layout(kind, 65536, 32), layer, machine, units=units).mean_imbalance
        for kind in ("striped", "zigzag", "contiguous")
    )
    page = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")
    said = f"{striped:.2f} striped, {zigzag:.2f} in zigzag and {contiguous:.2f} in contiguous pieces"
    assert said in page, said
    assert striped <= 1.1
