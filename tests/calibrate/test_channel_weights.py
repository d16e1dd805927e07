"""Weights of channels by their definition, over every token of every sample."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny import VOCAB, tiny_llama
from torch import Tensor

from gossamer import AttentionCall, Extent
from gossamer.calibrate.channels import find_channels, weights

SAMPLES = [
    torch.randint(2, VOCAB, (1, length), generator=torch.Generator().manual_seed(length)) for length in (40, 9, 25)
]


def turned(model: Any, sample: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Of each layer, queries and keys as attention has them: ``[heads, tokens, D]``."""
    found: list[tuple[Tensor, Tensor]] = []
    out = model(input_ids=sample, use_cache=True, output_hidden_states=True)
    cos, sin = model.model.rotary_emb(out.hidden_states[0], torch.arange(sample.shape[1])[None])
    for layer, hidden, cached in zip(
        model.model.layers, out.hidden_states[:-1], out.past_key_values.layers, strict=True
    ):
        x = layer.input_layernorm(hidden)
        q = layer.self_attn.q_proj(x).unflatten(-1, (-1, layer.self_attn.head_dim)).transpose(1, 2)
        half = torch.cat([-q[..., q.shape[-1] // 2 :], q[..., : q.shape[-1] // 2]], dim=-1)
        found.append(((q * cos[:, None] + half * sin[:, None])[0], cached.keys[0]))
    return found


@pytest.mark.parametrize("kind", ["k", "keys", "q", "qk"])
@torch.no_grad()
def test_channels_are_ranked_by_their_mean_weight(kind: str) -> None:
    model = tiny_llama()
    sums: list[Any] = [0.0, 0.0]
    for sample in SAMPLES:
        for layer, (q, k) in enumerate(turned(model, sample)):
            products = (q * k.repeat_interleave(2, dim=0)).abs()
            of_groups = products.unflatten(0, (2, 2)).sum(dim=1)
            sums[layer] += {"k": of_groups, "keys": k.abs(), "q": q.abs(), "qk": products}[kind].sum(dim=1)
    seen: list[int] = []
    channels = find_channels(model, SAMPLES, kind, seen.append)
    assert seen == [1, 2, 3]
    for own, heads in zip(sums, channels, strict=True):
        assert len(heads) == (2 if kind in ("k", "keys") else 4)
        for row, order in zip(own, heads, strict=True):
            assert sorted(order) == list(range(8))
            ranked = row[list(order)]
            assert bool((ranked.diff() <= 1e-4 * ranked[0]).all())
    assert model.config._attn_implementation == "sdpa"


def test_padding_has_no_weight() -> None:
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 7, 8, generator=draw), torch.randn(1, 2, 7, 8, generator=draw)
    padded = [torch.cat([torch.full((1, x.shape[1], 3, 8), torch.nan), x], dim=2) for x in (q, k)]
    for kind in ("k", "keys", "q", "qk"):
        alone = weights(AttentionCall(q, k), kind)
        assert torch.allclose(weights(AttentionCall(*padded, extent=Extent([-3], [7], [3], [7])), kind), alone)


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="kind must be one of k, keys, q, qk, got 'v'"):
        find_channels(tiny_llama(), SAMPLES, "v")
    with pytest.raises(ValueError, match="layer 0 of LlamaForCausalLM made no call"):
        find_channels(tiny_llama(), [])
