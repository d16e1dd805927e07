"""What heads of a denoising model get: a mode of Sparse-vDiT, or an order of axes for PAROAttention; layers, tiles.

search = ModeSearch()
with gossamer.enable(pipeline, "dense") as handle:
    handle.observe(search)
    pipeline(prompt)
search.profile().save("modes.json")
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import backends, methods
from gossamer.call import AttentionCall
from gossamer.integrations.stats import Observation
from gossamer.methods import PARO, AttentionTile, Method, SparseVDiT
from gossamer.methods.denoising import ORDERS, axis_order, layout_of
from gossamer.oracle import log_sum_exp
from gossamer.plan import SparsePlan
from gossamer.profiles import Profile

__all__ = ["ModeSearch", "OrderSearch", "TileSearch", "order_figures", "order_scores"]

# Weights of a map that are held at once.
_MAP_BYTES = 256 << 20


class Search:
    """Sums of figures ``[heads, choices]`` for each layer, over the calls that it is shown.

    What it is shown are dense calls with a layout, of `gossamer.integrations.diffusers.Handle.observe`; others, and
    steps that are no multiple of ``every``, are left out.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every must be at least 1, got {every}")
        self.every = every
        self._sums: dict[int, Tensor] = {}
        self._calls: dict[int, int] = {}

    def __call__(self, observed: Observation) -> None:
        call = observed.call
        due = call.step is None or call.step.number % self.every == 0
        if not due or call.layer is None or SparseVDiT("dense").lacks(call) is not None:
            return
        figures = self._figures(call, observed.out)
        self._sums[call.layer] = self._sums.get(call.layer, 0.0) + figures
        self._calls[call.layer] = self._calls.get(call.layer, 0) + 1

    @abstractmethod
    def _figures(self, call: AttentionCall, out: Tensor) -> Tensor:
        """fp64 ``[figures, heads, choices]``, the mean of the call's batch rows."""

    def means(self) -> list[Tensor]:
        """The figures of each layer, fp64 ``[figures, heads, choices]``, means over the calls that were seen.

        Raises:
            ValueError: no layer was seen, or layers are missing among them.
        """
        layers = sorted(self._sums)
        if not layers or layers != list(range(len(layers))):
            raise ValueError(
                f"a search needs calls of every layer from 0 on, got {layers}; show it a whole step of a sampling, "
                "by handle.observe(search)"
            )
        return [self._sums[layer] / self._calls[layer] for layer in layers]


class ModeSearch(Search):
    """Sparse-vDiT's search (2506.03065): the mode with the least ``error + weight (1 - sparsity)`` for each head.

    The error is the mean square of what a mode changes in the head's output, over that of the output: 1 for a head that
    is skipped. The sparsity is the share of pairs that the mode leaves out, counted. A head for which all modes lie
    above ``limit`` stays dense. Both are means over all calls that were seen, whatever prompt and step.

    Deviations: the paper's error is absolute, so that its limit of 1 depends on the scale of values; the sparsity of a
    mode is a constant there that is not published. One table serves all steps.

    Args:
        weight: the paper's lambda; limit: its epsilon, for relative errors.
        modes: tried; None: `SparseVDiT.candidates`.
        every: steps, of which the first is looked at.
        **fields: of all modes, such as ``block``.
    """

    def __init__(
        self,
        weight: float = 0.5,
        limit: float = 0.2,
        modes: Sequence[Method] | None = None,
        every: int = 1,
        **fields: Any,
    ) -> None:
        super().__init__(every)
        self.weight, self.limit = weight, limit
        self._dense = SparseVDiT("dense", **fields)
        tried = [methods.create("sparse_vdit", **fields, **given) for given in SparseVDiT.candidates]
        self.modes = tuple(tried if modes is None else modes)

    def profile(self) -> Profile:
        """The methods of all heads, with their errors and the share of pairs that they compute.

        Raises:
            ValueError: not every layer was seen.
        """
        layers, errors, costs = [], [], []
        for error, density in self.means():
            loss = error + self.weight * density
            best = loss.argmin(dim=1)
            stays = loss.amin(dim=1) > self.limit
            layers.append([self._dense if stay else self.modes[n] for n, stay in zip(best, stays, strict=True)])
            for figures, figure, whole in ((errors, error, 0.0), (costs, density, 1.0)):
                chosen = figure.gather(1, best[:, None])[:, 0]
                figures.append([whole if stay else float(x) for x, stay in zip(chosen, stays, strict=True)])
        return Profile(layers, errors=errors, costs=costs)

    def _figures(self, call: AttentionCall, out: Tensor) -> Tensor:
        whole = out.double().square().mean(dim=(2, 3)).clamp(min=1e-30)
        pairs = (call.extent.count_allowed()).double()[:, None]
        errors, densities = [], []
        for mode in self.modes:
            # Stripes are found anew in each call, or those of one sampling would be judged by those of another.
            plan = mode.plan(replace(call, state=None))
            changed = (backends.attend(call, plan)[0].double() - out.double()).square().mean(dim=(2, 3))
            errors.append((changed / whole).mean(dim=0).cpu())
            densities.append((_of_heads(plan, call.heads).double() / pairs).mean(dim=0))
        return torch.stack([torch.stack(errors, dim=1), torch.stack(densities, dim=1)])


