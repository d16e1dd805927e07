"""A tiny random model of every model type that transformers lists: its default config with every size made small."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto

__all__ = ["LISTED", "VOCAB", "build"]

VOCAB = 96


@dataclass(frozen=True)
class Listed:
    """What transformers lists: a model type, one of its classes, and the task of the list."""

    type: str
    model: str
    task: str


def _listed() -> dict[str, Listed]:
    found: dict[str, Listed] = {}
    for task, names in (
        ("text", modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        ("image", modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES),
        ("seq2seq", modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES),
    ):
        for name, model in names.items():
            if not any((listed.type, listed.model) == (name, model) for listed in found.values()):
                found[f"{name}+{task}" if name in found else name] = Listed(name, model, task)
    return found


# By the name of a family: the type, and for a second class of a type its task too.
LISTED = _listed()

_SIZES: dict[int | float, str] = {
    VOCAB: "vocab_size vocab_size_per_layer_input pad_vocab_size unpadded_vocab_size audio_vocab_size",
    32: """hidden_size intermediate_size n_embd d_model ffn_dim encoder_ffn_dim decoder_ffn_dim dim dim_ff dff emb_dim
        ffn_hidden_size embedding_size word_embed_proj_dim moe_intermediate_size shared_expert_intermediate_size
        shared_intermediate_size expert_ffn_hidden_size intermediate_size_mlp moe_shared_expert_intermediate_size
        dense_intermediate_size feed_forward_size hidden_dim d_inner d_ff n_inner attention_hidden_size embedding_dim
        lru_width input_embedding_size output_embedding_size shared_experts_intermediate_size router_hidden_size
        text_hidden_size projection_dim out_hidden_size proj_size mlp_hidden_size encoder_hidden_size""",
    4: """qk_rope_head_dim rotary_dim compressor_head_dim num_attention_heads n_head n_heads num_heads
        encoder_attention_heads decoder_attention_heads
        attention_heads num_encoder_attention_heads num_decoder_attention_heads num_query_groups
        swa_num_attention_heads linear_num_value_heads linear_num_heads index_n_heads mamba_n_heads mamba_num_heads
        n_mamba_heads global_num_attention_heads time_step_rank mamba_dt_rank encoder_num_attention_heads""",
    2: """num_hidden_layers num_key_value_heads n_layer n_layers num_layers encoder_layers decoder_layers
        num_encoder_layers num_decoder_layers num_kv_heads swa_num_key_value_heads linear_num_key_heads
        num_experts n_routed_experts num_local_experts moe_num_experts depth num_global_key_value_heads""",
    1: """num_experts_per_tok num_experts_per_token moe_topk moe_k n_group topk_group num_expert_group n_shared_experts
        num_shared_experts moe_num_shared_experts first_k_dense_replace num_dense_layers n_groups mamba_n_groups
        mamba_ngroups zero_expert_num o_groups top_k_experts num_nextn_predict_layers moe_layer_start_index""",
    8: """head_dim v_head_dim qk_nope_head_dim kv_lora_rank q_lora_rank o_lora_rank linear_key_head_dim dim_head
        linear_value_head_dim linear_head_dim mamba_d_state state_size ssm_state_size mamba_d_head mamba_head_dim
        mamba_headdim d_kv d_head swa_head_dim swa_v_head_dim kv_channels attention_head_dim global_head_dim
        hidden_size_per_layer_input laurel_rank mamba_chunk_size chunk_size adapter_rank hc_lowrank ple_embed_dim
        attention_head_size gated_norm_rank d_rel""",
    12: "qk_head_dim",
    16: "index_head_dim index_topk attention_chunk_size prompt_mid_dim index_block_size local_attention_window_len",
    20: "sliding_window window_size local_attention attention_window_size sliding_window_size",
    64: "mamba_d_ssm",
    512: """max_position_embeddings n_positions max_seq_len max_seq_length seq_length model_max_length
        max_target_positions n_ctx max_source_positions context_length""",
    0.2: "initializer_range init_std embed_init_std embedding_initializer_range",
    0.0: """attention_dropout attention_probs_dropout_prob dropout hidden_dropout_prob hidden_dropout activation_dropout
        layerdrop decoder_layerdrop encoder_layerdrop resid_pdrop embd_pdrop attn_pdrop classifier_dropout emb_pdrop
        residual_dropout embedding_dropout resid_dropout embed_dropout dropout_p""",
}
# Of towers that see or hear, which take no part in what is verified.
_TOWER_SIZES: dict[int, str] = {
    16: "image_size", 8: "patch_size", 2: "num_channels spatial_merge_size temporal_patch_size", 80: "num_mel_bins",
}  # fmt: skip
_TOWERS = ("vision", "audio", "vq", "perceiver", "qformer", "projector", "code_predictor", "speech", "vae", "protein")
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "start_token_id": 1, "decoder_start_token_id": 1}
_PER_LAYER = ("layer_types", "layers_block_type", "mlp_layer_types", "indexer_types", "intermediate_size")


def build(family: str) -> Any:
    """A model in ``eval``, sharpened so that a wrong mask shows in its logits.

    Raises:
        Exception: whatever the library does with sizes that don't go together.
    """
    torch.manual_seed(7)
    model_class = getattr(transformers, LISTED[family].model)
    config = tiny_config(family)
    text = config.get_text_config(decoder=True)
    if not isinstance(config, model_class.config_class) and isinstance(text, model_class.config_class):
        config = text
    kwargs = {"attn_implementation": _STOCK[family]} if family in _STOCK else {}
    model = model_class._from_config(config, **kwargs).float().eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("sinks", "attention_sink_bias")):
                weight.uniform_(-1.0, 3.0)
    return model


def tiny_config(family: str) -> Any:
    """The default config of a type, small."""
    made = CONFIG_MAPPING[LISTED[family].type]
    own = _OVERRIDES.get(family, {})
    try:
        default = made()
    except Exception:
        default = made(**own)
    small = _small(default)
    if LISTED[family].task == "text" and hasattr(default, "is_decoder"):
        small["is_decoder"] = True
    return made(**_merged(small, copy.deepcopy(own)))


def _merged(small: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Overrides on top, also of parts."""
    for name, value in own.items():
        part = isinstance(value, dict) and "model_type" in (small.get(name) or ())
        small[name] = _merged(small[name], value) if part else value
    return small


