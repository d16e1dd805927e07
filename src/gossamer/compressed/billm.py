"""BiLLM (2402.04291): weights of one bit; a few salient columns have two, the others two groups by magnitude."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gossamer.compressed.hessian import propagated

__all__ = ["Binarised", "Search", "binarise", "rounded", "sign_and_scale"]

Search = Literal["weights", "saliency"]
MOST_SALIENT = 49  # columns of a block
QUANTILES = [0.1 + 0.01 * n for n in range(81)]


@dataclass(frozen=True)
class Binarised:
    """A weight ``[out, in]`` in one bit, by blocks of columns: what a packed layer stores.

    A weight is ``mean + scale sign``; its group is salient, high or low. Salient columns have a second sign and scale,
    of what the first left.

    Attributes:
        positive: bool ``[out, in]``, the signs.
        high: bool ``[out, in]``, the group of weights in columns that are not salient.
        salient: bool ``[in]``.
        second: bool ``[out, in]``, the second signs, of salient columns.
        mean, scale: fp32 ``[4, out, blocks]`` of the groups low, high, salient and its rest.
        block: columns of a block.
    """

    positive: Tensor
    high: Tensor
    salient: Tensor
    second: Tensor
    mean: Tensor
    scale: Tensor
    block: int

    def dequantised(self) -> Tensor:
        """fp32 ``[out, in]``."""
        features = self.positive.shape[1]
        mean, scale = (x.repeat_interleave(self.block, -1)[..., :features] for x in (self.mean, self.scale))
        signs = self.positive * 2.0 - 1.0
        plain = torch.where(self.high, mean[1] + scale[1] * signs, mean[0] + scale[0] * signs)
        twice = mean[2] + scale[2] * signs + mean[3] + scale[3] * (self.second * 2.0 - 1.0)
        return torch.where(self.salient, twice, plain)

    @property
    def bits(self) -> float:
        """Of a weight, as the paper counts them: signs alone, without groups, means and scales."""
        return 1.0 + float(self.salient.float().mean())


def binarise(
    weight: Tensor,
    factor: Tensor | None,
    *,
    dead: Tensor | None = None,
    block: int = 128,
    search: Search = "weights",
    salient: bool = True,
    split: bool = True,
    compensate: bool = True,
) -> Binarised:
    """BiLLM of a weight ``[out, in]`` (2402.04291, section 3 and algorithm 1).

    In each block columns are ranked by ``sum over rows of w^2 / U_ii^2``; the number of salient ones, 1 to 49, and then
    the magnitude that parts the others in two groups, one of 81 quantiles from 10 to 90%, are those with the least
    squared error. A block's loss is handed on to the blocks after it, none inside it.

    Args:
        factor: `Hessian.factor` of the layer's inputs, ``[in, in]``; None hands no loss on and ranks by magnitude.
        dead: `Hessian.dead`; their weights begin as 0.
        search: what errors are measured on. ``"saliency"`` is a quirk of the released code: the search for columns
            sees ``w^2 / U_ii^2`` in place of the weights, and binarises both parts twice.
        salient, split, compensate: without one of these, as in the paper's ablation; the last hands no loss on.

    Raises:
        ValueError: another search, or a block below 1.
    """
    if search not in ("weights", "saliency"):
        raise ValueError(f"search must be 'weights' or 'saliency', got {search!r}")
    if block < 1:
        raise ValueError(f"block must be at least 1, got {block}")
    rows, features = weight.shape
    device = weight.device
    positive, high, second = (torch.zeros(rows, features, dtype=torch.bool, device=device) for _ in range(3))
    columns = torch.zeros(features, dtype=torch.bool, device=device)
    number = -(-features // block)
    mean, scale = (torch.zeros(4, rows, number, device=weight.device) for _ in range(2))

    def choose(w: Tensor, own: Tensor, start: int) -> tuple[Tensor, Tensor]:
        here, n = slice(start, start + w.shape[1]), start // block
        saliency = (w / own.diagonal()) ** 2
        chosen = _salient_columns(w, saliency, search) if salient else torch.zeros_like(w[0], dtype=torch.bool)
        above = _split(w, ~chosen) if split else torch.zeros_like(w, dtype=torch.bool)
        twice = chosen.expand_as(w)
        groups = (~twice & ~above, ~twice & above, twice)
        parts = [_binary(w, group) for group in groups]
        rest = _binary(w - parts[2].values, twice)
        kept = list(zip(parts, groups, strict=True))
        positive[:, here] = torch.stack([part.positive & group for part, group in kept]).any(0)
        high[:, here], columns[here], second[:, here] = groups[1], chosen, rest.positive & twice
        for i, part in enumerate((*parts, rest)):
            mean[i, :, n], scale[i, :, n] = part.mean, part.scale
        values = rest.values * twice
        for part, group in kept:
            values += part.values * group
        return values, (w - values) / own.diagonal()

    u = torch.eye(features, device=weight.device) if factor is None else factor
    propagated(weight, u, choose, block, dead=dead, hand_on=compensate)
    return Binarised(positive, high, columns, second, mean, scale, block)


@dataclass(frozen=True)
class _Binary:
    """``mean + scale sign`` of each row of a group: values and signs ``[out, b]``, mean and scale ``[out]``."""

    values: Tensor
    positive: Tensor
    mean: Tensor
    scale: Tensor


def _binary(w: Tensor, group: Tensor) -> _Binary:
    """The mean of a row's group, and the mean distance from it; 0 where a row has none."""
    count = group.sum(1).clamp(min=1)
    mean = (w * group).sum(1) / count
    centred = w - mean[:, None]
    scale = (centred.abs() * group).sum(1) / count
    positive = centred >= 0
    return _Binary(mean[:, None] + torch.where(positive, scale[:, None], -scale[:, None]), positive, mean, scale)


