"""Layers in turn: each sees what the changed ones before it give, with the model's own masks and positions."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from gossamer.compressed.sequential import decoder_layers, linear_layers, walk  # noqa: E402


def tiny(kind: str) -> Any:
    torch.manual_seed(0)
    size = dict(vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4)
    size |= dict(num_key_value_heads=2, head_dim=8)
    more: dict[str, Any] = {}
    if kind == "Gemma3Text":  # windows and whole layers, each with its mask and positions
        more = dict(sliding_window=4, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    config = getattr(transformers, f"{kind}Config")(**size, **more)
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    return getattr(transformers, name)(config).eval()


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(60, (2, n), generator=generator) for n in (9, 14)]


def noting(seen: dict[str, list[Tensor]], name: str) -> Any:
    return lambda _, args: seen.setdefault(name, []).append(args[0].clone())


@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "Gemma3Text"])
def test_inputs_are_those_of_the_changed_model(kind: str) -> None:
    model, other = tiny(kind), tiny(kind)
    seen: dict[str, list[Tensor]] = {}

    def observe(name: str, layer: nn.Linear, x: Tensor) -> None:
        seen.setdefault(name, []).append(x.clone())

    def after(name: str, layer: nn.Module) -> None:
        for inner, linear in linear_layers(layer):
            with torch.no_grad():
                linear.weight.mul_(0.9)
            assert f"{name}.{inner}" in seen

    walk(model, samples(), observe, after)
    assert len(seen) == 3 * 7
    expected: dict[str, list[Tensor]] = {}
    place, layers = decoder_layers(other)
    for number, layer in enumerate(layers):  # one layer more is changed in each pass
        hooks = [
            linear.register_forward_pre_hook(noting(expected, f"{place}.{number}.{inner}"))
            for inner, linear in linear_layers(layer)
        ]
        with torch.no_grad():
            for ids in samples():
                other(input_ids=ids, use_cache=False)
        for hook in hooks:
            hook.remove()
        after(f"{place}.{number}", layer)
    assert seen.keys() == expected.keys()
    for name, inputs in expected.items():
        for found, wanted in zip(seen[name], inputs, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


def test_looking_changes_nothing() -> None:
    model = tiny("Llama")
    before = copy.deepcopy(model.state_dict())
    names: set[str] = set()
    walk(model, samples(), lambda name, layer, x: names.add(name))
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert "model.layers.0.self_attn.q_proj" in names
    assert not any("lm_head" in name for name in names)


def test_models_without_layers() -> None:
    with pytest.raises(ValueError, match="no list of layers"):
        walk(nn.Linear(2, 2), [], lambda name, layer, x: None)
