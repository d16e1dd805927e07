"""What decode steps lose: predictions of a text's last tokens, read one by one, beside those of dense steps."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

import gossamer
from gossamer import backends
from gossamer.call import AttentionCall
from gossamer.methods import Method
from gossamer.methods.reduced import Reducing
from gossamer.plan import SparsePlan
from gossamer.summaries import Summary

__all__ = ["MassRead", "Steps", "compare_steps", "differences", "mass_read", "read_steps"]


@dataclass(frozen=True)
class Steps:
    """How one method read the last tokens of a text.

    Fields:
        kl: mean over the steps of the divergence of its predictions from those of dense steps, nats.
        top1: share of the steps whose likeliest token is the same.
        nats: mean loss of the text's tokens.
        read: share of the cache's keys that its steps read, over layers.
        recall, oracle_recall: attention mass on what the steps read in layers where they chose, and on as many tokens
            with the largest weights of a key/value head; means over heads. None where every step was dense, or its
            method answers with other keys than the cache's.
        found: share of those tokens with the largest weights that were read, of each step that chose; mean over layers
            and heads.
        step_s: median seconds of a step; plan_s, attention_s: of one in all layers, mean.
    """

    kl: float
    top1: float
    nats: float
    read: float
    step_s: float
    plan_s: float
    attention_s: float
    recall: float | None = None
    oracle_recall: float | None = None
    found: tuple[float, ...] = ()


@torch.inference_mode()
def compare_steps(model: Any, tokens: Tensor, methods: Mapping[str, Method], steps: int = 64) -> dict[str, Steps]:
    """Read a text densely but for its last tokens, and those one by one, densely and by each of some methods.

    Each method has the same cache of the same prompt, which is read once, and sees the text's own tokens whatever it
    predicts.

    Args:
        model: a transformers model that is not enabled.
        tokens: int64 ``[1, S]``.
        methods: by the names of the results, which have ``dense`` besides.
        steps: how many of the last tokens are read one by one.

    Raises:
        ValueError: no token before the steps, or a method that does not choose what a step reads.
    """
    if not 0 < steps < tokens.shape[1]:
        raise ValueError(f"{steps} steps need a longer text than {tokens.shape[1]} tokens, and at least one step")
    found: dict[str, Steps] = {}
    with gossamer.enable(model, "dense", cache="keep") as handle:
        cache = handle.new_cache()
        model(input_ids=tokens[:, :-steps], past_key_values=cache, use_cache=True, logits_to_keep=1)
    wanted: Tensor | None = None
    for name, method in {"dense": None, **methods}.items():
        with gossamer.enable(model, "dense", decode=method, cache="keep") as handle:
            rows, seconds = read_steps(model, tokens[:, -steps:], cache)
            layers = handle.stats()
        cache.crop(-steps)
        masses: list[MassRead] = []
        if method is not None and not isinstance(method, Reducing):
            masses = _choices(model, tokens[:, -steps:], cache, method)
        wanted = rows if wanted is None else wanted
        kl, top1, nats = differences(rows, wanted, tokens[0, -steps:])
        found[name] = Steps(
            kl=kl,
            top1=top1,
            nats=nats,
            read=sum(layer.step_density for layer in layers) / max(1, len(layers)),
            step_s=sorted(seconds)[len(seconds) // 2],
            plan_s=sum(layer.plan_seconds for layer in layers) / steps,
            attention_s=sum(layer.attention_seconds for layer in layers) / steps,
            recall=_mean([one.chosen for one in masses]),
            oracle_recall=_mean([one.best for one in masses]),
            found=tuple(
                sum(some := [one.found for one in masses if one.key_len == length]) / len(some)
                for length in sorted({one.key_len for one in masses})
            ),
        )
    return found


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _choices(model: Any, tokens: Tensor, cache: Any, method: Method) -> list[MassRead]:
    """Read the steps once more, untimed, and hold each choice against all weights."""
    watched = _Watched(method, [])
    with gossamer.enable(model, "dense", decode=watched, cache="keep"):
        read_steps(model, tokens, cache)
    cache.crop(-tokens.shape[1])
    return watched.found


@dataclass(frozen=True)
class MassRead:
    """One choice beside the best one of as many keys.

    Fields:
        chosen, best: the attention mass on each; means over heads.
        found: the share of the best keys that were chosen.
        key_len: slots of the cache.
    """

    chosen: float
    best: float
    found: float
    key_len: int


@dataclass(frozen=True)
class _Watched(Method):
    """A method whose choices are looked at."""

    name: ClassVar[str] = "watched"
    decodes: ClassVar[bool] = True
    inner: Method
    found: list[MassRead]

    def lacks(self, call: AttentionCall) -> str | None:
        return self.inner.lacks(call)

    def watches(self, call: AttentionCall) -> tuple[Summary[Any], ...]:
        return self.inner.watches(call)

    def least_density(self, call: AttentionCall) -> float:
        return self.inner.least_density(call)

    def plan(self, call: AttentionCall) -> SparsePlan:
        plan = self.inner.plan(call)
        if plan.density() < 1:
            self.found.append(mass_read(call, plan))
        return plan


def mass_read(call: AttentionCall, plan: SparsePlan) -> MassRead:
    """Of one query a row: the attention mass on a plan's keys, and on as many with the largest weights of each head.

    Query heads that share a choice share the best one too: the keys with the largest sum of their weights.
    """
    whole = SparsePlan.dense(call.groups, 1, call.key_len, call.extent)
    _, lse = backends.attend(replace(call, store=None), whole)
    logits = (call.q.unflatten(1, (call.groups, -1))[:, :, :, 0].float() @ call.k.float().mT).flatten(1, 2) * call.scale
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    live = call.extent.live_keys(call.key_len, call.device)[:, None]
    weights = (logits - lse).exp().masked_fill(~live, 0.0).unflatten(1, (plan.heads, -1))  # [B, heads, share, T]
    chosen = plan.to_mask()[:, :, 0]
    ranked = weights.sum(dim=2).sort(dim=-1, descending=True).indices
    best = torch.zeros_like(chosen).scatter_(
        2, ranked, torch.arange(call.key_len, device=call.device) < chosen.sum(dim=-1, keepdim=True)
    )
    mass, most = (float((weights * keys[:, :, None]).sum(dim=-1).mean()) for keys in (chosen, best))
    found = (chosen & best).sum(dim=-1) / best.sum(dim=-1).clamp(min=1)
    return MassRead(mass, most, float(found.mean()), call.key_len)


def differences(rows: Tensor, wanted: Tensor, tokens: Tensor) -> tuple[float, float, float]:
    """Of logits ``[steps, vocabulary]``: divergence from others, share of equal choices, loss of the next token.

    Args:
        tokens: those that were read, int64 ``[steps]``.
    """
    log, log_wanted = rows.log_softmax(dim=-1), wanted.log_softmax(dim=-1)
    kl = (log_wanted.exp() * (log_wanted - log)).sum(dim=-1).mean()
    same = (log.argmax(dim=-1) == log_wanted.argmax(dim=-1)).float().mean()
    target = tokens[1:].to(log.device)
    nats = float(-log[:-1].gather(1, target[:, None]).mean()) if len(tokens) > 1 else float("nan")
    return float(kl), float(same), nats


def read_steps(model: Any, tokens: Tensor, cache: Any) -> tuple[Tensor, list[float]]:
    """Logits fp32 ``[steps, vocabulary]`` and the seconds of each step."""
    rows, seconds = [], []
    for n in range(tokens.shape[1]):
        started = time.perf_counter()
        out = model(input_ids=tokens[:, n : n + 1], past_key_values=cache, use_cache=True, logits_to_keep=1)
        rows.append(out.logits[0, -1].float())
        seconds.append(time.perf_counter() - started)
    return torch.stack(rows), seconds
