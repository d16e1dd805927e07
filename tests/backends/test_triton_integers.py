"""Quantised plans in Triton against the definition: on a CUDA device where there is one, else interpreted."""

import pytest
import torch
from encoded_calls import drawn
from triton_checks import check, draw, plan_for
from triton_support import DEVICE, DTYPES, MARKS

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import triton
from gossamer.backends.triton import config
from gossamer.testing import SITUATIONS, make_call, random_plan

pytestmark = MARKS
SMALL = config.Config(32, 16, 4, 1)


@pytest.mark.parametrize("situation", SITUATIONS)
def test_products_of_integers_in_every_situation(situation: str) -> None:
    """Blocks, columns and bands; a head dimension below the least of an int8 product, and one between powers of two."""
    turn = SITUATIONS.index(situation)
    call = make_call(situation, length=90, heads=4, groups=2, dim=[16, 40][turn % 2],
                     dtype=list(DTYPES.values())[turn % 3])  # fmt: skip
    plan = plan_for(call, turn, heads=[2, 4][turn // 2 % 2])
    check(call, plan.with_attributes(quantised=True), None if turn % 2 else SMALL)


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_all_that_a_model_may_ask_for(scale: float) -> None:
    """Sinks, a soft-cap, wider values; no gain, or one below 0."""
    plan = random_plan(1, batch=2, heads=2, query_len=40, key_len=90, padded=True)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(0))
    call = draw(plan, heads=4, groups=2, dim=24, value_dim=40, sinks=sinks, softcap=3.0, scale=scale)
    check(call, plan.with_attributes(quantised=True))


def test_orders_of_queries_and_keys() -> None:
    call = make_call("no padding", length=90, heads=4, groups=2, dim=32)
    check(call, plan_for(call, 2, heads=4, orders="qk").with_attributes(quantised=True), SMALL)


def test_rows_leave_tiles_out_by_logits_of_integers() -> None:
    plan = random_plan(3, batch=1, heads=2, query_len=60, key_len=260, skip=0.5)
    check(draw(plan, heads=4, groups=2, dim=32, scale=0.5), plan.with_attributes(skip=0.5, quantised=True))


def test_a_bias_is_added_to_products_of_integers() -> None:
    plan = random_plan(2, batch=1, heads=2, query_len=30, key_len=80)
    bias = torch.randn(1, 2, 80, generator=torch.Generator().manual_seed(0))
    check(draw(plan, heads=4, groups=2, dim=32, bias=bias), plan.with_attributes(quantised=True))


def test_encoded_keys_are_decoded_first() -> None:
    q, k, v = drawn("int8", tokens=70, tails=(20, 10), dim=32, batch=1, device=DEVICE)
    call = AttentionCall(q, k, v, Extent.full(1, 1, 70))
    plan = SparsePlan.dense(2, 1, 70, call.extent).with_attributes(quantised=True).to(DEVICE)
    rows = AttentionCall(q, k.rows(), v.rows(), call.extent)
    for got, expected in zip(triton.attend(call, plan), triton.attend(rows, plan), strict=True):
        assert torch.equal(got, expected)
