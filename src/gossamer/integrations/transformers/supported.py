"""What `enable` refuses because it would compute something else, and how many layers it expects to see."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from gossamer.integrations.transformers.attention import BIDIRECTIONAL
from gossamer.integrations.transformers.configs import children, parts_of, path_to
from gossamer.integrations.transformers.owners import NAME

__all__ = ["attention_layers", "is_ours", "refuse", "text_of", "towers_of"]


def refuse(model: Any, text: Any, name: str) -> None:
    """Raise for what declares that it cannot be served, and for a config that another model uses otherwise."""
    read = text, text_of(text)  # of a composite that is enabled whole, its text part too
    for part in [part for part in parts_of(model) if any(part.config is config for config in read)] or [model]:
        if not part._supports_sdpa and not part._supports_attention_backend:
            raise ValueError(
                f"{type(part).__name__} declares that its attention can't be replaced (_supports_sdpa and "
                "_supports_attention_backend are both False): it would compute something else. Leave it as it is"
            )
    if any("compressed" in kind for kind in getattr(text, "layer_types", None) or ()):
        raise ValueError(
            f"{type(model).__name__} adds compressed keys to those that its mask is for, and joins masks as eager "
            "attention has them: under any other mask it would compute something else. Leave it as it is"
        )
    if is_ours(text) and text._attn_implementation != name:
        raise ValueError(
            f"this {type(model).__name__} shares its config with a model that is enabled as "
            f"{text._attn_implementation!r}, not {name!r}; give it one of its own: copy.deepcopy(config)"
        )


def attention_layers(modules: Iterable[Any], config: Any) -> int:
    """How many of the layers of a model or part attend, as far as the config and the modules say; at least 1."""
    # Models that run their layers several times count each time (HRM-Text).
    numbers = {getattr(module, "layer_idx", None) for module in modules} - {None}
    return max(1, min(_layers_of(config), len(numbers) or _layers_of(config)))


def text_of(config: Any) -> Any:
    """The config of what reads text: itself, of a composite config a sub-config, of an encoder-decoder's a copy."""
    try:
        return config.get_text_config(decoder=True)
    except ValueError:  # several parts read text
        return config


def towers_of(model: Any) -> list[Any]:
    """The parts of a composite model beside its text: those with another sub-config of its own."""
    text = text_of(model.config)
    if path_to(model.config, text) is None:
        return []
    others = {id(config) for config in _beside(model.config, text)}
    return [part for part in parts_of(model) if id(part.config) in others]


def _beside(config: Any, text: Any) -> list[Any]:
    """The sub-configs, at any depth, that do not lead to a text config and are not below it."""
    found = []
    for child in [] if config is text else children(config).values():
        found += _beside(child, text) + ([] if path_to(child, text) is not None else [child])
    return found


def _layers_of(config: Any) -> int:
    """Layers that attend to the prompt; those that attend to images alone are left out of prompts without (Mllama)."""
    of_images = len(getattr(config, "cross_attention_layers", None) or ())
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds:
        return sum("attention" in kind and "linear" not in kind for kind in kinds)
    # An encoder may have run before, and more layers than the decoder (T5).
    decoder = getattr(config, "num_decoder_layers", None) if getattr(config, "is_encoder_decoder", False) else None
    return (decoder or getattr(config, "num_hidden_layers", None) or 1) - of_images


def is_ours(config: Any) -> bool:
    return config._attn_implementation in (NAME, BIDIRECTIONAL)
