"""What subcommands read and check before anything slow is imported: environment, model's folder, profile, prompt."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer.backends import backend_of, cpu
from gossamer.cli.common import BadInput, first_line
from gossamer.cli.specs import takes_profile
from gossamer.methods import PerHead, available
from gossamer.methods.registry import class_of
from gossamer.policy import Policy
from gossamer.profiles import Profile

__all__ = ["check_environment", "check_profile", "read_model", "read_profile", "read_prompt"]


def check_environment() -> None:
    try:
        for verb in ("attend", "ListWriter"):
            backend_of(torch.empty(1, 1, 1, 64), verb)
        if cpu.is_available():
            cpu.active_isa(torch.float32)
    except ValueError as error:
        raise BadInput(first_line(error)) from error


def read_model(path: Path) -> dict[str, Any]:
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


def read_profile(path: Path | None) -> Profile | None:
    if path is None:
        return None
    try:
        return Profile.load(path)
    except OSError as error:
        raise BadInput(f"cannot read the profile {path}: {error.strerror}") from error
    except (ValueError, TypeError) as error:
        raise BadInput(f"the profile {path}: {first_line(error)}") from error


def check_profile(policies: Sequence[Policy], profile: Profile | None, config: dict[str, Any]) -> None:
    """That the methods per head have a profile, that a profile has such a method, and that it is for this model."""
    per_head = [policy.method for policy in policies if isinstance(policy.method, PerHead)]
    if profile is not None and not per_head:
        names = [method.name for method in map(class_of, available()) if takes_profile(method)]
        raise BadInput(f"--profile is for the methods {', '.join(names)}; name one of them, or leave --profile out")
    text = config.get("text_config") or config
    layers, heads = text.get("num_hidden_layers"), text.get("num_attention_heads")
    for method in per_head:
        if not method.layers and type(method).plan is PerHead.plan:
            raise BadInput(f"{method.name} has no methods for this model's heads; give a file of them by --profile")
        shape = len(method.layers), len(method.layers[0]) if method.layers else 0
        if method.layers and layers and heads and shape != (layers, heads):
            raise BadInput(
                f"the profile is for {shape[0]} layers of {shape[1]} heads, but this model has {layers} layers of "
                f"{heads}; use a profile made for it"
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
