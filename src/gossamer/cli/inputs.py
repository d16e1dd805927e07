"""What subcommands read and check before anything slow is imported: environment, model's folder, profile, prompt."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gossamer import AttentionCall
from gossamer.backends import ATTEND, PLAN, attend, backend_of, cpu
from gossamer.cli.common import BadInput, first_line, one_line
from gossamer.cli.specs import takes_profile
from gossamer.methods import MaxRelative, PerHead, available
from gossamer.methods.registry import class_of
from gossamer.plan.checks import CHECK, checks_numbers
from gossamer.policy import Policy
from gossamer.profiles import Profile
from gossamer.profiles.files import parse_json, read_file, read_text, shown
from gossamer.profiles.heads import check_heads

__all__ = [
    "check_environment",
    "check_made_for",
    "check_profile",
    "number_list",
    "read_model",
    "read_profile",
    "read_prompt",
    "require_transformers",
    "text_config",
]


# What is read of a model's config here, and how large it may be at most.
_SIZES = {"num_hidden_layers": 100_000, "num_attention_heads": 100_000, "max_position_embeddings": 2**40}
# More layers or heads than any model has.
_MOST_NUMBERS = 100_000


def check_environment(device: torch.device | str = "cpu") -> None:
    """That what the environment forces is known, and runs here: a few tokens are planned for and attended."""
    forced = {name: os.environ[name] for name in (ATTEND, PLAN, CHECK, cpu.ENVIRONMENT) if os.environ.get(name)}
    if not forced:
        return
    device = torch.device(device)
    if device.type == "cuda" and not torch.cuda.is_available():
        device = torch.device("cpu")  # what is wrong with the device is said where it is used
    tokens = torch.zeros(1, 1, 64, 64, device=device)
    try:
        checks_numbers()
        for verb in ("attend", "ListWriter"):
            backend_of(tokens, verb)
        if cpu.is_available():
            cpu.active_isa(torch.float32)
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    call = AttentionCall(tokens, tokens, tokens)
    try:
        attend(call, MaxRelative(last_rows=0).plan(call))
    except (ValueError, RuntimeError) as error:
        given = ", ".join(f"{name}={value}" for name, value in forced.items())
        raise BadInput(f"{given} cannot be used here: {first_line(error)}") from error


def read_model(path: Path) -> dict[str, Any]:
    """The model's config as JSON; the folder is looked at before anything slow is imported."""
    if not os.path.exists(path):
        raise BadInput(
            f"no such model: {path} (give the folder of a transformers model or a GGUF file; nothing is downloaded)"
        )
    file = path / "config.json"
    if not os.path.exists(file):
        raise BadInput(f"{path} is not a model: it has no config.json")
    try:
        content = read_file(file)
    except OSError as error:
        raise BadInput(f"{path} is not a model: its config.json cannot be read ({error.strerror})") from error
    try:
        config = parse_json(content, strict=False)  # transformers itself writes Infinity
    except ValueError as error:
        raise BadInput(f"{path} is not a model: its config.json is {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInput(f"{path} is not a transformers model: its config.json names no model_type")
    _check_config(path, config)
    return config


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model."""
    return config.get("text_config") or config


def _check_config(path: Path, config: Mapping[str, Any]) -> None:
    """That what is read of it is of the right type."""
    what = f"{path} is not a model: its config.json:"
    if not isinstance(config["model_type"], str):
        raise BadInput(f"{what} model_type must be text, found {shown(config['model_type'])}")
    inner = config.get("text_config")
    if inner is not None and not isinstance(inner, dict):
        raise BadInput(f"{what} text_config must be an object, found {shown(inner)}")
    for name, most in _SIZES.items():
        size = text_config(config).get(name)
        if size is None:
            continue
        if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size <= most:
            raise BadInput(f"{what} {name} must be an integer, 1 to {most:,}, found {shown(size)}")


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
    """That the methods per head have a profile, that a profile has such a method, and that all are for this model."""
    per_head = [policy.method for policy in policies if isinstance(policy.method, PerHead)]
    if profile is not None and not per_head:
        names = [method.name for method in map(class_of, available()) if takes_profile(method)]
        raise BadInput(f"--profile is for the methods {', '.join(names)}; name one of them, or leave --profile out")
    text = text_config(config)
    sizes = [text.get(name) for name in ("num_hidden_layers", "num_attention_heads", "num_key_value_heads")]
    for policy in policies:
        try:
            check_heads(policy.method, *sizes, ways=_how_to_give)
        except ValueError as error:
            raise BadInput(str(error)) from error


def _how_to_give(name: str) -> str:
    return "give a file of them by --profile" if name == "layers" else f"name a file of them: {name}=@FILE"


def check_made_for(profile: Profile | None, model: Any) -> None:
    """That a profile was made for a model that is loaded; what differs only a little is said on standard error."""
    try:
        note = None if profile is None else profile.check_config(model.config)
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    if note is not None:
        print(one_line(f"note: {note}; it may fit this one less well"), file=sys.stderr)


def read_prompt(name: str) -> str:
    source = "standard input" if name == "-" else f"the prompt file {name}"
    try:
        text = _read_input() if name == "-" else read_text(name)
        text.encode()  # some terminals hand on any bytes
    except (UnicodeDecodeError, UnicodeEncodeError) as error:
        raise BadInput(f"{source} is not UTF-8 text") from error
    except FileNotFoundError as error:
        raise BadInput(f"no such prompt file: {name}") from error
    except OSError as error:
        raise BadInput(f"cannot read {source}: {error.strerror}") from error
    if not text.strip():
        raise BadInput(f"the prompt is empty ({source})")
    return text


def _read_input() -> str:
    if sys.stdin.isatty():
        print("reading the prompt from the terminal; end it with Ctrl-D", file=sys.stderr)
    return sys.stdin.read()


def number_list(option: str, given: str | None, count: int | None) -> list[int] | None:
    """``0,3-5`` as [0, 3, 4, 5]; None for all."""
    if given is None:
        return None
    numbers: set[int] = set()
    for part in given.split(","):
        first, dash, last = part.strip().partition("-")
        if not _is_number(first) or (dash and not _is_number(last)) or (dash and int(last) < int(first)):
            raise BadInput(f"--{option} takes numbers and ranges such as 0,3-5, got {given!r}")
        if int(last or first) >= (count or _MOST_NUMBERS):
            there = f"0 to {count - 1}" if count else f"below {_MOST_NUMBERS:,}"
            raise BadInput(f"--{option}: this model has {option} {there}, got {int(last or first)}")
        numbers.update(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def _is_number(text: str) -> bool:
    return text.isdecimal() and len(text) < 20


def require_transformers(command: str) -> None:
    """That it is installed; it then downloads nothing."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput(f"`gossamer {command}` needs transformers: pip install 'gossamer[cli]'") from error
