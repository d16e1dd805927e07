"""Sparsifiner (2303.13755): a small low-rank attention predicts which tokens of an image attend which.

For each image and head (Section 3.2, and the authors' code)::

    C = softmax(W_q q (P^T W_k k)^T / sqrt(heads))      of n basis rows, for all but the class token
    predicted = C U^T                                   U [N, n], the basis

and each row attends the ``keep`` tokens with the largest predictions; the class token attends all.

- **Images are short: a ViT has 197 tokens, of which 50 scattered ones are attended. No block of keys is left out there,
  and kernels gain nothing, so that the layer is the masked-dense definition.** It counts multiplications
  (`SparsifinerAttention.multiplications`), not seconds. `plan_of_connections` is the same selection as a plan, for
  kernels and longer images.
- Two stages of distillation, from a dense teacher of the same shape. ``"reconstruct"``: attention stays dense, and
  `reconstruction_loss` draws predictions to the teacher's attention. ``"masked"``: the few largest coefficients and the
  large part of the basis are multiplied, connections are chosen, attention is masked, and `distillation_loss` trains
  the backbone. **A choice has no gradient, so that the predictor learns nothing in the second stage.** The code's
  self-distillation, which would teach it, is switched off by its defaults, and left out here.
- The logits of the coefficients are divided by the root of the number of heads, as in the code, not of channels.
- Pruned tokens (`prune_tokens`) are attended by nobody here. In the code the class token still gives them weight, and
  the number that a row keeps shrinks for good once a call had fewer tokens.
- Of equal predictions the earlier token is taken; the code leaves it open. A thresholded basis gives many zeros.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.modules.tokens import Factory, Heads
from gossamer.plan import Extent, SparsePlan, starts_of

__all__ = [
    "Connections",
    "ConnectivityPredictor",
    "SparsifinerAttention",
    "Stage",
    "distillation_loss",
    "plan_of_connections",
    "prune_tokens",
    "reconstruction_loss",
    "set_stage",
]

Stage = Literal["dense", "reconstruct", "masked"]
_STAGES = ("dense", "reconstruct", "masked")
_NONE = float("-inf")


class Connections(NamedTuple):
    """What a layer saw and chose.

    Fields:
        attention: weights ``[B, H, N, N]`` that it used.
        predicted: ``[B, H, N - 1, N]``, without the class token's row; None in stage ``"dense"``.
        chosen: bool ``[B, H, N, N]``; None but in stage ``"masked"``.
    """

    attention: Tensor
    predicted: Tensor | None
    chosen: Tensor | None


class ConnectivityPredictor(nn.Module):
    """Predicts attention of ``[B, H, N, D]``; the same weights for all heads.

    Args:
        tokens: N, the class token included, which is the first.
        heads, head_dim: H and D.
        keep: share of the tokens that a row attends, rounded up (0.25); None: those predicted above ``least``.
        rank: n, rows of the basis; N // 6 unless given (the code's default; its class has N // 8).
        reduce: queries and keys have D // reduce channels (2).
        coefficients: of a row, the largest so many count once connections are chosen (8).
        threshold: entries of the basis at most this far from 0 count as 0 then (0.02), and all others by their size.
        least: see ``keep`` (1e-4).
        shared: whether the basis is P itself.

    Raises:
        ValueError: a number out of range.
    """

    def __init__(
        self,
        tokens: int,
        heads: int,
        head_dim: int,
        *,
        keep: float | None = 0.25,
        rank: int | None = None,
        reduce: int = 2,
        coefficients: int = 8,
        threshold: float = 0.02,
        least: float = 1e-4,
        shared: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        rank = tokens // 6 if rank is None else rank
        if keep is not None and not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be above 0 and at most 1, a share of the tokens, or None, got {keep}")
        for name, value in (("rank", rank), ("head_dim // reduce", head_dim // reduce), ("coefficients", coefficients)):
            if value < 1:
                raise ValueError(f"{name} must be 1 or more, got {value}")
        self.tokens, self.least, self.threshold = tokens, least, threshold
        self.keep = None if keep is None else math.ceil(keep * tokens)
        self.coefficients, self.scale = min(coefficients, rank), heads**-0.5
        factory: Factory = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(head_dim, head_dim // reduce, **factory)
        self.k_proj = nn.Linear(head_dim, head_dim // reduce, **factory)
        self.down = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank, device=device, dtype=dtype), std=0.02))
        self.basis = (
            self.down
            if shared
            else nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, rank, device=device, dtype=dtype), std=0.02))
        )

    def weigh(self, q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
        """Coefficients of the basis, ``[B, H, N - 1, n]``; keys that are not live, bool ``[B, N]``, count as 0."""
        q, k = self.q_proj(q[..., 1:, :]), self.k_proj(k)
        if live is not None:
            k = k.masked_fill(~live[:, None, :, None], 0)
        return (q @ (k.transpose(-1, -2) @ self.down) * self.scale).softmax(-1)

    def reconstruct(self, q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
        """The whole prediction ``[B, H, N - 1, N]``, with its gradient to queries and keys too: the first stage."""
        return self.weigh(q, k, live) @ self.basis.T

    @torch.no_grad()
    def predict(self, q: Tensor, k: Tensor, live: Tensor | None = None) -> Tensor:
        """A sparse product, ``[B, H, N - 1, N]``: the largest coefficients, and what is left of the basis."""
        weights = self.weigh(q, k, live)
        order = weights.argsort(dim=-1, descending=True, stable=True)[..., : self.coefficients]
        few = torch.zeros_like(weights).scatter(-1, order, weights.gather(-1, order))
        return few @ self.thresholded().T

    def thresholded(self) -> Tensor:
        """The basis as `predict` has it, ``[N, n]``."""
        return F.threshold(self.basis.detach().abs(), self.threshold, 0.0)

    @torch.no_grad()
    def choose(self, predicted: Tensor, live: Tensor | None = None) -> Tensor:
        """Which tokens each attends, bool ``[B, H, N, N]``: the class token all of them."""
        if self.keep is None:
            chosen = predicted > self.least
        else:
            scores = predicted if live is None else predicted.masked_fill(~live[:, None, None], _NONE)
            order = scores.argsort(dim=-1, descending=True, stable=True)[..., : self.keep]
            chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)
        chosen = F.pad(chosen, (0, 0, 1, 0), value=True)
        return chosen if live is None else chosen & live[:, None, None] & live[:, None, :, None]


class SparsifinerAttention(nn.Module):
    """A layer of Sparsifiner. With its ``predictor``'s weights apart, it is the attention of a ViT.

    Args:
        width, heads: E and H.
        tokens: N, the class token included.
        bias: of the projections.
        stage: ``"dense"``, ``"reconstruct"`` or ``"masked"``; see the module, and `set_stage`.
        others: as `ConnectivityPredictor`.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        tokens: int = 197,
        *,
        keep: float | None = 0.25,
        rank: int | None = None,
        reduce: int = 2,
        coefficients: int = 8,
        threshold: float = 0.02,
        least: float = 1e-4,
        shared: bool = False,
        bias: bool = True,
        stage: Stage = "masked",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if stage not in _STAGES:
            raise ValueError(f"stage must be one of {', '.join(_STAGES)}, got {stage!r}")
        factory: Factory = {"device": device, "dtype": dtype}
        self.projections = Heads(width, heads, bias=bias, **factory)
        self.predictor = ConnectivityPredictor(
            tokens,
            heads,
            width // heads,
            keep=keep,
            rank=rank,
            reduce=reduce,
            coefficients=coefficients,
            threshold=threshold,
            least=least,
            shared=shared,
            **factory,
        )
        self.stage: Stage = stage

    def forward(
        self, x: Tensor, mask: Tensor | None = None, record: Callable[[Connections], object] | None = None
    ) -> Tensor:
        """``[B, N, E]`` to the same.

        Args:
            mask: bool ``[B, N]``, the tokens that were not pruned; it may have holes. Pruned ones give 0.
            record: is called with `Connections`, for losses and pictures.

        Raises:
            ValueError: other tokens than the predictor's N, or a mask of another shape or without class token.
        """
        predictor, shape = self.predictor, (x.shape[0], self.predictor.tokens)
        if x.ndim != 3 or x.shape[:2] != shape:
            raise ValueError(f"x must be [batch, {shape[1]}, width], got shape {tuple(x.shape)}")
        if mask is not None and (mask.shape != shape or mask.dtype != torch.bool or not bool(mask[:, 0].all())):
            raise ValueError(
                f"mask must be bool {list(shape)} with the class token in it, got {mask.dtype} {tuple(mask.shape)}"
            )
        q, k, v = self.projections.split(x)
        logits = q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5
        seen = torch.ones_like(logits, dtype=torch.bool) if mask is None else mask[:, None, None].expand_as(logits)
        predicted = chosen = None
        if self.stage == "reconstruct":
            predicted = predictor.reconstruct(q, k, mask)
        elif self.stage == "masked":
            predicted = predictor.predict(q, k, mask)
            seen = chosen = predictor.choose(predicted, mask)
        empty = ~seen.any(-1, keepdim=True)
        attention = logits.masked_fill(~seen, _NONE).masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
        if record is not None:
            record(Connections(attention, predicted, chosen))
        out = self.projections.merge(attention @ v)
        return out if mask is None else out.masked_fill(~mask[..., None], 0)

    def multiplications(self) -> dict[str, float]:
        """Of one image: ``dense`` attention, ``masked`` attention, and its ``predictor``, projections not counted.

        As a machine that multiplies connections alone would do it. The sparse product is counted by what is left of
        the basis, all of its rows being taken equally often; without ``keep`` masked attention is unknown, NaN.
        """
        predictor, heads = self.predictor, self.projections.heads
        tokens, rank = predictor.basis.shape
        width = self.projections.q_proj.out_features
        low = heads * predictor.q_proj.out_features
        kept = math.nan if predictor.keep is None else tokens + (tokens - 1) * predictor.keep
        left = int((predictor.thresholded() > 0).sum()) / rank  # of a row of the basis
        reduced = 2 * tokens * low * (width // heads) + 2 * tokens * low * rank
        return {
            "dense": 2.0 * tokens * tokens * width,
            "masked": 2.0 * kept * width,
            "predictor": reduced + heads * (tokens - 1) * predictor.coefficients * left,
        }


def set_stage(model: nn.Module, stage: Stage) -> None:
    """Puts every `SparsifinerAttention` of a model into a stage.

    Raises:
        ValueError: the stage is not known, or the model has no such layer.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, SparsifinerAttention)]
    if stage not in _STAGES or not layers:
        raise ValueError(f"expected one of {', '.join(_STAGES)} and a model with layers, got {stage!r}, {len(layers)}")
    for layer in layers:
        layer.stage = stage


def plan_of_connections(chosen: Tensor) -> SparsePlan:
    """Connections, bool ``[B, H, N, N]``, as columns of each token by itself: exact, and 4 bytes each."""
    batch, heads, tokens = chosen.shape[:3]
    return SparsePlan(
        heads=heads,
        query_len=tokens,
        key_len=tokens,
        extent=Extent.full(batch, tokens, tokens, causal=False),
        block_q=1,
        column_group=1,
        column_indptr=starts_of(chosen.sum(-1).flatten()),
        column_indices=chosen.nonzero()[:, 3].to(torch.int32),
    )


def prune_tokens(attention: Tensor, keep: int, live: Tensor | None = None) -> Tensor:
    """The class token and the ``keep`` tokens to which it gives most weight, by the mean of heads: bool ``[B, N]``.

    Args:
        attention: ``[B, H, N, N]``.
        live: bool ``[B, N]``, those not pruned before.
    """
    weight = attention[:, :, 0, 1:].detach().mean(1)
    if live is not None:
        weight = weight.masked_fill(~live[:, 1:], _NONE)
    order = weight.argsort(dim=-1, descending=True, stable=True)[:, :keep]
    kept = torch.zeros_like(weight, dtype=torch.bool).scatter(1, order, True) & (weight > _NONE)
    return F.pad(kept, (1, 0), value=True)


def reconstruction_loss(student: Sequence[Connections], teacher: Sequence[Connections], weight: float = 0.01) -> Tensor:
    """First stage, to be added to the task's loss: ``weight`` times the squared errors of predictions, summed.

    Over images, heads and pairs, as the authors sum them, so that it grows with the batch; the mean of layers.

    Raises:
        ValueError: layers are not as many, or a student's has no prediction.
    """
    if len(student) != len(teacher) or not student:
        raise ValueError(f"expected as many layers of both, at least one, got {len(student)} and {len(teacher)}")
    errors: list[Tensor] = []
    for own, other in zip(student, teacher, strict=True):
        if own.predicted is None:
            raise ValueError("a layer has no prediction; set_stage(student, 'reconstruct') before its forward pass")
        errors.append((own.predicted - other.attention[..., 1:, :].detach()).square().sum())
    return weight * torch.stack(errors).mean()


def distillation_loss(
    logits: Tensor,
    tokens: Tensor,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    labels: Tensor,
    *,
    of_logits: float = 0.5,
    of_tokens: float = 0.5,
    live: Tensor | None = None,
) -> Tensor:
    """Second stage: cross-entropy, KL divergence from the teacher's classes, and squared error of the last tokens.

    Args:
        logits, teacher_logits: ``[B, classes]``; tokens, teacher_tokens: ``[B, N - 1, E]``, without class token.
        labels: int64 ``[B]``.
        live: bool ``[B, N - 1]``, tokens that were not pruned: those alone are compared.
    """
    chances, wanted = logits.log_softmax(-1), teacher_logits.detach().log_softmax(-1)
    kl = F.kl_div(chances, wanted, reduction="batchmean", log_target=True)
    own, other = (tokens, teacher_tokens) if live is None else (tokens[live], teacher_tokens[live])
    return F.cross_entropy(logits, labels) + of_logits * kl + of_tokens * F.mse_loss(own, other.detach())
