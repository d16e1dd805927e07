"""How far one clip is from another: PSNR, SSIM, and a distance in features like LPIPS's."""

from __future__ import annotations

import functools
import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["feature_distance", "psnr", "ssim"]

_WINDOW, _SIGMA = 11, 1.5
_CHANNELS, _LEVELS = 32, 3


def psnr(x: Tensor, y: Tensor) -> float:
    """Peak signal-to-noise ratio of clips ``[F, C, H, W]`` in 0 .. 1, dB; infinite for equal ones."""
    _check(x, y)
    error = float((x.double() - y.double()).square().mean())
    return math.inf if error == 0 else -10 * math.log10(error)


def ssim(x: Tensor, y: Tensor) -> float:
    """Structural similarity (Wang et al., 2004, section III.B), mean over frames, channels and places; 1 for equal
    clips. With their Gaussian window of 11 pixels, of 1.5 deviation, and their constants; smaller frames have a window
    of their own size.
    """
    _check(x, y)
    size = min(_WINDOW, x.shape[2], x.shape[3])
    place = torch.arange(size, dtype=torch.float64, device=x.device) - (size - 1) / 2
    line = torch.exp(-place.square() / (2 * _SIGMA**2))
    line = line / line.sum()
    window = (line[:, None] * line)[None, None]

    def mean(frames: Tensor) -> Tensor:
        return F.conv2d(frames.double().flatten(0, 1)[:, None], window)

    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y = mean(x.double().square()) - mean_x.square(), mean(y.double().square()) - mean_y.square()
    both = mean(x.double() * y.double()) - mean_x * mean_y
    c1, c2 = 0.01**2, 0.03**2
    top = (2 * mean_x * mean_y + c1) * (2 * both + c2)
    return float((top / ((mean_x.square() + mean_y.square() + c1) * (var_x + var_y + c2))).mean())


def feature_distance(x: Tensor, y: Tensor) -> float:
    """The form of LPIPS (Zhang et al., 2018, equation 1) with a fixed random network for their trained one: mean over
    places of squared differences of features of unit length, summed over three levels. 0 for equal clips.

    It tells which of two clips is nearer to a third in edges and colours of several sizes, and is no number of LPIPS.
    """
    _check(x, y)
    total, (a, b) = 0.0, (t.float() * 2 - 1 for t in (x, y))
    for weight in _filters(x.shape[1]):
        a, b = (F.relu(F.conv2d(t, weight.to(t.device), padding=1)) for t in (a, b))
        units = [t / t.square().sum(dim=1, keepdim=True).sqrt().clamp(min=1e-10) for t in (a, b)]
        total += float((units[0] - units[1]).square().sum(dim=1).mean())
        if min(a.shape[2:]) < 2:
            break
        a, b = (F.avg_pool2d(t, 2) for t in (a, b))
    return total


@functools.cache
def _filters(channels: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    widths = [channels, *([_CHANNELS] * _LEVELS)]
    return tuple(
        torch.randn(wide, thin, 3, 3, generator=generator) / math.sqrt(9 * thin)
        for thin, wide in itertools.pairwise(widths)
    )


def _check(x: Tensor, y: Tensor) -> None:
    if x.shape != y.shape or x.ndim != 4 or not x.numel():
        raise ValueError(f"clips are [F, C, H, W] of one shape, got {tuple(x.shape)} and {tuple(y.shape)}")
