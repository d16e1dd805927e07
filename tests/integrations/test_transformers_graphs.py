"""Decode steps and prefills in graphs: compiled, exported, traced."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL, forward, generate, padding, pair, prompt, tiny_llama
from transformers import CompileConfig, StaticCache

from gossamer.integrations.transformers import enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL: dict[str, Any] = {"sink": 1, "window": 3} | ALWAYS_SPARSE


@pytest.mark.parametrize("family", ["llama", "gpt-oss-sinks"])
def test_generate_with_a_compiled_decode_step(family: str) -> None:
    stock, model = pair(family)
    mask = padding(left=(0, 9))
    expected = generate(stock, prompt(), mask, new=6, cache_implementation="static")
    compiled: Any = CompileConfig(backend="eager", fullgraph=True)
    compiled.mode = None
    compiled._compile_all_devices = True
    torch.compiler.reset()
    with enable(model, "a_shape", **FULL) as handle:
        got = generate(model, prompt(), mask, new=6, cache_implementation="static", compile_config=compiled)
        rows = list(handle.stats())
    torch.compiler.reset()
    assert torch.equal(got.tokens, expected.tokens)
    # The prefill is sparse and counted; the decode steps are in a graph, which holds no clocks and counters.
    assert all(row.sparse_calls == 1 for row in rows)
    assert all(row.dense_calls < 5 for row in rows)


def test_one_decode_step_is_one_graph() -> None:
    model = tiny_llama(num_hidden_layers=1)
    with enable(model, "a_shape", **FULL), torch.no_grad():
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(input_ids=prompt(), past_key_values=cache)
        step = torch.compile(model.forward, fullgraph=True, backend="eager")
        token = prompt(length=1, seed=9)
        got = step(input_ids=token, past_key_values=cache).logits
    torch.compiler.reset()
    expected = forward(model, torch.cat([prompt(), token], dim=1)).logits[:, -1:]
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_a_compiled_prefill_leaves_the_graph_and_is_still_sparse() -> None:
    model = tiny_llama(num_hidden_layers=1)
    expected = forward(model, prompt(), padding(left=(0, 9)), use_cache=False)
    with enable(model, "a_shape", **FULL) as handle:
        compiled = torch.compile(model, backend="eager")
        got = forward(compiled, prompt(), padding(left=(0, 9)), use_cache=False)
        assert all(row.sparse_calls == 1 for row in handle.stats())
    torch.compiler.reset()
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral-window", "gpt-oss-sinks", "gemma2-softcap"])
def test_a_prefill_is_one_graph_and_sparse(family: str) -> None:
    _, model = pair(family)
    with enable(model, "a_shape", **SMALL) as handle:
        expected = forward(model, prompt(), padding(left=(0, 9)), use_cache=False)
        handle.reset()
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        got = forward(compiled, prompt(), padding(left=(0, 9)), use_cache=False)
        assert [(row.layer, row.sparse_calls, row.dense_calls) for row in handle.stats()] == [(0, 1, 0), (1, 1, 0)]
    torch.compiler.reset()
    torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)


def test_a_graph_follows_the_model_to_another_policy() -> None:
    model = tiny_llama()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for policy in (SMALL, FULL):
        with enable(model, "a_shape", **policy):
            expected = forward(model, prompt(), use_cache=False)
            got = forward(compiled, prompt(), use_cache=False)
        torch.testing.assert_close(got.logits, expected.logits, atol=1e-5, rtol=1e-4)
    torch.compiler.reset()


def test_training_in_a_graph_is_dense_and_has_its_gradient() -> None:
    stock = tiny_llama().train()
    model = copy.deepcopy(stock)
    stock(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
    with enable(model, "a_shape", **SMALL):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
    torch.compiler.reset()
    for (name, one), (_, two) in zip(stock.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-5, rtol=1e-3, msg=name)


def test_training_in_a_graph_is_sparse_where_asked_for() -> None:
    plain = tiny_llama().train()
    model = copy.deepcopy(plain)
    with enable(plain, "a_shape", training=True, **SMALL):
        plain(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
    with enable(model, "a_shape", training=True, **SMALL) as handle:
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        compiled(input_ids=prompt(), labels=prompt(), use_cache=False).loss.backward()
        assert [(row.sparse_calls, row.dense_calls) for row in handle.stats()] == [(1, 0)] * 2
    torch.compiler.reset()
    for (name, one), (_, two) in zip(plain.named_parameters(), model.named_parameters(), strict=True):
        torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_is_sparse(strict: bool) -> None:
    model = tiny_llama()
    ids = prompt()
    with enable(model, "a_shape", **SMALL) as handle, torch.no_grad():
        expected = model(ids, use_cache=False).logits
        handle.reset()
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=strict)
        got = program.module()(ids, use_cache=False).logits
        assert all(row.sparse_calls == 1 for row in handle.stats())
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


def test_an_exported_program_keeps_its_policy_without_the_model(tmp_path: Any) -> None:
    model = tiny_llama()
    ids = prompt()
    with enable(model, "a_shape", **SMALL), torch.no_grad():
        expected = model(ids, use_cache=False).logits
        program = torch.export.export(model, (ids,), {"use_cache": False}, strict=False)
        torch.export.save(program, tmp_path / "program.pt2")
    del model, program
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    torch.testing.assert_close(loaded(ids, use_cache=False).logits, expected, atol=1e-5, rtol=1e-4)


def test_jit_traces_what_it_traces_without() -> None:
    model = tiny_llama()

    class Logits(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.model(ids, use_cache=False).logits

    expected = forward(model, prompt(), use_cache=False).logits
    with enable(model, "a_shape", **FULL), torch.no_grad():
        traced: Any = torch.jit.trace(Logits(), (prompt(),), check_trace=False)
    torch.testing.assert_close(traced(prompt()), expected, atol=1e-5, rtol=1e-4)
