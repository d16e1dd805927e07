"""RSC (2210.10737): the gradient of a sparse product from the column-row pairs that weigh most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gossamer.training.sampled import (
    Sample,
    check,
    cut,
    pair_scores,
    product,
    row_norms,
    sample_rows,
    top_rows,
    version_of,
)

__all__ = ["RSC", "allocate"]

Allocation = Literal["greedy", "uniform"]


def allocate(
    scores: Sequence[Tensor],
    entries: Sequence[Tensor],
    widths: Sequence[int],
    budget: float,
    *,
    step: float = 0.02,
    how: Allocation = "greedy",
) -> list[int]:
    """How many rows each layer's gradient uses, so that their products cost a share of the whole ones.

    All rows at first. While ``sum_l entries of the top k_l rows * d_l`` is more than ``budget * sum_l all entries *
    d_l``, the layer that loses the least relative score by it gives up ``step`` of its rows, those of the least
    scores (2210.10737, algorithm 1). ``"uniform"``, which that is compared with, has all layers give up ``step`` of
    their rows together until the same bound holds. Greedy ones lose less where rows cost alike; the paper's
    rule does not weigh what a row costs, so that with layers of unlike widths uniform ones can lose less.

    Args:
        scores: of each layer's rows ``[n_l]``, as `pair_scores`, divided by the norms of the whole matrix and of the
            whole gradient.
        entries: of each layer's rows ``[n_l]``, in the sparse matrix.
        widths: of each layer, the columns of its gradient.
        budget: share of the multiplications, in (0, 1].
        step: share of a layer's rows, in (0, 1].

    Raises:
        ValueError: lists of different lengths, or a share out of its range.
    """
    if not 0.0 < budget <= 1.0 or not 0.0 < step <= 1.0:
        raise ValueError(f"budget and step are shares in (0, 1], got {budget} and {step}")
    if how not in ("greedy", "uniform"):
        raise ValueError(f"rows are allocated 'greedy' or 'uniform', got {how!r}")
    if not len(scores) == len(entries) == len(widths):
        raise ValueError(f"a layer has scores, entries and a width: got {len(scores)}, {len(entries)}, {len(widths)}")
    kept, sums, costs, steps = [], [], [], []
    for layer, (score, count, width) in enumerate(zip(scores, entries, widths, strict=True)):
        if score.shape != count.shape:
            raise ValueError(f"layer {layer} has {len(score)} scores and {len(count)} counts of entries")
        order = score.argsort(descending=True, stable=True)
        none = torch.zeros(1, dtype=torch.float64, device="cpu")
        sums.append(torch.cat([none, score.double()[order].cumsum(0).cpu()]))
        costs.append(torch.cat([none, (count.double()[order] * width).cumsum(0).cpu()]))
        kept.append(len(score))
        steps.append(max(1, round(step * len(score))))

    def loss(layer: int) -> float:
        return float(sums[layer][kept[layer]] - sums[layer][max(0, kept[layer] - steps[layer])])

    limit = budget * sum(float(cost[-1]) for cost in costs)
    while sum(float(cost[k]) for cost, k in zip(costs, kept, strict=True)) > limit:
        left = [layer for layer, k in enumerate(kept) if k > 0]
        for layer in left if how == "uniform" else [min(left, key=loss)]:
            kept[layer] = max(0, kept[layer] - steps[layer])
    return kept


@dataclass
class _Matrix:
    """What the exact gradient and the scores need of a matrix, while it stays as it is."""

    a: Tensor
    version: tuple[int, int]
    norms: Tensor
    entries: Tensor
    whole: Sample
    used: bool = True


@dataclass
class _Layer:
    """The product of that number in a forward pass."""

    shape: torch.Size
    width: int
    scores: Tensor | None = None
    entries: Tensor | None = None
    rows: Tensor | None = None  # that the gradient uses; all before there are any
    sampled: tuple[Tensor, tuple[int, int], Sample] | None = None


@dataclass
class RSC:
    """Sampled gradients of the sparse products of a training, exact at its end (2210.10737, section 3).

        rsc = RSC(steps=200)
        for _ in range(200):
            with rsc:
                loss = loss_of(model(x, adjacency))
            loss.backward()
            optimizer.step()
            rsc.step()

    Inside ``with`` the products of CSR matrices that have a gradient (`torch.sparse.mm`, which PyTorch Geometric's
    layers call for such an ``adj_t``, with sums and means; ``@``, `torch.mm`, `torch.matmul`) are `mm`. A layer is
    known by the number of its product in the forward pass, so each pass has the same products in the same order:
    training on the whole graph. For batches of subgraphs, keep an object for each subgraph.

    At every ``refresh``-th step gradients are exact and each layer's scores are taken; `step` then allocates rows to
    the layers, and until the next such step they, and the sampled matrices, are used again. A matrix that was changed
    or made anew is cut anew, to the same rows. From ``exact_from`` of the steps on all gradients are exact.

    Deviations: what we have of the paper does not say whether the step that takes scores is exact; here it is, so that
    the whole cost is ``budget + (1 - budget) / refresh`` of an exact gradient's before ``exact_from``. ``"uniform"``
    holds the same bound on multiplications.

    Args:
        steps: of the whole training.
        budget: of multiplications, in (0, 1], beside exact gradients.
        refresh: steps that share an allocation.
        exact_from: share of the steps after which gradients are exact; 1 for never.
        shrink: share of a layer's rows that an allocation gives up at once.
        allocation: ``"greedy"`` or ``"uniform"``.

    Raises:
        ValueError: a number out of its range.
    """

    steps: int
    budget: float = 0.1
    refresh: int = 10
    exact_from: float = 0.8
    shrink: float = 0.02
    allocation: Allocation = "greedy"
    done: int = field(default=0, init=False)  # steps
    multiplied: int = field(default=0, init=False)  # numbers, by gradients so far
    whole: int = field(default=0, init=False)  # that exact gradients would have multiplied
    samplings: int = field(default=0, init=False)  # matrices that were cut
    _layers: list[_Layer] = field(default_factory=list, init=False, repr=False)
    _next: int = field(default=0, init=False, repr=False)
    _matrices: dict[int, _Matrix] = field(default_factory=dict, init=False, repr=False)
    _modes: list[_Products] = field(default_factory=list, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.steps < 1 or self.refresh < 1:
            raise ValueError(f"steps and refresh must be at least 1, got {self.steps} and {self.refresh}")
        if not 0.0 <= self.exact_from <= 1.0:
            raise ValueError(f"exact_from is a share of the steps in [0, 1], got {self.exact_from}")
        allocate([], [], [], self.budget, step=self.shrink, how=self.allocation)  # their ranges

    @property
    def exact(self) -> bool:
        """Whether this step's gradients are exact because the end is near."""
        return self.done >= round(self.exact_from * self.steps)

    @property
    def rows(self) -> list[int]:
        """How many rows each layer's gradient uses now."""
        return [layer.shape[0] if layer.rows is None or self.exact else len(layer.rows) for layer in self._layers]

    def mm(self, a: Tensor, h: Tensor) -> Tensor:
        """``a @ h`` ``[n, d]``, exactly; the gradient of ``h`` is sampled as this step's turn is.

        Args:
            a: CSR ``[n, m]``; its values may need a gradient, which is exact.
            h: ``[m, d]``.

        Raises:
            ValueError: ``a`` is no CSR matrix that fits ``h``; or this product had another size in earlier steps.
        """
        check(a, h)
        if not (h.requires_grad and torch.is_grad_enabled()):
            return product(a, h, lambda a, grad: sample_rows(a))
        number, self._next = self._next, self._next + 1
        if number == len(self._layers):
            self._layers.append(_Layer(a.shape, h.shape[1]))
        layer = self._layers[number]
        if (layer.shape, layer.width) != (a.shape, h.shape[1]):
            raise ValueError(
                f"product {number} of the forward pass is {tuple(a.shape)} by {h.shape[1]} columns, and was "
                f"{tuple(layer.shape)} by {layer.width}: each pass must have the same products in the same order"
            )
        return product(a, h, lambda a, grad: self._sample(layer, a, grad))

    def step(self) -> None:
        """Ends a training step: after the backward pass."""
        if not self.exact and self.done % self.refresh == 0:
            self._allocate()
        self.done += 1
        self._next = 0
        self._matrices = {key: one for key, one in self._matrices.items() if one.used}
        for one in self._matrices.values():
            one.used = False

    def __enter__(self) -> RSC:
        self._next = 0
        self._modes.append(_Products(self))
        self._modes[-1].__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._modes.pop().__exit__(*error)

    def _sample(self, layer: _Layer, a: Tensor, grad: Tensor) -> Sample:
        fresh = not self.exact and (self.done % self.refresh == 0 or layer.rows is None)
        if self.exact or fresh or layer.rows is None:
            found = self._matrix(a)
            if fresh:
                # A gradient of 0 has scores of 0, not NaN.
                whole = found.norms.norm() * torch.linalg.vector_norm(grad)
                layer.scores = pair_scores(found.norms, grad) / whole.clamp(min=torch.finfo(whole.dtype).tiny)
                layer.entries = found.entries
            sample = found.whole
        else:
            known = self._known(a)  # is kept for the next refresh
            if layer.sampled is None or layer.sampled[0] is not a or layer.sampled[1] != version_of(a):
                sample = sample_rows(a, layer.rows) if known is None else cut(known.whole, layer.rows)
                layer.sampled = a, version_of(a), sample
                self.samplings += 1
            sample = layer.sampled[2]
        self.multiplied += sample.transposed.values().numel() * layer.width
        self.whole += a.values().numel() * layer.width
        return sample

    def _matrix(self, a: Tensor) -> _Matrix:
        found = self._known(a)
        if found is None:
            found = _Matrix(a, version_of(a), row_norms(a), a.crow_indices().diff(), sample_rows(a))
            self._matrices[id(a)] = found
        return found

    def _known(self, a: Tensor) -> _Matrix | None:
        found = self._matrices.get(id(a))
        if found is None or found.a is not a or found.version != version_of(a):
            return None
        found.used = True
        return found

    def _allocate(self) -> None:
        scored = [
            (layer, layer.scores, layer.entries)
            for layer in self._layers
            if layer.scores is not None and layer.entries is not None
        ]
        scores, entries = [one[1] for one in scored], [one[2] for one in scored]
        widths = [layer.width for layer, _, _ in scored]
        kept = allocate(scores, entries, widths, self.budget, step=self.shrink, how=self.allocation)
        for (layer, score, _), k in zip(scored, kept, strict=True):
            layer.rows, layer.sampled = top_rows(score, k), None


