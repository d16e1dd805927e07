"""`enable` for pipelines and transformers of diffusers, and its `Handle`."""

from __future__ import annotations

import copy
import dataclasses
import os
import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Literal

from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils.torch_utils import unwrap_module
from torch import nn

from gossamer.attention import CallRecord
from gossamer.integrations.diffusers.runs import Run, modules_of
from gossamer.integrations.diffusers.seats import Seat, seat_of
from gossamer.integrations.policies import policy_of
from gossamer.integrations.stats import LayerStats, Observation, Stats
from gossamer.integrations.steps import Steps
from gossamer.methods import Method
from gossamer.methods.per_head import needs_of
from gossamer.policy import Policy
from gossamer.profiles import Profile

__all__ = ["Handle", "enable"]


class Handle:
    """An enabled pipeline or transformer. `enable` makes it; as a context manager it disables it on the way out.

    It holds the models weakly. Layers are counted in the order in which they first attend a whole image or video, those
    of a pipeline's first transformer before those of its second.
    """

    def __init__(self, models: Iterable[nn.Module], policy: Policy, steps: Steps, text_first: bool | None) -> None:
        self.policy = policy
        self._steps = steps
        self._records: dict[int | None, dict[int | None, LayerStats]] = {}
        self._seats: list[Seat] = []
        self._runs: list[Run] = []
        self._hooks: list[Any] = []
        self._names: list[str] = []
        self._enabled = True
        try:
            for model in models:
                self._take(model, text_first)
        except BaseException:
            self.disable()
            raise

    def _take(self, model: nn.Module, text_first: bool | None) -> None:
        run = Run(model, self.policy, self._steps, self._record, self._runs, text_first)
        self._runs.append(run)
        self._names.append(type(model).__name__)
        self._hooks.append(model.register_forward_pre_hook(run.enter, with_kwargs=True))
        self._hooks.append(model.register_forward_hook(run.exit, always_call=True))
        for module in modules_of(model):
            if seat_of(module) is not None:
                raise ValueError(
                    f"this {type(model).__name__} shares attention modules with another model of the pipeline; enable "
                    "one of them by itself"
                )
            self._seats.append(Seat(run, module))

    @property
    def enabled(self) -> bool:
        """Whether attention comes here: not after `disable`, nor once all processors or backends were set anew."""
        return self._enabled and any(seat.taken for seat in self._seats)

    @property
    def steps(self) -> list[int]:
        """Numbers of the denoising steps that there are records of."""
        return sorted(step for step in self._records if step is not None)

    def stats(self, step: int | None = None) -> Stats:
        """What each layer did until now, in all steps or in one. Calls that attend no whole image have no layer.

        Raises:
            ValueError: a step that there is no record of.
        """
        if step is not None and step not in self._records:
            known = ", ".join(map(str, self.steps)) or "none"
            raise ValueError(f"there is no record of step {step}; there are records of {known}")
        total: dict[int | None, LayerStats] = {}
        for number, layers in self._records.items():
            if step is None or number == step:
                for layer, row in layers.items():
                    total.setdefault(layer, LayerStats(layer)).merge(row)
        order = sorted(total, key=lambda layer: (layer is None, layer or 0))
        return Stats(tuple(copy.deepcopy(total[layer]) for layer in order))

    def reset(self) -> None:
        """Start counting anew."""
        self._records.clear()

    def restart(self) -> None:
        """Forget what methods keep: the next call begins a sampling.

        Most samplings are noticed by themselves: where a pipeline sets its scheduler's timesteps, where timesteps go
        back, where a call of the first step failed. A transformer called by itself may have to be told so, after a
        sampling with the same latents that was left in its first step.
        """
        self._steps.restart()

    def observe(self, visit: Callable[[Observation], None] | None) -> None:
        """Show ``visit`` the tensors of every call that attends a whole image or video; None ends it.

        It is called after the attention, for dense calls too. What it keeps stays in memory.

        Raises:
            ValueError: the handle is disabled.
        """
        if not self._enabled:
            raise ValueError("this handle is disabled; call gossamer.enable again")
        for run in self._runs:
            run.observe = visit

    def disable(self) -> None:
        """Give each module its own processor back. A second call does nothing.

        Processors that were set since stay, and what was set on processors, such as a backend.
        """
        self._enabled = False
        for hook in self._hooks:
            hook.remove()
        for seat in self._seats:
            seat.leave()
        for run in self._runs:
            run.observe = None
        self._seats, self._hooks = [], []
        self._steps.restart()

    def _record(self, call: CallRecord) -> None:
        now = self._steps.now
        layers = self._records.setdefault(None if now is None else now.number, {})
        layers.setdefault(call.layer, LayerStats(call.layer)).add(call)

    def __enter__(self) -> Handle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.disable()

    def __repr__(self) -> str:
        state = "enabled" if self.enabled else "disabled"
        return f"<gossamer {self.policy.name} on {', '.join(self._names)}, {state}>"


