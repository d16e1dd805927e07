"""Train the small video model from scratch on a CPU: `python models/train_video.py --out models/video`.

A text-conditioned diffusion transformer (diffusers' Wan, pixels for latents) on clips of moving shapes
(`moving_shapes.py`), by rectified flow: between a clip and noise the model predicts their difference. Steps, not
seconds, define the schedule, and each step draws its data from a generator seeded with (seed, step), so that a run can
be resumed (--resume) and repeated. Most steps see small clips; the last ones have the 4,096 tokens of the model's size.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import moving_shapes
import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from runs import Run, asked, trained
from torch import Tensor

TIMES = 1000  # of a schedule's timesteps
WITHOUT_TEXT = 0.1  # share of the clips whose sentence is left out, for guidance
GUIDANCE = 3.0
PROMPTS = 8  # that its folder names
SHIFT = 3.0  # towards noise, in training and in sampling
PATCH = (1, 2, 2)
CONFIG: dict[str, Any] = dict(
    patch_size=PATCH,
    num_attention_heads=4,
    attention_head_dim=64,
    in_channels=3,
    out_channels=3,
    text_dim=moving_shapes.TEXT_DIM,
    freq_dim=64,
    ffn_dim=512,
    num_layers=6,
    rope_max_seq_len=64,
)


@dataclass(frozen=True)
class Phase:
    """A stretch of training: ``steps`` of ``rows`` clips of ``frames`` frames of ``size`` by ``size`` pixels.

    first, last: learning-rate multipliers at its ends.
    """

    frames: int
    size: int
    rows: int
    steps: int
    first: float
    last: float

    @property
    def tokens(self) -> int:
        """Of one clip."""
        return self.frames // PATCH[0] * (self.size // PATCH[1]) * (self.size // PATCH[2])


SCHEDULE = (
    Phase(4, 16, 16, 1000, 1.0, 1.0),
    Phase(8, 24, 4, 900, 1.0, 0.7),
    Phase(16, 32, 1, 900, 0.7, 0.02),
)


class Trainer(Run):
    """One run: the weights, and what they are trained on."""

    def __init__(self, seed: int, schedule: tuple[Phase, ...], config: dict[str, Any], bfloat16: bool) -> None:
        torch.manual_seed(seed)
        super().__init__(seed, schedule, WanTransformer3DModel(**config), 1.5e-3, bfloat16)

    def batch(self, phase: Phase) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clips ``[B, 3, F, H, W]``, noise, sentences ``[B, words, D]`` and times in 0 .. 1, of the current step."""
        generator = self.generator()
        shapes = [moving_shapes.draw_shapes(generator) for _ in range(phase.rows)]
        x = torch.stack([moving_shapes.render(some, phase.frames, phase.size, phase.size) for some in shapes])
        text = moving_shapes.embed([moving_shapes.describe(some) for some in shapes])
        text[torch.rand(phase.rows, generator=generator) < WITHOUT_TEXT] = 0.0
        noise = torch.randn(x.shape, generator=generator)
        # One of each part of the range, so that batches differ less.
        even = (torch.arange(phase.rows) + torch.rand(phase.rows, generator=generator)) / phase.rows
        normal = torch.special.ndtri(even.clamp(1e-4, 1 - 1e-4))
        return x, noise, text, shifted(torch.sigmoid(normal))

    def loss(self, phase: Phase) -> Tensor:
        x, noise, text, times = self.batch(phase)
        share = times[:, None, None, None, None]
        with self.products():
            found = self.model((1 - share) * x + share * noise, times * TIMES, text, return_dict=False)[0]
        return (found.float() - (noise - x)).square().mean()

    def export(self, out: Path, size: tuple[int, int, int]) -> None:
        """Write the averaged weights in bfloat16 and the scheduler in diffusers' format, and the training log.

        Args:
            size: frames, height and width of the clips that are asked for.
        """
        self.take_average()
        shipped: Any = WanTransformer3DModel(**self.model.config).bfloat16()
        shipped.load_state_dict(self.model.state_dict())
        shipped.save_pretrained(out / "transformer")
        FlowMatchEulerDiscreteScheduler(shift=SHIFT).save_pretrained(out / "scheduler")
        generator = torch.Generator().manual_seed(self.seed + 1)
        words = {
            "words": moving_shapes.WORDS,
            "codes": moving_shapes.word_codes().tolist(),
            "prompts": [" ".join(moving_shapes.describe(moving_shapes.draw_shapes(generator))) for _ in range(PROMPTS)],
            "size": [self.model.config.in_channels, *size],
            "guidance": GUIDANCE,
        }
        (out / "words.json").write_text(json.dumps(words) + "\n")
        self.write_log(out)


def shifted(times: Tensor) -> Tensor:
    """Times moved towards noise, as the scheduler does it (Esser et al., 2403.03206, section 5.3.2)."""
    return SHIFT * times / (1 + (SHIFT - 1) * times)


def main() -> int:
    arguments = asked(__doc__, Path(__file__).parent / "video")
    trainer = Trainer(arguments.seed, SCHEDULE, CONFIG, not arguments.float32)
    if not trained(trainer, arguments):
        return 1
    last = SCHEDULE[-1]
    trainer.export(arguments.out, (last.frames, last.size, last.size))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
