"""Caches where gradients, encoder-decoders and prompts of one token meet them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, LlamaConfig, LlamaForCausalLM, T5Config

from gossamer import cache, enable
from gossamer.cache import StoreLayer
from gossamer.methods import Dense
from gossamer.policy import Policy


def test_what_a_graph_holds_is_not_written_to_after_a_crop() -> None:
    layer = StoreLayer()
    given = torch.randn(1, 2, 20, 8, requires_grad=True)
    keys, values = layer.update(given * 2, given * 3)
    out = (keys * values).sum()
    layer.crop(-4)
    with torch.no_grad():
        layer.update(torch.zeros(1, 2, 3, 8), torch.zeros(1, 2, 3, 8))
    out.backward()
    assert given.grad is not None
    assert torch.allclose(given.grad, 12 * given)


def test_no_empty_layer_takes_a_positive_crop() -> None:
    split = cache.DuoAttention(gates=((0.0, 1.0),))
    for layer in (StoreLayer(), split.layer(0, 1)):
        with pytest.raises(ValueError, match="negative number"):
            layer.crop(5)
        layer.crop(-5)
        assert layer.get_seq_length() == 0


def test_an_encoder_decoder_gets_two_caches_and_both_are_counted() -> None:
    made = cache.new_cache(T5Config(num_layers=2), cache.create("keep"))
    assert isinstance(made, EncoderDecoderCache)
    assert isinstance(made.cross_attention_cache, DynamicCache)
    new = torch.zeros(1, 2, 5, 4)
    made.self_attention_cache.update(new, new, 0)
    made.cross_attention_cache.update(new, new, 0)
    assert isinstance(made.self_attention_cache.layers[0], StoreLayer)
    assert not isinstance(made.cross_attention_cache.layers[0], StoreLayer)
    assert cache.nbytes(made) == 4 * new.numel() * new.element_size()


def test_positions_of_the_cache_take_a_prompt_of_one_token() -> None:
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 2,
    }
    torch.manual_seed(0)
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size)).eval()
    with enable(model, "dense", cache=cache.StreamingLLM(sinks=2, recent=6, positions="cache")) as handle:
        past = handle.new_cache()
        prompt = torch.tensor([[7]])
        model.generate(prompt, past_key_values=past, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    assert past.layers[0].slots == 7


def test_a_policys_cache_of_another_type_is_refused_before_the_model_is_touched() -> None:
    size: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "num_hidden_layers": 1,
    }
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=50, **size))
    before = model.config._attn_implementation
    with pytest.raises(TypeError, match="must be a name or a"):
        enable(model, Policy(Dense(), cache=cache.SnapKV))  # type: ignore[arg-type]
    assert model.config._attn_implementation == before
    enable(model, Policy(Dense(), cache=cache.SnapKV())).disable()
