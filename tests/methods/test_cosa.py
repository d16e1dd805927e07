"""CoSA's choice against one written from its formulas, and what the flags decide."""

import math
from dataclasses import replace

import pytest
import torch
from definitions import Row
from naive import QueryBlock, assert_chosen, cell_rows

from gossamer import AttentionCall
from gossamer.methods import CoSA, PerHead
from gossamer.testing import SITUATIONS, make_call

pytestmark = pytest.mark.usefixtures("smallest_constants")


def naive(call: AttentionCall, method: CoSA):
    per_block = method.block // method.stride

    def chosen(b: int, row: Row, head: int, block: QueryBlock) -> set[int]:
        score = dict.fromkeys(block.seen, 0.0)
        flagged: set[int] = set()
        for logits in cell_rows(call, b, row, head, block, method.stride):
            peaks: dict[int, float] = {}
            for u, logit in logits.items():
                peaks[u // per_block] = max(peaks.get(u // per_block, -math.inf), logit)
            for n, peak in peaks.items():
                beside = math.exp(peak - max(peaks.values()))
                score[n] += beside
                if beside >= 1 - 1e-3:
                    flagged.add(n)
        forced = (block.own | set(range(method.sink_blocks))) & set(score)

        def priority(n: int) -> tuple[int, float, int]:
            return (0 if n in forced else 1 if n in flagged else 2, -score[n], n)

        kept, held = set(forced), 0.0
        for n in sorted(score, key=priority):
            if held < method.p * sum(score.values()) or method.p == 1:
                kept.add(n)
            held += score[n]
        return kept

    return chosen


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("method", [CoSA(0.6, 1, 8, 4), CoSA(0.3, 0, 8, 2), CoSA(0.9, 2, 16, 8), CoSA(1.0, 0, 16, 16)])
def test_blocks_are_those_of_the_formulas(situation: str, method: CoSA) -> None:
    call = make_call(situation, length=90, heads=2, groups=1, dim=8)
    for scale in (1.5, -0.7):
        scaled = replace(call, scale=scale)
        assert_chosen(scaled, method.plan(scaled), naive(scaled, method))


def test_a_block_that_one_query_looks_at_most_comes_before_larger_sums() -> None:
    """The last query looks at block 2 alone, and the 7 beside it at all others, at block 5 a little more."""
    q, k = torch.zeros(1, 1, 64, 8), torch.zeros(1, 1, 64, 8)
    q[..., 0], k[0, 0, 16:24, 0], k[0, 0, 40:48, 0] = 1.0, -9.0, 0.05
    q[0, 0, 63, 0], q[0, 0, 63, 1], k[0, 0, 16:24, 1] = 0.0, 20.0, 1.0
    call = AttentionCall(q, k, scale=1.0)
    # Block 2 has 1 of a sum of 48, block 5 has 7, the others 6.7 each; blocks 0 and 7 are forced.
    for p, chosen in ((0.1, [0, 7]), (0.28, [0, 5, 7]), (0.43, [0, 2, 5, 7]), (0.45, [0, 1, 2, 5, 7])):
        assert CoSA(p, 1, 8, 1).plan(call).block_mask()[0, 0, 7].nonzero().flatten().tolist() == chosen


def test_flagged_blocks_behind_the_crossing_are_out() -> None:
    call = make_call("no padding", length=90, heads=2, groups=1, dim=8)
    few, more = (CoSA(p, 0, 8, 2).plan(call).density() for p in (0.1, 0.9))
    assert few < 0.5 < more


def test_p_of_one_takes_blocks_without_any_mass() -> None:
    q, k = torch.ones(1, 1, 64, 4), torch.zeros(1, 1, 64, 4)
    k[0, 0, :8] = 1e4
    assert CoSA(1.0, 0, 8, 8).plan(AttentionCall(q, k)).density() == 1.0
    assert CoSA(0.999, 0, 8, 8).plan(AttentionCall(q, k)).density() < 0.5


def test_heads_with_thresholds_of_their_own_are_planned_together() -> None:
    call = make_call("left padding", length=90, heads=2, groups=1, dim=8)
    each = [CoSA(0.3, 1, 8, 4), CoSA(0.8, 1, 8, 4)]
    mixed = PerHead([each]).plan(call).block_mask()
    for head, method in enumerate(each):
        assert torch.equal(mixed[:, head], method.plan(call).block_mask()[:, head])


def test_a_stride_that_does_not_divide_the_block_is_named() -> None:
    with pytest.raises(ValueError, match=r"cosa\.stride must divide block, got 3 for blocks of 128"):
        CoSA(stride=3)


def test_every_number_has_a_least_value() -> None:
    least = {"sink_blocks": 0, "block": 8, "stride": 1}
    assert CoSA(**least | {"block": 1}).to_dict() == CoSA().to_dict() | least | {"block": 1}
    for field, value in least.items():
        with pytest.raises(ValueError, match=f"cosa.{field} must "):
            CoSA(**{field: min(value, 1) - 1})


def test_defaults_are_the_published_ones() -> None:
    assert CoSA().to_dict() == {"method": "cosa", "p": 0.8, "sink_blocks": 1, "block": 128, "stride": 8}
