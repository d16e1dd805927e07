"""The configs of a model and of its parts: a tree, whose nodes say which attention implementation they ask for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gossamer.integrations.transformers.owners import NAME

__all__ = ["children", "configs", "implementations", "parts_of", "path_to", "request"]


def parts_of(model: Any) -> list[Any]:
    """The parts of a model that have a config and can be called by themselves, itself the first."""
    return [model, *(part for part in model.modules() if hasattr(part, "_supports_sdpa") and part is not model)]


def configs(model: Any) -> list[Any]:
    """The configs of a model and of its parts, each once."""
    found, waiting = {}, [part.config for part in parts_of(model)]
    while waiting:
        config = waiting.pop()
        if id(config) not in found:
            found[id(config)] = config
            waiting.extend(children(config).values())
    return list(found.values())


def children(config: Any) -> dict[str, Any]:
    """The sub-configs of a composite config, by name."""
    named = {name: getattr(config, name, None) for name in getattr(config, "sub_configs", {})}
    return {name: child for name, child in named.items() if child is not None}


def implementations(config: Any, instead: Mapping[int, str] | None = None) -> str | dict[str, Any]:
    """The attention implementations of a config and its sub-configs, as ``set_attn_implementation`` takes them.

    Args:
        instead: others, by the ``id`` of a config.
    """
    own: str = (instead or {}).get(id(config)) or config._attn_implementation
    below = children(config)
    if not below:
        return own
    return {"": own} | {name: implementations(child, instead) for name, child in below.items()}


def path_to(config: Any, target: Any) -> tuple[str, ...] | None:
    """Names that lead from a config to one of its sub-configs (by identity), or None."""
    if config is target:
        return ()
    for name, child in children(config).items():
        rest = path_to(child, target)
        if rest is not None:
            return (name, *rest)
    return None


def request(config: Any, text: Any) -> str | dict[str, Any]:
    """What to ask ``set_attn_implementation`` for, so that the text part alone changes."""
    path = path_to(config, text) or ()
    if not path and not children(config):
        return NAME
    asked: str | dict[str, Any] = NAME if path else {"": NAME}
    for name in reversed(path):
        asked = {name: asked}
    return asked
