"""Synthetic video: one or two shapes on a dark ground, each moving its own way, with the sentence that says so.

A clip is drawn from its description alone, at any size and number of frames, so that a model can be trained on small
clips and asked for large ones. Colours are in -1 .. 1; edges are a pixel wide.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TEXT_DIM", "TEXT_TOKENS", "WORDS", "Shape", "describe", "draw_shapes", "embed", "render", "word_codes"]

COLOURS = {
    "red": (1.0, -0.7, -0.7),
    "green": (-0.7, 0.9, -0.6),
    "blue": (-0.6, -0.5, 1.0),
    "yellow": (1.0, 0.9, -0.7),
    "white": (0.9, 0.9, 0.9),
}
KINDS = ("square", "circle", "triangle")
# Of a clip's width and height, from its first frame to its last.
MOTIONS = {"left": (-0.5, 0.0), "right": (0.5, 0.0), "up": (0.0, -0.5), "down": (0.0, 0.5), "still": (0.0, 0.0)}
PAD, AND = "", "and"
WORDS = (PAD, AND, *COLOURS, *KINDS, *MOTIONS)
TEXT_TOKENS = 7  # of two shapes: colour, kind, motion, "and", colour, kind, motion
TEXT_DIM = 32
GROUND = -0.85


@dataclass(frozen=True)
class Shape:
    """One shape: its words, and the middle of its way and its radius as shares of the frame."""

    colour: str
    kind: str
    motion: str
    x: float
    y: float
    radius: float

    @property
    def words(self) -> tuple[str, str, str]:
        return self.colour, self.kind, self.motion


def draw_shapes(generator: torch.Generator) -> list[Shape]:
    """One or two, by chance; two have different colours, so that a sentence tells them apart."""

    def among(options: Sequence[str]) -> str:
        return options[int(torch.randint(len(options), (), generator=generator))]

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    shapes: list[Shape] = []
    for _ in range(1 + int(torch.randint(2, (), generator=generator))):
        left = [colour for colour in COLOURS if colour not in {shape.colour for shape in shapes}]
        where = between(0.3, 0.7), between(0.3, 0.7), between(0.12, 0.2)
        shapes.append(Shape(among(left), among(KINDS), among(tuple(MOTIONS)), *where))
    return shapes


def describe(shapes: Sequence[Shape]) -> list[str]:
    """The words of a clip, such as ``red square left and blue circle still``."""
    words: list[str] = []
    for n, shape in enumerate(shapes):
        words += [AND, *shape.words] if n else shape.words
    return words


def word_codes() -> Tensor:
    """fp32 ``[TEXT_TOKENS, words, TEXT_DIM]``: a fixed random direction for each word at each place of a sentence."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(TEXT_TOKENS, len(WORDS), TEXT_DIM, generator=generator)


def embed(sentences: Sequence[Sequence[str]]) -> Tensor:
    """fp32 ``[B, TEXT_TOKENS, TEXT_DIM]``, of `word_codes`; 0 where there is no word.

    Raises:
        ValueError: a word that there is none of, or more than `TEXT_TOKENS`.
    """
    codes = word_codes()
    out = torch.zeros(len(sentences), TEXT_TOKENS, TEXT_DIM)
    for row, sentence in enumerate(sentences):
        unknown = [word for word in sentence if word not in WORDS]
        if unknown or len(sentence) > TEXT_TOKENS:
            raise ValueError(
                f"a sentence has at most {TEXT_TOKENS} of the words {', '.join(filter(None, WORDS))}; got "
                f"{' '.join(sentence)!r}"
            )
        for place, word in enumerate(sentence):
            if word != PAD:
                out[row, place] = codes[place, WORDS.index(word)]
    return out


def render(shapes: Sequence[Shape], frames: int, height: int, width: int) -> Tensor:
    """fp32 ``[3, frames, height, width]``; later shapes lie before earlier ones."""
    y = (torch.arange(height) + 0.5)[:, None] / height
    x = (torch.arange(width) + 0.5) / width
    pixel = 1.0 / min(height, width)
    clip = torch.full((3, frames, height, width), GROUND)
    for n in range(frames):
        share = n / (frames - 1) - 0.5 if frames > 1 else 0.0
        for shape in shapes:
            move = MOTIONS[shape.motion]
            distance = _distance(shape.kind, x - shape.x - share * move[0], y - shape.y - share * move[1], shape.radius)
            cover = (0.5 - distance / pixel).clamp(0, 1)
            colour = torch.tensor(COLOURS[shape.colour])[:, None, None]
            clip[:, n] = clip[:, n] * (1 - cover) + colour * cover
    return clip


def _distance(kind: str, x: Tensor, y: Tensor, radius: float) -> Tensor:
    """Signed, from the edge of a shape about the origin; below 0 inside."""
    if kind == "circle":
        return torch.sqrt(x * x + y * y) - radius
    if kind == "square":
        return torch.maximum(x.abs().expand(y.shape[0], -1), y.abs()) - 0.9 * radius
    # A triangle that stands on its base: the farthest of its three sides.
    side = math.sqrt(3) / 2
    return torch.maximum(torch.maximum(side * x - 0.5 * y, -side * x - 0.5 * y), y + 0 * x) - 0.6 * radius
