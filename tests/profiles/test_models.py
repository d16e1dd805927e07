"""What of a config attention depends on: the same in every spelling, and a profile of another model refused."""

from __future__ import annotations

import logging
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("transformers")
from transformers import AutoConfig, Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config

import gossamer
from gossamer import Profile
from gossamer.methods import AShape
from gossamer.profiles import Provenance
from gossamer.profiles.models import attention_config, config_hash, written

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
}


def llama(theta: float = 10_000.0, **changes: Any) -> LlamaConfig:
    given: dict[str, Any] = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    return LlamaConfig(**SIZES | given | changes)


def spelt(**fields: Any) -> Any:
    """As an older version of transformers has it."""
    text = SimpleNamespace(model_type="llama", **{n: v for n, v in SIZES.items() if n != "vocab_size"} | fields)
    text.get_text_config = lambda decoder: text
    return text


def test_the_fields_are_those_that_attention_depends_on() -> None:
    assert attention_config(llama(5e5)) == {
        "model_type": "llama",
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_size": 32,
        "rotary": [[500_000, "default", 1]],
    }


@pytest.mark.parametrize(
    "same",
    [
        llama(dtype="bfloat16"),
        llama(vocab_size=70, eos_token_id=3, attn_implementation="eager", _name_or_path="elsewhere"),
        llama(theta=10_000),
        spelt(rope_theta=10_000.0, rope_scaling=None),
        spelt(rope_theta=10_000.0, head_dim=8, sliding_window=None),
    ],
    ids=["dtype", "names", "integer", "older", "explicit"],
)
def test_the_hash_does_not_depend_on_what_attention_does_not(same: Any) -> None:
    assert config_hash(same) == config_hash(llama())


def test_the_hash_survives_the_way_through_a_folder(tmp_path) -> None:
    config = llama(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                                    "high_freq_factor": 4.0, "original_max_position_embeddings": 64})  # fmt: skip
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert config_hash(loaded) == config_hash(config) != config_hash(llama(5e5))
    older = spelt(rope_theta=5e5, rope_scaling={"type": "llama3", "factor": 8.0})
    assert config_hash(older) == config_hash(config)


@pytest.mark.parametrize(
    "change",
    [
        {"theta": 5e5},
        {"num_hidden_layers": 3},
        {"num_attention_heads": 8},
        {"num_key_value_heads": 4},
        {"head_dim": 16},
        {"hidden_size": 64, "head_dim": 8},
        {"sliding_window": 9},
        {"attn_logit_softcapping": 30.0},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
    ],
    ids=str,
)
def test_the_hash_depends_on_what_attention_depends_on(change: dict[str, Any]) -> None:
    assert config_hash(llama(**change)) != config_hash(llama())


def test_windows_count_where_layers_have_them_and_each_kind_of_layer_has_its_rotary_embedding() -> None:
    unused, used = (Qwen2Config(**SIZES, use_sliding_window=used, sliding_window=7) for used in (False, True))
    assert "sliding_window" not in attention_config(unused)
    assert attention_config(used)["sliding_window"] == 7
    newer = Gemma3TextConfig(**SIZES, head_dim=8, sliding_window=7)
    assert attention_config(newer)["rotary"] == [[10_000, "default", 1], [1_000_000, "default", 1]]
    older = spelt(rope_theta=1e6, rope_local_base_freq=1e4)
    assert attention_config(older)["rotary"] == attention_config(newer)["rotary"]


# Profiles


def made_for(model: Any, **changes: str) -> Profile:
    told: dict[str, Any] = {"config": written(model), "config_hash": config_hash(model)} | changes
    return replace(Profile.uniform(2, 4, AShape(1, 8)), provenance=Provenance("a model", **told))


def test_a_profile_fits_the_model_that_it_was_made_for_and_those_of_its_shape_where_it_says_nothing() -> None:
    assert made_for(llama()).check_config(llama(vocab_size=70)) is None
    assert Profile.uniform(2, 4, AShape()).check_config(llama()) is None
    assert made_for(llama(), config="", config_hash="").check_config(llama(5e5)) is None


def test_a_model_of_the_same_shape_with_another_rotary_embedding_is_noted() -> None:
    note = made_for(llama()).check_config(llama(5e5))
    assert note == (
        "the profile was made for a model, with rotary [[10000, 'default', 1]] (here [[500000, 'default', 1]])"
    )
    for spoilt in ("", "{", "[]", '{"model_type": 3}', "x" * 30_000):
        assert made_for(llama(), config=spoilt).check_config(llama(5e5)) == (
            "the profile was made for a model, whose config differs"
        )
        assert made_for(llama(), config=spoilt).check_config(llama()) is None


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (MistralConfig(**SIZES, head_dim=8), r"model_type 'llama' \(here 'mistral'\)"),
        (llama(num_key_value_heads=4), r"num_key_value_heads 2 \(here 4\)"),
        (llama(head_dim=16), r"head_dim 8 \(here 16\)"),
        (llama(num_hidden_layers=3), r"2 layers of 4 heads \(a model\), but this model has 3 layers"),
    ],
    ids=["kind", "key/value heads", "dimension", "layers"],
)
def test_a_profile_of_another_model_is_refused_with_the_reason(other: Any, reason: str) -> None:
    with pytest.raises(ValueError, match=f"{reason}.*use a profile made for"):
        made_for(llama()).check_config(other)


def test_enabling_refuses_and_warns_alike(caplog: pytest.LogCaptureFixture) -> None:
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM(llama())
    with pytest.raises(ValueError, match="num_key_value_heads 1"):
        gossamer.enable(model, profile=made_for(llama(num_key_value_heads=1)))
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="gossamer"):
        gossamer.enable(model, profile=made_for(llama())).disable()
        assert not caplog.records
        gossamer.enable(model, profile=made_for(llama(5e5))).disable()
    assert "the profile was made for a model, with rotary" in caplog.text
