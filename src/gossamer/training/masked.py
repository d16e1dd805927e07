"""Training a pruned model on with its zeros kept, and the model that it was made from as its teacher.

Sparse Llama (2405.03594) prunes by SparseGPT, trains on with the mask fixed, and fine-tunes with distillation layer by
layer. Here only the weights that pruning kept are trained, and their layers' biases; embeddings, norms and head stay.
Products are computed whole, with zeros in them: nothing is faster than training the dense model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gossamer.compressed.packed import SparseLinear, bits_of, bools_of

__all__ = ["MaskedLinear", "distillation_loss", "pack", "recover", "unpack"]

_CLIP = 1.0  # largest norm of a gradient
_RATE = 1e-4
_Layer = TypeVar("_Layer", bound=nn.Module)


class MaskedLinear(nn.Module):
    """``x (W * mask)^T + b`` with a mask that stays; W and b are fp32, products are in the inputs' dtype.

    The gradient of a weight outside the mask is 0, whatever reaches the layer, so that one that begins as 0 is 0 after
    any step of an optimiser whose update of a 0 without a gradient is 0: SGD with momentum, Adam, AdamW with decay.

    Args:
        weight: ``[out, in]``; what the mask leaves out becomes 0.
        mask: bool ``[out, in]``.
        dtype: of the pruned layer that this becomes again.

    Raises:
        ValueError: another shape of the mask.
    """

    mask: Tensor

    def __init__(self, weight: Tensor, mask: Tensor, bias: Tensor | None = None, dtype: torch.dtype | None = None):
        super().__init__()
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"the mask of a weight {list(weight.shape)} is bool of that shape; got {mask.dtype} {list(mask.shape)}"
            )
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype if dtype is None else dtype
        self.weight = nn.Parameter(weight.detach().float().masked_fill(~mask, 0.0))
        self.bias = None if bias is None else nn.Parameter(bias.detach().float().clone())
        self.register_buffer("mask", mask)

    @classmethod
    def of(cls, layer: SparseLinear) -> MaskedLinear:
        """Of a pruned layer, on its device."""
        if layer.scale is not None:
            raise ValueError("pruned layers in int8 cannot be trained: compress with bits=None, and round afterwards")
        mask = bools_of(layer.bitmap, layer.in_features)
        new = cls(layer.weight, mask, layer.bias, layer.dtype)
        return new.train(layer.training)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., out]`` of inputs ``[..., in]``."""
        # Not a product: of a weight that is left out neither NaN nor infinity is let through.
        weight = self.weight.masked_fill(~self.mask, 0.0).to(x.dtype)
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))

    @torch.no_grad()
    def packed(self) -> SparseLinear:
        """The pruned layer with these values: its zeros are those of the mask, also where a kept weight became 0.

        Raises:
            ValueError: a value is not finite in the layer's dtype.
        """
        values = self.weight[self.mask].to(self.dtype)
        bias = None if self.bias is None else self.bias.to(self.dtype)
        if not bool(values.isfinite().all()) or not (bias is None or bool(bias.isfinite().all())):
            raise ValueError(f"trained weights are not finite in {self.dtype}: lower the rate")
        starts = F.pad(self.mask.sum(1).cumsum(0), (1, 0))
        new = SparseLinear(self.in_features, bits_of(self.mask), values, starts, bias)
        return new.train(self.training)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, kept={float(self.mask.float().mean()):.3f}"


def unpack(model: nn.Module) -> dict[str, MaskedLinear]:
    """Replace the pruned layers of a model by `MaskedLinear`, in place.

    Returns:
        The new layers by name; their parameters are what there is to train.

    Raises:
        ValueError: there are none.
    """
    found = _layers(model, SparseLinear)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no pruned layers: gossamer.compress(model, 'sparsegpt', samples) makes them"
        )
    made = {layer: MaskedLinear.of(layer) for layer in found.values()}  # one that stands at several places is one
    new = {name: made[layer] for name, layer in found.items()}
    _put(model, new)
    return new