class OrderSearch(Search):
    """PAROAttention's search (2506.16054) for the order of axes in which a head's map falls into blocks.

    See `order_figures` and `order_scores`; figures are means over all calls that were seen.

    Args:
        alpha: weight of the share of blocks that can be left out, against how evenly the others are filled.
        every: steps, of which the first is looked at.
        **fields: of the methods in the profile, such as ``density`` and ``block``.
    """

    def __init__(self, alpha: float = 0.5, every: int = 1, **fields: Any) -> None:
        super().__init__(every)
        self.alpha, self._fields = alpha, fields
        self._block = PARO(**fields).block

    def profile(self) -> Profile:
        """The order of each head, and its score.

        Raises:
            ValueError: not every layer was seen.
        """
        layers, scores = [], []
        for figures in self.means():
            score = order_scores(*figures, alpha=self.alpha)
            best = score.argmin(dim=1)
            layers.append([PARO(ORDERS[n], **self._fields) for n in best])
            scores.append(score.amin(dim=1).tolist())
        return Profile(layers, scores=scores)

    def _figures(self, call: AttentionCall, out: Tensor) -> Tensor:
        return torch.stack(order_figures(call, self._block)).mean(dim=1)


class TileSearch(Search):
    """Efficient-vDiT's search by layer (2502.06155): the fewest reference frames under which a layer loses little.

    What a layer loses is the mean square of what tiles change in its output, over that of the output (the authors' loss
    was not at hand). A layer that loses more than ``limit`` under all numbers keeps every tile.

    Args:
        limit: 0.025 to 0.4 are the thresholds of the paper, for its own loss.
        frames: numbers of reference frames that are tried.
        every: steps, of which the first is looked at.
        block: of the method.
    """

    def __init__(
        self, limit: float = 0.1, frames: Sequence[int] = (1, 2, 3, 4, 6, 8, 12), every: int = 1, block: int = 64
    ) -> None:
        super().__init__(every)
        self.limit, self.frames, self.block = limit, tuple(sorted(set(frames))), block
        self._most = 1

    def method(self) -> AttentionTile:
        """The tiles of all layers.

        Raises:
            ValueError: not every layer was seen.
        """
        layers = []
        for (errors,) in self.means():
            fits = [k for k, error in zip(self.frames, errors[0].tolist(), strict=True) if error <= self.limit]
            layers.append(min(fits, default=self._most))
        return AttentionTile(layers=tuple(layers), block=self.block)

    def _figures(self, call: AttentionCall, out: Tensor) -> Tensor:
        self._most = max(self._most, layout_of(call).frames)
        whole = out.double().square().mean().clamp(min=1e-30)
        errors = []
        for k in self.frames:
            plan = AttentionTile(k, block=self.block).plan(call)
            errors.append((backends.attend(call, plan)[0].double() - out.double()).square().mean() / whole)
        return torch.stack(errors).cpu()[None, None]


