"""How the patches of an image or a video lie, from what a denoising model is called with."""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Grid3", "arguments_of", "grid_of", "is_first"]

Grid3 = tuple[int, int, int]
"""Frames, height and width in patches."""


def arguments_of(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """What a model is called with, by name; what its ``forward`` does not name is left out."""
    names = [name for name in inspect.signature(model.forward).parameters if name != "self"]
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def grid_of(config: Any, arguments: Mapping[str, Any]) -> Grid3 | None:
    """The patches of a call, or None where they are unknown.

    From the first that is there: the ids of packed patches (``img_ids``, Flux), their shapes (``img_shapes``,
    Qwen-Image), numbers (``num_frames``, ``height`` and ``width``, LTX), or the latents themselves, over the config's
    ``patch_size`` and ``patch_size_t``: ``[B, C, F, H, W]``, ``[B, F, C, H, W]`` (CogVideoX) or ``[B, C, H, W]``.
    """
    hidden = arguments.get("hidden_states")
    if arguments.get("img_ids") is not None:
        return _of_ids(arguments["img_ids"])
    if arguments.get("img_shapes") is not None:
        return _of_shapes(arguments["img_shapes"])
    if not isinstance(hidden, Tensor):
        return None
    if hidden.ndim == 3:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        if not (isinstance(frames, int) and isinstance(height, int) and isinstance(width, int)):
            return None
        return (frames, height, width) if frames * height * width == hidden.shape[1] else None
    return _of_latents(config, hidden)


def _of_ids(ids: Tensor) -> Grid3 | None:
    """From a row of coordinates for each patch, if they are all of a box, row by row."""
    rows = ids[0] if ids.ndim == 3 else ids
    sides = [int(column.unique().numel()) for column in rows.T]
    sides = [side for side in sides if side > 1]
    if len(sides) > 3 or math.prod(sides) != len(rows):
        return None
    varying = [column for column in rows.T if column.unique().numel() > 1]
    for n, column in enumerate(varying):  # the last one runs fastest
        expected = column.unique().repeat_interleave(math.prod(sides[n + 1 :])).repeat(math.prod(sides[:n]))
        if not torch.equal(column, expected):
            return None
    frames, height, width = [1] * (3 - len(sides)) + sides
    return frames, height, width


def _of_shapes(shapes: Any) -> Grid3 | None:
    """From the shapes of the images of each batch row: of one size, one after the other as frames."""
    rows = {tuple(map(tuple, row)) if isinstance(row[0], Sequence) else (tuple(row),) for row in shapes}
    images = next(iter(rows)) if len(rows) == 1 else ()
    sizes = {image[1:] for image in images}
    if len(sizes) != 1:
        return None
    (height, width) = sizes.pop()
    return sum(image[0] for image in images), height, width


def _of_latents(config: Any, latents: Tensor) -> Grid3 | None:
    patch, frames_a_patch = getattr(config, "patch_size", None), getattr(config, "patch_size_t", None)
    if isinstance(patch, Sequence) and len(patch) in (2, 3):
        of_frames, of_height, of_width = (1, *patch) if len(patch) == 2 else patch
    elif isinstance(patch, int):
        of_frames, of_height, of_width = frames_a_patch or 1, patch, patch
    else:
        return None
    if latents.ndim == 4:
        return 1, latents.shape[2] // of_height, latents.shape[3] // of_width
    if latents.ndim != 5:
        return None
    channels = getattr(config, "in_channels", None)
    frames = latents.shape[2] if latents.shape[1] == channels or latents.shape[2] != channels else latents.shape[1]
    return frames // of_frames, latents.shape[3] // of_height, latents.shape[4] // of_width


def is_first(module: Any, text: Tensor, value: Tensor, patches: int) -> bool | None:
    """Whether text stands before the patches, by where the values of its first token are; None where it can't be told.

    Args:
        module: of attention, with projections of values by the names that diffusers gives them.
        text: ``[B, tokens, channels]``, as the module was given it; value: ``[B, H, S, Dv]``.
    """
    project = getattr(module, "add_v_proj", None)
    project = getattr(module, "to_v", None) if project is None else project
    if project is None or not text.shape[1]:
        return None
    with torch.no_grad():
        own = project(text[:1, :1]).flatten().to(value.dtype)
    found = [
        own.numel() == value.shape[1] * value.shape[3]
        and torch.allclose(value[0, :, place].flatten(), own, rtol=1e-2, atol=1e-3)
        for place in (0, patches)
    ]
    return found[0] if found[0] != found[1] else None
