"""The reference executor against attention written out pair by pair, and against torch's SDPA."""

import math

import pytest
import torch
import torch.nn.functional as F

from gossamer import Extent, SparsePlan
from gossamer.backends import torch as reference
from gossamer.testing import random_plan


@pytest.mark.parametrize("seed", range(8))
def test_equals_attention_written_out(seed: int) -> None:
    torch.manual_seed(seed)
    heads_of_plan = [2, 4][seed % 2]
    plan = random_plan(
        seed,
        batch=2,
        heads=heads_of_plan,
        query_len=9,
        key_len=13,
        block_q=4,
        block_k=4,
        padded=seed % 3 == 0,
        permuted=seed % 4 == 1,
        causal=seed != 5,
    )
    q, k, v = (torch.randn(2, n, t, 8).double() for n, t in ((4, 9), (2, 13), (2, 13)))
    sinks = torch.randn(4).double() if seed % 2 else None
    softcap = 3.0 if seed % 3 == 1 else None
    out, lse = reference.execute(q, k, v, plan, scale=0.4, sinks=sinks, softcap=softcap)
    mask = plan.to_mask()
    for b in range(2):
        for h in range(4):
            for i in range(9):
                weights = []
                for j in range(13):
                    if not mask[b, h * heads_of_plan // 4, i, j]:
                        weights.append(0.0)
                        continue
                    logit = 0.4 * float(q[b, h, i] @ k[b, h // 2, j])
                    weights.append(math.exp(softcap * math.tanh(logit / softcap) if softcap else logit))
                total = sum(weights) + (math.exp(float(sinks[h])) if sinks is not None else 0.0)
                expected = sum(w * v[b, h // 2, j] for j, w in enumerate(weights)) / total if total else v[0, 0, 0] * 0
                torch.testing.assert_close(out[b, h, i], torch.as_tensor(expected))
                assert float(lse[b, h, i]) == pytest.approx(math.log(total) if total else -math.inf)


def test_dense_plan_equals_sdpa() -> None:
    q, k, v = torch.randn(2, 4, 200, 32), torch.randn(2, 2, 200, 32), torch.randn(2, 2, 200, 32)
    plan = SparsePlan.dense(2, 200, 200, Extent.full(2, 200, 200))
    out, _ = reference.execute(q, k, v, plan, scale=32**-0.5)
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(out, expected)


def test_nan_in_dead_slots_stays_there() -> None:
    q, k, v = torch.randn(1, 1, 5, 8), torch.full((1, 1, 9, 8), torch.nan), torch.full((1, 1, 9, 8), torch.nan)
    k[:, :, :5], v[:, :, :5] = 0.5, 2.0
    out, lse = reference.execute(q, k, v, SparsePlan.dense(1, 5, 9, Extent([0], [0], [5])), scale=1.0)
    assert bool(out.isfinite().all() and lse.isfinite().all())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((1, 3, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "3 query heads must be a multiple"),
        (((1, 2, 4, 8), (1, 2, 4, 16), (1, 2, 4, 16)), "do not fit"),
        (((2, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)), "do not fit"),
        (((2, 4, 8), (2, 4, 8), (2, 4, 8)), r"must be \[batch"),
        (((1, 4, 4, 8), (1, 4, 4, 8), (1, 4, 4, 8)), "the plan has 2 heads"),
        (((1, 2, 5, 8), (1, 2, 5, 8), (1, 2, 5, 8)), "the plan is for batch 1, 4 queries"),
    ],
)
def test_bad_shapes_are_named(shapes: tuple, message: str) -> None:
    plan = SparsePlan.dense(2, 4, 4, Extent.full(1, 4, 4))
    q, k, v = (torch.randn(s) for s in shapes)
    with pytest.raises(ValueError, match=message):
        reference.execute(q, k, v, plan, scale=1.0)
