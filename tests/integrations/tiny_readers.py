"""Tiny random models that read images and videos, and prompts of two rows with different images for them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from tiny_families import LISTED, VOCAB, tiny_config
from torch import Tensor

__all__ = ["FAMILIES", "IMAGE_TOKEN", "VIDEO_TOKEN", "Prompt", "build_reader", "prompt_for"]

IMAGE_TOKEN, VIDEO_TOKEN, START_TOKEN = 5, 6, 7
FAMILIES = ("qwen2_5_vl", "qwen3_vl", "llava", "internvl", "smolvlm", "gemma3")
_QWEN = ("qwen2_5_vl", "qwen3_vl")
_PER_IMAGE = {"llava": 64, "internvl": 16, "smolvlm": 16, "gemma3": 16}
# Patches of the images and videos of Qwen-VL: frames, height, width; four patches are a token.
_IMAGES, _VIDEO = ((1, 8, 12), (1, 12, 8), (1, 4, 8)), (3, 4, 8)


@dataclass
class Prompt:
    """What a model is called with, and the modality of each token, int8 ``[B, S]``, padding being text."""

    inputs: dict[str, Any]
    kinds: Tensor
    lengths: list[int] = field(default_factory=list)


def build_reader(family: str) -> Any:
    """A model in ``eval`` with image tokens of its own."""
    torch.manual_seed(7)
    config = tiny_config(family)
    for name in ("image_token_id", "image_token_index"):
        if hasattr(config, name):
            setattr(config, name, IMAGE_TOKEN)
    vision = config.vision_config
    if family in _QWEN:
        config.video_token_id, config.vision_start_token_id = VIDEO_TOKEN, START_TOKEN
    elif family == "internvl":
        vision.image_size, vision.patch_size = [64, 64], [8, 8]
    else:
        vision.image_size = 64
    if family == "gemma3":
        config.mm_tokens_per_image = _PER_IMAGE[family]
    return getattr(transformers, LISTED[family].model)._from_config(config).float().eval()


def prompt_for(family: str) -> Prompt:
    """Two rows: text, an image, text; and text, two images (and a video), text. The shorter one is padded left."""
    generator = torch.Generator().manual_seed(3)
    qwen = family in _QWEN
    counts = [f * h * w // 4 for f, h, w in _IMAGES] if qwen else [_PER_IMAGE[family]] * 3
    video = _VIDEO[0] * _VIDEO[1] * _VIDEO[2] // 4
    rows = [[60, (IMAGE_TOKEN, counts[0]), 150], [40, (IMAGE_TOKEN, counts[1]), 8, (IMAGE_TOKEN, counts[2]), 180]]
    if qwen:  # Qwen3-VL has each frame by itself, with words between them
        frames = _VIDEO[0] if family == "qwen3_vl" else 1
        rows[1][3:3] = [(VIDEO_TOKEN, video // frames), 4] * frames
    ids, kinds = zip(*(_tokens(row, generator, qwen) for row in rows), strict=True)
    longest = max(map(len, ids))
    lengths = [len(row) for row in ids]
    pads = [longest - length for length in lengths]
    mask = torch.tensor([[0] * pad + [1] * length for pad, length in zip(pads, lengths, strict=True)])
    inputs: dict[str, Any] = {
        "input_ids": torch.tensor([[0] * pad + row for pad, row in zip(pads, ids, strict=True)]),
        "attention_mask": mask,
    }
    of_tokens = torch.tensor([[0] * pad + row for pad, row in zip(pads, kinds, strict=True)], dtype=torch.int8)
    return Prompt(inputs | _pixels(family, of_tokens, generator), of_tokens, lengths)


def _tokens(runs: list[Any], generator: torch.Generator, starts: bool) -> tuple[list[int], list[int]]:
    ids: list[int] = []
    kinds: list[int] = []
    for run in runs:
        if isinstance(run, int):
            ids += torch.randint(10, VOCAB, (run,), generator=generator).tolist()
            kinds += [0] * run
            continue
        token, count = run
        if starts:
            ids[-1] = START_TOKEN
        ids += [token] * count
        kinds += [1 if token == IMAGE_TOKEN else 2] * count
    return ids, kinds


def _pixels(family: str, kinds: Tensor, generator: torch.Generator) -> dict[str, Any]:
    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if family in _QWEN:
        patch = 3 * 2 * 8 * 8
        return {
            "pixel_values": noise(sum(f * h * w for f, h, w in _IMAGES), patch),
            "image_grid_thw": torch.tensor(_IMAGES),
            "pixel_values_videos": noise(_VIDEO[0] * _VIDEO[1] * _VIDEO[2], patch),
            "video_grid_thw": torch.tensor([_VIDEO]),
            "mm_token_type_ids": kinds.int(),
        }
    if family == "smolvlm":
        images = noise(2, 2, 2, 64, 64)
        images[0, 1] = 0.0  # a row with fewer images than another has blank ones, which the model leaves out
        return {"pixel_values": images}
    more = {"token_type_ids": kinds.long()} if family == "gemma3" else {}
    return {"pixel_values": noise(3, 2, 64, 64)} | more
