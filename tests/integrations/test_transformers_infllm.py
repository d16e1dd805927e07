"""InfLLM whole in a model: chunks, batches, beams, caches in a file; and texts longer than a model was trained on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_transformers_evictions import PROMPT, STEPS, decoded, left_padded, tiny, tokens
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from gossamer import enable
from gossamer.cache import Tiers
from gossamer.methods import InfLLMLong
from gossamer.policy import NEAR

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

METHOD = InfLLMLong(blocks=1, block=4, count=2, init=4, local=12, every=1, together=8)


def test_rows_and_caches_and_chunks_say_the_same(tmp_path: Path) -> None:
    """Chunks end where queries that choose together do, counted from the end of the window on: 12, and then eights."""
    ids, mask, model = tokens(2), left_padded([8, 0]), tiny()
    found: list[Any] = []
    for kept, chunks in (
        ("keep", [PROMPT, *[1] * STEPS]),
        ("keep", [20, 8, 8, 4, *[1] * STEPS]),
        (Tiers(block=4, hot=16, resident=16, folder=str(tmp_path)), [PROMPT, *[1] * STEPS]),
    ):
        with enable(model, METHOD, cache=kept) as handle:
            found.append(decoded(model, handle.new_cache(), ids, mask, *chunks)[:, -STEPS:])
            for layer in handle.stats():
                assert layer.sparse_steps == STEPS
                assert set(layer.fallbacks) <= {NEAR}
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-4, atol=1e-5)
    alone = ids[:1, 8:]
    with enable(model, METHOD) as handle:
        own = decoded(model, handle.new_cache(), alone, torch.ones_like(alone), PROMPT - 8, *[1] * STEPS)
    torch.testing.assert_close(found[0][:1], own[:, -STEPS:], rtol=1e-4, atol=1e-5)


def test_it_generates_without_a_word_about_steps() -> None:
    ids, mask, model = tokens(2)[:, :PROMPT], left_padded([8, 0])[:, :PROMPT], tiny()
    fields: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
    with enable(model, METHOD) as handle:
        out = model.generate(ids, attention_mask=mask, **fields)
        assert all(layer.sparse_steps == 3 for layer in handle.stats())
        beams = model.generate(ids[1:], num_beams=2, **fields)
        drafted = model.generate(ids[1:], prompt_lookup_num_tokens=3, **fields)
    assert out.shape == (2, PROMPT + 4)
    assert beams.shape == (1, PROMPT + 4)
    assert drafted.shape == (1, PROMPT + 4)


def test_inside_the_window_a_model_says_the_same() -> None:
    ids, model = tokens(1), tiny()
    found = []
    for method in ("dense", InfLLMLong(local=64)):
        with enable(model, method, cache="keep") as handle:
            found.append(decoded(model, handle.new_cache(), ids, torch.ones_like(ids), PROMPT, 1, 1))
    assert torch.equal(found[0], found[1])


def test_a_model_without_rotary_embedding_is_refused() -> None:
    model = GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=32)).eval()
    with pytest.raises(ValueError, match="infllm_long looks at q and k before their rotary embedding"):
        enable(model, METHOD)


LENGTH, LAG, WORDS = 64, 7, 32


def repeating(rows: int, length: int, seed: int) -> Tensor:
    """Nine tokens in ten are the one ``LAG`` tokens before: who finds it knows most of the text."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(WORDS, (rows, length), generator=generator)
    repeats = torch.rand(rows, length, generator=generator) < 0.9
    for t in range(LAG, length):
        ids[:, t] = torch.where(repeats[:, t], ids[:, t - LAG], ids[:, t])
    return ids


@pytest.fixture(scope="module")
def short_model() -> Any:
    """Trained on ``LENGTH`` tokens. Its angles repeat after twice as many: distances beyond are not what they seem."""
    torch.manual_seed(0)
    size: Any = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "head_dim": 32}
    heads: Any = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": LENGTH}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=WORDS, **size, **heads))
    model.model.rotary_emb.inv_freq.copy_(torch.pi / LENGTH * torch.arange(1, 17))
    optimizer, steps = torch.optim.AdamW(model.parameters(), lr=3e-3), 110
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 20) * (1 - step / steps) + 1e-4
        ids = repeating(16, LENGTH, seed=step)
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@torch.no_grad()
def loss(model: Any, ids: Tensor) -> float:
    """Nats a token, of the second half."""
    half = ids.shape[1] // 2
    logits = model(ids).logits[:, half - 1 : -1]
    return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, half:].flatten()))


def test_a_text_of_eight_times_the_trained_length_is_read_nearly_as_well(short_model: Any) -> None:
    ids = repeating(4, 8 * LENGTH, seed=1000)
    short, long = loss(short_model, ids[:, :LENGTH]), loss(short_model, ids)
    method = InfLLMLong(blocks=2, block=16, count=2, init=16, local=48, every=1, together=16)
    with enable(short_model, method):
        extended = loss(short_model, ids)
    assert long > short + 1  # dense attention takes tokens at distances that it has never seen for others
    assert extended < short + 0.3
