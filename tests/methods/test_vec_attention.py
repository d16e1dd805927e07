"""VecAttention's columns against ones written from its formula, key by key."""

import math
from dataclasses import replace

import pytest
import torch
from definitions import rows_of
from naive import blocks_of, tokens

from gossamer import AttentionCall
from gossamer.methods import PerHead, VecAttention
from gossamer.testing import SITUATIONS, make_call

pytestmark = pytest.mark.usefixtures("smallest_constants")


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize(
    "method", [VecAttention(0.3, 1, 1, 8), VecAttention(0.05, 0, 2, 16), VecAttention(1.0, 2, 1, 8)]
)
def test_keys_are_those_of_the_formula(situation: str, method: VecAttention) -> None:
    plain = make_call(situation, length=90, heads=4, groups=2, dim=8)
    for scale in (plain.scale, -0.6):
        call = replace(plain, scale=scale)
        mask = method.plan(call).to_mask()
        for b, row in enumerate(rows_of(call.extent)):
            for block in blocks_of(row, method.block, method.block).values():
                seen = [j for j in range(row.key_count) if any(row.allows(i, j) for i in block.positions)]
                far = method.window_blocks - 1
                near = {n for own in block.own for n in range(own - far, own + (0 if row.causal else far) + 1)}
                for h in range(4):
                    q = tokens(call.q, b, h, -row.query_start, block.positions).mean(0)
                    x = {j: scale * float(q @ call.k[b, h // 2, j + row.key_start].double()) for j in seen}
                    top = max(x.values(), default=0.0)
                    kept = {j for j in seen if math.exp(x[j] - top) >= method.threshold}
                    kept |= {j for j in seen if j // method.block in near | set(range(method.sink_blocks))}
                    for i in block.positions:
                        got = mask[b, h, i - row.query_start].nonzero().flatten() - row.key_start
                        assert set(got.tolist()) == {j for j in kept if row.allows(i, j)}


def test_a_threshold_of_zero_is_dense_however_far_logits_lie_apart() -> None:
    call = make_call("no padding", length=90, heads=2, groups=1, dim=8)
    far = replace(call, q=100 * call.q)
    assert VecAttention(0.0, 0, 1, 8).plan(far).density() == 1.0
    assert VecAttention(1e-6, 0, 1, 8).plan(far).density() < 0.6


def test_a_single_key_is_found_and_its_neighbours_are_left_out() -> None:
    q, k = torch.ones(1, 1, 128, 4), torch.zeros(1, 1, 128, 4)
    k[0, 0, 37] = 9.0
    mask = VecAttention(0.1, 1, 1, 8).plan(AttentionCall(q, k)).to_mask()[0, 0]
    assert mask[100].nonzero().flatten().tolist() == [*range(8), 37, *range(96, 101)]


def test_heads_with_thresholds_of_their_own_are_planned_together() -> None:
    call = make_call("left padding", length=90, heads=2, groups=1, dim=8)
    each = [VecAttention(0.3, 1, 1, 8), VecAttention(0.01, 1, 1, 8)]
    mixed = PerHead([each]).plan(call).to_mask()
    for head, method in enumerate(each):
        assert torch.equal(mixed[:, head], method.plan(call).to_mask()[:, head])


def test_defaults_are_the_published_ones() -> None:
    fields = {"threshold": 0.1, "sink_blocks": 1, "window_blocks": 1, "block": 64}
    assert VecAttention().to_dict() == {"method": "vec_attention", **fields}
