"""Encoders and cross-attention run sparse where it is asked for; at full budget they compute what stock models do."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertModel,
    ModernBertConfig,
    ModernBertModel,
)

from gossamer.integrations.transformers import enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

VOCAB, LENGTH = 96, 60
ALWAYS_SPARSE: dict[str, Any] = {"min_tokens": 0, "max_density": 2.0}
FULL_BUDGETS: dict[str, dict[str, Any]] = {
    "max_relative": {"alpha": 0.0, "block_q": 16, "block_k": 16},
    "a_shape": {"sink": 1, "window": 1024},
    "vertical_slash": {"vertical_size": 1024, "slash_size": 1024},
    "block_sparse": {"blocks": 100, "block": 16},
}
_SIZE: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 32, "initializer_range": 0.2}


def bert() -> Any:
    config = BertConfig(**_SIZE, num_hidden_layers=2, num_attention_heads=4, hidden_dropout_prob=0.0)
    return BertModel, config


def modernbert() -> Any:
    """Its layers alternate between windows on both sides and everything."""
    kind: Any = ModernBertConfig  # whose names vary with the version
    config = kind(
        **_SIZE,
        num_hidden_layers=3,
        num_attention_heads=4,
        local_attention=16,
        global_attn_every_n_layers=3,
        pad_token_id=0,
        cls_token_id=1,
        sep_token_id=2,
        bos_token_id=1,
        eos_token_id=2,
        initializer_cutoff_factor=2.0,
    )
    return ModernBertModel, config


def bart() -> Any:
    config = BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128, init_std=0.2,
        dropout=0.0, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    return BartForConditionalGeneration, config


MODELS = {"bert": bert, "modernbert": modernbert, "bart": bart}


def pair(name: str) -> tuple[Any, Any]:
    """The stock model and one with the same weights, which share nothing."""
    kind, config = MODELS[name]()
    torch.manual_seed(0)
    stock = kind._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    other = kind._from_config(copy.deepcopy(config), attn_implementation="sdpa").eval()
    other.load_state_dict(stock.state_dict())
    return stock, other


def inputs(name: str, padding: str) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, VOCAB, (2, LENGTH))
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding == "right":
        mask[1, -13:] = 0
    if padding == "left":
        mask[1, :13] = 0
    given = {"input_ids": ids.masked_fill(mask == 0, 0), "attention_mask": mask}
    if name == "bart":
        given["decoder_input_ids"] = torch.randint(3, VOCAB, (2, 40))
    return given


@torch.no_grad()
def output(model: Any, given: dict[str, Any]) -> torch.Tensor:
    out = model(**given)
    return out.logits if "decoder_input_ids" in given else out.last_hidden_state * given["attention_mask"][..., None]


@pytest.mark.parametrize("method", FULL_BUDGETS)
@pytest.mark.parametrize(
    ("name", "padding"), [*((name, kind) for name in MODELS for kind in ("none", "right")), ("bert", "left")]
)
def test_full_budget_is_what_stock_computes(name: str, padding: str, method: str) -> None:
    stock, model = pair(name)
    given = inputs(name, padding)
    expected = output(stock, given)
    with enable(model, method, bidirectional=True, **FULL_BUDGETS[method], **ALWAYS_SPARSE) as handle:
        got = output(model, given)
        stats = handle.stats()
    assert sum(row.sparse_calls for row in stats) == {"bert": 2, "modernbert": 3, "bart": 6}[name]
    assert stats.fallbacks() == {}
    torch.testing.assert_close(got, expected, atol=2e-4, rtol=1e-4)
    assert torch.equal(output(model, given), expected)


@pytest.mark.parametrize("name", MODELS)
def test_a_small_budget_shows(name: str) -> None:
    """The negative control of the parity above."""
    stock, model = pair(name)
    given = inputs(name, "right")
    with enable(model, "a_shape", sink=1, window=2, bidirectional=True, **ALWAYS_SPARSE) as handle:
        got = output(model, given)
        assert all(0 < row.density < 0.8 for row in handle.stats())
    assert (got - output(stock, given)).abs().max() > 0.02


@pytest.mark.parametrize("name", MODELS)
def test_without_the_flag_only_causal_attention_runs_sparse(name: str) -> None:
    stock, model = pair(name)
    given = inputs(name, "right")
    with enable(model, "a_shape", sink=1, window=2, **ALWAYS_SPARSE) as handle:
        got = output(model, given)
        stats = handle.stats()
    assert set(stats.fallbacks()) == {"not causal"}
    assert sum(row.sparse_calls for row in stats) == (2 if name == "bart" else 0)
    if name != "bart":
        torch.testing.assert_close(got, output(stock, given), atol=2e-4, rtol=1e-4)


def test_left_padding_of_an_encoder_decoder_runs_dense() -> None:
    """Its masks do not tell encoders from cross-attention, whose queries may lie anywhere."""
    _, model = pair("bart")
    with enable(model, "a_shape", sink=1, window=2, bidirectional=True, **ALWAYS_SPARSE) as handle:
        output(model, inputs("bart", "left"))
        assert set(handle.stats().fallbacks()) == {"left padding without causality"}


SMALL_BUDGETS: dict[str, dict[str, Any]] = {
    "a_shape": {"sink": 1, "window": 3},
    "max_relative": {"alpha": 0.99, "sink_blocks": 1, "window_blocks": 1, "last_rows": 9, "block_q": 8, "block_k": 8},
    "block_sparse": {"blocks": 2, "block": 8},
    "vertical_slash": {"vertical_size": 8, "slash_size": 64},
}


@pytest.mark.parametrize("method", SMALL_BUDGETS)
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("name", ["bert", "modernbert"])
def test_padding_and_companions_change_nothing(name: str, padding: str, method: str) -> None:
    _, model = pair(name)
    given = inputs(name, padding)
    live = given["attention_mask"][1].bool()
    alone = {"input_ids": given["input_ids"][1:, live], "attention_mask": given["attention_mask"][1:, live]}
    if name == "bert":  # whose positions count slots
        given["position_ids"] = (given["attention_mask"].cumsum(-1) - 1).clamp(min=0)
    with enable(model, method, bidirectional=True, **SMALL_BUDGETS[method], **ALWAYS_SPARSE) as handle:
        together, by_itself = output(model, given)[1, live], output(model, alone)[0]
        assert handle.stats().fallbacks() == {}
    torch.testing.assert_close(together, by_itself, atol=1e-4, rtol=1e-4)
