"""What of a model's config its attention depends on: by it a profile knows the model that it was made for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gossamer.profiles.files import parse_json, shown

__all__ = ["attention_config", "config_hash", "differing", "key_value_heads", "written"]

# What makes it another model. `attention_config` has these and more.
SHAPE = (
    "model_type",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_size",
)
_SCALES = ("attn_logit_softcapping", "query_pre_attn_scalar", "attention_multiplier", "attention_chunk_size")
_OTHERS = ("rotary", "sliding_window", *_SCALES)
_MOST = 20_000  # characters of it as text


def attention_config(config: Any) -> dict[str, Any]:
    """The fields that say which attention a model computes, of a transformers config, a composite one's text part.

    Names, dtypes, tokens, what is left at the default of its class and how transformers spells it change nothing:
    one model has the same in every version that gossamer runs with.

    Returns:
        sizes and kind (``model_type``, layers, heads, key/value heads, dimension of a head, width), the sliding
        window where layers have one, ``rotary`` (``[theta, kind, factor]`` of each rotary embedding) and scales.
    """
    text = config.get_text_config(decoder=True)
    found = {name: getattr(text, name, None) for name in (*SHAPE, *_SCALES)}
    heads, width = found["num_attention_heads"], found["hidden_size"]
    found["num_key_value_heads"] = found["num_key_value_heads"] or heads
    if found["head_dim"] is None and heads and width:
        found["head_dim"] = width // heads
    if getattr(text, "use_sliding_window", True):
        found["sliding_window"] = getattr(text, "sliding_window", None)
    plain: dict[str, Any] = {name: _plain(value) for name, value in found.items() if value is not None}
    rotary = sorted({_rotary(entry, text) for entry in _rotaries(text)}, key=str)
    return plain | ({"rotary": [list(one) for one in rotary]} if rotary else {})


def config_hash(config: Any) -> str:
    """SHA-256 of `attention_config`, in hexadecimal."""
    return hash_of(written(config))


def hash_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def written(config: Any) -> str:
    """`attention_config` as one line of JSON, of which `config_hash` is the hash."""
    return json.dumps(attention_config(config), sort_keys=True)


def differing(text: str, config: Any) -> tuple[list[str], list[str]] | None:
    """In what a model differs from one whose `written` config is given, as words: in its `SHAPE`, and otherwise.

    None where the text is none that `written` gives.
    """
    theirs = _read(text)
    if theirs is None:
        return None
    mine = attention_config(config)

    def of(names: Sequence[str]) -> list[str]:
        differ = [name for name in names if theirs.get(name) != mine.get(name)]
        return [f"{name} {shown(theirs.get(name))} (here {shown(mine.get(name))})" for name in differ]

    return of(SHAPE), of(_OTHERS)


def key_value_heads(text: str) -> int | None:
    """Of a model whose `written` config is given; None where the text is none that `written` gives."""
    groups = (_read(text) or {}).get("num_key_value_heads")
    return groups if isinstance(groups, int) and not isinstance(groups, bool) else None


def _read(text: str) -> dict[str, Any] | None:
    try:
        found = parse_json(text) if len(text) <= _MOST else None
    except ValueError:
        return None
    return found if isinstance(found, dict) and set(SHAPE) <= found.keys() else None


def _rotaries(text: Any) -> Iterator[Mapping[str, Any]]:
    """Of each kind of layer, as any version of transformers spells them."""
    given = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None)
    parts = list(given.values()) if isinstance(given, Mapping) else []
    if parts and all(part is None or isinstance(part, Mapping) for part in parts):
        yield from (part for part in parts if part)
    elif parts or getattr(text, "rope_theta", None) is not None:
        yield given if isinstance(given, Mapping) else {}
    local = getattr(text, "rope_local_base_freq", None)
    if local is not None:
        yield {"rope_theta": local}


def _rotary(entry: Mapping[str, Any], text: Any) -> tuple[Any, str, Any]:
    theta = entry.get("rope_theta", getattr(text, "rope_theta", None))
    kind = entry.get("rope_type", entry.get("type", "default"))
    return _plain(theta), str(kind), _plain(entry.get("factor", 1.0))


def _plain(value: Any) -> Any:
    """A whole number as an integer, whichever way it was written; lists and objects as text."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value if value is None or isinstance(value, int | float | str) else str(value)