def pack(model: nn.Module) -> dict[str, SparseLinear]:
    """Inverse of `unpack`, in place, with the same zeros.

    Returns:
        The pruned layers by name.

    Raises:
        ValueError: weights are not finite in the dtype of the pruned layers. The model is as it was.
    """
    found = _layers(model, MaskedLinear)
    made = {layer: layer.packed() for layer in found.values()}
    new = {name: made[layer] for name, layer in found.items()}
    _put(model, new)
    return new


def distillation_loss(
    student: Any,
    teacher: Any,
    ids: Tensor,
    *,
    temperature: float = 1.0,
    text: float = 0.0,
    logits: float = 1.0,
    hidden: float = 1.0,
) -> Tensor:
    """What a student of transformers' form has to learn of a teacher on token ids ``[B, T]``, a number in nats.

    ``text`` times the surprise at the next token, plus ``logits`` times ``temperature^2 KL(teacher || student)`` of the
    softened predictions, plus ``hidden`` times the mean over layers of ``|h_s - h_t|^2 / |h_t|^2``, where h are the
    states that decoder layers give, all tokens together, the last ones after the model's norm (SquareHead, 2310.06927).
    Sparse Llama distils layer by layer with SquareHead, and gives no formula in the text that we have: these weights,
    and the means over layers and over the tokens of a batch, are ours.

    Args:
        student, teacher: models that take ``input_ids`` and give logits ``[B, T, V]`` and hidden states, of one
            vocabulary and, where ``hidden`` is above 0, of as many layers of one width. The teacher gets no gradient.
        ids: without padding.

    Raises:
        ValueError: models that do not fit each other; a weight below 0, none above; a temperature of 0 or less.
    """
    _check_weights(temperature, text, logits, hidden)
    asked: dict[str, Any] = {"use_cache": False, "output_hidden_states": hidden > 0}
    mine = student(input_ids=ids.to(student.device), **asked)
    own = mine.logits.float()
    loss = own.new_zeros(())
    if text:
        loss = loss + text * F.cross_entropy(own[:, :-1].flatten(0, 1), ids[:, 1:].flatten().to(own.device))
    if not (logits or hidden):
        return loss
    with torch.no_grad():
        theirs = teacher(input_ids=ids.to(teacher.device), **asked)
    if logits:
        wanted = theirs.logits.to(own.device).float()
        if wanted.shape != own.shape:
            raise ValueError(
                f"student and teacher predict {list(own.shape)} and {list(wanted.shape)}: another vocabulary"
            )
        soft = (wanted / temperature).log_softmax(-1).flatten(0, -2)
        kl = F.kl_div((own / temperature).log_softmax(-1).flatten(0, -2), soft, reduction="batchmean", log_target=True)
        loss = loss + logits * temperature**2 * kl
    if hidden:
        loss = loss + hidden * _square_head(mine.hidden_states[1:], theirs.hidden_states[1:])
    return loss


def _square_head(mine: tuple[Tensor, ...], theirs: tuple[Tensor, ...]) -> Tensor:
    """Mean over layers of the squared distance over the teacher's square."""
    shapes = [[tuple(x.shape) for x in states] for states in (mine, theirs)]
    if shapes[0] != shapes[1]:
        said = " and ".join(f"{len(states)} of {list(states[0])}" for states in shapes)
        raise ValueError(f"student and teacher have other hidden states, {said}: distil their logits alone, hidden=0")
    losses = []
    for own, wanted in zip(mine, theirs, strict=True):
        goal = wanted.to(own.device).float()
        losses.append((own.float() - goal).square().sum() / goal.square().sum())
    return torch.stack(losses).mean()


