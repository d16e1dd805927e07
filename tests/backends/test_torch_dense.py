"""Dense attention in torch: values and gradients against attention written out pair by pair."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from definitions import allowed_pairs, attention, call_in, everywhere
from gradients import with_extras
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.backends.torch.dense import dense, needs_mask, sdpa, under_mask

SINKS = torch.tensor([0.3, -1.0, 2.0, 0.0])
extras = pytest.mark.parametrize("extra", [{}, {"sinks": SINKS}, {"softcap": 1.5}, {"sinks": SINKS, "softcap": 1.5}])
every_bias = pytest.mark.parametrize("extra", [{}, {"sinks": SINKS, "softcap": 1.5}])


def allowed(call: AttentionCall) -> Tensor:
    return allowed_pairs(call.extent, call.query_len, call.key_len)[:, None].expand(-1, call.heads, -1, -1)


@everywhere
@extras
def test_dense_attention_attends_what_the_extent_allows(situation: str, extra: dict) -> None:
    """And reads nothing else: dead rows and slots hold NaN."""
    call = replace(call_in(situation), **extra)
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


@everywhere
@every_bias
def test_a_bias_is_added_after_the_soft_cap(situation: str, extra: dict) -> None:
    call = with_extras(call_in(situation), sinks=False, softcap=False)
    call = replace(call, **extra)
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


def test_slots_that_are_dead_in_all_rows_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[torch.Size] = []

    def spy(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        shapes.extend([k.shape, v.shape])
        return under_mask(q, k, v, *others)

    monkeypatch.setattr("gossamer.backends.torch.dense.under_mask", spy)
    q, k, v = torch.rand(3, 4, 2, 4), torch.rand(3, 2, 20, 4), torch.rand(3, 2, 20, 5)
    call = AttentionCall(q, k, v, Extent([3, 4, 0], [2, 2, 2], [6, 5, 1], [5, 6, 0]))
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)
    assert shapes == [(3, 2, 6, 4), (3, 2, 6, 5)]


def test_decoding_on_a_static_cache_needs_no_mask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gossamer.backends.torch.dense.under_mask", None)
    call = AttentionCall(torch.rand(1, 4, 1, 4), torch.rand(1, 2, 20, 4), torch.rand(1, 2, 20, 5), Extent([5], 1, 0, 6))
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("query_len", [1, 7, 20])
@pytest.mark.parametrize("causal", [True, False])
def test_without_padding_queries_are_the_last_or_all(query_len: int, causal: bool) -> None:
    full = call_in("no padding")
    extent = Extent.full(1, query_len, 20, causal=causal)
    call = replace(full, q=full.q[:, :, :query_len], extent=extent)
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("query_len", "extent", "extra", "needed"),
    [
        (9, Extent.full(1, 9, 9), {}, False),
        (1, Extent.full(1, 1, 9), {}, False),
        (4, Extent.full(1, 4, 9), {}, True),
        (4, Extent.full(1, 4, 9, causal=False), {}, False),
        (9, Extent.full(1, 9, 9, limit=9), {}, False),
        (9, Extent.full(1, 9, 9, limit=8), {}, True),
        (9, Extent.full(1, 9, 9, causal=False, limit=9), {}, False),
        (9, Extent.full(1, 9, 9, causal=False, limit=8), {}, True),
        (4, Extent([2], [4], [0], [9], causal=False, limit=7), {}, False),
        (4, Extent([2], [4], [0], [9], causal=False, limit=6), {}, True),
        (4, Extent([8], [4], [0], [9], causal=False, limit=12), {}, False),
        (4, Extent([8], [4], [0], [9], causal=False, limit=11), {}, True),
        (9, Extent([0], [8], [0], [9]), {}, True),
        (9, Extent([0], [9], [0], [8]), {}, True),
        (9, Extent([-1], [8], [1], [8]), {}, True),
        (9, Extent.full(1, 9, 9), {"sinks": torch.zeros(1)}, True),
        (9, Extent.full(1, 9, 9), {"softcap": 2.0}, True),
    ],
)
def test_a_mask_is_needed_where_sdpa_has_no_name_for_it(
    query_len: int, extent: Extent, extra: dict, needed: bool
) -> None:
    x = torch.zeros(1, 1, 9, 2)
    assert needs_mask(AttentionCall(x[:, :, :query_len], x, x, extent, **extra)) is needed


@pytest.mark.parametrize("query_start", [3, 40])
def test_other_queries_than_the_last_may_lie_beyond_a_limit(query_start: int) -> None:
    full = call_in("no padding")
    extent = Extent([query_start], [20], [0], [20], causal=False, limit=25)
    call = replace(full, extent=extent)
    torch.testing.assert_close(dense(call).double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


def drawn_mask() -> Tensor:
    mask = torch.rand(1, 1, 20, 20, generator=torch.Generator().manual_seed(0)) < 0.4
    return mask | torch.eye(20, dtype=torch.bool)


@extras
def test_a_mask_says_what_is_attended(extra: dict) -> None:
    call = replace(call_in("no padding"), **extra)
    mask = drawn_mask()
    got = under_mask(call.q, call.k, call.values, mask, call.scale, call.sinks, call.softcap)
    expected, _ = attention(call, mask.expand(-1, call.heads, -1, -1))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@extras
def test_without_a_mask_all_pairs_are_attended(extra: dict) -> None:
    call = replace(call_in("no padding"), **extra)
    got = under_mask(call.q, call.k, call.values, None, call.scale, call.sinks, call.softcap)
    expected, _ = attention(call, torch.ones(1, 4, 20, 20, dtype=torch.bool))
    torch.testing.assert_close(got.double(), expected, atol=1e-5, rtol=1e-5)


@extras
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_keep_their_dtype(dtype: torch.dtype, extra: dict) -> None:
    call = replace(call_in("no padding", dtype=dtype), **extra)
    out = dense(call)
    assert out.dtype == dtype
    # Weights and outputs are rounded to the dtype.
    tolerance = {torch.bfloat16: 2**-6, torch.float16: 2**-9}[dtype]
    torch.testing.assert_close(out.double(), attention(call, allowed(call))[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_causal", [True, False])
def test_sdpa_takes_scale_and_causality(is_causal: bool) -> None:
    call = call_in("no padding" if is_causal else "cross-attention")
    got = sdpa(call.q, call.k, call.values, call.scale, is_causal=is_causal)
    torch.testing.assert_close(got.double(), attention(call, allowed(call))[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("situation", ["no padding", "left padding", "right padding", "model window", "padded chunk"])
@extras
def test_gradients_are_those_of_fp64(situation: str, extra: dict) -> None:
    call = call_in(situation)
    inputs = [call.q, call.k, call.values, *([extra["sinks"]] if "sinks" in extra else [])]
    weights = torch.rand(call.values.shape[-1], generator=torch.Generator().manual_seed(0))
    leaves = [x.clone().requires_grad_() for x in inputs]
    doubles = [x.double().nan_to_num().requires_grad_() for x in inputs]

    def with_tensors(tensors: list[Tensor]) -> AttentionCall:
        q, k, v, *sinks = tensors
        return replace(call, q=q, k=k, v=v, **extra | ({"sinks": sinks[0]} if sinks else {}))

    (dense(with_tensors(leaves)) @ weights).sum().backward()
    (written_out(with_tensors(doubles), allowed(call)) @ weights.double()).sum().backward()
    for leaf, double in zip(leaves, doubles, strict=True):
        assert leaf.grad is not None
        assert double.grad is not None
        torch.testing.assert_close(leaf.grad.double(), double.grad, atol=2e-5, rtol=2e-5)


def written_out(call: AttentionCall, pairs: Tensor) -> Tensor:
    """Softmax as its quotient; differentiable."""
    k, v = (x.repeat_interleave(call.share, dim=1) for x in (call.k, call.values))
    logits = call.q @ k.transpose(-1, -2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    weights = torch.where(pairs, logits.exp(), 0.0)
    total = weights.sum(dim=-1, keepdim=True)
    if call.sinks is not None:
        total = total + call.sinks.exp().view(1, -1, 1, 1)
    return torch.where(pairs.any(-1, keepdim=True), weights / total.clamp(min=1e-30), 0.0) @ v
