"""Passages filled in with dense attention and by methods: what was right, what was the same, and what it took."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gossamer.evaluate.masked.passages import Passage, answer_tokens
from gossamer.evaluate.masked.sampler import fill
from gossamer.evaluate.masked.subject import MaskedSubject
from gossamer.evaluate.masked.variants import Variant
from gossamer.evaluate.records import policy_fields, policy_text
from gossamer.integrations.stats import Observation
from gossamer.integrations.transformers import enable
from gossamer.methods import Dense
from gossamer.policy import Policy

__all__ = ["Fills", "fields_of", "fill_lines"]

Record = dict[str, Any]


@dataclass(frozen=True)
class Fills:
    """How passages are filled in.

    Fields:
        steps: of the sampling; block: of a stretch, None for one stretch.
        share: of the last quarter that is masked.
        compared: steps at which predictions are held beside the dense ones on the dense run's own tokens, of those that
            have a mask left.
    """

    steps: int
    share: float = 0.5
    block: int | None = None
    compared: int = 4

    def __post_init__(self) -> None:
        if self.steps < 2 or self.compared < 1:
            raise ValueError(f"at least 2 steps and 1 to compare are needed, got {self.steps} and {self.compared}")

    def compared_steps(self) -> list[int]:
        """Evenly spread up to the last step; never the first, which begins a sampling."""
        count = min(self.compared, self.steps - 1)
        return sorted({max(1, round((n + 1) * (self.steps - 1) / count)) for n in range(count)})

    def check(self, length: int) -> None:
        """Whether passages of a length can be filled in so.

        Raises:
            ValueError: their stretches cannot share the steps evenly.
        """
        stretches = 1 if self.block is None else -(-answer_tokens(length) // self.block)
        if self.steps % stretches:
            raise ValueError(
                f"{self.steps} steps cannot be shared evenly by {stretches} stretches of {self.block} tokens, as the "
                f"last quarter of {length} has; give a multiple of {stretches}"
            )

    def head(self, passage: Passage) -> Record:
        """What of a line says which passage was filled in, and how."""
        block = {} if self.block is None else {"block": self.block}
        task = f"fill(steps={self.steps},share={self.share:g}" + "".join(f",{k}={v}" for k, v in block.items()) + ")"
        fields = {"task": "fill", "steps": self.steps, "share": self.share, **block}
        own = {"length": passage.length, "index": passage.index, "seed": passage.seed}
        return {"task": task, "task_fields": fields, **own}


@dataclass(eq=False)
class DenseRun:
    """What a dense sampling left: the result, and tokens ``[1, S]`` and log probabilities ``[n, V]`` at some steps."""

    tokens: Tensor
    states: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)


def fields_of(policy: Policy) -> Record:
    """`policy_fields`, also of a `Variant`, which is no registered method."""
    method = policy.method
    if not isinstance(method, Variant):
        return policy_fields(policy)
    usual, own = Variant().to_dict(), method.to_dict()
    changed = ",".join(f"{name}={value}" for name, value in own.items() if value != usual[name])
    label = f"{method.name}({changed})" if changed else method.name
    return {"method": label, "method_fields": own, "policy": policy_text(policy)}


def fill_lines(
    subject: MaskedSubject,
    policies: Sequence[Policy],
    passages: Iterable[Passage],
    fills: Fills,
    *,
    has: Callable[[Record], bool] = lambda record: False,
    observe: Callable[[Passage, int, Observation], None] | None = None,
) -> Iterator[Record]:
    """A line ``fill`` for each passage and policy, passage by passage. Dense attention on our kernel runs first and is
    what the others are held beside.

    Args:
        has: whether a line is there already; it is given what `Fills.head` and `fields_of` say.
        observe: sees each layer's call of a dense run of its own, which is not timed, with the passage and the step.
    """
    dense = Policy(Dense(kernel="gossamer"), min_tokens=0)
    for passage in passages:
        left = [
            policy
            for policy in policies
            if policy.method != dense.method and not has({"kind": "fill"} | fields_of(policy) | fills.head(passage))
        ]
        own = {"kind": "fill"} | fields_of(dense) | fills.head(passage)
        if observe is not None:
            _sampled(subject, dense, passage, fills, None, observe)
        if not left and has(own):
            continue
        kept, record = _sampled(subject, dense, passage, fills, None, None)
        if not has(own):
            yield own | record
        for policy in left:
            _, record = _sampled(subject, policy, passage, fills, kept, None)
            yield {"kind": "fill"} | fields_of(policy) | fills.head(passage) | record


def _sampled(
    subject: MaskedSubject,
    policy: Policy,
    passage: Passage,
    fills: Fills,
    dense: DenseRun | None,
    observe: Callable[[Passage, int, Observation], None] | None,
) -> tuple[DenseRun, Record]:
    """One sampling, and its figures; of the dense one None is given as the yardstick."""
    masked, by_step, because = passage.masked[None], list[Record](), Counter[str]()
    run, wanted, now = DenseRun(passage.tokens[None]), set(fills.compared_steps()), [0, 0.0, 0.0]
    with (
        enable(subject.model, policy, bidirectional=True) as handle,
        handle.sampling(prompt=passage.prompt, steps=fills.steps) as sampling,
    ):
        if observe is not None:
            handle.observe(lambda seen: observe(passage, int(now[0]), seen))

        def begin(step: int, tokens: Tensor) -> None:
            sampling.begin(step)
            handle.reset()
            if dense is None and step in wanted and bool((tokens == subject.mask_token).any()):
                run.states[step] = tokens, torch.empty(0)
            now[:] = step, time.perf_counter(), time.process_time()

        def seen(step: int, logits: Tensor) -> None:
            seconds, cpu = time.perf_counter() - now[1], time.process_time() - now[2]
            stats = handle.stats()
            by_step.append(
                {
                    "density": round(sum(layer.density for layer in stats) / max(1, len(stats)), 6),
                    "plan_s": round(sum(layer.plan_seconds for layer in stats), 6),
                    "attention_s": round(sum(layer.attention_seconds for layer in stats), 6),
                    "seconds": round(seconds, 6),
                    "cpu_s": round(cpu, 6),
                }
            )
            because.update(stats.fallbacks())
            if step in run.states:
                tokens, _ = run.states[step]
                run.states[step] = tokens, _log_shares(logits, tokens, subject.mask_token)

        run.tokens = fill(
            subject.predict, passage.tokens[None], masked, subject.mask_token, fills.steps, block=fills.block,
            start=passage.prompt, begin=begin, seen=seen,
        )  # fmt: skip
        near = [] if dense is None else [_beside(subject, sampling, step, *dense.states[step]) for step in dense.states]
    yardstick = run if dense is None else dense
    right = (run.tokens == passage.tokens)[0]
    same = (run.tokens == yardstick.tokens)[0]
    rest = passage.masked & ~passage.copied
    record: Record = {
        "density": round(sum(step["density"] for step in by_step) / len(by_step), 6),
        "filled": int(passage.masked.sum()),
        "copied": int(passage.copied.sum()),
        "accuracy": _share(right, passage.masked),
        "copied_accuracy": _share(right, passage.copied),
        "rest_accuracy": _share(right, rest),
        "agreement": _share(same, passage.masked),
        "copied_agreement": _share(same, passage.copied),
        "kl": 0.0 if dense is None else weighed(near, by_step, "kl", 8),
        "top1": 1.0 if dense is None else weighed(near, by_step, "top1", 6),
        "seconds": round(sum(step["seconds"] for step in by_step), 6),
        "compared": near,
        "by_step": by_step,
        "dense_because": dict(because),
    }
    return run, record


def _log_shares(logits: Tensor, tokens: Tensor, mask_token: int) -> Tensor:
    """Log probabilities where a mask stands, fp32 ``[n, V]``; the mask itself has none."""
    logits = logits[tokens == mask_token].float()
    logits[:, mask_token] = float("-inf")
    return logits.log_softmax(dim=-1)


def _beside(subject: MaskedSubject, sampling: Any, step: int, tokens: Tensor, exact: Tensor) -> Record:
    """What the policy predicts for tokens of the dense run. What it keeps over steps is that of its own sampling."""
    sampling.begin(step)
    found = _log_shares(subject.predict(tokens), tokens, subject.mask_token)
    kl = F.kl_div(found.clamp(min=-1e4), exact.clamp(min=-1e4), reduction="none", log_target=True)
    top1 = (found.argmax(dim=-1) == exact.argmax(dim=-1)).float().mean()
    own = {"kl": round(max(0.0, float(kl.sum(dim=-1).mean())), 8), "top1": round(float(top1), 6)}
    return {"step": step, "masks": len(exact), **own}


def weighed(near: Sequence[Record], by_step: Sequence[Record], name: str, digits: int) -> float | None:
    """Mean of a figure over the masked tokens of the compared steps that were sparse, or of all where none was.

    A step with two masks left says less than one with fifty, and one that ran dense says nothing of a plan.

    Returns:
        None where no step had a mask to compare.
    """
    near = [one for one in near if by_step[one["step"]]["density"] < 1] or near
    tokens = sum(one["masks"] for one in near)
    return round(sum(one["masks"] * one[name] for one in near) / tokens, digits) if tokens else None


def _share(right: Tensor, of: Tensor) -> float | None:
    return round(float(right[of].float().mean()), 6) if bool(of.any()) else None
