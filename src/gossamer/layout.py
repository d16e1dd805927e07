"""What a denoising model says of a call's tokens: `TokenLayout`, and `DenoisingStep`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DenoisingStep", "TokenLayout"]


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
    def patches(self) -> int:
        return self.frames * self.height * self.width


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
