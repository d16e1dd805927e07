"""``gossamer find-channels``: the channels by which `double_sparsity` finds a model's tokens."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json
from gossamer.cli.inputs import check_environment, read_model, require_transformers, text_config
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.training import check_length, check_place, check_seed, read_texts

__all__ = ["add_parser"]

_LEAST = {"samples": 1, "length": 2}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "find-channels", execute, "find the channels of keys that double_sparsity reads")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("--texts", nargs="+", required=True, metavar="FILE", help="plain texts to read")
    parser.add_argument("-o", "--out", type=Path, required=True, help="JSON file of the channels")
    parser.add_argument(
        "--by",
        choices=("k", "keys", "q", "qk"),
        default="k",
        help="what weighs: |q * k| by key/value head (k, default) or query head (qk), |k| (keys), |q| (q)",
    )
    parser.add_argument("--samples", type=int, default=256, metavar="N", help="passages (default: %(default)s)")
    parser.add_argument("--length", type=int, default=512, help="tokens of a passage (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=42, help="of the passages (default: %(default)s)")
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    for name, least in _LEAST.items():
        if not least <= getattr(arguments, name) < 2**31:
            raise BadInput(f"--{name} must be at least {least}, got {getattr(arguments, name)}")
    check_seed(arguments.seed)
    check_place(arguments.out)
    check_environment(arguments.device)
    arguments.model = model_folder(arguments.model)
    config = read_model(arguments.model)
    check_length(arguments.length, text_config(config).get("max_position_embeddings"))
    texts = read_texts(arguments.texts)
    require_transformers("find-channels")
    from tqdm import tqdm

    from gossamer.calibrate.channels import find_channels
    from gossamer.calibrate.texts import windows
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.profiles import write_channels

    tokenizer = load_tokenizer(arguments.model)
    tokenizer.model_max_length = sys.maxsize
    model = load_checked(arguments.model, arguments.dtype, arguments.device)
    bar = tqdm(total=arguments.samples, file=sys.stderr, disable=not sys.stderr.isatty(), unit="passage")
    try:
        sample = windows(tokenizer, texts, arguments.length, arguments.seed)
        channels = find_channels(model, map(sample, range(arguments.samples)), arguments.by, lambda _: bar.update(1))
        write_channels(arguments.out, channels, "k" if arguments.by == "keys" else arguments.by)
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    finally:
        bar.close()
    if arguments.json:
        sizes = {"layers": len(channels), "heads": len(channels[0]), "channels": len(channels[0][0])}
        print_json({"out": str(arguments.out), "by": arguments.by, "samples": arguments.samples} | sizes)
    print(f"{arguments.out}: {len(channels)} layers of {len(channels[0])} heads", file=sys.stderr)
    return 0
