"""What the seats of one model share: its policy, how its patches lie now, and where calls are recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from gossamer.attention import CallRecord
from gossamer.integrations.diffusers.layouts import Grid3, arguments_of, grid_of
from gossamer.integrations.diffusers.masks import live_keys
from gossamer.integrations.stats import Observation
from gossamer.integrations.steps import Steps
from gossamer.methods import Method, PerHead
from gossamer.policy import Policy

__all__ = ["Run", "modules_of"]


def modules_of(model: nn.Module) -> list[nn.Module]:
    """The attention modules of a diffusers model: those whose processor can be set."""
    return [m for m in model.modules() if callable(getattr(m, "processor", None)) and hasattr(m, "set_processor")]


class Run:
    """One model under one policy.

    Args:
        before: the models whose layers are counted before its own.

    Attributes:
        grid: patches of the model's last call, which a gradient may run parts of again; None where they are unknown.
        words: tokens of text that it was called with; None where it was not.
        text_first: whether text stands before the patches; None until that is known.
        reached: whether any attention came here.
    """

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        steps: Steps,
        record: Callable[[CallRecord], None],
        before: Sequence[Run] = (),
        text_first: bool | None = None,
    ) -> None:
        self._model = weakref.ref(model)
        self.policy, self.steps, self.record = policy, steps, record
        self._before = tuple(before)
        self._first: int | None = None
        self._count = 0
        self.grid: Grid3 | None = None
        self.words: int | None = None
        self.text_first = text_first
        self.reached = self._ran = False
        self._mask: tuple[Tensor, Tensor | None] | None = None
        self.observe: Callable[[Observation], None] | None = None

    def __deepcopy__(self, memo: Any) -> Run:
        """A copy of an enabled model is none: its calls run as they would have."""
        return self

    def number(self) -> int:
        """The next layer's: layers are counted in the order in which they first attend a whole image or video.

        Raises:
            ValueError: a model before this one did not run yet, it does not say how many layers it has, and the method
                differs between layers.
        """
        if self._first is None:
            self._first = sum(run.layers(self) for run in self._before)
        self._count += 1
        return self._first + self._count - 1

    def layers(self, later: Run) -> int:
        """How many there are; before the model ran, by what its modules say of themselves.

        Raises:
            ValueError: as for `number`, of the later model.
        """
        if self._ran:
            return self._count
        model = self._model()
        across = [] if model is None else [getattr(m, "is_cross_attention", None) for m in modules_of(model)]
        if None in across and _differs_between_layers(self.policy.method):
            raise ValueError(
                f"the layers of this {type(later._model()).__name__} cannot be numbered: those of the "
                f"{type(model).__name__} come before them, which did not run yet; enable each transformer of the "
                "pipeline by itself, with what is for its own layers"
            )
        return sum(not one for one in across)

    def live(self, mask: Tensor | None, batch: int, tokens: int) -> Tensor | None:
        """`live_keys`; of one mask that all layers of a call are given, once.

        Raises:
            NotPlain: as there.
        """
        if mask is None:
            return None
        if self._mask is None or self._mask[0] is not mask:
            self._mask = mask, live_keys(mask, batch, tokens)
        return self._mask[1]

    def enter(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pre-hook: reads the timestep and the patches."""
        if model is not self._model():
            return
        self._mask = None
        arguments = arguments_of(model, args, kwargs)
        self.steps.begin(arguments.get("timestep"), arguments.get("hidden_states", arguments.get("sample")))
        self.grid = grid_of(getattr(model, "config", None), arguments)
        text = arguments.get("encoder_hidden_states")
        self.words = text.shape[1] if isinstance(text, Tensor) and text.ndim == 3 else None

    def exit(self, model: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """A forward hook, which is called after errors, too.

        Raises:
            RuntimeError: none of the model's attention came here.
        """
        if model is not self._model():
            return
        self._mask = None
        if output is None:
            self.steps.failed()
            return
        self.steps.done()
        self._ran = True
        if not self.reached:
            raise RuntimeError(
                f"none of the attention of this {type(model).__name__} came to gossamer: its processors call neither "
                "diffusers' dispatch_attention_fn nor torch's scaled_dot_product_attention; disable() the handle"
            )


def _differs_between_layers(method: Method) -> bool:
    return isinstance(method, PerHead) or bool(method.tables) or bool(getattr(method, "layers", ()))
