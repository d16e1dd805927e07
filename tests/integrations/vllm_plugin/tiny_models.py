"""Models of four to six small layers, with random weights, that vLLM serves: what layers may have beside keys."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    PreTrainedModel,
)

WINDOW = 512
SHAPE = {
    "vocab_size": 5120,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": WINDOW,
    "max_position_embeddings": 8192,
    "initializer_range": 0.1,
}
WINDOWED_EVERY_OTHER = ["sliding_attention", "full_attention"]


def gemma2() -> PreTrainedModel:
    """A window in every other layer, and a soft-cap of the logits."""
    return Gemma2ForCausalLM(
        Gemma2Config(
            **SHAPE, hidden_size=128, num_hidden_layers=4, query_pre_attn_scalar=32, attn_logit_softcapping=5.0
        )
    )


def gpt_oss() -> PreTrainedModel:
    """A window in every other layer, and sinks."""
    model = GptOssForCausalLM(
        GptOssConfig(
            **SHAPE,
            hidden_size=64,
            num_hidden_layers=4,
            num_local_experts=4,
            num_experts_per_tok=2,
            layer_types=WINDOWED_EVERY_OTHER * 2,
        )
    )
    for name, parameter in model.named_parameters():
        if name.endswith("sinks"):
            torch.nn.init.normal_(parameter, std=2.0)
    return model


def gemma3n() -> PreTrainedModel:
    """The last two of six layers have no keys of their own."""
    return Gemma3nForCausalLM(
        Gemma3nTextConfig(
            **SHAPE,
            vocab_size_per_layer_input=5120,
            hidden_size=64,
            hidden_size_per_layer_input=16,
            num_hidden_layers=6,
            num_kv_shared_layers=2,
            laurel_rank=8,
            layer_types=WINDOWED_EVERY_OTHER * 3,
            activation_sparsity_pattern=[0.0] * 6,
        )
    )


MODELS = {"gemma2": gemma2, "gpt_oss": gpt_oss, "gemma3n": gemma3n}


def saved(name: str, folder: Path) -> Path:
    torch.manual_seed(0)
    MODELS[name]().save_pretrained(folder / name)
    return folder / name
