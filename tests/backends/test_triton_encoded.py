"""Attention on encoded keys and values in Triton, which reads them as they are stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from encoded_calls import CODINGS, TOLERANCE
from encoded_calls import drawn as drawn_on
from torch import Tensor
from triton_support import DEVICE, MARKS

from gossamer import AttentionCall, Extent, SparsePlan
from gossamer.backends import triton
from gossamer.backends.torch.attend import attend as definition
from gossamer.encoded import EncodedTokens

pytestmark = MARKS


def drawn(coding: str, **sizes: Any) -> tuple[Tensor, EncodedTokens, EncodedTokens]:
    return drawn_on(coding, device=DEVICE, **sizes)


def check(call: AttentionCall, plan: SparsePlan | None = None, *, read: bool = False) -> None:
    """Our result is that of the definition on decoded tokens, of which none was decoded for ours unless ``read``."""
    plan = plan or SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
    out, lse = (x.cpu() for x in triton.attend(call, plan))
    assert isinstance(call.k, EncodedTokens)
    assert (call.k.at_hand() is call.k) is not read
    k, v = (x.rows() if isinstance(x, EncodedTokens) else x for x in (call.k, call.values))
    sinks = None if call.sinks is None else call.sinks.double()
    exact = AttentionCall(call.q.double(), k.double(), v.double(), call.extent, call.scale, sinks, call.softcap)
    expected, expected_lse = definition(exact, plan)
    bound = TOLERANCE[call.q.dtype]
    assert float((out.double() - expected.cpu()).norm() / expected.cpu().norm()) < bound
    torch.testing.assert_close(lse.double(), expected_lse.cpu().double(), atol=bound, rtol=bound)


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize(("dim", "value_dim"), [(64, 64), (80, 48), (128, 128)])
def test_a_step_is_that_of_decoded_tokens(coding: str, dim: int, value_dim: int) -> None:
    group = 16 if dim == 80 else 32
    tails = (44, 40) if coding != "kivi4" else (12, 0)
    check(AttentionCall(*drawn(coding, dim=dim, value_dim=value_dim, group=group, tails=tails, tokens=140)))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_in_16_bits(coding: str, dtype: torch.dtype) -> None:
    check(AttentionCall(*drawn(coding, dtype=dtype, tokens=140, queries=2)))


@pytest.mark.parametrize("coding", CODINGS)
def test_halves_of_the_values(coding: str) -> None:
    """An output that is wider than its tile is high is made in two parts; the second begins amid the elements."""
    check(AttentionCall(*drawn(coding, dim=32, value_dim=256, heads=2, tokens=140)))


@pytest.mark.parametrize("coding", CODINGS)
def test_scale_cap_sinks_and_padding(coding: str) -> None:
    q, k, v = drawn(coding, tokens=140)
    live = torch.arange(140)[None] >= torch.tensor([0, 77])[:, None]
    extent = Extent.from_key_mask(live, 1)
    check(AttentionCall(q, k, v, extent, scale=0.3, softcap=5.0, sinks=torch.tensor([0.5, -1.0, 3.0, 0.0])))


@pytest.mark.parametrize("coding", CODINGS)
@pytest.mark.parametrize("tails", [(140 - 32, 140 - 1), (12, 0)])
def test_few_or_nearly_all_tokens_are_encoded(coding: str, tails: tuple[int, int]) -> None:
    check(AttentionCall(*drawn(coding, tails=tails, tokens=140)))


@pytest.mark.parametrize("coding", CODINGS)
def test_plans_of_blocks_and_columns(coding: str) -> None:
    call = AttentionCall(*drawn(coding, tokens=140))
    mask = torch.tensor([True, False, False, True, False, False, True, True, False]).expand(2, 2, 1, 9)
    columns = torch.tensor([3, 20, 90, 135], dtype=torch.int32)
    plan = SparsePlan.from_block_mask(
        mask, 1, 140, extent=call.extent, block_q=16, block_k=16,
        column_indptr=torch.arange(5) * 4, column_indices=columns.repeat(4), sink=2, window=5,
    )  # fmt: skip
    check(call, plan)


def test_keys_encoded_before_values_are() -> None:
    q, k, v = drawn("kivi4", tokens=140)
    check(AttentionCall(q, k, v.rows()))


def test_many_queries_have_them_decoded() -> None:
    check(AttentionCall(*drawn("int8", tokens=140, queries=20)), read=True)