def _check_weights(temperature: float, text: float, logits: float, hidden: float) -> None:
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    weights = {"text": text, "logits": logits, "hidden": hidden}
    if any(not 0 <= value < math.inf for value in weights.values()) or not any(weights.values()):
        raise ValueError(f"weights of a loss are 0 or more, and one is above 0; got {weights}")


def recover(
    student: Any,
    teacher: Any,
    batches: Iterable[Tensor],
    *,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer] | None = None,
    temperature: float = 1.0,
    text: float = 0.0,
    logits: float = 1.0,
    hidden: float = 1.0,
    progress: Callable[[int, float], None] = lambda step, loss: None,
) -> list[float]:
    """Train the weights that pruning kept until the model is near its teacher again; the zeros stay where they are.

    A step for each batch, with `distillation_loss`; the norm of a step's gradient is at most 1. Weights are trained in
    fp32 and then get the dtype that they had, so that a model in bfloat16 loses no small steps. Both models stay in the
    mode that they are in: one in training applies its dropout.

    Args:
        student: a model whose layers `gossamer.compress` pruned (`sparsegpt`, `magnitude`), changed in place.
        teacher: the dense model, which is not changed; None where the text alone is learned (`text` above 0, others 0).
        batches: token ids ``[B, T]`` each, without padding.
        optimizer: makes one of the parameters; AdamW without decay, of rate 1e-4, where none is given.
        temperature, text, logits, hidden: see `distillation_loss`.
        progress: told the number of each step, from 1, and its loss; a scheduler can be stepped here.

    Returns:
        The loss of each step.

    Raises:
        ValueError: no pruned layers; a teacher that shares them; a loss that is not finite; or as `distillation_loss`.
        TypeError: batches that are no token ids. Whatever is raised, the model is as it was.
    """
    _check_weights(temperature, text, logits, hidden)
    weights: dict[str, float] = {"temperature": temperature, "text": text, "logits": logits, "hidden": hidden}
    former = _layers(student, SparseLinear)
    if teacher is None and (logits or hidden):
        raise ValueError("without a teacher there is the text alone to learn: text=1.0, logits=0.0, hidden=0.0")
    if teacher is not None and set(teacher.modules()) & set(former.values()):
        raise ValueError("the teacher has the pruned layers of the student: give the model that was compressed, dense")
    if isinstance(batches, Tensor):
        raise TypeError("batches are token ids [B, T] each, in a list or what gives one after the other")
    layers = unpack(student)
    trained = list(dict.fromkeys(parameter for layer in layers.values() for parameter in layer.parameters()))
    own = set(trained)
    others = [p for p in student.parameters() if p.requires_grad and p not in own]
    losses: list[float] = []
    try:
        for parameter in others:
            parameter.requires_grad_(False)
        steps = optimizer(trained) if optimizer is not None else torch.optim.AdamW(trained, _RATE, weight_decay=0.0)
        for ids in batches:
            if not isinstance(ids, Tensor) or ids.ndim != 2 or ids.is_floating_point():
                raise TypeError(f"a batch is a tensor of token ids [B, T]; got {_said(ids)}")
            loss = distillation_loss(student, teacher, ids, **weights)
            number = float(loss.detach())
            if not math.isfinite(number):
                raise ValueError(f"the loss of step {len(losses) + 1} is {number}; lower the rate")
            steps.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, _CLIP)
            steps.step()
            losses.append(number)
            progress(len(losses), number)
        pack(student)
    except BaseException:  # nothing is half done
        _put(student, former)
        raise
    finally:
        for parameter in others:
            parameter.requires_grad_(True)
    return losses


def _said(x: object) -> str:
    return f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__


def _layers(model: nn.Module, kind: type[_Layer]) -> dict[str, _Layer]:
    found = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in found if isinstance(module, kind) and name}


def _put(model: nn.Module, layers: dict[str, Any]) -> None:
    for name, layer in layers.items():
        parent, _, own = name.rpartition(".")
        setattr(model.get_submodule(parent), own, layer)