def _twice(w: Tensor, group: Tensor) -> Tensor:
    first = _binary(w, group).values
    return first + _binary(w - first, group).values


def _salient_columns(w: Tensor, saliency: Tensor, search: Search) -> Tensor:
    """The best number of the most salient columns, bool ``[b]``; columns that tell nothing apart leave one."""
    order = saliency.abs().sum(0).argsort(descending=True, stable=True)
    seen = saliency if search == "saliency" else w
    best, least = 1, float("inf")
    everything = torch.ones_like(w, dtype=torch.bool)
    for number in range(1, min(MOST_SALIENT, w.shape[1]) + 1):
        chosen = torch.zeros_like(everything)
        chosen[:, order[:number]] = True
        once = _twice(seen, ~chosen) if search == "saliency" else _binary(seen, ~chosen).values
        error = float((seen - torch.where(chosen, _twice(seen, chosen), once)).square().sum())
        if error < least:
            best, least = number, error
    found = torch.zeros(w.shape[1], dtype=torch.bool, device=w.device)
    found[order[:best]] = True
    return found


def _split(w: Tensor, columns: Tensor) -> Tensor:
    """Weights of these columns whose magnitude is above the best of the quantiles, bool ``[out, b]``."""
    size, of = w.abs(), columns.expand_as(w)
    if not bool(columns.any()):
        return torch.zeros_like(of)
    best, least = torch.zeros_like(of), float("inf")
    flat = size[:, columns].flatten().sort().values
    for share in QUANTILES:
        # `torch.quantile` takes no more than 16 million numbers.
        above = of & (size > flat[min(len(flat) - 1, int(share * (len(flat) - 1)))])
        low, high = of & ~above, above
        values = torch.where(high, _binary(w, high).values, _binary(w, low).values)
        error = float(((w - values) * of).square().sum())
        if error < least:
            best, least = above, error
    return best


def sign_and_scale(weight: Tensor) -> Tensor:
    """One bit with the mean magnitude of each row (XNOR-Net, 1603.05279): what BiLLM is compared with."""
    w = weight.detach().float()
    return torch.where(w >= 0, 1.0, -1.0) * w.abs().mean(1, keepdim=True)


def rounded(weight: Tensor) -> Tensor:
    """One bit by rounding to the nearer end of each row's range (round to nearest at 1 bit)."""
    w = weight.detach().float()
    low, high = w.amin(1, keepdim=True), w.amax(1, keepdim=True)
    return torch.where(w - low < high - w, low, high)
