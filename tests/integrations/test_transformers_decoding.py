"""`enable(decode=..., cache=...)`: generate with batches, padding, beams, drafts and several turns on one cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tiny_transformers import VOCAB, Run, forward, generate, padding, pair, prompt
from torch import Tensor
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

import gossamer
from gossamer.cache import StoreLayer
from gossamer.integrations.transformers import Handle, enable
from gossamer.methods import DoubleSparsity, LServe, MagicPIG, Method, OracleTopK, Quest, RetroInfer
from gossamer.policy import TOO_DENSE
from gossamer.summaries import PageBounds

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

LENGTH = 150
SPARSE: list[Method] = [
    Quest(budget=32, page=8, dense_layers=0),
    OracleTopK(budget=24, dense_layers=0),
    DoubleSparsity(budget=24, dense_layers=0, group_factor=2),
    MagicPIG(bits=4, hash_tables=12, sinks=2, local=8, buffer=16, dense_layers=()),
    RetroInfer(probe=0.1, size=8, segment=64, sinks=2, local=8, least=32, update=8),
    LServe(budget=48, page=16, logical=4),
]
WHOLE = Quest(budget=4096, dense_layers=0)


@contextmanager
def enabled(model: Any, decode: Any = None, **given: Any) -> Iterator[Handle]:
    with enable(model, "dense", decode=decode, **given) as handle:
        yield handle


def long_prompt(rows: int = 2, seed: int = 3, length: int = LENGTH) -> Tensor:
    return prompt(rows, length, seed)


LEFT = padding(left=(0, 37), length=LENGTH)
SITUATIONS: dict[str, Any] = {
    "batch": lambda model: generate(model, long_prompt(), new=6),
    "left padding": lambda model: generate(model, long_prompt(), LEFT, new=6),
    "beams": lambda model: generate(model, long_prompt(), LEFT, new=6, num_beams=3),
    "several answers": lambda model: generate(model, long_prompt(), LEFT, new=6, num_return_sequences=2, num_beams=2),
    "chunked": lambda model: generate(model, long_prompt(), LEFT, new=6, prefill_chunk_size=48),
    "drafts": lambda model: generate(model, long_prompt(1), new=12, prompt_lookup_num_tokens=3),
    "offloaded": lambda model: generate(model, long_prompt(1), new=6, past_key_values=DynamicCache()),
    "follow-up turn": lambda model: turns(model, DynamicCache(config=model.config)),
}


def turns(model: Any, cache: Any) -> Run:
    """Two questions on one cache, each answered token by token; logits of the second answer."""
    seen, mask = 0, LEFT
    answers: list[Run] = []
    for seed, length in ((3, LENGTH), (5, 9)):
        ids = long_prompt(2, seed, length)
        mask = mask if seen == 0 else torch.cat([mask, torch.ones_like(ids)], dim=1)
        answers = [forward(model, ids, mask, past_key_values=cache)]
        seen += length
        for step in range(4):
            mask = torch.cat([mask, torch.ones(2, 1, dtype=mask.dtype)], dim=1)
            token = torch.full((2, 1), 7 + step + seed)
            answers.append(forward(model, token, mask, past_key_values=cache))
    return Run(torch.cat([run.logits for run in answers]), torch.stack([run.tokens for run in answers[1:]]))


@pytest.mark.parametrize("family", ["llama", "qwen3", "mistral-window", "gemma2-softcap"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_a_budget_for_everything_is_the_stock_model(family: str, situation: str) -> None:
    stock, ours = pair(family)
    expected = SITUATIONS[situation](stock)
    with enabled(ours, WHOLE):
        got = SITUATIONS[situation](ours)
    assert torch.equal(got.tokens, expected.tokens)
    assert torch.allclose(got.logits, expected.logits, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
def test_steps_are_sparse_and_counted(method: Method) -> None:
    _, ours = pair("llama")
    with enabled(ours, method) as handle:
        generate(ours, long_prompt(), LEFT, new=6)
        stats = handle.stats()
    assert f"<gossamer dense+{method.name} on LlamaForCausalLM" in repr(handle)
    for layer in stats:
        assert (layer.calls, layer.sparse_steps) == (6, 5)
        assert 0.1 < layer.step_density < 0.5
        assert layer.density == 1.0
    assert " read " in str(stats)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.name)
def test_a_row_is_decoded_as_if_it_were_alone(method: Method) -> None:
    _, ours = pair("llama")
    ids = long_prompt()
    with enabled(ours, method):
        both = generate(ours, ids, LEFT, new=6)
        alone = generate(ours, ids[1:, 37:], new=6)
    assert torch.equal(both.tokens[1, LENGTH:], alone.tokens[0, LENGTH - 37 :])
    assert torch.allclose(both.logits[:, 1], alone.logits[:, 0], atol=1e-4)


# Beams that change places make lserve choose anew.
@pytest.mark.parametrize(
    "method", [*SPARSE[:-1], LServe(budget=48, page=16, logical=4, interval=1)], ids=lambda m: m.name
)
def test_beams_decode_as_one_forward_pass_after_another(method: Method) -> None:
    """Each hypothesis that is left has the logits of a cache that never had beams."""
    _, ours = pair("llama")
    ids = long_prompt(1)
    with enabled(ours, method):
        beams = generate(ours, ids, new=5, num_beams=3, num_return_sequences=1, output_scores=True)
        cache = DynamicCache(config=ours.config)
        forward(ours, ids, past_key_values=cache)
        answer, score = beams.tokens[:, LENGTH:], 0.0
        last = forward(ours, ids, use_cache=False).logits[:, -1]
        for n in range(answer.shape[1]):
            score += float(last.log_softmax(dim=-1)[0, answer[0, n]])
            last = forward(ours, answer[:, n : n + 1], past_key_values=cache).logits[:, -1]
        found = ours.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, num_beams=3, do_sample=False,
            return_dict_in_generate=True, output_scores=True, length_penalty=0.0,
        )  # fmt: skip
    assert torch.equal(found.sequences[:, LENGTH:], answer)
    assert float(found.sequences_scores[0]) == pytest.approx(score, abs=1e-3)


def test_a_second_turn_chooses_anew() -> None:
    """The same tokens on a cache of one piece give the same answers."""
    _, ours = pair("llama")
    first, second = long_prompt(1), long_prompt(1, 8, 20)
    for method in SPARSE:
        with enabled(ours, method) as handle:
            cache = handle.new_cache()
            forward(ours, first, past_key_values=cache)
            for _ in range(3):  # an answer, taken back
                forward(ours, torch.tensor([[9]]), past_key_values=cache)
            cache.crop(-3)
            forward(ours, second, past_key_values=cache)
            got = [forward(ours, torch.tensor([[t]]), past_key_values=cache).logits for t in (4, 5, 6)]
            fresh = handle.new_cache()
            forward(ours, first, past_key_values=fresh)
            forward(ours, second, past_key_values=fresh)
            expected = [forward(ours, torch.tensor([[t]]), past_key_values=fresh).logits for t in (4, 5, 6)]
        assert torch.equal(torch.stack(got), torch.stack(expected))


def test_drafts_that_are_refused_leave_no_trace() -> None:
    _, ours = pair("llama")
    ids = torch.cat([long_prompt(1, length=30)] * 5, dim=1)
    with enabled(ours, WHOLE):
        plain = generate(ours, ids, new=16)
        cache = DynamicCache(config=ours.config)
        drafted = generate(ours, ids, new=16, prompt_lookup_num_tokens=4, past_key_values=cache)
    assert torch.equal(plain.tokens, drafted.tokens)
    _summarises_what_it_holds(cache)


def test_an_assistant_model_drafts() -> None:
    """What it proposes is read several tokens at a time; its own steps have a cache of its own."""
    assistant, ours = pair("llama")
    ids = long_prompt(1)
    with enabled(ours, WHOLE):
        plain = generate(ours, ids, new=12)
        cache = DynamicCache(config=ours.config)
        drafted = generate(ours, ids, new=12, assistant_model=assistant, past_key_values=cache)
    assert torch.equal(plain.tokens, drafted.tokens)
    _summarises_what_it_holds(cache)


def _summarises_what_it_holds(cache: DynamicCache) -> None:
    layer = cache.layers[0]
    assert isinstance(layer, StoreLayer)
    scratch = StoreLayer()
    scratch.update(*layer.read())
    assert torch.equal(layer.summary(PageBounds(16)), scratch.summary(PageBounds(16)))


def test_a_static_cache_in_a_compiled_model_decodes_as_stock_attention_does() -> None:
    """Graphs have no stores: steps are dense there."""
    stock, ours = pair("llama")
    ids = long_prompt(1, length=20)

    @torch.no_grad()
    def steps(model: Any) -> Tensor:
        cache = StaticCache(stock.config, max_cache_len=32)
        rows = [model(ids, past_key_values=cache).logits[:, -1]]
        for token in (4, 5):
            rows.append(model(torch.tensor([[token]]), past_key_values=cache).logits[:, -1])
        return torch.stack(rows)

    expected = steps(stock)
    with enabled(ours, SPARSE[0]):
        found = steps(torch.compile(ours, backend="eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_static_cache_decodes_dense_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    stock, ours = pair("llama")
    with enabled(ours, SPARSE[0]) as handle, caplog.at_level("WARNING", logger="gossamer"):
        got = generate(ours, long_prompt(), LEFT, new=4, past_key_values=StaticCache(ours.config, max_cache_len=160))
        assert handle.stats().fallbacks()["quest needs store"] == 6
    assert torch.equal(got.tokens, generate(stock, long_prompt(), LEFT, new=4).tokens)
    assert "a StaticCache takes no stores" in caplog.text


def test_without_our_cache_a_step_is_dense_and_says_so() -> None:
    _, ours = pair("llama")
    ids = long_prompt(1)
    with enabled(ours, SPARSE[0]) as handle:
        out = ours(ids)  # a cache of its own making
        assert not any(isinstance(layer, StoreLayer) for layer in out.past_key_values.layers)
        forward(ours, torch.tensor([[5]]), past_key_values=out.past_key_values)  # which takes stores here
        assert [layer.sparse_steps for layer in handle.stats()] == [1, 1]
        handle.reset()
        forward(ours, torch.tensor([[5]]), use_cache=False)
        assert handle.stats().fallbacks() == {"quest needs store": 2}


def test_a_hole_in_the_mask_is_dense() -> None:
    stock, ours = pair("llama")
    mask = torch.cat([LEFT, torch.ones(2, 1, dtype=LEFT.dtype)], dim=1)
    mask[0, 50:60] = 0
    runs = []
    for model, decode in ((stock, None), (ours, SPARSE[0])):
        with enabled(model, decode) if decode is not None else torch.no_grad() as handle:
            cache = DynamicCache(config=model.config)
            forward(model, long_prompt(), mask[:, :-1], past_key_values=cache)
            runs.append(forward(model, torch.full((2, 1), 5), mask, past_key_values=cache))
            if isinstance(handle, Handle):
                assert handle.stats().fallbacks() == {"mask is not plain": 4}
    assert torch.allclose(runs[0].logits, runs[1].logits, atol=1e-4)


def test_layers_with_windows_keep_their_own_cache() -> None:
    _, ours = pair("gemma2-softcap")
    with enabled(ours, SPARSE[0]) as handle:
        generate(ours, long_prompt(), new=4)
        layers = {layer.layer: layer for layer in handle.stats()}
    assert layers[0].fallbacks == {"quest needs store": 3}
    assert layers[1].sparse_steps == 3


def test_prompts_and_steps_have_methods_of_their_own() -> None:
    _, ours = pair("llama")
    prefill = gossamer.methods.create("a_shape", sink=4, window=60)
    with enable(ours, prefill, decode=SPARSE[0], min_tokens=0) as handle:
        generate(ours, long_prompt(), LEFT, new=4)
        for layer in handle.stats():
            assert (layer.sparse_calls, layer.sparse_steps, layer.fallbacks) == (4, 3, {})
            assert layer.density < 0.9


def test_a_name_has_published_budgets() -> None:
    _, ours = pair("llama")
    with enabled(ours, "quest") as handle:
        assert handle.policy.decode == Quest()
        generate(ours, long_prompt(1), new=3)
        assert handle.stats().fallbacks() == {TOO_DENSE: 4}


def test_compiled_models_decode_dense() -> None:
    stock, ours = pair("llama")
    with enabled(ours, SPARSE[0]):
        compiled = torch.compile(ours, backend="eager")
        got = [forward(compiled, long_prompt(1), past_key_values=DynamicCache(config=ours.config))]
    expected = forward(stock, long_prompt(1), past_key_values=DynamicCache(config=stock.config))
    assert torch.allclose(got[0].logits, expected.logits, atol=1e-4)


def test_what_is_left_after_disable() -> None:
    stock, ours = pair("llama")
    with enabled(ours, SPARSE[0]) as handle:
        twin = copy.deepcopy(ours)
    cache = DynamicCache(config=ours.config)
    for model in (ours, twin.eval()):
        model.set_attn_implementation("sdpa")
        forward(model, long_prompt(1), past_key_values=cache)
    assert not any(isinstance(layer, StoreLayer) for layer in cache.layers)
    with pytest.raises(ValueError, match="there are no stores"):
        handle.new_cache()
    with enable(stock, "dense") as plain, pytest.raises(ValueError, match="there are no stores"):
        plain.new_cache()


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"decode": "dense"}, ValueError, "must be a method that chooses"),
        ({"decode": "nonesuch"}, ValueError, "unknown method 'nonesuch'"),
        ({"cache": 3}, TypeError, "cache must be a name or a gossamer.cache.CachePolicy, got int"),
        ({"cache": "nonesuch"}, ValueError, "unknown cache 'nonesuch'"),
        ({"decode": "quest", "context_parallel": True}, ValueError, "leave decode and cache out"),
    ],
)
def test_what_is_refused(given: dict[str, Any], error: type[Exception], message: str) -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    )
    with pytest.raises(error, match=message):
        enable(model, "dense", **given)
    assert model.config._attn_implementation == "sdpa"
