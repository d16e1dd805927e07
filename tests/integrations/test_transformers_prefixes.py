"""Models whose layers are not causal by themselves and rely on masks: of prefixes, and of text beside images."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny_transformers import ALWAYS_SPARSE, FULL
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    GemmaConfig,
    GemmaForCausalLM,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
)

from gossamer.integrations.transformers import enable

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

IMAGE = 90
TEXT: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0, "eos_token_id": None, "initializer_range": 0.3,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 7,
}  # fmt: skip
WINDOWED: dict[str, Any] = {
    "sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
}  # fmt: skip


def make(name: str) -> Any:
    torch.manual_seed(0)
    if name == "paligemma":
        make_config: Any = PaliGemmaConfig
        config = make_config(
            text_config=TEXT | {"model_type": "gemma"},
            vision_config=VISION | {"model_type": "siglip_vision_model", "projection_dim": 32},
            image_token_id=IMAGE,
            projection_dim=32,
        )
        return PaliGemmaForConditionalGeneration(config).eval()
    if name == "gemma":
        return GemmaForCausalLM(GemmaConfig(**TEXT, use_bidirectional_attention=True)).eval()
    config = Gemma2Config(**TEXT, **WINDOWED, use_bidirectional_attention=True, attn_logit_softcapping=None)
    return Gemma2ForCausalLM(config).eval()


def tokens() -> Tensor:
    ids = torch.randint(2, 88, (2, 44), generator=torch.Generator().manual_seed(0))
    ids[:, 8:24] = IMAGE
    return ids


def given(model: Any) -> dict[str, Any]:
    if not isinstance(model, PaliGemmaForConditionalGeneration):
        return {}
    return {"pixel_values": torch.ones(2, 3, 28, 28)}


def whole(model: Any) -> Tensor:
    return model(input_ids=tokens(), attention_mask=torch.ones(2, 44, dtype=torch.long), **given(model)).logits


def padded(model: Any) -> Tensor:
    mask = torch.ones(2, 44, dtype=torch.long)
    mask[1, :5] = 0
    return model(input_ids=tokens(), attention_mask=mask, **given(model)).logits[mask.bool()]


def second_turn(model: Any) -> Tensor:
    cache, mask = DynamicCache(config=model.config), torch.ones(2, 44, dtype=torch.long)
    model(input_ids=tokens()[:, :30], attention_mask=mask[:, :30], past_key_values=cache, **given(model))
    return model(input_ids=tokens()[:, 30:], attention_mask=mask, past_key_values=cache).logits


def in_chunks(model: Any) -> Tensor:
    out = model.generate(
        input_ids=torch.where(tokens() == IMAGE, 5, tokens()), max_new_tokens=3, do_sample=False, prefill_chunk_size=16,
        output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    return torch.stack(out.logits)


@pytest.mark.parametrize("policy", [{}, FULL], ids=["default thresholds", "full budget"])
@pytest.mark.parametrize("run", [whole, padded, second_turn, in_chunks])
@pytest.mark.parametrize("name", ["paligemma", "gemma", "gemma2"])
def test_masks_rule_where_layers_are_not_causal(
    name: str, run: Callable[[Any], Tensor], policy: dict[str, Any]
) -> None:
    if name == "paligemma" and run is in_chunks:
        pytest.skip("its processor gives the whole image at once")
    model = make(name)
    with torch.no_grad():
        expected = run(model)
        with enable(model, "a_shape", **policy):
            got = run(model)
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)


@pytest.mark.parametrize("image", [False, True])
def test_a_prompt_without_images_runs_sparse(image: bool) -> None:
    """Gemma 3 names the tokens of images in every prompt, and lets them see each other both ways."""
    torch.manual_seed(0)
    config = Gemma3Config(
        text_config=TEXT | WINDOWED,
        vision_config=VISION | {"model_type": "siglip_vision_model"},
        mm_tokens_per_image=16,
        image_token_index=IMAGE,
    )
    model = Gemma3ForConditionalGeneration(config).eval()
    ids = torch.where(tokens() == IMAGE, 5, tokens())
    kinds = torch.zeros_like(ids)
    kinds[:, 8:24] = int(image)
    with torch.no_grad():
        expected = model(input_ids=ids, token_type_ids=kinds).logits
        with enable(model, "a_shape", sink=1, window=1024, **ALWAYS_SPARSE) as handle:
            got = model(input_ids=ids, token_type_ids=kinds).logits
            assert [row.sparse_calls for row in handle.stats()] == [0 if image else 1] * 2
    torch.testing.assert_close(got, expected, atol=1e-4 * float(expected.abs().max()), rtol=1e-4)
