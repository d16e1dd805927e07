"""Calls say how a model turned its q and k: found out from the model, whatever its kind of rotary embedding."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import SIZE, padding, prompt, tiny_llama
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    DynamicCache,
    Gemma3TextConfig,
    GlmConfig,
    GPT2Config,
    LlamaConfig,
    SmolLM3Config,
    StableLmConfig,
)

from gossamer import Policy
from gossamer.integrations.transformers import enable
from gossamer.methods import PerHead, SeerAttention

DYNAMIC = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 64}
PARTIAL: dict[str, Any] = SIZE | {"partial_rotary_factor": 0.25}
GLM: dict[str, Any] = SIZE | {"head_dim": 8, "partial_rotary_factor": 0.5}
SERVED: dict[str, Any] = {
    "llama": lambda: LlamaConfig(**SIZE),
    "yarn": lambda: LlamaConfig(**SIZE, rope_parameters=YARN),
    "partial": lambda: StableLmConfig(**PARTIAL),
    "interleaved and partial": lambda: GlmConfig(**GLM),
}

KINDS = {  # channels that are turned, of 8; whether pairs are neighbours; whether they are scaled
    "llama": (8, False, False),
    "yarn": (8, False, True),
    "partial": (2, False, False),
    "interleaved and partial": (4, True, False),
}


def model_of(config: Any) -> Any:
    torch.manual_seed(1)
    return AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()


def calls(model: Any, *runs: dict[str, Any]) -> list[Any]:
    """The calls of the last of some forward passes."""
    seen: list[Any] = []
    with enable(model, "dense") as handle, torch.no_grad():
        handle.observe(lambda observed: seen.append(observed.call), rotary=True)
        for run in runs:
            seen.clear()
            model(**run)
    return seen


def before(model: Any, layer: int, hidden: Tensor) -> Tensor:
    """Queries of a layer as its projection gives them, ``[B, H, S, D]``."""
    attention = model.model.layers[layer].self_attn
    q = attention.q_proj(model.model.layers[layer].input_layernorm(hidden))
    return q.view(*hidden.shape[:2], -1, attention.head_dim).transpose(1, 2)


@pytest.mark.parametrize("kind", SERVED)
def test_queries_are_those_of_the_projection(kind: str) -> None:
    model, ids = model_of(SERVED[kind]()), prompt()
    found = calls(model, {"input_ids": ids})
    assert [call.layer for call in found] == [0, 1]
    rotary = found[0].rotary
    assert (rotary.channels, rotary.interleaved, rotary.scaling > 1) == KINDS[kind]
    with torch.no_grad():
        expected = before(model, 0, model.model.embed_tokens(ids))
    torch.testing.assert_close(found[0].before_rotary().q, expected, atol=1e-4, rtol=1e-3)
    assert not torch.allclose(found[0].q, expected, atol=1e-2)


def keys_before(model: Any, ids: Tensor) -> Tensor:
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        k = attention.k_proj(model.model.layers[0].input_layernorm(model.model.embed_tokens(ids)))
    return k.view(*ids.shape, -1, attention.head_dim).transpose(1, 2)


@pytest.mark.parametrize("given", [False, True], ids=["padding is counted", "padding is not counted"])
def test_the_models_own_positions_count(given: bool) -> None:
    """With left padding, a model without position_ids counts the padding."""
    model, ids, mask = tiny_llama(), prompt(), padding(left=(0, 9))
    run: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    if given:
        run["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    call = calls(model, run)[0]
    live = mask.bool()[:, None, :, None]
    plain, expected = call.before_rotary().k, keys_before(model, ids)
    torch.testing.assert_close(plain * live, expected * live, atol=1e-4, rtol=1e-3)
    assert call.rotary is not None
    offsets = call.rotary.offsets
    assert offsets is None if given else torch.equal(offsets, torch.tensor([0, 9]))


def test_cached_keys_are_undone_too() -> None:
    model, ids = tiny_llama(), prompt()
    cache = DynamicCache(config=model.config)
    first, second = ({"input_ids": part, "past_key_values": cache} for part in (ids[:, :20], ids[:, 20:]))
    call = calls(model, first, second)[0]
    assert call.query_len < call.key_len == ids.shape[1]
    torch.testing.assert_close(call.before_rotary().k, keys_before(model, ids), atol=1e-4, rtol=1e-3)


def test_positions_with_a_hole_say_nothing() -> None:
    model, ids = tiny_llama(), prompt(rows=1)
    positions = torch.arange(ids.shape[1])[None] * 2
    found = calls(model, {"input_ids": ids, "position_ids": positions, "attention_mask": torch.ones_like(ids)})
    assert [call.rotary for call in found] == [None, None]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: GPT2Config(vocab_size=96, n_embd=32, n_layer=2, n_head=4), "no rotary module"),
        (
            lambda: LlamaConfig(**SIZE, rope_parameters=DYNAMIC),
            "change",
        ),
        (lambda: Gemma3TextConfig(**SIZE, head_dim=8, sliding_window=20), "no rotary module with one list of angles"),
        (lambda: SmolLM3Config(**SIZE, no_rope_layers=[1, 0], use_sliding_window=False), "layer 1 of SmolLM3"),
        (
            lambda: Cohere2Config(**SIZE, sliding_window=20, layer_types=["sliding_attention", "full_attention"]),
            "layer 1 of Cohere2",
        ),
    ],
)
def test_what_cannot_be_undone_is_refused(config: Any, message: str) -> None:
    model = model_of(config())
    with pytest.raises(ValueError, match=f"seer_attention looks at q and k before their rotary embedding: .*{message}"):
        enable(model, "seer_attention")
    enable(model, "dense").disable()
    with pytest.raises(ValueError, match="before their rotary embedding"):
        enable(model, PerHead([[SeerAttention()] * 4] * 2))


def test_a_model_runs_a_gate_and_is_given_back() -> None:
    model, ids = tiny_llama(), prompt(length=200)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with enable(model, Policy(SeerAttention(threshold=0.0), 0, 2.0)) as handle:
            assert len(handle.stats()) == 0
            torch.testing.assert_close(model(input_ids=ids).logits, expected, atol=1e-4, rtol=1e-3)
            assert [layer.sparse_calls for layer in handle.stats()] == [1, 1]
            assert all(layer.density == 1.0 for layer in handle.stats())
        with enable(model, Policy(SeerAttention(threshold=0.5, last_blocks=1), 0, 2.0)) as handle:
            assert not torch.allclose(model(input_ids=ids).logits, expected, atol=1e-3)
            assert all(layer.density < 1 for layer in handle.stats())
            copy.deepcopy(model)
    assert not model.model.rotary_emb._forward_pre_hooks
    assert torch.equal(model(input_ids=ids).logits, expected)


def test_in_a_graph_nobody_sees_positions() -> None:
    """What an eager forward showed before is not taken for the graph's."""
    model, ids = tiny_llama(), prompt(rows=1, length=64)
    with enable(model, Policy(SeerAttention(threshold=0.5), 0, 2.0)) as handle, torch.no_grad():
        model(input_ids=ids)
        assert [layer.sparse_calls for layer in handle.stats()] == [1, 1]
        handle.reset()
        torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids, use_cache=False)
        assert handle.stats().fallbacks() == {"seer_attention needs rotary": 2}
