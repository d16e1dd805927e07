"""Tiny models of many architectures, sharpened so that a wrong mask shows in the logits, and ways to run them."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma3TextConfig,
    GptOssConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

VOCAB = 96
LENGTH = 44
WINDOW = 20

SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_ALTERNATING = ["sliding_attention", "full_attention"]
_EXPERTS: dict[str, Any] = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 32}


def _size(**changes: Any) -> dict[str, Any]:
    return copy.deepcopy(SIZE | {"head_dim": 8} | changes)


@dataclass(frozen=True)
class Family:
    """One architecture. SDPA has neither soft-caps nor sinks, so that some are compared with eager attention."""

    config: Callable[[], Any]
    stock: str = "sdpa"
    sparse_layers: tuple[int, ...] = (0, 1)
    dense_layers: tuple[int, ...] = ()


FAMILIES: dict[str, Family] = {
    "llama": Family(lambda: LlamaConfig(**_size())),
    "qwen3": Family(lambda: Qwen3Config(**_size())),
    "mistral-window": Family(lambda: MistralConfig(**_size(sliding_window=WINDOW))),
    "phi3-head96": Family(
        lambda: Phi3Config(
            **_size(hidden_size=192, head_dim=96, num_attention_heads=2, num_key_value_heads=1, sliding_window=None)
        ),
    ),
    "gemma2-softcap": Family(
        lambda: Gemma2Config(
            **_size(
                sliding_window=WINDOW,
                layer_types=_ALTERNATING,
                attn_logit_softcapping=5.0,
                query_pre_attn_scalar=4,
                attention_dropout=0.0,
            )
        ),
        "eager",
    ),
    "gemma3-head256": Family(
        lambda: Gemma3TextConfig(
            **_size(
                head_dim=256,
                num_attention_heads=2,
                num_key_value_heads=1,
                sliding_window=WINDOW,
                layer_types=_ALTERNATING,
                query_pre_attn_scalar=256,
            )
        ),
    ),
    "gpt-oss-sinks": Family(
        lambda: GptOssConfig(
            **_size(sliding_window=WINDOW, layer_types=_ALTERNATING, num_local_experts=2, num_experts_per_tok=1)
        ),
        "eager",
    ),
    "mixtral": Family(
        lambda: MixtralConfig(**_size(num_local_experts=2, num_experts_per_tok=1, sliding_window=None)),
    ),
    "qwen3-moe": Family(lambda: Qwen3MoeConfig(**_size(**_EXPERTS))),
    # Masks with a window that it does not pass to its attention function.
    "qwen2-moe-window": Family(
        lambda: Qwen2MoeConfig(
            **_size(
                **_EXPERTS,
                shared_expert_intermediate_size=32,
                use_sliding_window=True,
                sliding_window=WINDOW,
                max_window_layers=1,
                layer_types=_ALTERNATING,
            )
        ),
    ),
    "olmo2": Family(lambda: Olmo2Config(**_size())),
    # Only its full-attention layer attends; the linear one never calls attention.
    "qwen3-next-hybrid": Family(
        lambda: Qwen3NextConfig(
            **_size(
                **_EXPERTS,
                shared_expert_intermediate_size=32,
                layer_types=["linear_attention", "full_attention"],
                linear_num_value_heads=4,
                linear_num_key_heads=2,
                linear_key_head_dim=8,
                linear_value_head_dim=8,
            )
        ),
        sparse_layers=(1,),
    ),
    # Chunked attention is no sliding window, and no plain mask.
    "llama4-chunked": Family(
        lambda: Llama4TextConfig(
            **_size(
                intermediate_size_mlp=32,
                num_local_experts=2,
                attention_chunk_size=16,
                layer_types=["chunked_attention", "full_attention"],
            )
        ),
        sparse_layers=(1,),
        dense_layers=(0,),
    ),
}


@functools.cache
def pair(family: str) -> tuple[Any, Any]:
    """Two models with the same weights and configs of their own: for the stock implementation, and to be enabled."""
    make, stock = FAMILIES[family].config, FAMILIES[family].stock
    torch.manual_seed(7)
    models = [AutoModelForCausalLM.from_config(make(), attn_implementation=stock).eval() for _ in range(2)]
    with torch.no_grad():
        for name, weight in models[0].named_parameters():
            if any(part in name for part in ("q_norm", "k_norm")):
                weight.mul_(2.0).add_(1.0)
            elif name.endswith("sinks"):
                weight.uniform_(-1.0, 3.0)
    models[1].load_state_dict(models[0].state_dict())
    assert models[0].config is not models[1].config
    return models[0], models[1]


@dataclass(frozen=True)
class Run:
    """What a situation produced: logits at the tokens that are no padding, and greedy tokens."""

    logits: Tensor
    tokens: Tensor


def prompt(rows: int = 2, length: int = LENGTH, seed: int = 3) -> Tensor:
    return torch.randint(2, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def padding(left: tuple[int, ...] = (), right: tuple[int, ...] = (), length: int = LENGTH) -> Tensor:
    """An attention mask with the given numbers of padding tokens in its rows."""
    rows = len(left or right)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row, count in enumerate(left):
        mask[row, :count] = 0
    for row, count in enumerate(right):
        mask[row, length - count :] = 0
    return mask


def forward(model: Any, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Run:
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask, **kwargs).logits
    live = logits if mask is None else logits[mask[:, -ids.shape[1] :].bool()]
    return Run(live, live.argmax(dim=-1))


def generate(model: Any, ids: Tensor, mask: Tensor | None = None, new: int = 4, **kwargs: Any) -> Run:
    out = model.generate(
        input_ids=ids,
        attention_mask=mask if mask is not None else torch.ones_like(ids),
        max_new_tokens=new,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **kwargs,
    )
    return Run(torch.stack(out.logits), out.sequences)


def _follow_up(model: Any) -> Run:
    """A second turn on the cache of the first, whose rows differ in length."""
    first, second = prompt(), prompt(length=13, seed=4)
    mask = padding(left=(0, 7))
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=first, attention_mask=mask, past_key_values=cache)
    longer = torch.cat([mask, torch.ones_like(second)], dim=1)
    return forward(model, second, longer, past_key_values=cache)


def _packed(model: Any) -> Run:
    """Two sequences in one row; transformers sees them by their positions, without a cache only."""
    positions = torch.cat([torch.arange(20), torch.arange(LENGTH - 20)])[None]
    return forward(model, prompt(rows=1), position_ids=positions, use_cache=False)


SITUATIONS: dict[str, Callable[[Any], Run]] = {
    "no padding": lambda model: generate(model, prompt()),
    "no cache": lambda model: forward(model, prompt(), use_cache=False),
    "left padding": lambda model: generate(model, prompt(), padding(left=(0, 9))),
    "left padding of every row": lambda model: generate(model, prompt(), padding(left=(3, 9))),
    "right padding of one row": lambda model: forward(model, prompt(), padding(right=(0, 9))),
    "right padding of every row": lambda model: forward(model, prompt(), padding(right=(3, 9))),
    "padding on both sides": lambda model: forward(model, prompt(), padding(left=(0, 5), right=(0, 6))),
    "hole": lambda model: forward(model, prompt(), 1 - padding(left=(10, 30)) + padding(left=(15, 35))),
    "static cache": lambda model: generate(model, prompt(), cache_implementation="static"),
    "static cache, left padding": lambda model: generate(
        model, prompt(), padding(left=(0, 9)), cache_implementation="static"
    ),
    "chunked": lambda model: generate(model, prompt(), prefill_chunk_size=16),
    "chunked, left padding": lambda model: generate(model, prompt(), padding(left=(0, 21)), prefill_chunk_size=16),
    "chunked, static cache": lambda model: generate(
        model, prompt(), padding(left=(0, 5)), prefill_chunk_size=16, cache_implementation="static"
    ),
    "follow-up turn": _follow_up,
    "packed": _packed,
}
# What these describe cannot be planned for; they run dense, and say so.
DENSE_SITUATIONS = {"hole", "packed"}


# Every pair of every call, by the sparse path.
ALWAYS_SPARSE: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0}
FULL: dict[str, Any] = {"sink": 1, "window": 1024} | ALWAYS_SPARSE


def tiny_llama(**changes: Any) -> Any:
    config = copy.deepcopy(pair("llama")[0].config)  # the first call of it draws numbers
    torch.manual_seed(0)
    for name, value in changes.items():
        setattr(config, name, value)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
