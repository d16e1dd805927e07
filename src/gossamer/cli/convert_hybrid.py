"""``gossamer convert-hybrid``: a model some of whose layers attend everything and the others by LongGen's patterns."""

from __future__ import annotations

import argparse
import hashlib
import re
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json
from gossamer.cli.inputs import check_environment, number_list, read_model, require_transformers, text_config
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import parse_method
from gossamer.cli.training import check_length, check_place, check_seed, read_texts, step_progress
from gossamer.methods import Method
from gossamer.profiles.hybrid import PLACEMENTS, full_layers

__all__ = ["add_parser"]

# The paper's two, of blocks of 64 tokens; its 32 recent blocks are for both.
_PATTERNS = {"sink": "longgen", "stride": "longgen(sink=0,stride=64)"}
_LEAST = {"steps": 0, "length": 64, "save_every": 1}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "convert-hybrid", execute, "make most layers of a model sparse, and mend it")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the model and its profile.json")
    parser.add_argument("--full-layers", metavar="N", help="that stay full: a share or a number (default: 1/3)")
    parser.add_argument(
        "--placement", default="middle", help="of these: middle, first, last, interleaved, or numbers such as 1,4-6"
    )
    parser.add_argument(
        "--pattern", default="sink", help="of all other layers: sink, stride, or a method with fields (default: sink)"
    )
    parser.add_argument("--texts", nargs="+", default=[], metavar="FILE", help="plain texts to train on, for --steps")
    parser.add_argument("--steps", type=int, help="of training (default: 500 with --texts, else none)")
    parser.add_argument("--length", type=int, default=8192, help="tokens of a step (default: %(default)s)")
    parser.add_argument("--rate", type=float, default=2e-5, help="largest learning rate (default: %(default)s)")
    parser.add_argument("--distil", action="store_true", help="learn the predictions of the model before, not the text")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="steps (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where it is trained (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    _check(arguments)
    check_environment(arguments.device)
    arguments.model = model_folder(arguments.model)
    config = read_model(arguments.model)
    pattern, full = _pattern(arguments.pattern), _full(arguments, text_config(config).get("num_hidden_layers"))
    if arguments.steps:
        check_length(arguments.length, text_config(config).get("max_position_embeddings"))
    texts = read_texts(arguments.texts)
    require_transformers("convert-hybrid")
    from gossamer.calibrate.hybrid import PROFILE, hybrid_of, save_hybrid
    from gossamer.cli.generation import load_checked, load_tokenizer

    stored = _stored(config)
    tokenizer = load_tokenizer(arguments.model)
    model = load_checked(arguments.model, "float32" if arguments.steps else stored, arguments.device)
    try:
        profile = hybrid_of(model, full, pattern, name=arguments.model.name)
        training = _train(arguments, model, tokenizer, profile, texts) if arguments.steps else None
        save_hybrid(model.to(getattr(_torch(), stored)), tokenizer, profile, arguments.out)
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    losses = []
    if training is not None:
        training.done()
        losses = training.losses
        print(f"loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last", file=sys.stderr)
    if arguments.json:
        print_json({"out": str(arguments.out), "full_layers": full, "steps": len(losses), "losses": losses})
    shown = ", ".join(map(str, full)) or "none"
    print(f"{arguments.out}: full layers {shown}; run it with --profile {arguments.out / PROFILE}", file=sys.stderr)
    return 0


def _train(arguments: argparse.Namespace, model: Any, tokenizer: Any, profile: Any, texts: list[str]) -> Any:
    from gossamer.calibrate.hybrid import train_hybrid
    from gossamer.calibrate.texts import windows
    from gossamer.calibrate.training import Schedule
    from gossamer.cli.generation import load_model
    from gossamer.evaluate.subject import Subject

    limit, tokenizer.model_max_length = tokenizer.model_max_length, sys.maxsize
    sample = windows(tokenizer, texts, arguments.length, arguments.seed)
    tokenizer.model_max_length = limit
    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    about = {"model": Subject(model, tokenizer, "").fingerprint(), "texts": digest}
    teacher = None
    if arguments.distil:
        teacher = load_model(arguments.model, "float32", progress=False).to(arguments.device)
        teacher.requires_grad_(False)
    return train_hybrid(
        model,
        profile,
        sample,
        Schedule(arguments.steps, arguments.rate),
        teacher=teacher,
        about=about | {"length": arguments.length, "seed": arguments.seed},
        path=arguments.out.with_name(arguments.out.name + ".partial"),
        progress=step_progress(arguments.steps),
        save_every=arguments.save_every,
    )


def _check(arguments: argparse.Namespace) -> None:
    if arguments.steps is None:
        arguments.steps = 500 if arguments.texts else 0
    if bool(arguments.steps) != bool(arguments.texts):
        raise BadInput("training needs both --texts and --steps of at least 1; leave out both to convert alone")
    for name, least in _LEAST.items():
        value = getattr(arguments, name)
        if not least <= value < 2**31:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 < arguments.rate <= 10:
        raise BadInput(f"--rate must be above 0 and at most 10, got {arguments.rate}")
    if arguments.distil and not arguments.steps:
        raise BadInput("--distil is a way of training; give --texts as well")
    check_seed(arguments.seed)
    check_place(arguments.out)


def _pattern(given: str) -> Method:
    try:
        pattern = parse_method(_PATTERNS.get(given, given))
    except (ValueError, TypeError) as error:
        names = ", ".join(_PATTERNS)
        raise BadInput(f"--pattern: {first_line(error)} (or one of LongGen's: {names})") from error
    if pattern.name in ("dense", "per_head", "minference", "auto") or pattern.tables:
        raise BadInput(f"--pattern is a method for single heads, such as longgen or a_shape, got {pattern.name}")
    return pattern


def _full(arguments: argparse.Namespace, layers: int | None) -> list[int]:
    if layers is None:
        raise BadInput(f"{arguments.model} says no num_hidden_layers in its config.json; it cannot be converted")
    if arguments.placement not in PLACEMENTS:
        if arguments.full_layers is not None:
            raise BadInput("--placement with numbers says which layers stay full; leave --full-layers out")
        return number_list("placement", arguments.placement, layers) or []
    try:
        return list(full_layers(layers, _count(arguments.full_layers or "1/3"), arguments.placement))
    except ValueError as error:
        raise BadInput(f"--full-layers: {first_line(error)}") from error


def _count(given: str) -> int | Fraction:
    """``12`` is a number of layers, and ``1/3`` or ``0.4`` a share."""
    if re.fullmatch(r"\d{1,6}", given):
        return int(given)
    if re.fullmatch(r"\d{1,6}/0*[1-9]\d{0,5}|\d{0,6}\.\d{1,9}", given):
        return Fraction(given)
    raise BadInput(f"--full-layers takes a number such as 12 or a share such as 1/3, got {given!r}")


def _stored(config: dict[str, Any]) -> str:
    """The dtype that the model's weights have in its files."""
    parts = (config, text_config(config))
    named = next((d for part in parts for d in (part.get("dtype"), part.get("torch_dtype")) if d), "float32")
    return named if named in ("float32", "bfloat16", "float16") else "float32"


def _torch() -> Any:
    import torch

    return torch
