"""At full budget a model computes the same with gossamer as without, in every situation that transformers knows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_transformers import DENSE_SITUATIONS, FAMILIES, SITUATIONS, forward, pair, prompt

from gossamer.backends import cpu, triton
from gossamer.integrations.transformers import NAME, Stats, enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

ALWAYS_SPARSE: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0}
FULL_BUDGETS: dict[str, dict[str, Any]] = {
    "max_relative": {"alpha": 0.0, "block_q": 16, "block_k": 16},
    "a_shape": {"sink": 1, "window": 1024},
    "minference": {"vertical_size": 1024, "slash_size": 1024},
}
# Its modelling code does not hand positions to the mask, so the sequences leak into each other under sdpa, too.
UNSEEN_BY_TRANSFORMERS = {("gpt-oss-sinks", "packed")}


def compare(family: str, situation: str, method: str) -> Stats:
    """Assert equality with the stock implementation, and that gossamer really ran."""
    stock, model = pair(family)
    expected = SITUATIONS[situation](stock)
    with enable(model, method, **FULL_BUDGETS[method], **ALWAYS_SPARSE) as handle:
        assert model.config._attn_implementation == NAME != stock.config._attn_implementation
        got = SITUATIONS[situation](model)
        stats = handle.stats()
    assert torch.equal(got.tokens, expected.tokens)
    torch.testing.assert_close(got.logits, expected.logits, atol=2e-4, rtol=1e-4)
    expected_layers = {*FAMILIES[family].sparse_layers, *FAMILIES[family].dense_layers}
    assert {row.layer for row in stats} == expected_layers
    return stats


@pytest.mark.parametrize("situation", SITUATIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_at_full_budget(family: str, situation: str) -> None:
    stats = compare(family, situation, "max_relative")
    if situation in DENSE_SITUATIONS and (family, situation) not in UNSEEN_BY_TRANSFORMERS:
        assert set(stats.fallbacks()) == {"mask is not plain"}
        assert all(row.sparse_calls == 0 for row in stats)
        return
    for row in stats:
        assert row.density == pytest.approx(1.0)
        if row.layer in FAMILIES[family].dense_layers:
            # Within one chunk of attention, as chunks of the prompt are, chunked attention is plain.
            assert row.sparse_calls == 0 or situation.startswith("chunked")
            assert row.sparse_calls + row.fallbacks.get("mask is not plain", 0) >= 1
        else:
            assert row.sparse_calls >= 1
            assert set(row.fallbacks) <= {"decode"}


@pytest.mark.parametrize("method", ["a_shape", "minference"])
@pytest.mark.parametrize("situation", ["left padding", "chunked, left padding", "static cache", "follow-up turn"])
@pytest.mark.parametrize("family", ["llama", "gpt-oss-sinks"])
def test_parity_of_other_methods_at_full_budget(family: str, situation: str, method: str) -> None:
    stats = compare(family, situation, method)
    assert all(row.sparse_calls >= 1 for row in stats)


@pytest.mark.parametrize("situation", ["no padding", "static cache, left padding", "chunked, left padding"])
@pytest.mark.parametrize("family", FAMILIES)
def test_parity_of_decoding_on_our_own_kernel(family: str, situation: str, monkeypatch) -> None:
    if not cpu.is_available():
        pytest.skip("no C++ kernels")
    monkeypatch.setattr("gossamer.policy.STREAMED_KEYS", {4: 0})
    stats = compare(family, situation, "a_shape")
    for row in stats:
        ours = sum(count for name, count in row.executors.items() if name.startswith("cpu/"))
        assert ours == row.calls - row.fallbacks.get("mask is not plain", 0)
        assert row.fallbacks["decode"] > 0 or row.layer in FAMILIES[family].dense_layers


@pytest.mark.parametrize("executor", ["triton", "flex"])
@pytest.mark.parametrize("situation", ["left padding", "chunked, left padding"])
@pytest.mark.parametrize("family", ["llama", "gpt-oss-sinks", "gemma2-softcap"])
def test_parity_on_the_executors_for_gpus(family: str, situation: str, executor: str, monkeypatch) -> None:
    if executor == "triton" and not (triton.is_available() and triton.interprets()):
        pytest.skip(triton.why_unavailable() or "Triton is not interpreted here")
    monkeypatch.setenv("GOSSAMER_BACKEND", executor)
    stats = compare(family, situation, "a_shape")
    for row in stats:
        assert row.executors[executor] == row.sparse_calls >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", ["llama", "gpt-oss-sinks"])
def test_parity_on_a_cuda_device(family: str) -> None:
    stock, model = pair(family)
    ids = prompt().to("cuda")
    stock.to("cuda")
    model.to("cuda")
    expected = forward(stock, ids)
    with enable(model, "max_relative", **FULL_BUDGETS["max_relative"], **ALWAYS_SPARSE) as handle:
        got = forward(model, ids)
        stats = handle.stats()
    assert all(row.executors["triton"] >= 1 for row in stats if row.sparse_calls)
    assert any(row.sparse_calls for row in stats)
    torch.testing.assert_close(got.logits, expected.logits, atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("situation", sorted(set(SITUATIONS) - DENSE_SITUATIONS))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_small_budget_changes_the_logits(family: str, situation: str) -> None:
    """The negative control of the parity above: these weights do show which pairs were computed."""
    stock, model = pair(family)
    expected = SITUATIONS[situation](stock)
    with enable(model, "a_shape", sink=1, window=3, **ALWAYS_SPARSE) as handle:
        got = SITUATIONS[situation](model)
        stats = handle.stats()
    assert all(0 < row.density < 0.7 for row in stats if row.layer in FAMILIES[family].sparse_layers)
    assert (got.logits - expected.logits).abs().max() > 0.05
