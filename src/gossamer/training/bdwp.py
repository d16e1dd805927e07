"""BDWP (2309.13015): linear layers that train with N:M-sparse weights forward and backward.

Of the three products of a linear layer's training step two have the weight in them, and hardware that skips zeros needs
those zeros in groups along the dimension that a product sums over: the inputs going forward, the outputs going back.
One weight therefore has two masks, each with the N largest of M. This is a reference: masks are multiplied in, every
product is computed whole, and nothing is faster than `nn.Linear`; `count_macs` says what hardware would compute.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from gossamer.compressed import Pattern, SparseLinear

__all__ = ["BDWPLinear", "Macs", "bdwp", "count_macs", "largest"]

Backward = Literal["bdwp", "dense", "shared"]


def largest(weight: Tensor, pattern: Pattern | str, dim: int = -1) -> Tensor:
    """Which are the N largest magnitudes of each M consecutive numbers along ``dim``; of equal ones the first.

    Args:
        weight: of any shape.
        pattern: N:M, such as ``"2:8"``.

    Returns:
        bool, as the weight; exactly N of each M.

    Raises:
        ValueError: M does not divide that dimension, or the pattern is no N:M.
    """
    pattern = _parsed(pattern)
    groups = weight.detach().abs().movedim(dim, -1)
    if groups.shape[-1] % pattern.of:
        raise ValueError(
            f"{pattern} needs groups of {pattern.of}, and {pattern.of} does not divide {groups.shape[-1]}: dimension "
            f"{dim} of {list(weight.shape)}. Choose another pattern, or leave this layer dense"
        )
    groups = groups.unflatten(-1, (-1, pattern.of))
    first = groups.argsort(dim=-1, descending=True, stable=True)[..., : pattern.keep]
    kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, first, True)
    return kept.flatten(-2).movedim(-1, dim)


def _parsed(pattern: Pattern | str) -> Pattern:
    found = pattern if isinstance(pattern, Pattern) else Pattern.parse(pattern)
    if not found.of:
        raise ValueError(f"a pattern is N:M here, such as 2:8; got {pattern!r}")
    return found


class _Products(torch.autograd.Function):
    """The three products of a training step, each with the weight as it is meant to be there."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, ahead: Tensor, back: Any, decay: float
    ) -> Tensor:
        ctx.save_for_backward(x, weight, ahead, back)
        ctx.decay = decay
        return F.linear(x, weight.masked_fill(~ahead, 0.0), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, ahead, back = ctx.saved_tensors
        (grad,) = grads
        rows = grad.reshape(-1, grad.shape[-1])
        of_x = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_x = grad @ (weight if back is None else weight.masked_fill(~back, 0.0))
        if ctx.needs_input_grad[1]:
            of_weight = rows.T @ x.reshape(-1, x.shape[-1])
            if ctx.decay:
                of_weight = of_weight + ctx.decay * weight.masked_fill(ahead, 0.0)
        if ctx.needs_input_grad[2]:
            of_bias = rows.sum(0)
        return of_x, of_weight, of_bias, None, None, None


class BDWPLinear(nn.Linear):
    """`nn.Linear` whose products with the weight have N of each M weights; its parameter is the dense weight.

    With ``W [out, in]``, ``F`` its N largest of each M along the inputs and ``B`` those along the outputs, both chosen
    anew at each call::

        y = x F^T + b       dx = dy B       dW = dy^T x       db = sum dy

    ``dW`` is dense and is what the optimiser gets for the dense weight, though that did not stand in the product
    (straight-through). It is not the derivative of the output by W; nor is ``dx`` the one by x, but for ``"shared"``.

    Args:
        pattern: N:M; the paper's default is 2:8.
        backward: what ``dx`` is made with. ``"bdwp"``: B. ``"dense"``: the dense weight, so that only the forward
            product is sparse. ``"shared"``: F, one mask for both; this is what autograd makes of a masked weight, and
            SR-STE (2102.04010) trains so. Its zeros lie in no groups along the outputs, over which ``dx`` sums.
        decay: SR-STE's lambda; adds ``decay * W`` of the weights that are not in F to ``dW``, which draws them to 0;
            2e-4 there. It is added before the optimiser scales gradients, as there. The text of BDWP that we have does
            not say whether BDWP has it: by default it is 0.

    Raises:
        ValueError: M does not divide the inputs, or, of ``"bdwp"``, the outputs; another option is not one of these.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        pattern: Pattern | str = "2:8",
        backward: Backward = "bdwp",
        decay: float = 0.0,
    ) -> None:
        pattern = _checked(pattern, backward, decay)
        _check_sizes(pattern, backward, in_features, out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.pattern, self.backward_weight, self.decay = pattern, backward, decay

    @classmethod
    def of(
        cls, linear: nn.Linear, pattern: Pattern | str = "2:8", *, backward: Backward = "bdwp", decay: float = 0.0
    ) -> BDWPLinear:
        """In place of a linear layer, whose parameters become this one's: optimisers that know them still do."""
        options: dict[str, Any] = {"pattern": pattern, "backward": backward, "decay": decay}
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, "meta", **options)
        new.weight, new.bias = linear.weight, linear.bias
        return new.train(linear.training)

    def forward(self, input: Tensor) -> Tensor:
        """``[..., out]`` of ``[..., in]``; under autocast in its dtype, masks by the weight as it is kept.

        Raises:
            RuntimeError: its gradient is to be differentiated once more.
        """
        ahead = largest(self.weight, self.pattern, 1)
        back = {"bdwp": None, "dense": None, "shared": ahead}[self.backward_weight]
        if self.backward_weight == "bdwp":
            back = largest(self.weight, self.pattern, 0)
        x, weight, bias = input, self.weight, self.bias
        device = x.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        out: Any = _Products.apply(x, weight, bias, ahead, back, self.decay)
        return out

    @torch.no_grad()
    def sparse(self) -> SparseLinear:
        """What it computes forward, stored as a pruned layer is."""
        return SparseLinear.of(self.weight.masked_fill(~largest(self.weight, self.pattern, 1), 0.0), self.bias)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, pattern={self.pattern}, backward={self.backward_weight}, decay={self.decay:g}"


