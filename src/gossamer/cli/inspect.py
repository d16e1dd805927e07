"""``gossamer inspect``: what each head of a model does with a prompt, as a table, a page and files."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table, unicode
from gossamer.cli.inputs import (
    check_environment,
    number_list,
    read_model,
    read_prompt,
    require_transformers,
    text_config,
)
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.profiles.files import write_whole

if TYPE_CHECKING:
    from gossamer.evaluate.heads import HeadReport

__all__ = ["add_parser"]

_LISTED = 2
_WORTH_LISTING = 0.01
_BLOCK_WORTH_LISTING = 0.001


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "inspect", execute, "show what each head of a model attends to")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument("prompt", nargs="?", default="-", help="text file; - or nothing reads standard input")
    parser.add_argument("--out", type=Path, metavar="DIR", help="also write heads.html, heads.csv and heads.jsonl here")
    parser.add_argument("--layers", metavar="LIST", help="such as 0,3-5 (default: all)")
    parser.add_argument("--heads", metavar="LIST", help="such as 0,2-3 (default: all)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read the first N tokens of the prompt only")
    parser.add_argument(
        "--rows",
        type=int,
        default=4096,
        metavar="N",
        help="look at about this many queries, evenly spaced (default: %(default)s)",
    )
    add_dtype(parser)


def execute(arguments: argparse.Namespace) -> int:
    for name in ("max_tokens", "rows"):
        value = getattr(arguments, name)
        if value is not None and value < 2:
            raise BadInput(f"--{name.replace('_', '-')} must be at least 2, got {value}")
    check_environment()
    arguments.model = model_folder(arguments.model)
    config = read_model(arguments.model)
    sizes = text_config(config)
    layers = number_list("layers", arguments.layers, sizes.get("num_hidden_layers"))
    heads = number_list("heads", arguments.heads, sizes.get("num_attention_heads"))
    if arguments.out is not None:
        _make_folder(arguments.out)
    text = read_prompt(arguments.prompt)
    require_transformers("inspect")
    from gossamer.cli.generation import layer_progress, load_checked, load_tokenizer, tokenize
    from gossamer.evaluate.heads import heads_record, inspect_model
    from gossamer.evaluate.subject import Subject

    tokenizer = load_tokenizer(arguments.model)
    tokenizer.model_max_length = sys.maxsize  # its warning comes before the prompt is cut
    prompt = tokenize(tokenizer, text, chat=False)
    prompt = prompt[:, : min(arguments.max_tokens or sys.maxsize, sys.maxsize)]
    _check_length(sizes, prompt.shape[1])
    model = load_checked(arguments.model, arguments.dtype)
    rows = arguments.rows if arguments.rows < prompt.shape[1] else None
    map_size = None if arguments.out is None else 64
    try:
        with layer_progress(model, "inspect"):
            reports = inspect_model(model, prompt, rows=rows, layers=layers, heads=heads, map_size=map_size)
    except ValueError as error:
        raise BadInput(first_line(error)) from error

    name = unicode(arguments.model.resolve().name)
    about = Subject(model, tokenizer, name).to_dict()
    record = heads_record(reports, model=about, task="prompt", length=prompt.shape[1], index=0, rows=rows)
    if arguments.out is not None:
        from gossamer.cli.heads_page import make_page

        _write(arguments.out / "heads.jsonl", json.dumps(record, allow_nan=False) + "\n")
        _write(arguments.out / "heads.csv", _csv(reports))
        _write(arguments.out / "heads.html", make_page(reports, name, arguments.prompt, prompt.shape[1], rows))
    if arguments.json:
        print_json({key: value for key, value in record.items() if key not in ("kind", "maps", "task", "index")})
        return 0
    print(table(_rows(reports)))
    print(_summary(reports, prompt.shape[1], rows), file=sys.stderr)
    if arguments.out is not None:
        print(f"wrote {arguments.out}/heads.html, heads.csv, heads.jsonl", file=sys.stderr)
    return 0


def _check_length(config: Mapping[str, Any], tokens: int) -> None:
    limit = config.get("max_position_embeddings")
    if tokens < 2:
        raise BadInput(f"the prompt has {tokens} token; give one of at least 2")
    if limit is not None and tokens > limit:
        raise BadInput(
            f"the prompt is too long: {tokens} tokens, but this model takes {limit}; add --max-tokens {limit}"
        )


def _make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise BadInput(f"--out {path} is a file; give a folder") from error
    except OSError as error:
        raise BadInput(f"cannot make the folder {path}: {error.strerror}") from error
    except ValueError as error:  # a null byte in the name
        raise BadInput(f"cannot make the folder {path}: {error}") from error
    if not os.access(path, os.W_OK):
        raise BadInput(f"cannot write into {path}; give another folder")


def _write(path: Path, content: str) -> None:
    try:
        write_whole(path, content)
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from error


def _rows(reports: Sequence[HeadReport]) -> list[tuple[str, ...]]:
    patterns = tuple(reports[0].mass)
    header = ("layer", "head", "pattern", *patterns, "90% in", "columns", "distances", "blocks")
    return [header] + [
        (
            "-" if report.layer is None else str(report.layer),
            str(report.head),
            report.pattern,
            *(f"{share:.0%}" for share in report.mass.values()),
            str(report.window),
            _short([(str(at), mass) for at, mass in report.columns], _WORTH_LISTING),
            _short([(str(at), mass) for at, mass in report.diagonals], _WORTH_LISTING),
            " ".join(f"{m}:{n}" for m, n, mass in report.blocks[:_LISTED] if mass >= _BLOCK_WORTH_LISTING) or "-",
        )
        for report in reports
    ]


def _short(places: Sequence[tuple[str, float]], least: float) -> str:
    """The first few places that are worth a line, with their share of the mass."""
    return " ".join(f"{name}({mass:.0%})" for name, mass in places[:_LISTED] if mass >= least) or "-"


def _summary(reports: Sequence[HeadReport], tokens: int, rows: int | None) -> str:
    counts = Counter(report.pattern for report in reports)
    found = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    sampled = "" if rows is None else f", about {rows} of them looked at"
    return (
        f"{tokens} tokens{sampled}; {len(reports)} heads: {found}. Each figure is the share of the head's attention "
        f"that the pattern explains with at most {reports[0].budget:.1%} of the pairs; sink is the first "
        f"{reports[0].sink_tokens} tokens, local the latest {reports[0].local_tokens}. `90% in` is how many of the "
        "latest tokens hold 90% of it; columns and distances are in tokens, blocks of 64 are query:key."
    )


def _csv(reports: Sequence[HeadReport]) -> str:
    from gossamer.report.spreadsheet import csv_text

    figures = ("budget", "sink_tokens", "local_tokens", "first_token", "first_tokens", "window", "sink_logit")
    rows: list[list[Any]] = [["layer", "head", "pattern", *reports[0].mass, *figures, "columns", "diagonals", "blocks"]]
    for report in reports:
        lists = (
            [f"{at}:{mass:.6f}" for at, mass in report.columns],
            [f"{at}:{mass:.6f}" for at, mass in report.diagonals],
            [f"{m}-{n}:{mass:.6f}" for m, n, mass in report.blocks],
        )
        numbers = [*report.mass.values(), *(getattr(report, name) for name in figures)]
        shown = [f"{number:.6f}" if isinstance(number, float) else number for number in numbers]
        rows.append([report.layer, report.head, report.pattern, *shown, *(" ".join(part) for part in lists)])
    return csv_text(rows)
