"""What `enable` refuses because it would compute something else, and how many layers it expects to see."""

from __future__ import annotations

from typing import Any

from gossamer.integrations.transformers.attention import BIDIRECTIONAL
from gossamer.integrations.transformers.owners import NAME

__all__ = ["attention_layers", "is_ours", "refuse"]


def refuse(model: Any, text: Any, name: str) -> None:
    """Raise for what declares that it cannot be served, and for a config that another model uses otherwise."""
    parts = [part for part in model.modules() if hasattr(part, "_supports_sdpa")]
    for part in [part for part in parts if part.config is text] or [model]:
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


def attention_layers(model: Any, config: Any) -> int:
    """How many layers of a model attend, as far as its config and its modules say; at least 1."""
    # Models that run their layers several times count each time (HRM-Text).
    numbers = {getattr(module, "layer_idx", None) for module in model.modules()} - {None}
    return max(1, min(_layers_of(config), len(numbers) or _layers_of(config)))


def _layers_of(config: Any) -> int:
    """Layers that attend to the prompt; those that attend to images alone are left out of prompts without (Mllama)."""
    of_images = len(getattr(config, "cross_attention_layers", None) or ())
    kinds = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    if kinds:
        return sum("attention" in kind and "linear" not in kind for kind in kinds)
    return (getattr(config, "num_hidden_layers", None) or 1) - of_images


def is_ours(config: Any) -> bool:
    return config._attn_implementation in (NAME, BIDIRECTIONAL)
