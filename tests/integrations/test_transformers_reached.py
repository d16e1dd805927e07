"""Attention layers that do not come to gossamer are noticed, whichever part of a model is called."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL, SIZE, prompt, tiny_llama
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    T5Config,
    T5ForConditionalGeneration,
)

from gossamer.integrations.transformers import enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

IMAGE, PATCHES = 95, 16
IDS = prompt(rows=1)


def llava() -> Any:
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=7
    )
    text = LlamaConfig(**copy.deepcopy(SIZE))
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projector_hidden_act="gelu")
    return LlavaForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def bart() -> Any:
    sizes: dict[str, Any] = {"vocab_size": 96, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    heads: dict[str, Any] = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    config = BartConfig(**sizes, **heads, encoder_layers=3, decoder_layers=2, max_position_embeddings=128)
    return BartForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def t5() -> Any:
    config = T5Config(vocab_size=96, d_model=32, d_kv=8, d_ff=32, num_layers=3, num_decoder_layers=2, num_heads=4)
    return T5ForConditionalGeneration._from_config(config, attn_implementation="sdpa").eval()


def image() -> dict[str, Any]:
    ids = IDS.clone()
    ids[0, 1 : 1 + PATCHES] = IMAGE
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, 28, 28)}


def leave_out(decoder: Any, layers: int = 1) -> None:
    """Layers whose attention is computed by themselves."""
    for layer in decoder.layers[:layers]:
        layer.self_attn.forward = lambda hidden_states, **_: (hidden_states, None)


@torch.no_grad()
def run(part: Any, *given: Any, **named: Any) -> Any:
    return part(*given, **named)


def test_the_base_model_by_itself() -> None:
    model = tiny_llama()
    leave_out(model.model)
    with enable(model, "a_shape", **FULL):
        with pytest.raises(RuntimeError, match="of the 2 attention layers of LlamaModel, 1 reached"):
            run(model.model, IDS)
        run(model.model, IDS)  # said once
        with pytest.raises(RuntimeError, match="of the 2 attention layers of LlamaForCausalLM, 1 reached"):
            run(model, IDS)  # of the head's own forward, too


def test_what_the_whole_called_is_answered_for() -> None:
    model = tiny_llama()
    leave_out(model.model)
    with enable(model, "a_shape", **FULL):
        with pytest.raises(RuntimeError, match="LlamaForCausalLM"):
            run(model, IDS)
        run(model.model, IDS)


def test_calls_of_earlier_forwards_do_not_count() -> None:
    model = tiny_llama()
    with enable(model, "a_shape", **FULL):
        run(model.model, IDS)
        leave_out(model.model, 2)
        with pytest.raises(RuntimeError, match="of the 2 attention layers of LlamaForCausalLM, 0 reached"):
            run(model, IDS)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_language_part_of_a_composite_by_itself(bidirectional: bool) -> None:
    model = llava()
    leave_out(model.model.language_model)
    whose = "of the 2 attention layers of LlamaModel, 1 reached"
    with enable(model, "a_shape", bidirectional=bidirectional, **FULL), pytest.raises(RuntimeError, match=whose):
        run(model.model.language_model, IDS)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_tower_does_not_stand_in_for_the_text(bidirectional: bool) -> None:
    model = llava()
    leave_out(model.model.language_model, 2)
    whose = "of the 2 attention layers of LlavaForConditionalGeneration, 0 reached"
    with enable(model, "a_shape", bidirectional=bidirectional, **FULL), pytest.raises(RuntimeError, match=whose):
        run(model, **image())


def test_a_decoder_by_itself() -> None:
    model = bart()
    for layer in model.model.decoder.layers:
        for attention in (layer.self_attn, layer.encoder_attn):
            attention.forward = lambda hidden_states, **_: (hidden_states, None)
    with enable(model, "a_shape", **FULL), pytest.raises(RuntimeError, match="2 attention layers of BartDecoder, 0"):
        run(model.model.decoder, input_ids=IDS)


def test_a_forward_that_fails_is_no_forward() -> None:
    model = tiny_llama()
    leave_out(model.model)
    with enable(model, "a_shape", **FULL):
        for part in (model, model.model):
            with pytest.raises(ValueError, match="exactly one"):
                run(part)
        with pytest.raises(RuntimeError, match="LlamaModel, 1 reached"):
            run(model.model, IDS)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("make", [bart, t5])
def test_encoders_and_decoders_by_themselves_raise_no_alarm(make: Any, bidirectional: bool) -> None:
    model = make()
    with enable(model, "a_shape", bidirectional=bidirectional, **FULL) as handle:
        encoded = run(model.get_encoder(), input_ids=IDS)
        run(model.get_decoder(), input_ids=IDS)
        run(model, encoder_outputs=encoded, decoder_input_ids=IDS)
        run(model, input_ids=IDS, decoder_input_ids=IDS)
        assert len(handle.stats()) > 0


@pytest.mark.parametrize("bidirectional", [False, True])
def test_parts_of_a_composite_raise_no_alarm(bidirectional: bool) -> None:
    model = llava()
    with enable(model, "a_shape", bidirectional=bidirectional, **ALWAYS_SPARSE, sink=1, window=9):
        run(model.get_image_features, pixel_values=image()["pixel_values"])
        run(model.model.language_model, IDS)
        run(model.model, IDS)
        model.generate(**image(), max_new_tokens=3, do_sample=False)  # later steps leave the tower out
        run(model, IDS)


def test_a_model_in_training_raises_no_alarm() -> None:
    model = tiny_llama().train()
    leave_out(model.model)
    with enable(model, "a_shape", **FULL):
        model.model(IDS)


def test_nothing_hangs_on_a_model_that_is_disabled() -> None:
    model = llava()
    enable(model, "a_shape", **FULL).disable()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any(module._forward_hooks_always_called for module in model.modules())


@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_composite_whose_text_part_runs_eager_alone_is_refused(bidirectional: bool) -> None:
    model = llava()
    model.model.language_model._supports_sdpa = model.model.language_model._supports_attention_backend = False
    before = model.config.text_config._attn_implementation
    with pytest.raises(ValueError, match="LlamaModel declares that its attention can't be replaced"):
        enable(model, "a_shape", bidirectional=bidirectional, **FULL)
    assert model.config.text_config._attn_implementation == before
