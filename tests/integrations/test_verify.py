"""`verify` finds what differs, and nothing where nothing does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_transformers import pair, tiny_llama
from torch import Tensor
from transformers import BartConfig, BartForConditionalGeneration

import gossamer
from gossamer.integrations.transformers import owners, verify
from gossamer.integrations.transformers.verify import SITUATIONS, _prompt

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


@pytest.mark.parametrize("family", ["llama", "gemma2-softcap", "gpt-oss-sinks", "qwen3-next-hybrid", "llama4-chunked"])
def test_supported_families_are_the_same(family: str) -> None:
    _, model = pair(family)
    before = model.config._attn_implementation
    found = gossamer.verify(model)
    assert found.ok, str(found)
    assert [check.situation for check in found.checks] == list(SITUATIONS)
    assert all(check.ok for check in found.checks), str(found)
    prefills = [check for check in found.checks if check.situation != "one token on a cache"]
    assert all(check.sparse_calls > 0 for check in prefills), str(found)
    assert model.config._attn_implementation == before
    assert all(owners.owner_of(module) is None for module in model.modules())


def test_an_encoder_decoder_keeps_what_it_encoded() -> None:
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=96, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, init_std=0.2,
    )  # fmt: skip
    found = verify(BartForConditionalGeneration._from_config(config, attn_implementation="sdpa"))
    assert all(check.ok for check in found.checks), str(found)


def test_a_mask_that_is_not_followed_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: padding is ignored."""
    monkeypatch.setattr("gossamer.integrations.transformers.masks._says_nothing", lambda *_: True)
    found = verify(tiny_llama())
    by_name = {check.situation: check.ok for check in found.checks}
    assert by_name["a prompt"]
    assert by_name["left padding"] is False
    assert not found.ok
    assert "NOT the same" in str(found)
    assert "WRONG" in str(found)
    assert found.to_dict()["ok"] is False


def test_an_error_of_ours_is_a_difference_and_one_of_the_models_is_not() -> None:
    model = tiny_llama()
    forward = model.forward

    def without_padding(input_ids: Tensor, attention_mask: Tensor | None = None, **more: Any) -> Any:
        if attention_mask is not None and not bool(attention_mask.all()):
            raise RuntimeError("no padding here")
        if model.config._attn_implementation == "gossamer" and "past_key_values" in more:
            raise RuntimeError("no cache\nunder gossamer")
        return forward(input_ids=input_ids, attention_mask=attention_mask, **more)

    model.forward = without_padding
    found = verify(model)
    checks = {check.situation: check for check in found.checks}
    assert checks["a prompt"].ok
    assert (checks["left padding"].ok, checks["left padding"].failure) == (None, "stock: RuntimeError: no padding here")
    assert (checks["a second chunk"].ok, checks["a second chunk"].failure) == (False, "RuntimeError: no cache")
    assert not found.ok
    table = str(found)
    assert "stock: RuntimeError: no padding here" in table
    assert "  RuntimeError: no cache" in table


def test_a_model_that_cannot_run_a_prompt_was_not_compared() -> None:
    """Nor was it found to differ."""
    model = tiny_llama()

    def without_text(input_ids: Tensor, **_: Any) -> Any:
        raise RuntimeError("images alone")

    model.forward = without_text
    found = verify(model)
    assert not found.ok
    assert str(found).splitlines()[0] == (
        "LlamaForCausalLM: NOT compared: the model by itself can't run a prompt of text"
    )


def test_what_was_found_does_not_change_and_says_what_ran_dense() -> None:
    found = verify(tiny_llama())
    assert "decode x2" in str(found).splitlines()[-1]
    with pytest.raises(AttributeError):
        found.checks[0].difference = 0.0  # type: ignore[misc]
    with pytest.raises(AttributeError):
        found.model = "another"  # type: ignore[misc]


def test_the_prompt_holds_no_token_that_means_something() -> None:
    model = tiny_llama()
    model.config.image_token_id, model.config.eos_token_id = 5, [6, 7]
    ids = _prompt(model, 4000, seed=0)
    assert ids.shape == (2, 4000)
    assert not set(ids.flatten().tolist()) & {model.config.pad_token_id, model.config.bos_token_id, 5, 6, 7}
    assert len(ids.unique()) == model.config.vocab_size - 5


def test_situations_are_padded_as_they_say() -> None:
    model = tiny_llama()
    seen: list[Tensor | None] = []
    model.register_forward_pre_hook(lambda module, args, given: seen.append(given["attention_mask"]), with_kwargs=True)
    ids = _prompt(model, 20, seed=0)
    edges: dict[str, list[list[int]]] = {}
    for name, run in SITUATIONS.items():
        seen.clear()
        run(model, ids)
        edges[name] = [] if seen[-1] is None else [[int(row[0]), int(row[-1])] for row in seen[-1]]
    assert edges == {
        "a prompt": [],
        "left padding": [[1, 1], [0, 1]],
        "right padding": [[1, 1], [1, 0]],
        "right padding of all rows": [[1, 0], [1, 0]],
        "a second chunk": [[1, 1], [1, 1]],
        "a second turn, left padding": [[1, 1], [0, 1]],
        "one token on a cache": [[1, 1], [0, 1]],
    }


def test_a_model_in_training_is_given_back_so() -> None:
    model = tiny_llama().train()
    model.model.layers[0].eval()  # frozen, as a part may be
    before = [module.training for module in model.modules()]
    assert verify(model).ok
    assert [module.training for module in model.modules()] == before


def test_weights_that_are_no_numbers_are_no_agreement() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    assert not verify(model).ok


def test_a_model_without_a_vocabulary_is_refused() -> None:
    from transformers import ViTConfig, ViTModel

    sizes: dict[str, Any] = {
        "hidden_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "intermediate_size": 32,
    }
    model = ViTModel(ViTConfig(**sizes, image_size=32, patch_size=8))
    with pytest.raises(ValueError, match="ViTModel has no vocabulary"):
        verify(model)
    assert model.config._attn_implementation == "sdpa"


def test_bad_arguments_are_named() -> None:
    with pytest.raises(ValueError, match="at least 16 tokens"):
        verify(tiny_llama(), length=15)
    with pytest.raises(TypeError, match="got Linear"):
        verify(torch.nn.Linear(2, 2))
    model = tiny_llama()
    with gossamer.enable(model), pytest.raises(ValueError, match="enabled already"):
        verify(model)
