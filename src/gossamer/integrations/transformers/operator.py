"""One operator for a layer's attention in graphs: decide, plan and attend inside, so that no plan crosses the graph.

``torch.compile(fullgraph=True)`` and ``torch.export`` keep a prefill in one piece with it. At run time the operator
finds the layer's module, and with it the policy and the statistics, by a number; a program that runs elsewhere, or
after the model is disabled, builds the policy that it was exported with from its description.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from gossamer.integrations.transformers.owners import Owner, key_of, module_of, owner_for, owner_of
from gossamer.methods import registry
from gossamer.policy import Policy

__all__ = ["named", "operator", "trains"]


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

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        query, key, value, mask, sinks, *ctx.others = inputs
        ctx.save_for_backward(query, key, value, mask, sinks)

    def backward(ctx: Any, reaching: Tensor) -> tuple[Any, ...]:
        query, key, value, mask, sinks = ctx.saved_tensors
        needs = [ctx.needs_input_grad[n] for n in (0, 1, 2, 4)]
        found = iter(gradient(reaching, query, key, value, mask, sinks, *ctx.others, needs))
        q, k, v, of_sinks = (next(found) if needed else None for needed in needs)
        return (q, k, v, None, of_sinks, *(None for _ in ctx.others))

    gradient = _gradient(run)
    attention.register_autograd(backward, setup_context=keep)
    return attention


def _gradient(run: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    """The operator's gradient, an operator again: it decides, plans and attends once more, so that no plan is kept."""

    @torch.library.custom_op("gossamer::attention_gradient", mutates_args=())
    def gradient(
        reaching: Tensor,
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
        needs: list[bool],
    ) -> list[Tensor]:
        there = module_of(module)
        owner = None if there is None else owner_of(there)
        owner = replace(owner or _described(policy), record=None, observe=None, reached=Counter())
        inputs = (query, key, value, sinks)
        leaves = [x if x is None else x.detach().requires_grad_(n) for x, n in zip(inputs, needs, strict=True)]
        q, k, v, s = leaves
        with _recording():
            out = run(owner, q, k, v, mask, s, scale, softcap, window, causal, layer)
            wanted = [x for x in leaves if x is not None and x.requires_grad]
            return [x.contiguous() for x in torch.autograd.grad(out, wanted, reaching)]

    @gradient.register_fake
    def _(
        reaching: Tensor, query: Tensor, key: Tensor, value: Tensor, mask: Any, sinks: Any, *others: Any
    ) -> list[Tensor]:
        inputs = (query, key, value, sinks)
        return [x.new_empty(x.shape) for x, needed in zip(inputs, others[-1], strict=True) if needed]

    return gradient


@contextmanager
def _recording() -> Iterator[None]:
    """Autograd inside an operator, which runs below it."""
    core: Any = torch._C
    excluded = core._dispatch_tls_local_exclude_set()
    for name in ("AutogradCPU", "AutogradCUDA", "AutogradOther", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(core.DispatchKey, name))
    with core._ForceDispatchKeyGuard(core._dispatch_tls_local_include_set(), excluded), torch.enable_grad():
        yield


@torch._dynamo.assume_constant_result
def trains(module: nn.Module) -> bool:
    """Whether a module's policy plans calls that need a gradient."""
    return owner_for(module).policy.training


@torch._dynamo.assume_constant_result
def named(module: nn.Module) -> tuple[int, str]:
    """The numbers and words by which the operator finds a module's owner."""
    return key_of(module), _description(owner_for(module).policy)


def _description(policy: Policy) -> str:
    names = ("min_tokens", "max_density", "training", "keep_plans")
    fields = {name: getattr(policy, name) for name in names}
    return json.dumps({"method": policy.method.to_dict(), **fields})


@functools.lru_cache(maxsize=16)
def _described(policy: str) -> Owner:
    fields = json.loads(policy)
    return Owner(Policy(registry.from_dict(fields.pop("method")), **fields), None)
