"""P-RGE (2409.15520): fine-tuning by forward passes only, all of a step's in one batch."""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PRGE", "estimate_gradient", "target_loss"]

Batched = Literal["all", "pair", "one"]
Loss = Callable[[Any, Mapping[str, Any]], Tensor]
_IGNORED = -100  # of labels, as in transformers


def estimate_gradient(
    loss: Callable[[list[Tensor]], float | Tensor],
    weights: Sequence[Tensor],
    queries: int = 1,
    eps: float = 1e-3,
    seed: int = 0,
) -> list[Tensor]:
    """Random gradient estimation: ``1/q sum_i [loss(w + eps z_i) - loss(w - eps z_i)] / (2 eps) z_i``.

    The ``z_i`` are standard normal: the mean over seeds tends to the gradient of a smoothed loss. Where the loss is
    linear that far, the squared cosine to a gradient of ``d`` numbers is distributed as Beta(q/2, (d - 1)/2), so that
    its mean is ``q / (q + d - 1)``.

    Args:
        loss: of weights of the same shapes; called ``2 queries`` times, without a gradient.
        weights: left as they are.
        queries: ``q``.
        seed: which ``z_i`` there are: the same on all devices.

    Raises:
        ValueError: ``queries`` below 1 or ``eps`` that is not positive.
    """
    _check(queries, eps)
    with torch.no_grad():
        found = [torch.zeros_like(w) for w in weights]
        for query in range(queries):
            z = noise((seed, query), weights)
            up, down = (
                float(loss([w + sign * eps * n for w, n in zip(weights, z, strict=True)])) for sign in (1.0, -1.0)
            )
            for g, n in zip(found, z, strict=True):
                g.add_(n, alpha=(up - down) / (2 * eps * queries))
    return found


