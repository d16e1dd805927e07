"""`filter_prompt` against GemFilter's formula, from a model's own hidden states; what it runs, and what it refuses."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from test_transformers_encoders import bart, bert
from tiny_transformers import VOCAB, pair, tiny_llama
from torch import Tensor

import gossamer
from gossamer.integrations.transformers import filter_prompt, owners

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def prompt(length: int = 60, seed: int = 0) -> Tensor:
    return torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(seed))


def naive(model: Any, ids: Tensor, layer: int, keep: int) -> list[int]:
    """Positions, from the hidden states before a Llama layer: rotate, multiply, sum over heads, average, sort."""
    with torch.no_grad():
        hidden = model(input_ids=ids, output_hidden_states=True).hidden_states[layer]
        block = model.model.layers[layer]
        states = block.input_layernorm(hidden)
        q, k = block.self_attn.q_proj(states)[0].double(), block.self_attn.k_proj(states)[0].double()
    dim, length = block.self_attn.head_dim, ids.shape[1]
    heads, groups = q.shape[1] // dim, k.shape[1] // dim
    base = model.config.rope_parameters["rope_theta"]

    def rotated(x: Tensor, position: int) -> list[float]:
        half, out = dim // 2, [0.0] * dim
        for i in range(half):
            angle = position * base ** (-2 * i / dim)
            one, other = float(x[i]), float(x[i + half])
            out[i] = one * math.cos(angle) - other * math.sin(angle)
            out[i + half] = other * math.cos(angle) + one * math.sin(angle)
        return out

    score = [0.0] * length
    for h in range(heads):
        query = rotated(q[-1, h * dim : (h + 1) * dim], length - 1)
        group = h // (heads // groups)
        for j in range(length):
            key = rotated(k[j, group * dim : (group + 1) * dim], j)
            score[j] += sum(a * b for a, b in zip(query, key, strict=True))
    padded = [0.0, 0.0, *score, 0.0, 0.0]
    around = [sum(padded[j : j + 5]) / 5 for j in range(length)]
    return sorted(sorted(range(length), key=lambda j: (-around[j], j))[:keep])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("keep", [1, 7, 59])
def test_the_tokens_are_those_of_the_formula(layer: int, keep: int) -> None:
    model = tiny_llama()
    for seed in range(3):
        ids = prompt(seed=seed)
        expected = naive(model, ids, layer, keep)
        got = filter_prompt(model, ids, layer, keep)
        assert torch.equal(got, ids[:, expected])
        assert torch.equal(filter_prompt(model, ids[0], layer, keep), ids[0, expected])


def test_scores_are_not_scaled_and_heads_are_not_weighed() -> None:
    """The order of a sum over heads does not change with the scale, and that of a mean of softmaxes would."""
    model = tiny_llama()
    expected = filter_prompt(model, prompt(), 0, 9)
    for block in model.model.layers:
        block.self_attn.scaling *= 7.0
    assert torch.equal(filter_prompt(model, prompt(), 0, 9), expected)


def test_layers_behind_the_one_that_scores_do_not_run() -> None:
    model, ran = tiny_llama(), []
    for number, block in enumerate(model.model.layers):
        block.register_forward_hook(lambda *_, number=number: ran.append(number))
    model.lm_head.register_forward_hook(lambda *_: ran.append(-1))
    filter_prompt(model, prompt(), 1, 5)
    assert ran == [0]


def test_the_first_pass_may_be_sparse() -> None:
    ids, fields = prompt(), {"sink": 0, "window": 1, "min_tokens": 0, "max_density": 2.0}
    model = tiny_llama()
    policy = gossamer.Policy(gossamer.methods.AShape(0, 1), min_tokens=0)
    got = filter_prompt(model, ids, 1, 9, method=policy)
    assert owners.owner_of(model) is None
    assert model.config._attn_implementation == "sdpa"
    with gossamer.enable(model, "a_shape", **fields) as handle:
        expected = ids[:, naive(model, ids, 1, 9)]
        handle.reset()
        assert torch.equal(filter_prompt(model, ids, 1, 9), expected)
        assert len(handle.stats()) == 0
        assert handle.enabled
        owner = owners.owner_of(model)
        assert owner is not None
        assert type(owner.policy) is gossamer.Policy
        with pytest.raises(ValueError, match="enabled already, and reads prompts by its own method"):
            filter_prompt(model, ids, 1, 9, method="dense")
    assert torch.equal(got, expected)
    assert not torch.equal(got, filter_prompt(model, ids, 1, 9))


def test_what_is_kept_is_a_prompt_of_its_own() -> None:
    """Positions are counted anew."""
    model = tiny_llama()
    kept = filter_prompt(model, prompt(), 1, 12)
    with torch.no_grad():
        logits = model(input_ids=kept, position_ids=torch.arange(12)[None]).logits
        assert torch.equal(model(input_ids=kept).logits, logits)


@pytest.mark.parametrize("keep", [60, 61, 1000])
def test_a_prompt_that_is_short_enough_stays(keep: int) -> None:
    ids = prompt()
    assert filter_prompt(tiny_llama(), ids, 0, keep) is ids


def test_the_model_is_left_as_it_was() -> None:
    model = tiny_llama(attention_dropout=0.5).train()
    model.model.layers[0].eval()
    ids = prompt()
    once, again = filter_prompt(model, ids, 1, 9), filter_prompt(model, ids, 1, 9)
    assert torch.equal(once, again)
    assert [module.training for module in (model, model.model.layers[0], model.model.layers[1])] == [True, False, True]
    assert model.config._attn_implementation == "sdpa"
    assert all(owners.owner_of(module) is None for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_soft_caps_and_sinks_do_not_hinder() -> None:
    """Gemma 2 alternates: a layer that sees a window alone can't score."""
    model = copy.deepcopy(pair("gemma2-softcap")[0])
    assert filter_prompt(model, prompt(), 1, 9).shape == (1, 9)
    with pytest.raises(ValueError, match="layer 0 attends 20 tokens alone, and can't tell which of 60 matter"):
        filter_prompt(model, prompt(), 0, 9)
    assert filter_prompt(model, prompt(length=20), 0, 9).shape == (1, 9)