def _small(config: Any, tower: bool = False) -> dict[str, Any]:
    """Arguments for a config's class: its sizes, small, and its parts'."""
    given = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    small: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, bool):
            continue
        if name == "head_dim" and not value:
            small[name] = _SMALL[name]
        elif name in _SMALL and isinstance(value, (int, float)):
            small[name] = type(value)(_SMALL[name]) if value else value
        elif name.endswith(("token_id", "token_index", "_id")) and isinstance(value, (int, list)):
            small[name] = _TOKENS.get(name, 3)
    if given.get("kv_lora_rank"):  # latent attention: every head has keys of its own, of which only a part turns
        small |= {"num_key_value_heads": _SMALL["num_attention_heads"]} if "num_key_value_heads" in given else {}
        small |= {"head_dim": _SMALL["qk_rope_head_dim"]} if "head_dim" in given else {}
    small |= {"eos_token_id": None} if "eos_token_id" in given else {}
    if tower:
        small |= {
            name: size
            for size, names in _TOWER_SIZES.items()
            for name in names.split()
            if isinstance(given.get(name), int)
        }
    else:
        small |= _small_layers(config)
    if given.get("rope_parameters"):
        small["rope_parameters"] = _small_rope(given["rope_parameters"])
    for name in getattr(config, "sub_configs", {}):
        part = getattr(config, name, None)
        if part is not None:
            hidden = tower or name.startswith(_TOWERS) or "vision" in name or "audio" in name
            small[name] = _small(part, hidden) | {"model_type": part.model_type}
    return small


def _small_layers(config: Any) -> dict[str, Any]:
    """Lists that name each layer, so that every kind occurs, and the number of layers."""
    types = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if not types or not isinstance(types, list):
        return {}
    kinds = list(dict.fromkeys(types))
    layers = max(2, len(kinds))
    found: dict[str, Any] = {"num_hidden_layers": layers}
    for name in _PER_LAYER:
        value = vars(config).get(name)
        if isinstance(value, list):
            kinds = list(dict.fromkeys(value))
            found[name] = (kinds + kinds[-1:] * layers)[:layers]
    if isinstance(found.get("intermediate_size"), list):
        found["intermediate_size"] = [32] * layers
    return found


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    small = {"original_max_position_embeddings": 64, "mrope_section": [2, 1, 1]}
    return {
        name: _small_rope(value) if isinstance(value, dict) else small.get(name, value) for name, value in rope.items()
    }


