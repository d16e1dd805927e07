"""``gossamer compress``: a model with other linear layers, as a folder with a card of what that cost."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table, unicode
from gossamer.cli.inputs import check_environment, read_model, require_transformers, text_config
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import field_values, parse_task, split_specs
from gossamer.cli.subjects import check_device, check_numbers
from gossamer.cli.training import check_length, read_texts
from gossamer.profiles.files import file_name, parse_json, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.compressed import Card, Recipe
    from gossamer.compressed.measures import Measures

__all__ = ["add_parser"]

_STORED = ("float32", "bfloat16", "float16")
_LEAST = {"samples": 1, "length": 16, "windows": 1, "limit": 1, "task_length": 64, "rounds": 1}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "compress", execute, "replace a model's linear layers, and say what that cost")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("-o", "--out", type=Path, required=True, help="folder for the model and its card")
    parser.add_argument(
        "--recipe", required=True, help="sparsegpt, magnitude, billm, sign_and_scale, rounded, int8; see the manual"
    )
    parser.add_argument("--pattern", help="of zeros: their share, such as 0.7, or N:M, such as 2:4")
    parser.add_argument(
        "--set", action="append", default=[], metavar="FIELD=VALUE", help="a field of the recipe; may be repeated"
    )
    parser.add_argument(
        "--calibrate", nargs="+", required=True, metavar="FILE", help='texts, or .jsonl with a "text" in each line'
    )
    parser.add_argument("--samples", type=int, default=32, help="passages of these texts (default: %(default)s)")
    parser.add_argument(
        "--length", type=int, default=2048, help="tokens of each, and of a window of held-out text (default: 2048)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the passages and the tasks (default: %(default)s)")
    parser.add_argument(
        "--dtype", choices=("stored", *_STORED), default="stored", help="of what is written (default: as the model's)"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a model that lies in the folder")
    parser.add_argument("--card", action=argparse.BooleanOptionalAction, default=True, help="measure (the default)")
    parser.add_argument("--held-out", metavar="FILE", help="text to measure on (default: gossamer's own)")
    parser.add_argument("--windows", type=int, default=16, help="of that text (default: %(default)s)")
    parser.add_argument(
        "--tasks", default="passkey,needle_single", metavar="LIST", help="for answers, or none (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=20, help="prompts of a task (default: %(default)s)")
    parser.add_argument("--task-length", type=int, default=1024, help="tokens of each (default: %(default)s)")
    parser.add_argument("--lengths", default="512,2k", help="prompts that are timed, in tokens (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=5, help="of what is timed (default: %(default)s)")
    parser.add_argument("--times", action=argparse.BooleanOptionalAction, default=True, help="time (the default)")
    parser.add_argument("--chat", action="store_true", help="wrap tasks in the tokenizer's chat template")
    parser.add_argument("--device", default="cpu", help="where it is compressed and measured (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    check_numbers(arguments, _LEAST)
    check_device(arguments.device)
    check_environment(arguments.device)
    folder = model_folder(arguments.model)
    config = read_model(folder)
    if config.get("quantization_config") is not None:
        raise BadInput(f"{arguments.model} is quantised or compressed already; give the model that it was made from")
    check_length(arguments.length, text_config(config).get("max_position_embeddings"))
    _check_place(arguments, folder)
    texts = _texts(arguments.calibrate)
    require_transformers("compress")
    stored = _stored(config) if arguments.dtype == "stored" else arguments.dtype
    try:
        recipe = _recipe(arguments)
        measures = _measures(arguments, texts) if arguments.card else None
        with _begun(arguments.out) as begun, _teller() as told:
            spent = _compress(arguments, folder, begun, recipe, measures, texts, stored, told)
            given = arguments, folder, begun, recipe
            card = None if measures is None else _card(*given, measures, stored, spent, told)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    _print(arguments, recipe, card)
    return 0


def _compress(
    arguments: argparse.Namespace,
    folder: Path,
    begun: Path,
    recipe: Recipe,
    measures: Measures | None,
    texts: list[str],
    stored: str,
    told: Callable[[str], None],
) -> float:
    """Write the compressed model; seconds that compressing took.

    What cannot be measured afterwards is said before anything slow is done.
    """
    import torch

    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.compressed.model import compress
    from gossamer.compressed.sequential import decoder_layers, linear_layers
    from gossamer.evaluate.subject import Subject

    tokenizer = load_tokenizer(folder)
    model = load_checked(folder, "float32", arguments.device)
    place, layers = decoder_layers(model)
    recipe.check({f"{place}.{name}": linear for name, linear in linear_layers(layers)})
    samples = _samples(arguments, tokenizer, texts)
    if measures is not None:
        limit, tokenizer.model_max_length = tokenizer.model_max_length, sys.maxsize
        measures.check(Subject(model, tokenizer, "", chat=arguments.chat))
        tokenizer.model_max_length = limit
    done = 0

    def layer(name: str) -> None:
        nonlocal done
        done += 1
        told(f"{name}: {done} of {len(layers)} layers")

    told(f"{recipe.name}: {len(samples)} passages of {arguments.length} tokens")
    started = time.monotonic()
    compress(model, recipe, samples, progress=layer)
    spent = time.monotonic() - started
    model.to(getattr(torch, stored)).save_pretrained(begun)
    tokenizer.save_pretrained(begun)
    return spent


def _card(
    arguments: argparse.Namespace,
    folder: Path,
    begun: Path,
    recipe: Recipe,
    measures: Measures,
    stored: str,
    spent: float,
    told: Callable[[str], None],
) -> Card:
    """Measure what was written, as it is loaded from there."""
    from gossamer.cli.generation import load_checked, load_tokenizer
    from gossamer.compressed.cards import card

    gc.collect()  # the model that was compressed
    tokenizer = load_tokenizer(folder)
    tokenizer.model_max_length = sys.maxsize
    original = load_checked(folder, "float32", arguments.device)
    try:
        compressed = load_checked(begun, stored, arguments.device)
    except BadInput as error:
        raise BadInput(str(error).replace(str(begun), "the compressed model")) from error
    made: dict[str, Any] = {"calibrated on": [file_name(name) for name in arguments.calibrate]}
    made |= {"passages": arguments.samples, "tokens of a passage": arguments.length, "seed": arguments.seed}
    made |= {"calibrated in": "float32", "seconds to compress": round(spent, 1), "written in": stored}
    more: dict[str, Any] = {"name": unicode(arguments.model.name), "recipe": recipe.to_dict(), "made": made}
    more |= {"files": (_weights(folder), _weights(begun)), "chat": arguments.chat, "progress": told}
    found = card(original, compressed, tokenizer, measures, **more)
    write_whole(begun / "card.json", json.dumps(found.to_dict(), indent=1, allow_nan=False) + "\n")
    write_whole(begun / "README.md", found.to_markdown())
    return found


def _weights(folder: Path) -> int:
    """Bytes of the files of weights."""
    return sum(path.stat().st_size for kind in ("*.safetensors", "*.bin") for path in folder.glob(kind))


def _recipe(arguments: argparse.Namespace) -> Recipe:
    from gossamer.compressed import RECIPES, recipe_of

    kind = RECIPES.get(arguments.recipe)
    pairs = [*arguments.set, *([f"pattern={arguments.pattern}"] if arguments.pattern is not None else [])]
    return recipe_of({"recipe": arguments.recipe} | (field_values(kind, pairs) if kind is not None else {}))


def _measures(arguments: argparse.Namespace, texts: list[str]) -> Measures:
    from gossamer.compressed.measures import Measures
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.runner import parse_lengths

    names = [] if arguments.tasks == "none" else split_specs(arguments.tasks)
    held_out = load_haystack(arguments.held_out or "package")
    if held_out.text in texts:
        raise BadInput(f"the held-out text {held_out.name} also calibrates; give another by --held-out")
    return Measures(
        text=held_out,
        windows=arguments.windows,
        length=arguments.length,
        tasks=tuple(parse_task(name) for name in names),
        samples=arguments.limit,
        task_length=arguments.task_length,
        lengths=parse_lengths(arguments.lengths) if arguments.times else (),
        rounds=arguments.rounds,
        seed=arguments.seed,
    )


def _texts(names: list[str]) -> list[str]:
    """Plain texts, and those in the lines of ``.jsonl`` files."""
    found = []
    for name, text in zip(names, read_texts(names), strict=True):
        found += _lines(name, text) if name.lower().endswith(".jsonl") else [text]
    return found


def _lines(name: str, text: str) -> Iterator[str]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = parse_json(line, strict=False)
        except ValueError as error:
            raise BadInput(f"{name}, line {number}: it is {error}") from error
        if not isinstance(data, dict) or not isinstance(data.get("text"), str):
            raise BadInput(f'{name}, line {number}: it has no "text"; each line is an object with one')
        yield data["text"]


def _samples(arguments: argparse.Namespace, tokenizer: Any, texts: list[str]) -> list[Tensor]:
    from gossamer.calibrate.texts import windows

    limit, tokenizer.model_max_length = tokenizer.model_max_length, sys.maxsize
    sample = windows(tokenizer, texts, arguments.length, arguments.seed)
    tokenizer.model_max_length = limit
    return [sample(number) for number in range(arguments.samples)]


def _stored(config: dict[str, Any]) -> str:
    """The dtype that the model's weights have in its files."""
    parts = (config, text_config(config))
    named = next((d for part in parts for d in (part.get("dtype"), part.get("torch_dtype")) if d), "float32")
    return named if named in _STORED else "float32"


