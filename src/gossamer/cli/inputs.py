"""What subcommands check before anything slow is imported: the environment, the model's folder, profiles, prompts."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from gossamer.attention import Policy
from gossamer.backends import cpu
from gossamer.cli.common import BadInput, first_line
from gossamer.profiles import Profile

__all__ = ["check_environment", "check_model", "check_profile", "read_prompt"]


def check_environment() -> None:
    try:
        if cpu.is_available():
            cpu.active_isa(torch.float32)
    except ValueError as error:
        raise BadInput(first_line(error)) from error


def check_model(path: Path) -> dict[str, Any]:
    """The model's config as JSON; the folder is looked at before anything slow is imported."""
    if not path.exists():
        raise BadInput(f"no such model: {path} (give the folder of a transformers model; nothing is downloaded)")
    file = path / "config.json"
    if not file.is_file():
        raise BadInput(f"{path} is not a model: it has no config.json")
    try:
        config = json.loads(file.read_text())
    except (ValueError, OSError) as error:
        raise BadInput(f"{path} is not a model: its config.json cannot be read ({first_line(error)})") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"{path} is not a transformers model: its config.json names no model_type")
    return config


def check_profile(policy: Policy, config: dict[str, Any]) -> None:
    profile: Profile | None = getattr(policy.method, "profile", None)
    text = config.get("text_config") or config
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    if profile is not None and layers and heads and (profile.layers, profile.heads) != (layers, heads):
        raise BadInput(
            f"the profile is for {profile.layers} layers of {profile.heads} heads, but this model has {layers} layers "
            f"of {heads}; use a profile made for it"
        )


def read_prompt(name: str) -> str:
    if name == "-":
        if sys.stdin.isatty():
            print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
        text, source = sys.stdin.read(), "standard input"
    else:
        path, source = Path(name), name
        if not path.exists():
            raise BadInput(f"no such prompt file: {name}")
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise BadInput(f"the prompt file {name} is not UTF-8 text") from error
        except OSError as error:
            raise BadInput(f"cannot read the prompt file {name}: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"the prompt is empty ({source})")
    return text