_WINDOWED = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 20}
_SOME_WINDOWED = _WINDOWED | {"use_sliding_window": True, "max_window_layers": 1}
_HYBRID = {"num_hidden_layers": 3, "layers_block_type": ["linear_attention", "hybrid", "hybrid"]}
_GEMMA3N = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "intermediate_size": [32] * 4,
    "activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0],
}
_INDEXER = {
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}  # fmt: skip
_THREE_AXES = (
    "cosmos3_edge", "glm46v", "glm4v", "glmga", "glm_ocr", "hunyuan_vl", "paddleocr_vl", "qwen2_5_omni_thinker",
    "qwen2_5_vl", "qwen2_vl",
)  # fmt: skip
_MINIMAX_M3 = {"layer_types": ["full_attention", "minimax_m3_sparse"]}
_MLLAMA = {"num_hidden_layers": 3, "cross_attention_layers": [1]}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}
_COMPASS = _WINDOWED | {"rope_parameters": dict.fromkeys(_WINDOWED["layer_types"], _ROPE)}
_DOTS3_TEXT = {
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 8,
    "swa_head_dim": 12, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8,
}  # fmt: skip
_DOTS3 = {
    "text_config": _DOTS3_TEXT,
    "vision_config": {"num_hidden_layers": 42, "adapter_in_dim": 32, "adapter_out_dim": 32},
    "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
}
# What does not follow from a type's default config.
_OVERRIDES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_d_head": 16, "attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "cohere_compass_text": _COMPASS,
    "dbrx": {"attn_config": {"clip_qkv": 8.0, "rope_theta": 10000.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 1},
    "dots3_note": _DOTS3,
    "dots3_note+image": _DOTS3,
    "dots3_note_text": _DOTS3_TEXT,
    "dots1": _WINDOWED | {"n_routed_experts": 2, "num_experts_per_tok": 1, "n_shared_experts": 1},
    "falcon_h1": {"mamba_d_head": 16},
    "gemma3n_text": _GEMMA3N,
    "gemma2": {"attn_logit_softcapping": 5.0},
    **{name: {"text_config": {"embed_dim": 32, "layers": 2}} for name in ("kosmos-2", "kosmos-2.5")},
    **{name: {"text_config": {"rope_parameters": _ROPE}} for name in _THREE_AXES},
    "glm4v_moe": {
        "text_config": {"rope_parameters": _ROPE | {"partial_rotary_factor": 0.5, "mrope_section": [1, 1, 0]}}
    },
    "chameleon": {"vocabulary_map": {"<image>": 3}},
    "emu3+image": {"vocabulary_map": {"<image>": 3}, "vq_config": {"base_channels": 32}},
    "encoder-decoder": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemo_speechlm": {"head_config": {"audio_hidden_size": 32}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "qwen3_asr": {"eos_token_id": 3},
    "cohere_compass": {"text_config": _COMPASS},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "laguna": _WINDOWED,
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"moe_topk": 2},
    "mamba2": {"head_dim": 16},
    "mellum": _WINDOWED,
    "minimax_m3_vl": {"text_config": _MINIMAX_M3},
    "minimax_m3_vl_text": _MINIMAX_M3,
    "mllama": {"text_config": _MLLAMA},
    "mllama+image": {"text_config": _MLLAMA},
    "mistral": {"sliding_window": 20},
    "mixtral": {"sliding_window": 20},
    "nemotron": {"num_key_value_heads": 2},
    "phi3": {"sliding_window": 20},
    "phimoe": {"sliding_window": 20},
    "qwen2": _SOME_WINDOWED,
    "qwen2_moe": _SOME_WINDOWED,
    "qwen3": _SOME_WINDOWED,
    "qwen3_moe": {"use_sliding_window": True, "sliding_window": 20},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp+image": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"axial_pos_embds": False},
    "step3p7": {"text_config": _WINDOWED},
    "starcoder2": {"sliding_window": 20},
    "vibevoice_asr": {f"{part}_tokenizer_encoder_config": {"num_filters": 1} for part in ("acoustic", "semantic")},
    "vaultgemma": {"attn_logit_softcapping": 5.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": _HYBRID | {"attention_hidden_size": 64},
    "zamba2": _HYBRID | {"attention_hidden_size": 64, "mamba_headdim": 16},
}
# What has no soft-cap or sinks in SDPA is compared with eager attention.
_STOCK = {"gemma2": "eager", "vaultgemma": "eager"}
