"""Who decides for an attention module: the one piece of process-wide state, written by `Handle` alone."""

from __future__ import annotations

import functools
import logging
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

from torch import Tensor, nn
from torch.utils.weak import WeakIdKeyDictionary

from gossamer.attention import CallRecord
from gossamer.call import AttentionCall
from gossamer.integrations.stats import Observation
from gossamer.layout import ModalityLayout
from gossamer.plan import Extent
from gossamer.policy import Policy
from gossamer.rotary import Rotary

__all__ = [
    "NAME",
    "Observation",
    "Owner",
    "former_of",
    "key_of",
    "lend",
    "module_of",
    "owner_for",
    "owner_of",
    "set_owner",
]

logger = logging.getLogger("gossamer")

NAME = "gossamer"


def _nothing(layer: int | None, extent: Extent) -> dict[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, eq=False)
class Owner:
    """Who decides for an attention module: the policy, and where its calls are recorded.

    Fields:
        reached: how often each layer's attention came here, whatever became of the call; None for those without a
            ``layer_idx``.
        rotary: how the model turned a call's q and k, where somebody asked for it.
        instead: makes the output ``[B, H, S, Dv]`` of calls with several queries, in place of the policy.
        given: what else a call says of itself, by its layer and extent.
        modalities: which of a call's tokens are text, by its extent and number of query rows; where a method or an
            observer looks at it.
        context: the same of all calls, where several processes share a prompt; what it is given has no extent.
    """

    policy: Policy
    record: Callable[[CallRecord], None] | None
    observe: Callable[[Observation], None] | None = None
    reached: Counter[int | None] = field(default_factory=Counter)
    rotary: Callable[[Extent], Rotary | None] | None = None
    instead: Callable[[AttentionCall], Tensor] | None = None
    context: Callable[[AttentionCall], Tensor] | None = None
    given: Callable[[int | None, Extent], dict[str, Any]] = _nothing
    modalities: Callable[[Extent, int], ModalityLayout | None] | None = None

    def about(self, layer: int | None, extent: Extent, queries: int, state: Any) -> dict[str, Any]:
        """What a call of so many query rows says of itself besides its tensors.

        Args:
            state: the store's, where the layer has one.
        """
        wanted = self.modalities is not None and queries > 1
        wanted = wanted and (self.observe is not None or any(part.modal for part in self.policy.method.parts()))
        layout = self.modalities(extent, queries) if wanted and self.modalities is not None else None
        own = self.given(layer, extent) if state is None else {"state": state}
        return ({} if layout is None else {"layout": layout}) | own


_owners: WeakKeyDictionary[nn.Module, Owner] = WeakKeyDictionary()
# Compiled graphs name a module by a number: drawn, so that a program from another process meets none of ours.
_keys: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()
_modules: WeakValueDictionary[int, nn.Module] = WeakValueDictionary()
_draw = random.SystemRandom()
# What configs asked for before they were lent, and how many models use each. Two models may share a config object.
_lent: Any = WeakIdKeyDictionary()


def owner_of(module: nn.Module) -> Owner | None:
    return _owners.get(module)


def set_owner(module: nn.Module, owner: Owner | None) -> None:
    if owner is None:
        _owners.pop(module, None)
    else:
        _owners[module] = owner


def owner_for(module: nn.Module) -> Owner:
    """Who decides for a module that asks for our attention: its own owner, else one that does as the situation wants.

    A model that is not enabled but shares its config with one that is stays as it was: dense.
    """
    owner = _owners.get(module)
    if owner is not None:
        return owner
    return _default_owner() if former_of(getattr(module, "config", None)) is None else _bystander()


def lend(config: Any, previous: str, models: int) -> str | None:
    """Count a model more (1) or less (-1) that uses a config under our name.

    Returns:
        What the config asked for before the first of them, once no model uses it any more; else None.
    """
    first, count = _lent.get(config, (previous, 0))
    _lent[config] = (first, count + models)
    if count + models > 0:
        return None
    del _lent[config]
    return first


def former_of(config: Any) -> str | None:
    """What a config asked for before it was lent; None for one that is not."""
    return None if config is None else _lent.get(config, (None, 0))[0]


def key_of(module: nn.Module) -> int:
    """The number by which `module_of` finds a module, as long as it lives."""
    key = _keys.get(module)
    if key is None:
        key = _keys[module] = _draw.getrandbits(62)
        _modules[key] = module
    return key


def module_of(key: int) -> nn.Module | None:
    return _modules.get(key)


@functools.cache
def _bystander() -> Owner:
    return Owner(Policy.of("dense"), None)


@functools.cache
def _default_owner() -> Owner:
    logger.warning(
        "a model uses attn_implementation=%r without gossamer.enable(model): it runs the default policy, unrecorded. "
        "A deep copy of an enabled model is such a one; enable it too.",
        NAME,
    )
    return Owner(replace(Policy.of("minference"), training=False), None)