def order_figures(
    call: AttentionCall, block: int = 64, small: float = 1e-3, share: float = 0.9
) -> tuple[Tensor, Tensor]:
    """How a call's map of patches looks in each order of its axes, in tiles of ``block`` patches.

    Returns:
        empty: the share of tiles of which at least ``share`` of the weights are below ``small``; uneven: the mean over
        the tiles of their largest weight over their mean, 0 for a tile of nothing. Both fp64 ``[B, H, 6]``.
    """
    layout, lse = layout_of(call), log_sum_exp(call)
    figures = torch.zeros(2, call.batch, call.heads, len(ORDERS), dtype=torch.float64, device="cpu")
    for row, before in enumerate(layout.before):
        patches = slice(before, before + layout.patches)
        k, of_row = call.k[row, :, patches].float(), lse[row, :, patches].float()
        q = call.q[row, :, patches].float() * call.scale
        for number, axes in enumerate(ORDERS):
            order = (axis_order(call, axes)[row, patches] - before).to(call.device)
            figures[:, row, :, number] = _tiles(call, q[:, order], k[:, order], of_row[:, order], block, small, share)
    return figures[0], figures[1]


def _tiles(call: AttentionCall, q: Tensor, k: Tensor, lse: Tensor, block: int, small: float, share: float) -> Tensor:
    """``[2, H]`` of one batch row."""
    patches = q.shape[1]
    sums = torch.zeros(2, call.heads, dtype=torch.float64, device=q.device)
    width = F.pad(q.new_ones(patches), (0, -patches % block)).view(-1, block).sum(dim=1)
    step = max(1, _MAP_BYTES // (4 * call.heads * block * patches)) * block
    for first in range(0, patches, step):
        rows = slice(first, first + step)
        stacked = q[:, rows].unflatten(0, (call.groups, call.share)).flatten(1, 2)
        logits = (stacked @ k.transpose(-1, -2)).unflatten(1, (call.share, -1)).flatten(0, 1)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        weight = (logits - lse[:, rows, None]).exp()
        tall = weight.shape[1]
        padded = F.pad(weight, (0, -patches % block, 0, -tall % block), value=-1.0)
        tiles = padded.unflatten(2, (-1, block)).unflatten(1, (-1, block))  # [H, m, block, n, block]
        height = F.pad(q.new_ones(tall), (0, -tall % block)).view(-1, block).sum(dim=1)
        size = height[:, None] * width
        below = ((tiles >= 0) & (tiles < small)).sum(dim=(2, 4))
        largest, mean = tiles.amax(dim=(2, 4)), tiles.clamp(min=0).sum(dim=(2, 4)) / size
        sums[0] += (below >= share * size).double().sum(dim=(1, 2))
        sums[1] += (largest / mean.clamp(min=1e-30)).double().sum(dim=(1, 2))
    return (sums / len(width) ** 2).cpu()


def order_scores(empty: Tensor, uneven: Tensor, *, alpha: float = 0.5) -> Tensor:
    """``alpha (1 - empty) / sum + (1 - alpha) uneven / sum`` over the orders, the least being the best.

    Equation 3 of the paper has ``empty`` itself in the first term and takes the least, against its own "higher is
    better": the order with the fewest empty blocks would win.
    """
    full = 1 - empty
    parts = (x / x.sum(dim=-1, keepdim=True).clamp(min=1e-30) for x in (full, uneven))
    first, second = parts
    return alpha * first + (1 - alpha) * second


def _of_heads(plan: SparsePlan, heads: int) -> Tensor:
    """Pairs of each query head, ``[B, H]``."""
    return plan.count_pairs().repeat_interleave(heads // plan.heads, dim=1)
