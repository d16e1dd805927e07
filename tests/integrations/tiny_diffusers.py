"""Tiny transformers of diffusers with random weights, and what a pipeline calls them with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

diffusers = pytest.importorskip("diffusers")

__all__ = ["FAMILIES", "Family", "inputs_of", "noise", "tiny"]

TEXT = 7  # tokens


@dataclass(frozen=True)
class Family:
    """One architecture: how it is made, what it is called with, and what is known of its attention.

    Fields:
        grid: frames, height and width in patches.
        text: where text stands in joint attention: "first", "last", or "" where it is attended across.
        layers: that attend the whole image or video.
        pads: whether the model takes a mask of padded text in joint attention.
        scale: of the timesteps that its pipeline gives, over the scheduler's.
    """

    make: Callable[[], nn.Module]
    inputs: Callable[[int], dict[str, Any]]
    grid: tuple[int, int, int]
    text: str
    layers: int
    pads: bool = False
    scale: float = 1.0


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def padded(batch: int) -> Tensor:
    """Which text tokens are live: another number in each row."""
    return torch.arange(TEXT) < torch.tensor([TEXT - 2 * (row + 1) for row in range(batch)])[:, None]


def wan() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32,
    )  # fmt: skip


def wan_inputs(batch: int) -> dict[str, Any]:
    return {"hidden_states": noise(batch, 4, 3, 8, 12), "encoder_hidden_states": noise(batch, TEXT, 8, seed=1)}


def wan_of_images() -> nn.Module:
    return diffusers.WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=16, num_layers=2, rope_max_seq_len=32, image_dim=6, added_kv_proj_dim=24,
    )  # fmt: skip


def wan_of_images_inputs(batch: int) -> dict[str, Any]:
    text = noise(batch, 512, 8, seed=1)
    return wan_inputs(batch) | {
        "encoder_hidden_states": text,
        "encoder_hidden_states_image": noise(batch, 5, 6, seed=2),
    }


def hunyuan() -> nn.Module:
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=10, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, guidance_embeds=True,
        text_embed_dim=8, pooled_projection_dim=6, rope_axes_dim=(2, 4, 4),
    )  # fmt: skip


def hunyuan_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 3, 8, 12),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=1),
        "encoder_attention_mask": padded(batch).long(),
        "pooled_projections": noise(batch, 6, seed=2),
        "guidance": torch.full((batch,), 1000.0),
    }


def cogvideox() -> nn.Module:
    return diffusers.CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, time_embed_dim=4,
        text_embed_dim=8, num_layers=2, sample_width=12, sample_height=8, sample_frames=9, patch_size=2,
        temporal_compression_ratio=4, max_text_seq_length=TEXT,
    )  # fmt: skip


def cogvideox_inputs(batch: int) -> dict[str, Any]:
    return {"hidden_states": noise(batch, 3, 4, 8, 12), "encoder_hidden_states": noise(batch, TEXT, 8, seed=1)}


def flux() -> nn.Module:
    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=8, pooled_projection_dim=8, axes_dims_rope=(4, 4, 8),
    )  # fmt: skip


def flux_inputs(batch: int) -> dict[str, Any]:
    ids = torch.cartesian_prod(torch.zeros(1), torch.arange(9.0), torch.arange(8.0))
    return {
        "hidden_states": noise(batch, 72, 4),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=1),
        "pooled_projections": noise(batch, 8, seed=2),
        "img_ids": ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def qwen() -> nn.Module:
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=4, out_channels=1, num_layers=2, attention_head_dim=16, num_attention_heads=3,
        joint_attention_dim=8, axes_dims_rope=(8, 4, 4),
    )  # fmt: skip


def qwen_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 72, 4),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=1),
        "encoder_hidden_states_mask": padded(batch),
        "img_shapes": [[(1, 9, 8)]] * batch,
    }


def ltx() -> nn.Module:
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, cross_attention_dim=16,
        num_layers=2, caption_channels=8,
    )  # fmt: skip


def ltx_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 72, 4),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=1),
        "encoder_attention_mask": padded(batch).float(),
        "num_frames": 3,
        "height": 4,
        "width": 6,
    }


def sd3() -> nn.Module:
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
        caption_projection_dim=16, joint_attention_dim=8, pooled_projection_dim=8, out_channels=4,
        pos_embed_max_size=16,
    )  # fmt: skip


def sd3_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(batch, 4, 9, 8),
        "encoder_hidden_states": noise(batch, TEXT, 8, seed=1),
        "pooled_projections": noise(batch, 8, seed=2),
    }


FAMILIES = {
    "wan": Family(wan, wan_inputs, (3, 4, 6), "", 2),
    "wan-images": Family(wan_of_images, wan_of_images_inputs, (3, 4, 6), "", 2),
    "hunyuan-video": Family(hunyuan, hunyuan_inputs, (3, 4, 6), "last", 2, pads=True),
    "cogvideox": Family(cogvideox, cogvideox_inputs, (3, 4, 6), "first", 2),
    "flux": Family(flux, flux_inputs, (1, 9, 8), "first", 2, scale=1e-3),
    "qwen-image": Family(qwen, qwen_inputs, (1, 9, 8), "first", 2, pads=True, scale=1e-3),
    "ltx-video": Family(ltx, ltx_inputs, (3, 4, 6), "", 2),
    "sd3": Family(sd3, sd3_inputs, (1, 9, 8), "last", 2),
}


def tiny(name: str) -> Any:
    """A model whose weights are large enough for attention to matter."""
    torch.manual_seed(0)
    model = FAMILIES[name].make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * (1.5 / parameter[0].numel() ** 0.5))
    return model


def inputs_of(name: str, batch: int, time: float) -> dict[str, Any]:
    return FAMILIES[name].inputs(batch) | {"timestep": torch.full((batch,), time), "return_dict": False}
