"""What a model says of a call's tokens: `TokenLayout` and `DenoisingStep` in denoising, `ModalityLayout` in reading."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["IMAGE", "TEXT", "VIDEO", "DenoisingStep", "ModalityLayout", "TokenLayout"]

TEXT = 0
IMAGE = 1
VIDEO = 2
"""Numbers of modalities, as transformers' ``mm_token_type_ids`` has them."""


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Which tokens of a call are text, and how the others lie in an image or a video.

    By position, as `Extent` counts: ``before[b]`` tokens of text (of a language model, the prompt), then ``frames *
    height * width`` patches, frame by frame and row by row; whatever follows them is text (or what a language model
    fills in), queries beyond the keys too.

    Fields:
        before: of each batch row.
        frames, height, width: patches; all 0 where there is no image.

    Raises:
        ValueError: a number is negative, or some of the three are 0 and others not.
    """

    before: tuple[int, ...]
    frames: int = 0
    height: int = 0
    width: int = 0

    def __post_init__(self) -> None:
        sides = (self.frames, self.height, self.width)
        if min(*self.before, *sides, 0) < 0 or (0 in sides and any(sides)):
            raise ValueError(
                f"a TokenLayout needs numbers of tokens from 0 on, and no image or one of at least 1 x 1 x 1 patches, "
                f"got before={self.before} and {self.frames} x {self.height} x {self.width}"
            )

    @property
    def batch(self) -> int:
        return len(self.before)

    @property
    def patches(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True, eq=False)
class ModalityLayout:
    """Which tokens of a prompt are text, and which an image's or a video's, as a model that reads them is told.

    Fields:
        kinds: int8 ``[B, positions]`` on the CPU: `TEXT`, `IMAGE`, `VIDEO`, or a higher number of another modality; by
            position, as `Extent` counts. Positions beyond are text.
        strides: of each batch row, after how many tokens its frames, or the rows of them, repeat: what grid heads may
            go by. () where nothing is known.

    Raises:
        TypeError: kinds are no int8 tensor.
        ValueError: kinds are not ``[B, positions]``, negative or not on the CPU; strides are not of B rows, or below 1.
    """

    kinds: Tensor
    strides: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        kinds = self.kinds
        if not isinstance(kinds, Tensor) or kinds.dtype != torch.int8:
            given = kinds.dtype if isinstance(kinds, Tensor) else type(kinds).__name__
            raise TypeError(f"kinds must be an int8 tensor, got {given}")
        if kinds.ndim != 2 or kinds.device.type != "cpu" or bool((kinds < 0).any()):
            raise ValueError(
                "kinds must be numbers of modalities from 0 on, [batch, positions] on the CPU, "
                f"got {tuple(kinds.shape)} on {kinds.device}"
            )
        if (self.strides and len(self.strides) != kinds.shape[0]) or any(s < 1 for row in self.strides for s in row):
            raise ValueError(
                f"strides must be numbers from 1 on for each of {kinds.shape[0]} batch rows, got {self.strides}"
            )

    @property
    def batch(self) -> int:
        return self.kinds.shape[0]

    def of_row(self, row: int, count: int) -> Tensor:
        """Modalities of the first ``count`` positions of a batch row, int8 ``[count]``."""
        kinds = self.kinds[row, :count]
        return torch.nn.functional.pad(kinds, (0, count - len(kinds)))


@dataclass(frozen=True, slots=True)
class DenoisingStep:
    """Where a call stands in the sampling of one image, video or text.

    Fields:
        number: of the step, from 0.
        total: steps of the whole sampling; None where nobody said.
        branch: which call of the step it is: guidance without a classifier runs a model twice, unless it puts both
            into one batch.
    """

    number: int
    total: int | None = None
    branch: int = 0
