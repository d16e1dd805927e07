"""Which tokens the routers of SeqBoat activate: keys, values and queries, or what stands between."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gossamer.evaluate.mqar.data import IGNORED, Compositional, Examples, Variant
from gossamer.modules import SeqBoatLayer

__all__ = ["ROLES", "TEST_BATCH", "activated", "roles"]

TEST_BATCH = 256  # sequences of a test at once: a whole test of the paper's sizes takes gigabytes of activations
ROLES = ("filler", "key", "value", "query")


def roles(variant: Variant, examples: Examples) -> Tensor | None:
    """Of each token which of `ROLES` it has, int64 ``[M, T]``; a query's own token is no key.

    None where tokens do not tell it: random fillers, keys of two tokens, or key and value in one.
    """
    if variant.fillers != "zero" or variant.parts > 1 or isinstance(variant, Compositional):
        return None
    tokens = examples.inputs
    found = (tokens > 0).long() + (tokens >= variant.vocabulary // 2).long()
    return found.masked_fill(examples.labels != IGNORED, ROLES.index("query"))


@torch.no_grad()
def activated(model: nn.Module, variant: Variant, examples: Examples) -> list[dict[str, float]]:
    """Of each layer with a router, the share of the tokens of each role that it activates; empty without such a layer
    or without roles."""
    layers = [m for m in model.modules() if isinstance(m, SeqBoatLayer) and m.log_temperature is not None]
    kinds = roles(variant, examples)
    if not layers or kinds is None:
        return []
    seen: dict[SeqBoatLayer, list[Tensor]] = {layer: [] for layer in layers}

    def watch(layer: SeqBoatLayer, given: tuple[Tensor, ...]) -> None:
        seen[layer].append(layer.active(given[0]))

    hooks = [layer.register_forward_pre_hook(watch) for layer in layers]
    try:
        model.eval()
        for inputs, labels in zip(examples.inputs.split(TEST_BATCH), examples.labels.split(TEST_BATCH), strict=True):
            model(inputs, labels != IGNORED)
    finally:
        for hook in hooks:
            hook.remove()
    return [
        {name: round(float(active[kinds == role].double().mean()), 4) for role, name in enumerate(ROLES)}
        for active in map(torch.cat, seen.values())
    ]
