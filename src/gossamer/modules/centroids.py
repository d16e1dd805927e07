"""Online spherical k-means of the Routing Transformer (2003.05997): centroids that follow queries and keys."""

from __future__ import annotations

from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["Centroids", "Update"]

Update = Literal["sum", "mean"]


class Centroids(nn.Module):
    """Unit vectors ``means [H, C, D]``, a buffer: no gradient reaches them; they move when `update` is called.

    The tokens "assigned" to a centroid, which move it, are those that it is nearest to, each to one: so the authors'
    code has it (google-research, ``routing_transformer/utils.py``), and lucidrains'. They are not the balanced clusters
    that attend each other, which hold a token several times or never; `gossamer.modules.combiner.Learnable`, whose
    spans are the nearest tokens, moves its centroids by the same rule. The authors' code averages sums and counts
    apart and divides them, queries before keys, and does not normalise the result; neither form here does that.

    In the first training pass the whole batch says where centroids begin (`start`), so that in this one pass a token's
    cluster depends on later tokens and on other rows, also with ``assign="prefix"`` and in Combiner's learned spans.
    Centroids stay in fp32, at least, whatever a module around them is cast to: a step of a decay near 1 is below what
    bf16 tells apart, and they would stand still.

    Args:
        decay: of the moving average (0.999).
        update: ``"sum"``, the paper's ``mu <- decay mu + (1 - decay) / 2 (sum of its queries + sum of its keys)``;
            ``"mean"``, lucidrains' code: the mean of all of them in place of half of the sums. Both normalise
            afterwards, and leave a cluster that got nothing as it is.
    """

    means: Tensor
    started: Tensor  # bool, whether `start` has been

    def __init__(
        self,
        heads: int,
        clusters: int,
        dim: int,
        *,
        decay: float = 0.999,
        update: Update = "sum",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if clusters < 1:
            raise ValueError(f"clusters must be 1 or more, got {clusters}")
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        if update not in ("sum", "mean"):
            raise ValueError(f"update must be 'sum' or 'mean', got {update!r}")
        self.decay, self.how = decay, update
        start = F.normalize(torch.randn(heads, clusters, dim, device=device, dtype=_wide(dtype)), dim=-1)
        self.register_buffer("means", start)
        self.register_buffer("started", torch.zeros((), dtype=torch.bool, device=device))

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        """What ``to()``, ``half()`` and the like do: they move centroids, and do not narrow them."""
        before = self.means
        super()._apply(fn, recurse)
        if self.means.dtype != _wide(self.means.dtype):
            self.means = before.to(self.means.device)
        return self

    def scores(self, x: Tensor) -> Tensor:
        """Cosine of tokens ``[B, H, T, D]`` and centroids, ``[B, H, T, C]``; no gradient."""
        return F.normalize(x.detach(), dim=-1) @ self.means.to(x.dtype).transpose(-1, -2)

    def scores_of(self, clusters: Tensor, x: Tensor) -> Tensor:
        """Cosine of tokens ``[B, H, T, D]`` and the centroids of ``clusters [B, H, S]``, ``[B, H, S, T]``."""
        if clusters.shape[2] < self.means.shape[1]:  # so few need not be looked up among the scores of all centroids
            head = torch.arange(len(self.means), device=x.device)[:, None]
            return self.means[head, clusters].to(x.dtype) @ F.normalize(x.detach(), dim=-1).transpose(-1, -2)
        every = self.scores(x).transpose(-1, -2)  # [B, H, C, T]
        return every.gather(2, clusters[..., None].expand(-1, -1, -1, x.shape[2]))

    def nearest(self, x: Tensor) -> Tensor:
        """Cluster of each token, int64 ``[B, H, T]``; of equally near ones the first."""
        return self.scores(x).argmax(-1)

    @torch.no_grad()
    def start(self, x: Tensor, live: Tensor, rounds: int = 10) -> None:
        """Begin from a first batch ``[B, H, T, D]``, as lucidrains' code does: tokens of it, then k-means.

        Does nothing once it has been done, and waits for a batch with as many live tokens as there are clusters.

        Args:
            live: bool ``[B, T]``.
        """
        clusters = self.means.shape[1]
        if bool(self.started) or int(live.sum()) < clusters:
            return
        self.started.fill_(True)
        points = F.normalize(x, dim=-1).transpose(1, 2)[live].transpose(0, 1)  # [H, tokens, D]
        self.means.copy_(points[:, torch.randperm(points.shape[1], device=points.device)[:clusters]])
        everyone = torch.ones(1, points.shape[1], dtype=torch.bool, device=points.device)
        for _ in range(rounds):
            total, count = self._sums(points[None], everyone)
            self._move(torch.where(count > 0, total, self.means))

    @torch.no_grad()
    def update(self, q: Tensor, k: Tensor, live: Tensor) -> None:
        """Move towards the queries and keys ``[B, H, T, D]`` that are nearest to each centroid.

        Args:
            live: bool ``[B, T]``.
        """
        (queries, asked), (keys, held) = (self._sums(F.normalize(x, dim=-1), live) for x in (q, k))
        count = asked + held
        step = (queries + keys) / (count.clamp(min=1) if self.how == "mean" else 2)
        self._move(torch.where(count > 0, self.decay * self.means + (1 - self.decay) * step, self.means))

    def _sums(self, x: Tensor, live: Tensor) -> tuple[Tensor, Tensor]:
        """Sum ``[H, C, D]`` and number ``[H, C, 1]`` of the tokens of each cluster."""
        near = F.one_hot(self.nearest(x), self.means.shape[1]).to(self.means.dtype) * live[:, None, :, None]
        return torch.einsum("bhtc,bhtd->hcd", near, x.to(self.means.dtype)), near.sum((0, 2))[..., None]

    def _move(self, to: Tensor) -> None:
        self.means.copy_(F.normalize(to, dim=-1))


def _wide(dtype: torch.dtype | None) -> torch.dtype:
    return torch.promote_types(torch.get_default_dtype() if dtype is None else dtype, torch.float32)
