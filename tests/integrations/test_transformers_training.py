"""Layers in training run dense, with and without gradients, derivatives forward too; and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL, forward, padding, pair, prompt, tiny_llama
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer.integrations.transformers import enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL: dict[str, Any] = {"sink": 1, "window": 3} | ALWAYS_SPARSE


def test_gradients_run_dense_and_agree() -> None:
    stock, model = (copy.deepcopy(model) for model in pair("llama"))
    mask = padding(left=(0, 9))
    stock(input_ids=prompt(), attention_mask=mask).logits[mask.bool()].square().mean().backward()
    with enable(model, "a_shape", sink=1, window=3, **ALWAYS_SPARSE) as handle:
        model(input_ids=prompt(), attention_mask=mask).logits[mask.bool()].square().mean().backward()
        assert all(row.dense_calls == 1 for row in handle.stats())
        assert all(reason.startswith("training") for reason in handle.stats().fallbacks())
    for (name, one), (_, two) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        assert one.grad is not None, name
        torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-3)


def test_dropout_runs_dense_and_drops_what_stock_attention_drops() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    stock = copy.deepcopy(model)

    def logits(of: Any, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return of(input_ids=prompt()).logits

    with enable(model, "a_shape", **FULL) as handle:
        got, other = logits(model, 1), logits(model, 2)
        assert handle.stats().fallbacks() == {"training: dropout": 4}
    torch.testing.assert_close(got, logits(stock, 1), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(got, other, atol=1e-2)


def test_dropout_with_sinks_is_an_error() -> None:
    model = copy.deepcopy(pair("gpt-oss-sinks")[1]).train()
    model.model.layers[0].self_attn.attention_dropout = 0.5
    with enable(model), pytest.raises(ValueError, match="dropout"):
        model(input_ids=prompt())


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_computes_twice_what_it_computes_once(reentrant: bool) -> None:
    """A re-entrant checkpoint runs the forward without gradients, and then again with them."""
    stock = tiny_llama().train()
    model = copy.deepcopy(stock)
    for one in (stock, model):
        one.gradient_checkpointing_enable({"use_reentrant": reentrant})
        one.enable_input_require_grads()
    with enable(model, "a_shape", **SMALL) as handle:
        losses = [one(input_ids=prompt(), labels=prompt()).loss for one in (stock, model)]
        for loss in losses:
            loss.backward()
        assert [row.sparse_calls for row in handle.stats()] == [0, 0]
    torch.testing.assert_close(losses[1], losses[0], atol=1e-5, rtol=1e-5)
    for (name, one), (_, two) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_frozen_layers_in_training_run_dense_and_are_counted() -> None:
    model = tiny_llama().train()
    model.requires_grad_(False)
    model.model.layers[1].requires_grad_(True)
    expected = model(input_ids=prompt(), labels=prompt()).loss
    with enable(model, "a_shape", **SMALL) as handle:
        got = model(input_ids=prompt(), labels=prompt()).loss
        assert [(row.sparse_calls, row.dense_calls) for row in handle.stats()] == [(0, 1)] * 2
        assert all(reason.startswith("training") for reason in handle.stats().fallbacks())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sparse", [False, True])
def test_autocast_gives_one_dtype_as_stock_attention_does(sparse: bool) -> None:
    """Rotations leave queries and keys in float32 under autocast, while values are in its dtype."""
    stock, model = pair("llama")
    policy = FULL if sparse else {}
    with torch.autocast("cpu", dtype=torch.bfloat16), enable(model, "a_shape", **policy) as handle:
        for mask in (None, padding(left=(0, 9))):
            expected, got = (forward(one, prompt(), mask, use_cache=False) for one in (stock, model))
            torch.testing.assert_close(got.logits, expected.logits, atol=0.3, rtol=0.1)
        assert all(row.sparse_calls == 2 * sparse for row in handle.stats())


def test_autocast_trains() -> None:
    model = tiny_llama().train()
    with torch.autocast("cpu", dtype=torch.bfloat16), enable(model, "a_shape", **FULL):
        model(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_mixed_dtypes_name_the_layer() -> None:
    model = tiny_llama()
    model.model.layers[1].self_attn.v_proj.bfloat16()
    model.model.layers[1].self_attn.v_proj.register_forward_pre_hook(lambda module, inputs: inputs[0].bfloat16())
    with (
        enable(model, "a_shape", **FULL),
        pytest.raises(
            TypeError, match=r"LlamaAttention of layer 1 gives .* torch\.float32, torch\.float32 and torch\.bfloat16"
        ),
    ):
        forward(model, prompt(), use_cache=False)


def test_derivatives_forward_are_those_of_stock_attention() -> None:
    """Which has them on its own plain path alone."""
    stock, model = pair("llama")
    embedded = model.get_input_embeddings()(prompt()).detach()
    mask = padding(left=(0, 9))

    def slope(of: Any) -> torch.Tensor:
        def live(inputs: torch.Tensor) -> torch.Tensor:
            return of(inputs_embeds=inputs, attention_mask=mask, use_cache=False).logits[mask.bool()]

        return torch.func.jvp(live, (embedded,), (embedded.cos(),))[1]

    with torch.no_grad():
        with sdpa_kernel(SDPBackend.MATH):
            expected = slope(stock)
        with enable(model, "a_shape") as handle:
            torch.testing.assert_close(slope(model), expected, atol=1e-4, rtol=1e-3)
            assert handle.stats().fallbacks() == {"short prompt": 2}
        with enable(model, "a_shape", **FULL), pytest.raises(NotImplementedError, match="forward-mode"):
            slope(model)