def test_a_layer_without_our_attention_is_named() -> None:
    model = copy.deepcopy(pair("qwen3-next-hybrid")[0])
    linear = next(i for i, kind in enumerate(model.config.layer_types) if kind == "linear_attention")
    full = next(i for i, kind in enumerate(model.config.layer_types) if kind == "full_attention")
    with pytest.raises(ValueError, match=f"layer {linear} of Qwen3NextForCausalLM has no attention that comes"):
        filter_prompt(model, prompt(), linear, 9)
    assert filter_prompt(model, prompt(), full, 9).shape == (1, 9)


def test_encoders_are_refused() -> None:
    kind, config = bart()
    with pytest.raises(ValueError, match="is an encoder-decoder"):
        filter_prompt(kind(config).eval(), prompt(), 0, 9)
    kind, config = bert()
    model = kind(config).eval()
    with pytest.raises(ValueError, match="layer 0 of BertModel has no attention that comes"):
        filter_prompt(model, prompt(), 0, 9)
    with gossamer.enable(model, "dense", bidirectional=True), pytest.raises(ValueError, match="is not causal"):
        filter_prompt(model, prompt(), 0, 9)


@pytest.mark.parametrize(
    ("ids", "layer", "keep", "error", "message"),
    [
        (prompt().expand(2, -1), 0, 9, ValueError, "a prompt is filtered by itself, got 2"),
        (prompt().float(), 0, 9, TypeError, "input_ids must be a tensor of token ids"),
        ([3, 4], 0, 1, TypeError, "input_ids must be a tensor of token ids"),
        (prompt(), 2, 9, ValueError, "layer must be at least 0 and below 2, the number of the model's layers, got 2"),
        (prompt(), -1, 9, ValueError, "layer must be at least 0 and below 2"),
        (prompt(), 1.0, 9, TypeError, r"layer must be an integer, got 1\.0"),
        (prompt(), 0, 0, ValueError, "keep must be at least 1, got 0"),
        (prompt(), 0, True, TypeError, "keep must be an integer, got True"),
    ],
)
def test_what_can_not_work_is_refused(ids: Any, layer: Any, keep: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        filter_prompt(tiny_llama(), ids, layer, keep)


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(TypeError, match="needs a transformers model"):
        filter_prompt(torch.nn.Linear(2, 2), prompt(), 0, 9)