def noise(key: tuple[int, ...], like: Sequence[Tensor]) -> list[Tensor]:
    """Standard normal numbers in the shapes of some tensors, the same for the same key on all devices."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    generator = torch.Generator(device="cpu").manual_seed(int.from_bytes(digest, "little") >> 1)
    drawn = (torch.randn(w.shape, generator=generator, dtype=torch.float32, device="cpu") for w in like)
    return [z.to(w.device, w.dtype) for z, w in zip(drawn, like, strict=True)]


def target_loss(outputs: Any, batch: Mapping[str, Any]) -> Tensor:
    """Cross-entropy of each row, ``[R]``: the mean over its own targets, so that rows count alike.

    transformers' loss is the mean over the targets of all rows; it equals the mean of these where rows have as many.

    Args:
        outputs: with ``logits`` ``[R, n, vocabulary]``, of the last ``n`` positions.
        batch: with ``labels`` ``[R, S]``, each to be predicted one position before; -100 for none. A row without
            targets has a loss of 0.
    """
    logits, labels = outputs.logits, batch["labels"][:, -outputs.logits.shape[1] :]
    found, wide = [], torch.promote_types(logits.dtype, torch.float32)
    for row, label in zip(logits[:, :-1], labels[:, 1:], strict=True):  # only a row's logits in fp32 at a time
        asked = label != _IGNORED
        total = F.cross_entropy(row[asked].to(wide), label[asked], reduction="sum")
        found.append(total / asked.sum().clamp(min=1))
    return torch.stack(found)


class StackedLoraFA:
    """What is added to a linear layer's output: ``scale * B A x``, with another ``B`` for each part of the rows.

    Fields:
        a: frozen ``[rank, in]``, random: the layer's dtype.
        b: trained ``[out, rank]``, 0 at first: fp32, or fp64 beside fp64.
        copies: None, or ``[C, out, rank]``: ``R`` rows are C parts of ``R / C`` consecutive ones, each with its own.
    """

    def __init__(self, linear: nn.Module, rank: int, scale: float, seed: int) -> None:
        weight = next((p for p in linear.parameters() if p.is_floating_point()), None)
        dtype, device = (torch.float32, None) if weight is None else (weight.dtype, weight.device)
        width_in, width_out = int(linear.in_features), int(linear.out_features)  # pyright: ignore[reportArgumentType]
        (normal,) = noise((seed,), [torch.empty(rank, width_in, device="cpu")])
        self.a = (normal / math.sqrt(width_in)).to(device, dtype)
        self.b = torch.zeros(width_out, rank, dtype=torch.promote_types(dtype, torch.float32), device=device)
        self.scale, self.copies = scale, None
        self.handle = linear.register_forward_hook(self)

    copies: Tensor | None

    def __call__(self, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> Tensor:
        low = F.linear(args[0], self.a.to(args[0].dtype)).to(self.b.dtype)
        if self.copies is None:
            added = low @ self.b.T
        else:
            if len(low) % len(self.copies):
                raise ValueError(f"{len(low)} rows are no multiple of the {len(self.copies)} copies of a layer")
            parts = low.reshape(len(self.copies), -1, low.shape[-1])
            added = parts.bmm(self.copies.mT).view(out.shape)
        return out + added.mul_(self.scale).to(out.dtype)


class PRGE:
    """Fine-tunes a model by forward passes only, in the memory that these take.

        tuner = PRGE(model, queries=4, lr=0.1)
        for batch in batches:
            tuner.step(batch)
        tuner.merge()

    Chosen linear layers get LoRA-FA: a frozen random ``A`` and a trained ``B``, which is 0 at first, so that the
    model is as before. A step estimates ``B``'s gradient from ``queries`` pairs ``B + eps z`` and ``B - eps z``
    (`estimate_gradient`), and takes ``lr`` times it from ``B``. The ``2 queries`` copies of ``B`` stand stacked in each
    layer, and the batch is repeated as often, a copy after the other: one forward pass has them all. Memory is that
    of a forward pass of ``2 queries`` times the rows; nothing is kept for a backward pass, and ``z`` is drawn again
    from its seed. Attention runs as the model runs it: sparse after `gossamer.enable`.

    Between steps the model is as trained so far: it can be evaluated, or generate. Runs under `torch.no_grad` and
    `torch.inference_mode` alike.

    Deviation: LoRA's ``A`` is uniform; here it is normal with the deviation of ``1 / sqrt(in)``.

    Args:
        model: in ``eval()``; left as it is but for the layers' outputs.
        targets: last parts of the names of linear layers.
        rank: of A and B.
        alpha: ``B A x`` counts ``alpha / rank``.
        queries: pairs a step, ``q``.
        eps: how far copies stand from ``B``.
        lr: of the descent; may be set between steps.
        batched: ``"all"`` the copies in one forward pass; ``"pair"``: a pass for each query; ``"one"``: for each copy.
        seed: of A and of all ``z``.
        loss: ``(outputs, repeated batch) -> [R]``, a loss for each row.

    Raises:
        ValueError: no layer is called so, or a number is out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        targets: Sequence[str] = ("q_proj", "v_proj"),
        *,
        rank: int = 8,
        alpha: float = 16.0,
        queries: int = 4,
        eps: float = 1e-3,
        lr: float = 1e-2,
        batched: Batched = "all",
        seed: int = 0,
        loss: Loss = target_loss,
    ) -> None:
        _check(queries, eps)
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        if batched not in ("all", "pair", "one"):
            raise ValueError(f"batched must be 'all', 'pair' or 'one', got {batched!r}")
        linear = {name: one for name, one in model.named_modules() if hasattr(one, "in_features")}
        self.layers = {name: one for name, one in linear.items() if name.rpartition(".")[2] in targets}
        if not self.layers:
            names = sorted({name.rpartition(".")[2] for name in linear})
            raise ValueError(f"no linear layer is called {' or '.join(targets)}; the model has {', '.join(names)}")
        self.model, self.queries, self.eps, self.lr = model, queries, eps, lr
        self.batched, self.seed, self.loss = batched, seed, loss
        self.steps = 0
        self.adapters = {
            name: StackedLoraFA(layer, rank, alpha / rank, int.from_bytes(_digest(seed, name), "little"))
            for name, layer in self.layers.items()
        }

    @torch.no_grad()
    def step(self, batch: Mapping[str, Any]) -> float:
        """One step of descent on a batch; returns the mean loss of the copies, which is near the loss before it.

        Args:
            batch: what the model is called with, and ``labels`` ``[b, S]`` for `target_loss`. Tensors of ``b`` rows,
                as many as its first one has, are repeated for each copy; others are handed on.

        Raises:
            ValueError: no targets; the model is in ``train()``, where dropout would differ between the two of a pair;
                a loss is not finite (nothing was changed then); or the tuner was merged or removed.
        """
        slopes, mean = self._slopes(batch)
        for g, adapter in zip(self._combined(slopes), self.adapters.values(), strict=True):
            adapter.b.sub_(g, alpha=self.lr)
        self.steps += 1
        return mean

    @torch.no_grad()
    def gradient(self, batch: Mapping[str, Any]) -> dict[str, Tensor]:
        """What the next `step` would descend along: of each layer, ``[out, rank]``."""
        slopes, _ = self._slopes(batch)
        return dict(zip(self.adapters, self._combined(slopes), strict=True))

    @torch.no_grad()
    def merge(self) -> None:
        """Adds what was trained to the layers' weights, in their dtype, and `remove`.

        Raises:
            TypeError: a layer has no floating-point weight, as compressed ones have none; nothing was changed.
        """
        self._require_attached()
        for name, layer in self.layers.items():
            weight = getattr(layer, "weight", None)
            if not (isinstance(weight, nn.Parameter) and weight.is_floating_point()):
                raise TypeError(f"{name} is a {type(layer).__name__} without a floating-point weight to merge into")
        for name, layer in self.layers.items():
            adapter, weight = self.adapters[name], layer.get_parameter("weight")
            product = adapter.b @ adapter.a.to(adapter.b.dtype)
            weight.copy_(weight.to(product.dtype) + adapter.scale * product)
        self.remove()

    def remove(self) -> None:
        """Gives the model back as it was, or as `merge` left it."""
        for adapter in self.adapters.values():
            adapter.handle.remove()
        self.adapters = {}

    def _slopes(self, batch: Mapping[str, Any]) -> tuple[list[float], float]:
        """``[loss(B + eps z) - loss(B - eps z)] / (2 eps)`` of each query, and the mean loss."""
        self._require_attached()
        if self.model.training:
            raise ValueError("call model.eval() first: dropout would differ between the two of a pair")
        if self.loss is target_loss and "labels" not in batch:
            raise ValueError(f"the batch has no labels [b, S], only {', '.join(batch)}; or give another loss")
        if self.loss is target_loss and not (batch["labels"][:, 1:] != _IGNORED).any():
            raise ValueError("no label of the batch is a target (all are -100, or the first of their rows)")
        copies = [(query, sign) for query in range(self.queries) for sign in (1.0, -1.0)]
        size = {"all": len(copies), "pair": 2, "one": 1}[self.batched]
        found = [loss for i in range(0, len(copies), size) for loss in self._losses(batch, copies[i : i + size])]
        if not all(map(math.isfinite, found)):
            raise ValueError(f"a copy's loss is not finite ({found}): take a smaller eps or lr, or look at the batch")
        pairs = zip(found[::2], found[1::2], strict=True)
        return [(up - down) / (2 * self.eps) for up, down in pairs], sum(found) / len(found)

    def _losses(self, batch: Mapping[str, Any], copies: list[tuple[int, float]]) -> list[float]:
        """Of some copies (query, sign), in one forward pass."""
        places = [adapter.b for adapter in self.adapters.values()]
        drawn = {query: noise((self.seed, self.steps, query), places) for query in dict.fromkeys(q for q, _ in copies)}
        for n, adapter in enumerate(self.adapters.values()):
            adapter.copies = torch.stack([adapter.b + sign * self.eps * drawn[query][n] for query, sign in copies])
        repeated, rows = _repeated(batch, len(copies))
        given = {name: value for name, value in repeated.items() if name != "labels"}
        try:
            losses = self.loss(self.model(**given, **self._options(repeated, given)), repeated)
        finally:
            for adapter in self.adapters.values():
                adapter.copies = None
        if losses.shape != (len(copies) * rows,):
            raise ValueError(f"the loss must be one number a row, [{len(copies) * rows}], got {tuple(losses.shape)}")
        return losses.double().view(len(copies), rows).mean(1).tolist()

    def _options(self, batch: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
        """No cache of keys, and logits from the first target on, where the model's forward knows how."""
        known, found = inspect.signature(self.model.forward).parameters, {}
        if "use_cache" in known and "use_cache" not in given:
            found["use_cache"] = False
        if self.loss is target_loss and "logits_to_keep" in known and "logits_to_keep" not in given:
            asked = (batch["labels"][:, 1:] != _IGNORED).any(0)
            found["logits_to_keep"] = batch["labels"].shape[1] - int(asked.int().argmax())
        return found

    def _combined(self, slopes: list[float]) -> list[Tensor]:
        """The mean of ``slope * z`` over the queries, a tensor for each layer."""
        places = [adapter.b for adapter in self.adapters.values()]
        found = [torch.zeros_like(b) for b in places]
        for query, slope in enumerate(slopes):
            for g, z in zip(found, noise((self.seed, self.steps, query), places), strict=True):
                g.add_(z, alpha=slope / len(slopes))
        return found

    def _require_attached(self) -> None:
        if not self.adapters:
            raise ValueError("this tuner was merged or removed: make another one")


def _repeated(batch: Mapping[str, Any], copies: int) -> tuple[dict[str, Any], int]:
    """Tensors of as many rows as the first has, so many times one after the other; and the rows of one."""
    rows = next((len(value) for value in batch.values() if isinstance(value, Tensor) and value.dim()), None)
    if rows is None:
        raise ValueError("a batch has at least one tensor [b, ...]")

    def repeat(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.dim() or len(value) != rows:
            return value
        return value.repeat(copies, *[1] * (value.dim() - 1))

    return {name: repeat(value) for name, value in batch.items()}, rows


def _digest(*key: Any) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=7).digest()


def _check(queries: int, eps: float) -> None:
    if queries < 1:
        raise ValueError(f"queries must be at least 1, got {queries}")
    if not eps > 0.0:
        raise ValueError(f"eps must be positive, got {eps}")
