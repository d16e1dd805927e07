"""What a cache keeps, beside the same said in Python numbers."""

import math

import pytest
import torch
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.cache import keep
from gossamer.testing import make_call

CASES = ("no padding", "left padding", "right padding", "chunk", "padded chunk", "static cache", "model window")
KINDS = [(1, "max", "mean"), (5, "mean", "mean"), (7, "max", "max"), (4, "max", "sum")]


def naive_votes(call: AttentionCall, window: int, kernel: int, pool: str, reduce: str) -> list[list[list[float]]]:
    """As the docstring says, pair by pair."""
    extent, share = call.extent, call.share
    found = []
    for b in range(call.batch):
        start, pad, keys = int(extent.query_start[b]), int(extent.key_start[b]), int(extent.key_count[b])
        live = [max(0, -start) + i for i in range(int(extent.query_count[b]))]
        rows = live[-window:]
        before = start + live[-1] + 1 - len(rows)
        heads = []
        for h in range(call.heads):
            sums = [0.0] * extent.longest
            for i in rows:
                seen = [j for j in range(keys) if j <= start + i and start + i - j < (extent.limit or math.inf)]
                logits = [
                    float(call.q[b, h, i].double() @ call.k[b, h // share, pad + j].double()) * call.scale for j in seen
                ]
                total = sum(math.exp(x - max(logits)) for x in logits)
                for j, x in zip(seen, logits, strict=True):
                    sums[j] += math.exp(x - max(logits)) / total
            sums = [x if j < before else 0.0 for j, x in enumerate(sums)]
            pooled = []
            for j in range(len(sums)):
                near = [sums[i] for i in range(j - kernel // 2, j - kernel // 2 + kernel) if 0 <= i < len(sums)]
                one = max(near) if pool == "max" else sum(near) / kernel
                pooled.append(one if j < before else 0.0)
            heads.append(pooled)
        groups = []
        for g in range(call.groups):
            own = torch.tensor(heads[g * share : (g + 1) * share])
            groups.append(getattr(own, {"mean": "mean", "max": "amax", "sum": "sum"}[reduce])(0).tolist())
        found.append(groups)
    return found


@pytest.mark.parametrize(("kernel", "pool", "reduce"), KINDS)
@pytest.mark.parametrize("case", CASES)
def test_votes_are_pooled_column_sums_of_the_last_queries(case: str, kernel: int, pool: str, reduce: str) -> None:
    call = make_call(case, length=30, heads=4, groups=2, dim=8)
    votes = keep.window_votes(call, 6, kernel, pool, reduce)  # type: ignore[arg-type]
    expected = torch.tensor(naive_votes(call, 6, kernel, pool, reduce))
    assert votes.shape == expected.shape
    torch.testing.assert_close(votes, expected, atol=1e-5, rtol=1e-4)


def test_votes_of_a_row_do_not_depend_on_its_padding() -> None:
    call = make_call("left padding", length=30, heads=4, groups=2, dim=8)
    pad, live = int(call.extent.key_start[0]), int(call.extent.key_count[0])
    alone = AttentionCall(call.q[:1, :, pad:], call.k[:1, :, pad:], None, Extent.full(1, live, live))
    together, apart = keep.window_votes(call, 6), keep.window_votes(alone, 6)
    torch.testing.assert_close(together[:1, :, :live], apart)
    assert bool((together[0, :, live:] == 0).all())


def naive_best(votes: list[float], count: int, budget: int, window: int) -> list[int]:
    if count <= budget:
        return list(range(count))
    ranked = sorted(range(count - window), key=lambda j: (-votes[j], j))
    return sorted(ranked[: budget - window]) + list(range(count - window, count))


@pytest.mark.parametrize("budget", [3, 8, 20, 40])
def test_best_keeps_the_window_and_the_most_votes(budget: int) -> None:
    votes = torch.randint(0, 6, (3, 2, 24), generator=torch.Generator().manual_seed(0)).float()  # many are equal
    count, window = torch.tensor([24, 7, 2]), torch.tensor([3, 3, 2])
    kept = keep.best(votes, count, budget, window)
    assert kept.shape[-1] == min(budget, 24)
    for b in range(3):
        for g in range(2):
            expected = naive_best(votes[b, g].tolist(), int(count[b]), budget, int(window[b]))
            dead = [-1] * (kept.shape[-1] - len(expected))
            assert kept[b, g].tolist() == dead + expected


def test_best_takes_a_budget_for_each_row() -> None:
    votes = torch.rand(2, 1, 12, generator=torch.Generator().manual_seed(0))
    kept = keep.best(votes, torch.tensor([12, 12]), torch.tensor([4, 9]), torch.tensor([2, 2]))
    for b, budget in enumerate((4, 9)):
        assert [j for j in kept[b, 0].tolist() if j >= 0] == naive_best(votes[b, 0].tolist(), 12, budget, 2)


@pytest.mark.parametrize(("sink", "recent"), [(0, 3), (2, 4), (4, 0), (4, 30), (40, 3)])
def test_sinks_and_recent(sink: int, recent: int) -> None:
    counts = [20, 3, 0, 7]
    kept = keep.sinks_and_recent(torch.tensor(counts), sink, recent)
    expected = [sorted({*range(min(sink, n)), *range(max(0, n - recent), n)}) for n in counts]
    most = max(map(len, expected))
    assert kept.tolist() == [[-1] * (most - len(row)) + row for row in expected]


def authors_budget(layer: int, layers: int, tokens: int, capacity: int, window: int, beta: int) -> int:
    """Of ``pyramidkv_utils.py``, in the words of the specification; the window included."""
    low = (capacity - window) // beta
    high = 2 * (capacity - window) - low
    if high >= tokens - window:
        high = tokens - window
        low = 2 * (capacity - window) - high
    step = (high - low) // max(layers - 1, 1)
    if tokens < capacity:
        return tokens
    return capacity if tokens < 2 * (capacity - window) else high - layer * step + window


@pytest.mark.parametrize("beta", [5, 20])
def test_pyramid_budgets_are_the_authors(beta: int) -> None:
    tokens = [10, 63, 64, 100, 111, 112, 118, 119, 120, 130, 1000]
    for layer in range(7):
        found = keep.pyramid_budgets(layer, 7, torch.tensor(tokens), 64, 8, beta)
        assert found.tolist() == [authors_budget(layer, 7, n, 64, 8, beta) for n in tokens]


def test_pyramid_budgets_fall_and_mean_the_budget() -> None:
    budgets = [int(keep.pyramid_budgets(layer, 8, torch.tensor([5000]), 64, 8)) for layer in range(8)]
    assert budgets == sorted(budgets, reverse=True)
    assert abs(sum(budgets) / 8 - 64) < 8
    assert int(keep.pyramid_budgets(0, 1, torch.tensor([5000]), 64, 8)) == 64


def test_votes_of_all_queries_are_the_attention_of_the_last() -> None:
    """A prompt no longer than the window has no votes: all is kept."""
    call = make_call("no padding", length=5, heads=2, groups=1, dim=4)
    votes: Tensor = keep.window_votes(call, 8)
    assert bool((votes == 0).all())
    assert keep.best(votes, torch.tensor([5]), 3, torch.tensor([3])).tolist() == [[[2, 3, 4]]]
