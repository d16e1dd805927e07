"""Whether the small video model makes what it is asked for: `python models/video_fidelity.py models/video`.

Clips of sentences that are drawn as in training, from another seed, are read back by rules alone: which colours are
there, where each one's middle goes from the first frames to the last, and which shape covers it best. The same rules
read clips that were drawn, not made, so that what they get wrong by themselves is known. Writes
``benchmarks/results/video_model.json``, and frames of the first clips into the model's folder.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from moving_shapes import COLOURS, GROUND, MOTIONS, Shape, describe, draw_shapes, render
from torch import Tensor

from gossamer.evaluate.video import header_of, load_video_model
from gossamer.integrations.diffusers import enable
from gossamer.report.png import png

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results" / "video_model.json"
SEED = 7  # of the sentences; training has another
STEPS = 20
LEAST = 0.008  # of a frame's pixels: a triangle of the smallest radius has 0.027
SHOWN, FRAMES, LARGER = 6, 8, 2  # clips of the picture, frames of each, and how often a pixel stands there each way
AREAS = {"square": 1.8**2, "circle": math.pi, "triangle": 0.6**2 * 3**1.5}  # of a radius of 1
CHECKS = ("colour", "motion", "shape", "all")


@dataclass(frozen=True)
class Seen:
    """What is seen of one colour: where its middle is, in shares of the frame, at the first frames and the last."""

    colour: str
    kind: str
    motion: str


def masks_of(clip: Tensor) -> dict[str, Tensor]:
    """Pixels of a clip ``[F, 3, H, W]`` in 0 .. 1 that are nearest to each colour: bool ``[F, H, W]``."""
    names = [*COLOURS, ""]
    palette = torch.tensor([*COLOURS.values(), (GROUND,) * 3])
    distance = ((clip * 2 - 1)[:, None] - palette[None, :, :, None, None]).square().sum(dim=2)
    nearest = distance.argmin(dim=1)
    return {name: nearest == n for n, name in enumerate(names) if name}


def middles(mask: Tensor) -> Tensor:
    """Of each frame, ``[F, 2]``: x and y in shares of the frame; nan where there is nothing."""
    height, width = mask.shape[1:]
    weight = mask.float()
    whole = weight.sum(dim=(1, 2))
    x = (weight * (torch.arange(width) + 0.5) / width).sum(dim=(1, 2))
    y = (weight * ((torch.arange(height) + 0.5) / height)[:, None]).sum(dim=(1, 2))
    return torch.stack([x, y], dim=1) / whole[:, None]


def seen(clip: Tensor) -> list[Seen]:
    """What a clip shows, by colour."""
    found = []
    for colour, mask in masks_of(clip).items():
        area = mask.float().mean(dim=(1, 2))
        if float(area.median()) < LEAST:
            continue
        there = middles(mask)[area > LEAST / 2]
        few = max(1, len(there) // 4)
        way = (there[-few:].mean(dim=0) - there[:few].mean(dim=0)) * len(clip) / (len(clip) - few)
        motion = min(MOTIONS, key=lambda name: float((way - torch.tensor(MOTIONS[name])).norm()))
        found.append(Seen(colour, kind_of(mask), motion))
    return found


def kind_of(mask: Tensor) -> str:
    """The shape that covers the pixels best, of the size that it has where most of it is seen."""
    height, width = mask.shape[1:]
    areas, whole = mask.float().mean(dim=(1, 2)), middles(mask)
    frames = areas.argsort(descending=True)[:6].tolist()
    scores = {}
    for kind, area in AREAS.items():
        radius = (float(areas.max()) / area) ** 0.5
        scores[kind] = 0.0
        for frame in frames:
            # A triangle's radius is measured from the middle of its pixels.
            x, y = whole[frame].tolist()
            drawn = render([Shape("white", kind, "still", x, y, radius)], 1, height, width)[0, 0] > 0
            scores[kind] += float((drawn & mask[frame]).sum()) / max(1.0, float((drawn | mask[frame]).sum()))
    return max(scores, key=lambda kind: scores[kind])


def judged(shapes: list[Shape], clip: Tensor) -> dict[str, bool]:
    """Whether colours, motions and shapes are those that were asked for, no more and no fewer."""
    found = {one.colour: one for one in seen(clip)}
    asked = {shape.colour: shape for shape in shapes}
    colour = found.keys() == asked.keys()
    both = found.keys() & asked.keys()
    motion = both == asked.keys() and all(found[name].motion == asked[name].motion for name in both)
    kind = both == asked.keys() and all(found[name].kind == asked[name].kind for name in both)
    return {"colour": colour, "motion": motion, "shape": kind, "all": colour and motion and kind}


def drawn(shapes: list[Shape], size: tuple[int, int, int]) -> Tensor:
    """The clip as it was drawn in training, ``[F, 3, H, W]`` in 0 .. 1."""
    return ((render(shapes, *size).permute(1, 0, 2, 3) + 1) / 2).clamp(0, 1)


def picture(clips: list[Tensor]) -> bytes:
    """Frames of clips, a row each, as a PNG."""
    rows = []
    for clip in clips:
        chosen = torch.linspace(0, len(clip) - 1, FRAMES).round().long()
        rows.append(torch.cat(list(clip[chosen]), dim=2))
    whole = torch.cat(rows, dim=1).repeat_interleave(LARGER, 1).repeat_interleave(LARGER, 2)
    pixels = (whole.permute(1, 2, 0) * 255).round().to(torch.uint8).contiguous()
    return png(pixels.numpy().tobytes(), pixels.shape[1], pixels.shape[0], 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--clips", type=int, default=16)
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    model = load_video_model(arguments.model, dtype=torch.bfloat16)
    size = json.loads((arguments.model / "words.json").read_text())["size"]
    generator = torch.Generator().manual_seed(SEED)
    rows: list[dict[str, Any]] = []
    clips = []
    with enable(model.enabled, "dense", kernel="gossamer", min_tokens=0):
        for seed in range(arguments.clips):
            shapes = draw_shapes(generator)
            words = " ".join(describe(shapes))
            started = time.perf_counter()
            clip = model.sample(words, seed, STEPS)
            seconds = time.perf_counter() - started
            clips.append(clip)
            found = [f"{one.colour} {one.kind} {one.motion}" for one in seen(clip)]
            rows.append(
                {"prompt": words, "seed": seed, "seen": found, "seconds": round(seconds, 2)} | judged(shapes, clip)
            )
            print(json.dumps(rows[-1]), flush=True)
    drawings = [draw_shapes(generator) for _ in range(200)]
    right = [judged(shapes, drawn(shapes, tuple(size[1:]))) for shapes in drawings]
    report = header_of(model) | {
        "steps": STEPS,
        "clips": rows,
        "shares": {name: sum(row[name] for row in rows) / len(rows) for name in CHECKS},
        "of_drawn": {name: sum(row[name] for row in right) / len(right) for name in CHECKS} | {"clips": len(right)},
    }
    arguments.out.write_text(json.dumps(report, indent=1) + "\n")
    (arguments.model / "frames.png").write_bytes(picture(clips[:SHOWN]))


if __name__ == "__main__":
    main()
