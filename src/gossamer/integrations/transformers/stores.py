"""Which caches get stores: those that a model is called with, looked at before each of its forward passes."""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
from torch import nn
from torch.jit import is_tracing  # pyright: ignore[reportPrivateImportUsage]

from gossamer.cache import CachePolicy, adopt
from gossamer.integrations.transformers.configs import parts_of
from gossamer.integrations.transformers.supported import towers_of

__all__ = ["Stores"]

logger = logging.getLogger("gossamer")


class Stores:
    """Hooks on a model and on those of its parts that read text, which give their caches stores.

    See `gossamer.cache.adopt`. ``generate`` makes a ``DynamicCache`` and passes it to the model; so do callers. A cache
    that a forward pass makes for itself gets stores when it is passed to the next one. Compiled models keep theirs,
    and so decode dense.
    """

    def __init__(self, model: nn.Module, policy: CachePolicy) -> None:
        towers = {id(module) for tower in towers_of(model) for module in tower.modules()}
        parts = [part for part in parts_of(model) if id(part) not in towers]
        self._hooks = [part.register_forward_pre_hook(_Adopt(policy), with_kwargs=True) for part in parts]

    def stop(self) -> None:
        """Leave later caches as they are. Those that have stores keep them."""
        for hook in self._hooks:
            hook.remove()


class _Adopt:
    """A hook of a part. Copies of the model have one that does nothing."""

    def __init__(self, policy: CachePolicy | None = None) -> None:
        self._policy = policy

    def __call__(self, part: nn.Module, inputs: Any, given: dict[str, Any]) -> None:
        cache = given.get("past_key_values")
        if self._policy is None or cache is None or torch.compiler.is_compiling() or is_tracing():
            return
        config: Any = part.config
        layers = getattr(config.get_text_config(decoder=True), "num_hidden_layers", None)
        if not adopt(cache, self._policy, layers):
            _say_once(type(cache).__name__)

    def __deepcopy__(self, memo: Any) -> Any:
        return type(self)()

    def __reduce__(self) -> Any:
        return type(self), ()


@functools.cache
def _say_once(kind: str) -> None:
    logger.warning(
        "a %s takes no stores: decoding reads all of it, and nothing is dropped or encoded. Stores are for layers of "
        "full attention: where a model has them, use a DynamicCache (generate's default), or Handle.new_cache()",
        kind,
    )
