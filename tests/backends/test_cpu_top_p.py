"""Top-p rules in C++ choose exactly the sets of the torch selectors."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gossamer import estimators
from gossamer.backends import cpu
from gossamer.backends.cpu import planning
from gossamer.methods import _choice
from gossamer.plan import ceil_div
from gossamer.testing import SITUATIONS, make_case

pytestmark = [
    pytest.mark.skipif(not cpu.is_available(), reason=f"no C++ kernels: {cpu.why_unavailable()}"),
    pytest.mark.usefixtures("poisoned_memory"),
]
SHARES = ("top_p", "top_p_forced", "top_p_reaching", "top_p_below", "top_p_of_all_rows")
every_share = pytest.mark.parametrize("rule", SHARES)
BATCH, HEADS, ROWS = 2, 4, 70


def draw(kind: str, width: int, generator: torch.Generator) -> Tensor:
    shape = (BATCH, HEADS, ROWS, width)
    if kind == "ties":  # few values, whole rows of 0 among them
        return torch.randint(0, 6, shape, generator=generator).float() * torch.randint(0, 4, (ROWS, 1)).clamp(max=1)
    scores = torch.rand(shape, generator=generator).pow(30)  # as softmaxed scores are: many decades
    if kind == "spoilt":
        scores[torch.rand(shape, generator=generator) < 1 / width] = math.nan
        scores[torch.rand(shape, generator=generator) < 1 / width] = math.inf
        return torch.where(scores < 1e-20, -0.0, scores)
    return scores / scores.sum(-1, keepdim=True).clamp(min=1e-30)


def masks_of(counts: Tensor, indices: Tensor, width: int) -> Tensor:
    row = torch.repeat_interleave(torch.arange(counts.numel()), counts.flatten())
    mask = torch.zeros(counts.numel(), width, dtype=torch.bool)
    mask[row, indices.long()] = True
    return mask.view(*counts.shape, width)


@every_share
@pytest.mark.parametrize("kind", ["ties", "softmax", "spoilt"])
@pytest.mark.parametrize("width", [1, 63, 64, 65, 255, 256, 3000])
def test_the_sets_are_those_of_the_selectors(rule: str, kind: str, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    scores = draw(kind, width, generator)
    ends = torch.randint(0, width + 1, (3, BATCH, ROWS, 2), generator=generator).sort(dim=-1).values
    seen_range, forced_range, leading_range = ends[0], ends[1], ends[2, :, 0]
    column = torch.arange(width)

    def inside(ranges: Tensor) -> Tensor:
        return (column >= ranges[..., :1]) & (column < ranges[..., 1:])

    seen = inside(seen_range)[:, None]
    forcing = torch.tensor([[True, False, True, False], [True, True, False, True]])
    forced = (inside(forced_range)[:, None] | inside(leading_range)[:, None, None]) & forcing[:, :, None, None]
    share = torch.tensor([0.0, 0.5, 0.9, 1.0])
    expected = _choice._select(scores, rule, share, seen, forced) | forced
    kwargs: dict[str, Any] = {rule: share}
    ranges = planning.Ranges(seen_range, forced_range, leading_range)
    lists = planning.choose(ranges, HEADS, width, scores=scores, forcing=forcing, **kwargs)
    assert torch.equal(masks_of(*lists, width), expected & seen)


def test_shares_at_the_edge_of_an_exact_sum() -> None:
    """2^-k sums to 1 - 2^-n exactly: p is met to the last bit, and the sums run from the best entry down."""
    scores = torch.tensor([0.0625, 0.5, 0.125, 0.25, 0.0625]).expand(1, 1, 1, 5)
    everything, nothing = torch.tensor([[[0, 5]]]), torch.zeros(1, 1, 2, dtype=torch.int64)
    ranges = planning.Ranges(everything, nothing, nothing[:, 0])

    def chosen(rule: str, p: float) -> list[int]:
        kwargs: dict[str, Any] = {rule: p}
        return planning.choose(ranges, 1, 5, scores=scores, **kwargs)[1].tolist()

    above = math.nextafter(0.875, 1.0)
    assert chosen("top_p", 0.875) == chosen("top_p_below", 0.875) == chosen("top_p_reaching", 0.875) == [1, 2, 3]
    assert chosen("top_p", above) == chosen("top_p_reaching", above) == [0, 1, 2, 3]  # of equals the lower index
    assert chosen("top_p_below", above) == [1, 2, 3]


def test_a_share_is_taken_in_fp64() -> None:
    """Ten entries hold 2 less than 0.9 of 160 million: below 0.9, but above what 0.9 is in fp32."""
    scores = torch.tensor([14_400_000.0] * 9 + [14_399_998.0, 4_000_002.0] + [4_000_000.0] * 3).view(1, 1, 1, 14)
    everything, nothing = torch.tensor([[[0, 14]]]), torch.zeros(1, 1, 2, dtype=torch.int64)
    counts, _ = planning.choose(planning.Ranges(everything, nothing, nothing[:, 0]), 1, 14, scores=scores, top_p=0.9)
    selected = _choice._select(scores, "top_p", 0.9, torch.tensor(True), torch.tensor(False))
    assert int(counts) == int(selected.sum()) == 11


def build(rule: dict[str, Tensor | float], situation: str, length: int) -> tuple[Tensor, Tensor]:
    """A choice in two parts, with everything that a method can force, on scores of 9 in 10 among the seen blocks."""
    case = make_case(situation, length=length, heads=4, groups=2, dim=8)
    visible = estimators.BlockVisibility(case.extent, case.query_len, case.key_len, 64, 32, case.q.device)
    batch, blocks = visible.last_query.shape
    generator = torch.Generator().manual_seed(length)
    choice = _choice.BlockChoice(
        visible,
        4,
        leading=1,
        tail=torch.arange(blocks).expand(batch, -1) == blocks // 3,
        bands=torch.rand(batch, 4, 9, generator=generator) < 0.1,
        forcing=torch.tensor([True, False, True, True]).expand(batch, 4),
    )
    scores = torch.rand(batch, 4, blocks, ceil_div(case.key_len, 32), generator=generator).pow(9)
    # What lies outside is left out, whatever it holds.
    scores = torch.where(visible.any_pair(0, blocks)[:, None], scores, 7.0)
    choice.add(0, blocks // 2, scores[:, :, : blocks // 2], **rule)
    choice.add(blocks // 2, blocks, scores[:, :, blocks // 2 :], **rule)
    return choice.build()


@pytest.fixture
def with_planner(monkeypatch) -> Callable[[str], None]:
    return lambda name: monkeypatch.setenv(planning.ENVIRONMENT, name)


@every_share
@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("length", [1, 65, 1000])
@pytest.mark.parametrize("share", [0.8, torch.tensor([0.0, 0.3, 0.95, 1.0])], ids=["one", "a head"])
def test_block_choice_is_the_same_in_torch(
    with_planner: Callable, rule: str, situation: str, length: int, share: Tensor | float
) -> None:
    ours = build({rule: share}, situation, length)
    with_planner("torch")
    for got, oracle in zip(ours, build({rule: share}, situation, length), strict=True):
        assert torch.equal(got, oracle)


@every_share
def test_choices_do_not_depend_on_threads(rule: str) -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = build({rule: 0.7}, "left padding", 5000)
        for threads in (2, 5):
            torch.set_num_threads(threads)
            assert all(
                torch.equal(*pair) for pair in zip(build({rule: 0.7}, "left padding", 5000), expected, strict=True)
            )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("planner", ["", "torch"])
def test_bad_rules_are_named(with_planner: Callable, planner: str) -> None:
    with_planner(planner)
    with pytest.raises(ValueError, match=r"p must lie in \[0, 1\], got 1.5"):
        build({"top_p": 1.5}, "no padding", 65)
    with pytest.raises(TypeError, match=r"exactly one rule of alpha, budgets, .*; got scores with top_p, alpha"):
        build({"top_p": 0.5, "alpha": 0.5}, "no padding", 65)
    with pytest.raises(TypeError, match="got scores with no rule"):
        build({}, "no padding", 65)
    with pytest.raises(TypeError, match="got scores with share"):
        build({"share": 0.5}, "no padding", 65)
