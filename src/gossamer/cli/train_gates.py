"""``gossamer train-gates``: gates of SeerAttention or DuoAttention for a model, which stays as it is."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json
from gossamer.cli.inputs import check_environment, read_model, require_transformers, text_config
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.training import check_length, check_place, check_seed, read_texts, step_progress

__all__ = ["add_parser"]

# Steps and learning rate of the authors; the length is what they trained on, as far as a model takes it.
_DEFAULTS = {"seer": (500, 1e-3, 8192), "duo": (2000, 0.02, 8192)}
_SHORTEST = 1000  # tokens of duo's prompts
_LEAST = {"steps": 1, "length": 64, "block": 1, "sink": 0, "recent": 1, "save_every": 1, "passkeys": 1, "words": 1}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "train-gates", execute, "train the gates of seer_attention or duo_attention")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="plain texts to train on")
    parser.add_argument("--kind", choices=sorted(_DEFAULTS), default="seer", help="default: %(default)s")
    parser.add_argument("-o", "--out", type=Path, required=True, help="file of the gates; for duo a folder")
    parser.add_argument("--steps", type=int, help="default: 500 for seer, 2000 for duo")
    parser.add_argument("--length", type=int, help="tokens of a step, for duo at most (default: 8192)")
    parser.add_argument("--rate", type=float, help="largest learning rate (default: 0.001 for seer, 0.02 for duo)")
    parser.add_argument("--block", type=int, default=64, help="of seer's gates, in tokens (default: %(default)s)")
    parser.add_argument("--passkeys", type=int, default=10, metavar="N", help="of duo's prompts (default: %(default)s)")
    parser.add_argument("--words", type=int, default=32, metavar="N", help="of a passkey (default: %(default)s)")
    parser.add_argument("--sink", type=int, default=128, help="of duo's streaming heads (default: %(default)s)")
    parser.add_argument("--recent", type=int, default=256, help="likewise (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--save-every", type=int, default=50, metavar="N", help="steps (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    _check(arguments)
    check_environment(arguments.device)
    arguments.model = model_folder(arguments.model)
    config = read_model(arguments.model)
    check_length(arguments.length, text_config(config).get("max_position_embeddings"))
    texts = read_texts(arguments.texts)
    require_transformers("train-gates")
    from gossamer.cli.generation import load_checked, load_tokenizer

    tokenizer = load_tokenizer(arguments.model)
    tokenizer.model_max_length = sys.maxsize
    model = load_checked(arguments.model, arguments.dtype, arguments.device)
    model.requires_grad_(False)
    run = {"seer": _seer, "duo": _duo}[arguments.kind]
    try:
        training = run(arguments, model, tokenizer, texts)
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    training.done()
    losses = training.losses
    if arguments.json:
        print_json({"out": str(arguments.out), "kind": arguments.kind, "steps": len(losses), "losses": losses})
    print(f"{arguments.out}: loss {losses[0]:.4g} at first, {losses[-1]:.4g} at last", file=sys.stderr)
    return 0


def _seer(arguments: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> Any:
    from gossamer.calibrate.seer import train_seer
    from gossamer.calibrate.texts import windows

    sample = windows(tokenizer, texts, arguments.length, arguments.seed)
    gates, training = train_seer(model, sample, block=arguments.block, **_common(arguments, model, tokenizer, texts))
    about = {"model": type(model).__name__, "steps": str(arguments.steps), "length": str(arguments.length)}
    gates.save(arguments.out, about)
    return training


def _duo(arguments: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> Any:
    from gossamer.calibrate.duo import train_duo
    from gossamer.calibrate.passkeys import Passkeys
    from gossamer.profiles import write_duo

    size = {"longest": arguments.length, "shortest": min(_SHORTEST, arguments.length)}
    counts = {"keys": arguments.passkeys, "words": arguments.words, "seed": arguments.seed}
    prompts = Passkeys(tokenizer, texts, **size, **counts)
    common = _common(arguments, model, tokenizer, texts)
    common["about"] |= {"passkeys": arguments.passkeys, "words": arguments.words}
    gates, training = train_duo(model, prompts.sample, sink=arguments.sink, recent=arguments.recent, **common)
    write_duo(arguments.out, gates, sink=arguments.sink, recent=arguments.recent)
    return training


def _common(arguments: argparse.Namespace, model: Any, tokenizer: Any, texts: list[str]) -> dict[str, Any]:
    import hashlib

    from gossamer.calibrate.training import Schedule
    from gossamer.evaluate.subject import Subject

    digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
    fingerprint = Subject(model, tokenizer, "").fingerprint()
    about = {"model": fingerprint, "texts": digest, "length": arguments.length, "seed": arguments.seed}
    return {
        "schedule": Schedule(arguments.steps, arguments.rate, "cosine" if arguments.kind == "seer" else "trapezoid"),
        "about": about,
        "path": arguments.out.with_name(arguments.out.name + ".partial"),
        "progress": step_progress(arguments.steps),
        "save_every": arguments.save_every,
    }


def _check(arguments: argparse.Namespace) -> None:
    steps, rate, length = _DEFAULTS[arguments.kind]
    arguments.steps = steps if arguments.steps is None else arguments.steps
    arguments.rate = rate if arguments.rate is None else arguments.rate
    arguments.length = length if arguments.length is None else arguments.length
    for name, least in _LEAST.items():
        value = getattr(arguments, name, least)
        if not least <= value < 2**31:
            raise BadInput(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not 0 < arguments.rate <= 10:
        raise BadInput(f"--rate must be above 0 and at most 10, got {arguments.rate}")
    check_seed(arguments.seed)
    check_place(arguments.out)
