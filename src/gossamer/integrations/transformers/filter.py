"""`filter_prompt`: an early layer says which tokens of a prompt matter, and the others are dropped (GemFilter)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer import scores
from gossamer.call import AttentionCall
from gossamer.integrations.transformers.handle import enable
from gossamer.integrations.transformers.owners import owner_of, set_owner
from gossamer.methods import Method
from gossamer.policy import Decision, Policy
from gossamer.rules import top_k

__all__ = ["filter_prompt"]

POOL = 5  # neighbours that share a score


def filter_prompt(
    model: Any, input_ids: Tensor, layer: int, keep: int, *, method: str | Method | Policy | None = None
) -> Tensor:
    """The ``keep`` tokens of a prompt that its last token looks at most in one layer, in their order (2409.17422).

    Layers 0 to ``layer`` run on the whole prompt, the last of them as far as its queries and keys. A token's score is
    the sum over heads of the product of the last query with its key, after rotation and not scaled, averaged over the 5
    tokens around it; beyond the ends count zeros. Of equal scores the earlier token stays. What is kept is a prompt of
    its own: give it to ``model`` or ``model.generate`` as it is, and its positions are 0, 1, and so on.

    A token that no query asks for in this layer is gone, template and first token included, and an answer that needs
    where things stood, or all of them, can't be given. The authors take layer 13 of Llama-3.1-8B's 32, 19 of
    Mistral-Nemo's 40 and of Phi-3.5-mini's 32, and keep 1024 tokens.

    Args:
        model: a transformers decoder; enabled or not, it is left as it was.
        input_ids: one prompt without padding, ``[1, S]`` or ``[S]``.
        layer: index of the layer that scores; it must attend the whole prompt.
        method: by which the layers before attend, where the model is not enabled; default: dense. An enabled model does
            so by its own, and counts nothing.

    Returns:
        The chosen ids, ``[1, keep]`` or ``[keep]``; the prompt itself where it is no longer.

    Raises:
        TypeError: numbers that are no integers, a model that `gossamer.enable` doesn't take.
        ValueError: several prompts, an encoder-decoder, no such layer, one with a window or without our attention, a
            method beside a model that is enabled; what `gossamer.enable` refuses.
    """
    ids = _one_prompt(input_ids)
    _check_numbers(model, layer, keep)
    if ids.shape[1] <= keep:
        return input_ids
    call = _call_of_layer(model, ids, layer, method)
    around = F.avg_pool1d(scores.last_query_products(call)[:, None], POOL, stride=1, padding=POOL // 2)
    return input_ids[..., top_k(around[0, 0], keep).to(input_ids.device)]


def _one_prompt(input_ids: Tensor) -> Tensor:
    if not isinstance(input_ids, Tensor) or input_ids.is_floating_point() or input_ids.ndim not in (1, 2):
        raise TypeError(f"input_ids must be a tensor of token ids, [1, S] or [S], got {input_ids!r:.80}")
    ids = input_ids if input_ids.ndim == 2 else input_ids[None]
    if ids.shape[0] != 1:
        raise ValueError(
            f"a prompt is filtered by itself, got {ids.shape[0]}: call filter_prompt for each, without its padding; "
            "what it returns has equal lengths"
        )
    return ids


def _check_numbers(model: Any, layer: int, keep: int) -> None:
    for name, value in (("layer", layer), ("keep", keep)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")
    if keep < 1:
        raise ValueError(f"keep must be at least 1, got {keep}")
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder: its encoder has no last token that asks. "
            "filter_prompt is for decoders"
        )
    layers = None if config is None else getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
    if layer < 0 or (layers is not None and layer >= layers):
        known = "" if layers is None else f" and below {layers}, the number of the model's layers"
        raise ValueError(f"layer must be at least 0{known}, got {layer}")


class _Reached(Exception):
    """Ends a forward pass at the layer that scores."""

    def __init__(self, call: AttentionCall) -> None:
        self.call = call


@dataclass(frozen=True)
class _UpTo(Policy):
    """A policy until a layer is reached."""

    layer: int = 0

    def decide(self, call: AttentionCall) -> Decision:
        if call.layer == self.layer:
            raise _Reached(call)
        return super().decide(call)


def _call_of_layer(model: Any, ids: Tensor, layer: int, method: str | Method | Policy | None) -> AttentionCall:
    """The call of one layer, when the layers before it have run on a prompt."""
    with ExitStack() as stack:
        if not any(owner_of(module) is not None for module in _modules(model)):
            stack.enter_context(enable(model, "dense" if method is None else method))
        elif method is not None:
            raise ValueError("this model is enabled already, and reads prompts by its own method: leave method out")
        stack.enter_context(_ending_at(model, layer))
        stack.enter_context(_evaluating(model))
        try:
            model(input_ids=ids.to(model.device), use_cache=False)
        except _Reached as reached:
            call = reached.call
        else:
            raise ValueError(
                f"layer {layer} of {type(model).__name__} has no attention that comes to gossamer with a plain mask; "
                "take another layer"
            )
    if not call.extent.causal:
        raise ValueError(f"layer {layer} of {type(model).__name__} is not causal: filter_prompt is for decoders")
    if call.extent.limit is not None and call.extent.limit < ids.shape[1]:
        raise ValueError(
            f"layer {layer} attends {call.extent.limit} tokens alone, and can't tell which of {ids.shape[1]} matter; "
            "take a layer that attends them all"
        )
    return call


def _modules(model: Any) -> list[Any]:
    return list(model.modules()) if hasattr(model, "modules") else []


@contextmanager
def _ending_at(model: Any, layer: int) -> Iterator[None]:
    owners = {module: owner for module in _modules(model) if (owner := owner_of(module)) is not None}
    try:
        for module, owner in owners.items():
            policy = owner.policy
            given = {part.name: getattr(policy, part.name) for part in fields(policy)}
            ending = _UpTo(**given, layer=layer)
            set_owner(module, replace(owner, policy=ending, record=None, observe=None))
        yield
    finally:
        for module, owner in owners.items():
            set_owner(module, owner)


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = [module for module in _modules(model) if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
