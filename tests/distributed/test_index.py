"""The columns and diagonals that ranks find together are those of one process."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import ranks
import torch
from test_layout import layout
from torch import Tensor

from gossamer import AttentionCall, Extent, backends
from gossamer.distributed import KINDS, Layout, RingPlan, TopP, plan_vertical_slash, ring_attention
from gossamer.methods import VerticalSlash

HEADS, GROUPS, DIM = 4, 2, 16


@dataclass(frozen=True)
class Case:
    kind: str
    length: int
    seed: int
    budget: TopP | VerticalSlash
    lengths: tuple[int, ...] = ()
    scale: float = 1.0

    def layout(self, count: int) -> Layout:
        return layout(self.kind, self.length, count, 64)

    def live(self) -> Tensor:
        return torch.tensor(self.lengths or (self.length,))

    def tensors(self) -> list[Tensor]:
        """Keys that are heavy in a few columns, so that a small budget says something."""
        draw = torch.Generator().manual_seed(self.seed)
        shape = (len(self.live()), HEADS, self.length, DIM)
        q, k, v = (torch.randn(shape[0], n, *shape[2:], generator=draw) for n in (HEADS, GROUPS, GROUPS))
        return [q, k * (1 + 3 * (torch.rand(k.shape[:3], generator=draw) < 0.03))[..., None], v]


def share(rank: int, cases: list[Case]) -> list[tuple[Tensor, ...]]:
    found = []
    for case in cases:
        dealt = case.layout(torch.distributed.get_world_size())
        q, k, v = (dealt.split(x, rank) for x in case.tensors())
        selection = plan_vertical_slash(q, k, dealt, budget=case.budget, lengths=case.live(), scale=case.scale)
        out, _ = ring_attention(q, k, v, RingPlan(selection, dealt, rank), scale=case.scale)
        found.append((selection.slashes, selection.verticals, selection.vertical_counts, out))
    return found


CASES = [
    *(Case(kind, 500, seed, VerticalSlash(40, 128, last=32)) for seed, kind in enumerate(KINDS)),
    *(Case(kind, 330, seed, TopP(0.8, 200)) for seed, kind in enumerate(KINDS)),
    Case("striped", 448, 4, VerticalSlash(70, 192), (448, 201)),
    Case("zigzag", 448, 5, TopP(0.6, 64, last=16), (17, 448)),
    Case("contiguous", 100, 6, TopP(0.95, 4096)),
    Case("striped", 40, 7, VerticalSlash()),
]


def of_formula(case: Case) -> tuple[Tensor, Tensor]:
    """Bands and columns by the paper's words, with no regard to cost, fp64: bool ``[B, H, N]`` each."""
    budget, (q, k, _) = case.budget, case.tensors()
    assert isinstance(budget, TopP)
    bands, columns = (torch.zeros(*q.shape[:2], n, dtype=torch.bool) for n in (-(-case.length // 64), case.length))
    for b, live in enumerate(case.live().tolist()):
        for h in range(HEADS):
            rows = torch.arange(max(0, live - budget.last), live)
            logits = q[b, h, rows].double() @ k[b, h // 2, :live].double().T * case.scale
            before = rows[:, None] - torch.arange(live)
            weights = logits.masked_fill(before < 0, float("-inf")).softmax(-1)
            mass = torch.zeros(len(bands[b, h]) + 1, dtype=torch.float64)
            band, share = before[before >= 0] // 64, before[before >= 0] % 64 / 64
            mass.index_add_(0, band, weights[before >= 0] * (1 - share))
            mass.index_add_(0, band + 1, weights[before >= 0] * share)
            for chosen, masses, most in (
                (columns[b, h], weights.sum(0), budget.most),
                (bands[b, h], mass, -(-budget.most // 64)),
            ):
                order = masses.argsort(descending=True)
                count = min(int((masses[order].cumsum(0) < budget.p * len(rows)).sum()), most)
                chosen[order[:count][order[:count] < len(chosen)]] = True
            bands[b, h, 0] = True
    return bands, columns


def assert_as_one_process(case: Case, dealt: Layout, parts: list[tuple[Tensor, ...]]) -> None:
    slashes, verticals, counts, _ = parts[0]
    for part in parts[1:]:
        assert all(torch.equal(one, other) for one, other in zip(part[:3], parts[0][:3], strict=True))
    out = dealt.join([part[3] for part in parts])
    q, k, v = case.tensors()
    live = case.live()
    call = AttentionCall(q, k, v, Extent(0 * live, live, 0 * live, live), scale=case.scale)
    if isinstance(case.budget, VerticalSlash):
        plan = case.budget.plan(call)
        expected = backends.attend(call, plan)[0]
        assert float((out - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    else:
        bands, columns = of_formula(case)
        assert torch.equal(slashes, bands)
        assert torch.equal(counts, columns.sum(-1))
        assert torch.equal(verticals, columns.nonzero()[:, 2])


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_find_the_plan_of_one_process(count: int, tmp_path: Path) -> None:
    answers = [torch.load(path) for path in ranks.run(share, count, tmp_path, CASES)]
    for n, case in enumerate(CASES):
        assert_as_one_process(case, case.layout(count), [answer[n] for answer in answers])


@pytest.mark.parametrize("fields", [{"p": 0}, {"p": 1.5}, {"p": True}, {"most": 0}, {"last": 0}])
def test_budgets_out_of_range_are_refused(fields: dict) -> None:
    with pytest.raises((ValueError, TypeError), match=f"TopP.{next(iter(fields))}"):
        TopP(**fields)


def test_exact_diagonals_are_refused() -> None:
    x = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ValueError, match="exact=False"):
        plan_vertical_slash(x, x, Layout("striped", 8, 1), budget=VerticalSlash(exact=True))