def _check_place(arguments: argparse.Namespace, model: Path) -> None:
    """That a folder can be written there, and that nothing is lost but a model that is to be replaced."""
    out: Path = arguments.out
    if not os.path.isdir(out.parent) or not os.access(out.parent, os.W_OK):
        raise BadInput(f"cannot write into {out.parent}; give another --out")
    if not os.path.lexists(out):
        return
    if out.is_symlink() or not out.is_dir():
        raise BadInput(f"{out} is there already, and is no folder; give another --out")
    held = [arguments.held_out] if arguments.held_out else []
    for kind, name in [("the model that is to be compressed", name) for name in (model, arguments.model)] + [
        ("a text that is read", name) for name in (*arguments.calibrate, *held)
    ]:
        place = Path(name).resolve()
        if out.resolve() in (place, *place.parents):
            raise BadInput(f"{out} holds {kind}, {name}; give another --out")
    if next(out.iterdir(), None) is None:
        return
    if not arguments.overwrite:
        raise BadInput(f"{out} is there already and not empty; give another --out, or add --overwrite")
    if not (out / "config.json").is_file():
        raise BadInput(f"{out} is not overwritten, since it holds no model; give another --out, or remove it")


@contextmanager
def _begun(out: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name when it is whole; whatever happens, nothing else stays behind."""
    begun, former = (out.with_name(f".{out.name}.{os.getpid()}.{what}") for what in ("begun", "former"))
    try:
        yield begun
        if os.path.lexists(out):
            os.replace(out, former)
        try:
            os.replace(begun, out)
        except BaseException:
            if os.path.lexists(former):
                os.replace(former, out)
            raise
        shutil.rmtree(former, ignore_errors=True)  # not before the new one is in its place
    finally:
        shutil.rmtree(begun, ignore_errors=True)


@contextmanager
def _teller() -> Iterator[Callable[[str], None]]:
    """Says what is done: on a terminal a line that changes, else a line every ten seconds at most."""
    from tqdm import tqdm

    begun, said = time.monotonic(), -10.0
    bar = tqdm(total=0, file=sys.stderr, disable=not sys.stderr.isatty(), bar_format="{desc}; {elapsed}", leave=False)

    def tell(text: str) -> None:
        nonlocal said
        bar.set_description_str(text)
        now = time.monotonic() - begun
        if bar.disable and now - said >= 10.0:
            said = now
            print(f"{text}; {now:.0f} s so far", file=sys.stderr, flush=True)

    with bar:
        yield tell


def _print(arguments: argparse.Namespace, recipe: Recipe, card: Card | None) -> None:
    if arguments.json:
        print_json({"out": str(arguments.out), "recipe": recipe.to_dict(), "card": card and card.to_dict()})
    elif card is not None:
        rows = [["", "original", "compressed"], *(list(row) for row in card.costs())]
        print(table([*rows, *(list(row) for row in card.sizes())]))
    told = "" if card is None else f"; its card is {arguments.out / 'README.md'}"
    print(f"{arguments.out}: compressed by {recipe.name}{told}", file=sys.stderr)