class _Products(TorchFunctionMode):
    """Hands products of CSR matrices to an `RSC`; whoever calls torch need not know of it."""

    def __init__(self, rsc: RSC) -> None:
        super().__init__()
        self.rsc = rsc

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reduce = _reduction(func, args, kwargs or {})
        if reduce is None:
            return func(*args, **(kwargs or {}))
        a, h = args[:2]
        out = self.rsc.mm(a, h)
        return out if reduce == "sum" else out / a.crow_indices().diff().clamp(min=1).to(out.dtype)[:, None]


_MULTIPLY = (torch.sparse.mm, torch.mm, torch.matmul, Tensor.mm, Tensor.matmul, Tensor.__matmul__)


def _reduction(func: Any, args: Any, kwargs: Any) -> str | None:
    """``"sum"`` or ``"mean"`` where a call is a product of a CSR and a dense matrix; None of any other."""
    if func not in _MULTIPLY or len(args) not in (2, 3) or set(kwargs) - {"reduce"}:
        return None
    a, h = args[:2]
    if not (isinstance(a, Tensor) and isinstance(h, Tensor)) or a.layout != torch.sparse_csr:
        return None
    if h.layout != torch.strided or (a.dim(), h.dim()) != (2, 2):
        return None
    reduce = kwargs.get("reduce", args[2] if len(args) == 3 else "sum")
    return reduce if reduce in ("sum", "mean") else None
