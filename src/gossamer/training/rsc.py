"""RSC (2210.10737): the gradient of a sparse product from the column-row pairs that weigh most."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode

__all__ = ["RSC", "allocate", "topk_mm"]

Allocation = Literal["greedy", "uniform"]
_ENTRIES = 1 << 22  # numbers gathered at once for the gradient of a matrix's values


class Sample(NamedTuple):
    """Rows of a matrix ``[n, m]``, ascending, and the matrix of those rows transposed, CSR ``[m, k]``."""

    rows: Tensor
    transposed: Tensor


def topk_mm(a: Tensor, h: Tensor, k: int) -> Tensor:
    """``a @ h``, exactly, with an approximate gradient of ``h``.

    Of ``a.T @ grad``, a sum of outer products of ``a``'s rows with the gradient's, the ``k`` with the largest
    ``||a[i]|| * ||grad[i]||`` are summed up (2210.10737, section 3.1). The gradient of ``a``'s values is exact.

    Args:
        a: CSR ``[n, m]``.
        h: ``[m, d]``, of the same dtype.
        k: rows of ``a`` that the gradient uses; ``n`` makes it exact.

    Raises:
        ValueError: ``k`` is not in 0 .. n, or ``a`` is no CSR matrix whose size fits ``h``'s.
    """
    _check(a, h)
    if not 0 <= k <= a.shape[0]:
        raise ValueError(f"k must be one of 0 .. {a.shape[0]}, the rows of the sparse matrix; got {k}")
    return _product(a, h, lambda a, grad: sample_rows(a, top_rows(pair_scores(row_norms(a), grad), k)))


def row_norms(a: Tensor) -> Tensor:
    """Of a CSR matrix, ``[n]``."""
    values = a.values()
    squares = torch.zeros(a.shape[0], dtype=values.dtype, device=values.device)
    return squares.index_add_(0, _row_of_entry(a), values.square()).sqrt_()


def pair_scores(norms: Tensor, grad: Tensor) -> Tensor:
    """``||a[i]|| * ||grad[i]||`` of each row, ``[n]``."""
    return norms * torch.linalg.vector_norm(grad, dim=1)


def top_rows(scores: Tensor, k: int) -> Tensor:
    """The ``k`` rows of the largest scores, ascending; of equal ones the first."""
    return scores.argsort(descending=True, stable=True)[:k].sort().values


def sample_rows(a: Tensor, rows: Tensor | None = None) -> Sample:
    """Some rows of a CSR matrix, all by default."""
    n, m = a.shape
    columns, values, row = a.col_indices(), a.values().detach(), _row_of_entry(a)
    if rows is None:
        rows = torch.arange(n, device=row.device)
    else:
        place = torch.full((n,), -1, dtype=torch.int64, device=row.device)
        place[rows] = torch.arange(len(rows), device=row.device)
        row = place[row]
        kept = row >= 0
        row, columns, values = row[kept], columns[kept], values[kept]
    order = columns.argsort(stable=True)
    starts = torch.zeros(m + 1, dtype=columns.dtype, device=row.device)
    starts[1:] = torch.bincount(columns, minlength=m).cumsum(0)
    entries = starts, row[order].to(columns.dtype), values[order]
    return Sample(
        rows, torch.sparse_csr_tensor(*entries, size=(m, len(rows)), device=row.device, check_invariants=False)
    )


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
        return self.done >= self.exact_from * self.steps

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
        _check(a, h)
        if not (h.requires_grad and torch.is_grad_enabled()):
            return _product(a, h, lambda a, grad: sample_rows(a))
        number, self._next = self._next, self._next + 1
        if number == len(self._layers):
            self._layers.append(_Layer(a.shape, h.shape[1]))
        layer = self._layers[number]
        if (layer.shape, layer.width) != (a.shape, h.shape[1]):
            raise ValueError(
                f"product {number} of the forward pass is {tuple(a.shape)} by {h.shape[1]} columns, and was "
                f"{tuple(layer.shape)} by {layer.width}: each pass must have the same products in the same order"
            )
        return _product(a, h, lambda a, grad: self._sample(layer, a, grad))

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
            if layer.sampled is None or layer.sampled[0] is not a or layer.sampled[1] != _version(a):
                layer.sampled = a, _version(a), sample_rows(a, layer.rows)
                self.samplings += 1
            sample = layer.sampled[2]
        self.multiplied += sample.transposed.values().numel() * layer.width
        self.whole += a.values().numel() * layer.width
        return sample

    def _matrix(self, a: Tensor) -> _Matrix:
        found = self._matrices.get(id(a))
        if found is None or found.a is not a or found.version != _version(a):
            found = _Matrix(a, _version(a), row_norms(a), a.crow_indices().diff(), sample_rows(a))
            self._matrices[id(a)] = found
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


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, a: Tensor, h: Tensor, sampler: Callable[[Tensor, Tensor], Sample]) -> Tensor:
        ctx.sampler, ctx.a = sampler, a
        ctx.version = _version(a)
        ctx.save_for_backward(h if ctx.needs_input_grad[0] else None)
        return torch.sparse.mm(a, h)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a = ctx.a
        if _version(a) != ctx.version:
            raise RuntimeError("the sparse matrix of a product was changed in place before its backward pass")
        (h,) = ctx.saved_tensors
        grad_a = None if h is None else _at_entries(a, grad, h)
        if not ctx.needs_input_grad[1]:
            return grad_a, None, None
        sample = ctx.sampler(a, grad)
        if not sample.transposed.values().numel():
            return grad_a, torch.zeros(a.shape[1], grad.shape[1], dtype=grad.dtype, device=grad.device), None
        taken = grad if len(sample.rows) == len(grad) else grad.index_select(0, sample.rows)
        return grad_a, torch.sparse.mm(sample.transposed, taken), None


def _product(a: Tensor, h: Tensor, sampler: Callable[[Tensor, Tensor], Sample]) -> Tensor:
    return cast("Tensor", _Product.apply(a, h, sampler))


def _at_entries(a: Tensor, grad: Tensor, h: Tensor) -> Tensor:
    """``grad @ h.T`` where ``a`` has entries, as a CSR matrix."""
    row, columns = _row_of_entry(a), a.col_indices()
    size = max(1, _ENTRIES // max(1, h.shape[1]))
    parts = [(grad[r] * h[c]).sum(1) for r, c in zip(row.split(size), columns.split(size), strict=True)] or [
        torch.zeros(0, dtype=grad.dtype, device=grad.device)
    ]
    return torch.sparse_csr_tensor(
        a.crow_indices(), columns, torch.cat(parts), size=a.shape, device=grad.device, check_invariants=False
    )


def _row_of_entry(a: Tensor) -> Tensor:
    counts = a.crow_indices().diff()
    return torch.repeat_interleave(torch.arange(a.shape[0], device=counts.device), counts)


def _version(a: Tensor) -> tuple[int, int]:
    return a._version, a.values()._version


def _check(a: Tensor, h: Tensor) -> None:
    if a.layout != torch.sparse_csr or a.dim() != 2:
        raise ValueError(f"the sparse matrix must be CSR [n, m], got {a.layout} of {tuple(a.shape)}: a.to_sparse_csr()")
    if h.layout != torch.strided or h.dim() != 2 or h.shape[0] != a.shape[1]:
        raise ValueError(f"a dense matrix [{a.shape[1]}, d] fits the sparse one, got {h.layout} of {tuple(h.shape)}")
