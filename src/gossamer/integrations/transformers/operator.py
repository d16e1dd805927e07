"""One operator for a layer's attention in graphs: decide, plan and attend inside, so that no plan crosses the graph.

``torch.compile(fullgraph=True)`` and ``torch.export`` keep a prefill in one piece with it. At run time the operator
finds the layer's module, and with it the policy and the statistics, by a number; a program that runs elsewhere, or
after the model is disabled, builds the policy that it was exported with from its description.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.integrations.transformers.owners import Owner, key_of, module_of, owner_for, owner_of
from gossamer.methods import registry
from gossamer.policy import Policy

__all__ = ["named", "operator"]


def operator(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Register ``run(owner, query, key, value, mask, sinks, scale, softcap, window, causal, layer)`` as the operator.

    Returns:
        The operator, with ``module: int, policy: str`` in place of the owner.
    """

    @torch.library.custom_op("gossamer::attention", mutates_args=())
    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        softcap: float | None,
        window: int | None,
        causal: bool,
        layer: int | None,
        module: int,
        policy: str,
    ) -> Tensor:
        there = module_of(module)
        owner = None if there is None else owner_of(there)
        return run(owner or _described(policy), query, key, value, mask, sinks, scale, softcap, window, causal, layer)

    @attention.register_fake
    def _(query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        batch, heads, queries, _ = query.shape
        return query.new_empty(batch, queries, heads, value.shape[-1])

    return attention


@torch._dynamo.assume_constant_result
def named(module: nn.Module) -> tuple[int, str]:
    """The numbers and words by which the operator finds a module's owner."""
    return key_of(module), _description(owner_for(module).policy)


def _description(policy: Policy) -> str:
    fields = {"min_tokens": policy.min_tokens, "max_density": policy.max_density}
    return json.dumps({"method": policy.method.to_dict(), **fields})


@functools.lru_cache(maxsize=16)
def _described(policy: str) -> Owner:
    fields = json.loads(policy)
    return Owner(Policy(registry.from_dict(fields.pop("method")), **fields), None)
