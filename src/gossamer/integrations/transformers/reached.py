"""Whether a model's attention came to gossamer: looked at once for each part that is called by itself."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from gossamer.integrations.transformers.configs import parts_of
from gossamer.integrations.transformers.supported import attention_layers, is_ours, text_of, towers_of

__all__ = ["Reached"]


class Reached:
    """Hooks on a model and on those of its parts that read text, which raise once if attention layers are missing.

    Whichever is called from outside (the whole, its base model, the text part of a composite, a decoder) answers for
    its own layers, and for the parts that it called. Parts that it left out are looked at when they are called. Layers
    of towers (vision, audio) are not counted: they come or not as the prompt has them.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: Counter[int | None] = Counter()
        self._depth = 0
        self._called: set[int] = set()
        self._hooks: dict[int, tuple[Any, Any]] = {}
        towers = {id(module) for tower in towers_of(model) for module in tower.modules()}
        for part in parts_of(model):
            if id(part) not in towers:
                before = part.register_forward_pre_hook(_Before(self))
                after = part.register_forward_hook(_After(self, _expected(part, model, towers)), always_call=True)
                self._hooks[id(part)] = before, after

    def counters(self, model: nn.Module) -> list[tuple[nn.Module, Counter[int | None]]]:
        """Where the layers of a model count, and those of its towers: later ones are parts of earlier ones."""
        return [(model, self._layers), *((tower, Counter()) for tower in towers_of(model))]

    def stop(self) -> None:
        """Look no more."""
        self._drop(set(self._hooks))

    def enter(self, part: nn.Module) -> None:
        if self._depth == 0:
            self._layers.clear()
            self._called.clear()
        self._depth += 1
        self._called.add(id(part))

    def leave(self, part: Any, expected: int, whole: bool) -> None:
        """After a part's forward; ``whole`` if all that it has was to run.

        Raises:
            RuntimeError: fewer layers came here than are expected.
        """
        self._depth = max(self._depth - 1, 0)
        if self._depth > 0 or not whole or not (is_ours(part.config) or is_ours(text_of(part.config))):
            return
        self._drop(self._called)
        # Layers without a number may be one module that runs several times (ALBERT): calls count.
        reached = len(self._layers.keys() - {None}) + self._layers[None]
        if reached < expected:
            raise RuntimeError(
                f"of the {expected} attention layers of {type(part).__name__}, {reached} reached "
                "gossamer in a forward pass: this model computes attention by itself, and under another mask than it "
                "expects. Its results are wrong; disable the handle and leave the model as it is"
            )

    def _drop(self, parts: set[int]) -> None:
        for hook in [hook for part in parts for hook in self._hooks.pop(part, ())]:
            hook.remove()


def _expected(part: Any, model: Any, towers: set[int]) -> int:
    """How many layers a part must have come here with; 0 where nothing says."""
    text = text_of(part.config)
    whole = part is model or part is getattr(model, "base_model", None)
    if not is_ours(text):
        return int(whole)
    layers = [module for module in part.modules() if id(module) not in towers]
    numbered = any(getattr(module, "layer_idx", None) is not None for module in layers)
    # Which of the other parts attend is written on their layers, if at all.
    return attention_layers(layers, text) if whole or numbered else 0


class _Before:
    """A hook of a part. Copies of the model have one that does nothing."""

    def __init__(self, reached: Reached | None = None) -> None:
        self._reached = reached

    def __call__(self, part: nn.Module, inputs: Any) -> None:
        if self._reached is not None and not _in_a_graph():
            self._reached.enter(part)

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


class _After(_Before):
    def __init__(self, reached: Reached | None = None, expected: int = 0) -> None:
        super().__init__(reached)
        self._expected = expected

    def __call__(self, part: nn.Module, inputs: Any, outputs: Any = None) -> None:
        if self._reached is not None and not _in_a_graph():
            # Layers may be dropped in training; and a forward that raised has no outputs.
            self._reached.leave(part, self._expected, whole=not part.training and outputs is not None)


def _in_a_graph() -> bool:
    """Graphs count when they run."""
    return torch.compiler.is_compiling() or is_tracing()
