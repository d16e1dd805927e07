"""A tiny random Llama, sharpened so that its heads differ."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

VOCAB = 64


def tiny_llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    size: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "initializer_range": 0.2,
        "pad_token_id": 0,
        "eos_token_id": None,
    }
    return LlamaForCausalLM(LlamaConfig(**size | changes)).eval()


def tokens(length: int, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))
