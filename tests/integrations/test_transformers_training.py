"""Layers in training run dense, with and without gradients, derivatives forward too; and autocast."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL, forward, padding, pair, prompt, tiny_llama
from torch.nn.attention import SDPBackend, sdpa_kernel

from gossamer import Policy, methods
from gossamer.backends import triton
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


def pairs_of(model: Any, handle: Any, mask: torch.Tensor | None = None) -> list[torch.Tensor]:
    """What each layer of an enabled model attends in a prompt, bool ``[B, H, S, T]``."""
    seen: list[torch.Tensor] = []

    def look(observation: Any) -> None:
        call = observation.call
        seen.append(handle.policy.method.plan(call).to_mask().repeat_interleave(call.share, dim=1))

    handle.observe(look)
    with torch.no_grad():
        model.eval()(input_ids=prompt(), attention_mask=mask, use_cache=False)
    handle.observe(None)
    handle.reset()
    return seen


@pytest.mark.parametrize("family", ["llama", "gpt-oss-sinks", "gemma2-softcap"])
@pytest.mark.parametrize("keep_plans", [True, False], ids=["kept", "remade"])
def test_training_is_sparse_where_asked_for(family: str, keep_plans: bool) -> None:
    """As attention under the plan's mask, which is given to a stock model."""
    stock, model = (copy.deepcopy(one) for one in pair(family))
    with enable(model, "a_shape", training=True, keep_plans=keep_plans, **SMALL) as handle:
        pairs = pairs_of(model, handle)
        model.train()(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
        rows = [(row.sparse_calls, row.dense_calls) for row in handle.stats()]
        assert rows == [(1, 0)] * len(rows)
    masks = [torch.where(layer[:, :1], 0.0, torch.finfo(torch.float32).min) for layer in pairs]
    mask = dict(zip(("sliding_attention", "full_attention"), masks, strict=True)) if family != "llama" else masks[0]
    stock.set_attn_implementation("eager")
    stock.train()(input_ids=prompt(), attention_mask=mask, labels=prompt(), use_cache=False).loss.backward()
    for (name, one), (_, two) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        if one.grad is None:
            assert two.grad is None, name
        else:
            torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=2e-3, msg=name)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_a_sparse_training_is_exact(reentrant: bool) -> None:
    plain = tiny_llama().train()
    model = copy.deepcopy(plain)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for one in (plain, model):
        one.enable_input_require_grads()
        with enable(one, "a_shape", training=True, **SMALL) as handle:
            one(input_ids=prompt(), labels=prompt()).loss.backward()
            assert all(row.dense_calls == 0 for row in handle.stats())
    for (name, one), (_, two) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        assert torch.equal(torch.as_tensor(two.grad), torch.as_tensor(one.grad)), name


@pytest.mark.parametrize("name", ["training", "keep_plans"])
def test_enable_takes_yes_or_no(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name} must be True or False, got 'yes'"):
        enable(tiny_llama(), "a_shape", **{name: "yes"})  # type: ignore[arg-type]


def test_enable_says_what_a_policy_trains() -> None:
    """The argument holds, whatever the policy says."""
    policy = Policy(methods.create("a_shape"), training=True)
    with enable(tiny_llama(), policy) as handle:
        assert not handle.policy.training


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


@pytest.mark.skipif(not triton.is_available(), reason=f"{triton.why_unavailable()}")
@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets the kernels on the CPU")
def test_a_model_trains_on_the_triton_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, gradients = tiny_llama().train(), dict[str, dict[str, torch.Tensor]]()
    for name in ("torch", "triton"):
        monkeypatch.setenv("GOSSAMER_BACKEND", name)
        one, ids = copy.deepcopy(model), prompt()
        with enable(one, "a_shape", training=True, **SMALL) as handle:
            one(input_ids=ids, labels=ids, use_cache=False).loss.backward()
            assert all(row.sparse_calls == 1 for row in handle.stats())
        gradients[name] = {key: torch.as_tensor(p.grad) for key, p in one.named_parameters()}
    for key, expected in gradients["torch"].items():
        torch.testing.assert_close(gradients["triton"][key], expected, atol=1e-5, rtol=1e-3)