def _checked(pattern: Pattern | str, backward: str, decay: float) -> Pattern:
    if backward not in get_args(Backward):
        raise ValueError(f"backward must be one of {', '.join(get_args(Backward))}; got {backward!r}")
    if not 0.0 <= decay < float("inf"):
        raise ValueError(f"decay must be 0 or more, and finite; got {decay}")
    return _parsed(pattern)


def _check_sizes(pattern: Pattern, backward: str, in_features: int, out_features: int, name: str = "the layer") -> None:
    sizes = {"inputs": in_features} | ({"outputs": out_features} if backward == "bdwp" else {})
    for what, size in sizes.items():
        if size % pattern.of:
            raise ValueError(
                f"{pattern} needs {what} in multiples of {pattern.of}, and {name} has {size}: choose another pattern, "
                "or leave this layer dense"
            )


def bdwp(
    model: nn.Module,
    pattern: Pattern | str = "2:8",
    *,
    backward: Backward = "bdwp",
    decay: float = 0.0,
    only: Callable[[str, nn.Linear], bool] = lambda name, linear: True,
) -> list[str]:
    """Replace the linear layers inside a model by `BDWPLinear`, in place; parameters stay the same objects.

    Layers of classes derived from `nn.Linear` are somebody's own and stay; a layer that stands at several places
    remains one.

    Args:
        only: which layers, by name and layer; others stay dense.

    Returns:
        The names of the layers that were replaced.

    Raises:
        ValueError: as `BDWPLinear`, of the first layer that does not fit; or no layer is left. The model is as it was.
    """
    found = _checked(pattern, backward, decay)
    linears = {
        name: module
        for name, module in model.named_modules(remove_duplicate=False)
        if type(module) is nn.Linear and name and only(name, module)
    }
    if not linears:
        raise ValueError(f"{type(model).__name__} has no linear layer inside that is to be replaced")
    for name, linear in linears.items():
        _check_sizes(found, backward, linear.in_features, linear.out_features, name)
    made = {linear: BDWPLinear.of(linear, found, backward=backward, decay=decay) for linear in linears.values()}
    for name, linear in linears.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, made[linear])
    return list(linears)


@dataclass(frozen=True)
class Macs:
    """Multiply-adds of linear layers in a training step, two floating-point operations each.

    Fields:
        forward, to_inputs, to_weights: of ``y``, of ``dx`` and of ``dW``.
    """

    forward: int
    to_inputs: int
    to_weights: int

    @property
    def total(self) -> int:
        return self.forward + self.to_inputs + self.to_weights


def count_macs(model: nn.Module, tokens: int, pattern: Pattern | str | None = None) -> dict[str, Macs]:
    """What the linear layers of a model would multiply in a step if zeros of weights were skipped.

    Plain linear layers count whole in each; choosing the N of M, attention, norms and what is no linear layer do not
    count. ``dx`` of a first layer, whose inputs need no gradient, is counted as that of others.

    Args:
        tokens: rows that go through each layer.
        pattern: in place of the layers' own.

    Returns:
        by name: ``dense``; ``forward``, where only y has N of M; ``bdwp``, where dx has too. One shared mask has the
        numbers of ``bdwp`` where hardware can skip zeros that lie in no groups, of ``forward`` where it cannot.

    Raises:
        ValueError: the pattern is no N:M.
    """
    given = None if pattern is None else _parsed(pattern)
    whole = kept = 0
    for module in model.modules():
        if not isinstance(module, nn.Linear):
            continue
        macs = module.in_features * module.out_features * tokens
        own = (given or module.pattern) if isinstance(module, BDWPLinear) else None
        whole += macs
        kept += macs if own is None else macs * own.keep // own.of
    return {
        "dense": Macs(whole, whole, whole),
        "forward": Macs(kept, whole, whole),
        "bdwp": Macs(kept, kept, whole),
    }