def enable(
    model: Any,
    method: str | Method | Policy = "adaspa",
    *,
    profile: str | os.PathLike[str] | Profile | None = None,
    steps: int | None = None,
    text: Literal["first", "last"] | None = None,
    min_tokens: int | None = None,
    max_density: float | None = None,
    training: bool = False,
    **fields: Any,
) -> Handle:
    """Run the attention of a diffusers pipeline or transformer through gossamer.

    The joint and self-attention over a whole image or video may run sparse; cross-attention to text, attention over
    text alone and attention under context parallelism run as they did, and are counted with the reason. So does any
    step for which the method asks for dense attention. Weights, configs and the library stay as they are.

    Args:
        model: a pipeline, of which every transformer is enabled, or one model; of compiled ones what was compiled.
        method: a name from `gossamer.methods.denoising` or `gossamer.methods.available`, a method, or a policy.
        profile: methods per layer and head instead: a `Profile`, or the path of one.
        steps: of a sampling. A pipeline's scheduler says it by itself; a method that acts by a share of the steps needs
            it where a transformer alone is enabled.
        text: where text stands in joint attention, before the patches or after them. None: found out from the values of
            the first text token, where a module's projections have the names that diffusers gives them.
        min_tokens, max_density, training: of the policy; see `gossamer.enable` for transformers.
        **fields: hyperparameters of the method, where `method` is a name.

    Raises:
        TypeError: no model of diffusers.
        ValueError: an unknown method or field, one that chooses what decode steps read, a model without attention
            processors, or one that is enabled already.
        RuntimeError: later, after the first forward pass: no attention came here.
    """
    if profile is not None and not isinstance(profile, Profile):
        profile = Profile.load(profile)
    if profile is not None and method == "adaspa":
        method = "per_head"
    if text not in (None, "first", "last"):
        raise ValueError(f"text must be 'first', 'last' or None, got {text!r}")
    if steps is not None and (not isinstance(steps, int) or steps < 1):
        raise ValueError(f"steps must be a number of steps from 1 on, or None, got {steps!r}")
    policy = dataclasses.replace(policy_of(method, profile, min_tokens, max_density, fields), training=training)
    if policy.decode is not None or policy.cache is not None:
        raise ValueError("denoising models have no decode steps: leave decode and cache out of the policy")
    if "rotary" in needs_of(policy.method):
        raise ValueError(
            f"{policy.method.name} looks at q and k before their rotary embedding, which here has several axes; "
            "use another method"
        )
    model = unwrap_module(model)
    models = _models_of(model)
    if any(seat_of(module) is not None for part in models for module in modules_of(part)):
        raise ValueError(f"this {type(model).__name__} is enabled already; call disable() on its handle first")
    scheduler = None if isinstance(model, nn.Module) else _scheduler_of(model)
    return Handle(models, policy, Steps(scheduler, steps), None if text is None else text == "first")


def _scheduler_of(pipeline: Any) -> Callable[[], Any]:
    """Whichever a pipeline has when it is asked: users replace it."""
    there = weakref.ref(pipeline)
    return lambda: getattr(there(), "scheduler", None)


def _models_of(model: Any) -> list[nn.Module]:
    """The models with attention of a pipeline that denoise, or the one that is given."""
    if isinstance(model, ModelMixin):
        found: list[nn.Module] = [model] if modules_of(model) else []
    elif hasattr(model, "components"):
        parts = [unwrap_module(part) for part in model.components.values()]
        parts = list({id(part): part for part in parts if isinstance(part, ModelMixin)}.values())
        found = [part for part in parts if _denoises(part) and modules_of(part)]
    else:
        raise TypeError(f"gossamer.enable needs a pipeline or a model of diffusers, got {type(model).__name__}")
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer whose attention processors can be set")
    return found


def _denoises(model: nn.Module) -> bool:
    """Pipelines hold autoencoders, too, and those have attention."""
    names = type(model).__module__.split(".")
    return "transformers" in names or "unets" in names
