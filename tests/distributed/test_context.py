"""A prompt that ranks share is read, and gone on from, as by one process."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import ranks
import torch
from torch import Tensor
from transformers import DynamicCache, GptOssConfig, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import gossamer
from gossamer.integrations.transformers.context import UNIT

ranks.preload("gossamer.integrations.transformers", "transformers.models.llama.modeling_llama")

LENGTH, NEW, VOCAB = 3 * UNIT + 41, 5, 96
SIZE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 1024,
    "initializer_range": 0.2,
}
SHARED: dict[str, Any] = {"min_tokens": 1, "max_density": 2.0}
METHODS: list[tuple[str, dict[str, Any]]] = [
    ("dense", {}),
    ("a_shape", {"sink": 4, "window": 150}),
    ("vertical_slash", {"vertical_size": 40, "slash_size": 128}),
]


@functools.cache
def model() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZE)).eval()


def prompt() -> Tensor:
    return torch.randint(3, VOCAB, (2, LENGTH), generator=torch.Generator().manual_seed(1))


def share(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Logits after the prompt and one token more, and what is generated."""
    found = []
    for n, (name, fields) in enumerate(METHODS):
        kind = ("striped", "zigzag", "contiguous")[n]
        given = SHARED | fields
        with gossamer.enable(model(), name, context_parallel=True, context_layout=kind, **given) as handle:
            context = handle.context
            assert context is not None
            logits = [context.prefill(prompt()), context.decode(torch.full((2, 1), 7))]
            found.append((torch.stack(logits), context.generate(prompt(), NEW)))
    return found


def by_one(name: str, fields: dict[str, Any]) -> tuple[Tensor, Tensor]:
    with torch.no_grad(), gossamer.enable(model(), name, **SHARED, **fields):
        cache, ids, logits = DynamicCache(), prompt(), []
        for part in (ids, torch.full((2, 1), 7)):
            logits.append(model()(input_ids=part, past_key_values=cache, logits_to_keep=1).logits[:, -1])
        generated = model().generate(ids, max_new_tokens=NEW, do_sample=False, eos_token_id=None, pad_token_id=0)
    return torch.stack(logits), generated


@pytest.mark.parametrize("count", [2, 3])
def test_ranks_read_and_go_on_as_one_process(count: int, tmp_path: Path) -> None:
    answers = [torch.load(path) for path in ranks.run(share, count, tmp_path)]
    for n, (name, fields) in enumerate(METHODS):
        logits, generated = by_one(name, fields)
        for answer in answers:
            torch.testing.assert_close(answer[n][0], logits, rtol=1e-4, atol=1e-4)
            assert torch.equal(answer[n][1], generated)


def refused(rank: int) -> list[str]:
    def message(do: Any, *given: Any, **more: Any) -> str:
        try:
            do(*given, **more)
        except ValueError as error:
            return str(error)
        return "nothing"

    found = [
        message(gossamer.enable, model(), "minference", context_parallel=True),
        message(gossamer.enable, model(), "dense", context_parallel=True, context_layout="spiral"),
        message(
            gossamer.enable,
            MistralForCausalLM(MistralConfig(**SIZE, sliding_window=64)),
            "dense",
            context_parallel=True,
        ),
    ]
    with gossamer.enable(model(), "dense", context_parallel=True) as handle:
        assert handle.context is not None
        found += [
            message(model(), input_ids=prompt()),
            message(handle.context.decode, torch.zeros(2, 1, dtype=torch.long)),
            message(handle.context.prefill, prompt()[:, : UNIT - 1]),
        ]
        handle.context.prefill(prompt())
        found += [
            message(model(), input_ids=prompt()),
            message(handle.context.decode, torch.zeros(2, 2, dtype=torch.long)),
        ]
    assert model().config._attn_implementation != "gossamer"
    return found


def test_what_ranks_cannot_share_is_refused(tmp_path: Path) -> None:
    for path in ranks.run(refused, 2, tmp_path):
        method, layout, windows, before, no_prompt, short, forward, two = torch.load(path)
        assert "looks at the whole prompt at once" in method
        assert "must be one of contiguous" in layout
        assert "sliding window" in windows
        assert "handle.context.prefill" in before
        assert "handle.context.prefill" in forward
        assert "call prefill first" in no_prompt
        assert "too few for 2 ranks" in short
        assert "one token of each row" in two


def test_without_processes_it_says_what_to_call() -> None:
    with pytest.raises(ValueError, match="init_process_group"):
        gossamer.enable(model(), "dense", context_parallel=True)


def test_models_with_windows_and_sinks_are_refused_by_their_config() -> None:
    from gossamer.integrations.transformers.context import _refuse_windows

    with pytest.raises(ValueError, match="sliding_attention"):
        _refuse_windows(GptOssConfig())
