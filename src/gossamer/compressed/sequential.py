"""A model's layers one after the other, each seeing what the compressed ones before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["decoder_layers", "linear_layers", "walk"]

Observe = Callable[[str, nn.Linear, Tensor], None]


def decoder_layers(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The stack of a language model's layers and its name: the list of modules of one class with the most weights.

    Raises:
        ValueError: it has none.
    """
    found = [
        (sum(p.numel() for p in module.parameters()), name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of layers of one class: it cannot be compressed")
    _, name, layers = max(found, key=lambda entry: entry[0])
    return name, layers


def linear_layers(module: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    """The linear layers inside, with their names; those of classes derived from `nn.Linear` are somebody's own."""
    for name, child in module.named_modules():
        if type(child) is nn.Linear:
            yield name, child


class _Seen(Exception):
    """All layers were called."""


@dataclass(frozen=True)
class _Call:
    """What a layer was called with, but for its hidden states."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        out = layer(hidden, *self.args, **self.kwargs)
        return out[0] if isinstance(out, tuple) else out


@torch.no_grad()
def walk(
    model: Any,
    samples: Sequence[Tensor],
    observe: Observe,
    after: Callable[[str, nn.Module], None] | None = None,
) -> None:
    """Show every linear layer its inputs, layer by layer of the model.

    Hidden states of all samples are held at once, ``[samples, T, E]``; masks and positions are those that the model
    itself gave each layer, and are held once where samples of one shape have the same.

    Args:
        samples: token ids ``[B, T]`` each.
        observe: gets the name of a linear layer in the model, the layer and its inputs ``[B, T, in]``.
        after: gets the name of each layer and the layer once all samples went through it, and may change what is
            inside; the samples then go through it again for the next one.

    Raises:
        ValueError: the model calls a layer not once for a prompt.
    """
    name, layers = decoder_layers(model)
    calls: list[list[_Call]] = [[] for _ in layers]
    hidden: list[Tensor] = []

    held: dict[tuple[Any, ...], list[Tensor]] = {}

    def shared(x: Any) -> Any:
        if isinstance(x, (tuple, list)):
            return type(x)(shared(item) for item in x)
        if isinstance(x, dict):
            return {key: shared(item) for key, item in x.items()}
        if not isinstance(x, Tensor):
            return x
        known = held.setdefault((x.shape, x.dtype), [])
        same = next((other for other in known if torch.equal(other, x)), None)
        if same is None:
            known.append(x)
        return x if same is None else same

    def note(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            known = dict(kwargs)
            first = args[0] if args else known.pop("hidden_states")
            if number == 0:
                hidden.append(first.clone())
            calls[number].append(_Call(shared(args[1:]), shared(known)))
            if number == len(layers) - 1:
                raise _Seen  # the rest of the model, its head above all, is for nothing

        return hook

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.callback(layer.register_forward_pre_hook(note(number), with_kwargs=True).remove)
        for ids in samples:
            with suppress(_Seen):
                model(input_ids=ids.to(model.device), use_cache=False)
    if not hidden or any(len(own) != len(samples) for own in calls):
        raise ValueError(f"{type(model).__name__} does not call each of {name} once for a prompt")
    for number, layer in enumerate(layers):
        place = f"{name}.{number}"
        with ExitStack() as stack:
            for inner, linear in linear_layers(layer):
                hook = _shown(observe, f"{place}.{inner}")
                stack.callback(linear.register_forward_pre_hook(hook).remove)
            kept = [call(layer, x) for call, x in zip(calls[number], hidden, strict=True)]
        if after is not None:
            after(place, layer)
            kept = [call(layer, x) for call, x in zip(calls[number], hidden, strict=True)]
        hidden, calls[number] = kept, []


def _shown(observe: Observe, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        observe(name, module, args[0])  # type: ignore[arg-type]

    return hook
