"""``gossamer eval-masked MODEL``: what a masked diffusion language model fills in, dense and with sparse attention."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, table
from gossamer.cli.inputs import check_environment, require_transformers
from gossamer.cli.machine import add_dtype, fast_dtype
from gossamer.cli.specs import parse_method, split_specs
from gossamer.methods import SparseD
from gossamer.policy import Policy

__all__ = ["add_parser"]


def add_parser(commands: Any) -> None:
    parser = add_command(
        commands, "eval-masked", execute, "measure what a masked language model fills in under sparse attention"
    )
    parser.add_argument("model", type=Path, help="folder of a masked language model of transformers")
    parser.add_argument(
        "--methods",
        default="sparsed(block=32,share=0.5)",
        metavar="LIST",
        help="names with fields (default: %(default)s)",
    )
    parser.add_argument(
        "--beside",
        metavar="LIST",
        help="for each sparsed among them also as many blocks chosen otherwise: joint, best, fresh, window, random",
    )
    parser.add_argument(
        "--span", type=float, help="also each of these sparse in the first and in the last steps alone, this share"
    )
    parser.add_argument("--lengths", default="512", help="tokens of a text (default: %(default)s)")
    parser.add_argument(
        "--steps", default="32", help="of a sampling, one number or one a length (default: %(default)s)"
    )
    parser.add_argument(
        "--block", type=int, help="fill in stretch by stretch, of so many tokens (default: all at once)"
    )
    parser.add_argument(
        "--share", type=float, default=0.5, help="of the last quarter that is masked (default: %(default)s)"
    )
    parser.add_argument("--limit", type=int, default=8, help="texts of each length (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="draws of masks of each text (default: %(default)s)")
    parser.add_argument("--text", default="package", help="text file to take texts from (default: gossamer's own text)")
    parser.add_argument("--overlap", metavar="LIST", help="of these sparsed also how far choices agree over the steps")
    add_dtype(parser)
    parser.add_argument("--out", type=Path, default=Path("masked.jsonl"), help="results; an existing file goes on")


def execute(arguments: argparse.Namespace) -> int:
    check_environment()
    require_transformers("eval-masked")
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.masked.comparison import Fills
    from gossamer.evaluate.masked.subject import load_masked_model
    from gossamer.evaluate.records import check_out
    from gossamer.evaluate.results import ResultsFile, make_header

    for name in ("limit", "seeds"):
        if not 1 <= getattr(arguments, name) <= 10_000:
            raise BadInput(f"--{name} must be 1 to 10000, got {getattr(arguments, name)}")
    if not 0.0 < arguments.share <= 1.0:
        raise BadInput(f"--share must be above 0 and at most 1, got {arguments.share:g}")
    try:
        policies, watched = policies_of(arguments), overlapping(arguments.overlap)
        fills = [
            (length, Fills(steps, arguments.share, arguments.block))
            for length, steps in zip(*_sizes(arguments), strict=True)
        ]
        for length, how in fills:
            how.check(length)
        check_out(arguments.out)
        dtype = fast_dtype()[0] if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        subject, haystack = load_masked_model(arguments.model, dtype), load_haystack(arguments.text)
        longest = max(length for length, _ in fills)
        if subject.max_length is not None and longest > subject.max_length:
            raise ValueError(f"this model takes {subject.max_length} tokens, got a length of {longest}; ask for less")
        header = make_header(subject, SimpleNamespace(haystack=haystack, seed=0))
        with ResultsFile(arguments.out, header) as results:
            _run(arguments, subject, subject.text_tokens(haystack.text), policies, watched, fills, results)
            records = results.records
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    _print(arguments, records)
    return 0


def policies_of(arguments: argparse.Namespace) -> list[Policy]:
    """What was asked for, each sparsed followed by what it is held beside.

    Raises:
        ValueError, TypeError: an unknown name or field, or something to vary of `sparsed` where there is none.
    """
    from gossamer.evaluate.masked.variants import Variant

    if arguments.span is not None and not 0 < arguments.span < 1:
        raise ValueError(f"--span must be a share of the steps between 0 and 1, got {arguments.span:g}")
    asked: list[Any] = []
    for method in map(parse_method, split_specs(arguments.methods)):
        asked.append(method)
        if not isinstance(method, SparseD):
            continue
        own = {part.name: getattr(method, part.name) for part in fields(method)}
        variants = [Variant(**own, choice=name) for name in split_specs(arguments.beside)] if arguments.beside else []
        asked += variants
        if arguments.span is not None:
            always = [Variant(**own), *(one for one in variants if one.choice == "fresh")]
            asked += [replace(one, span=at, part=arguments.span) for one in always for at in ("first", "last")]
    beside = [option for option in ("beside", "span") if getattr(arguments, option) is not None]
    if beside and not any(isinstance(method, SparseD) for method in asked):
        raise ValueError(f"--{beside[0]} varies sparsed, and --methods has none; add one, such as sparsed(share=0.2)")
    return [Policy(method, min_tokens=0) for method in asked]


def overlapping(specs: str | None) -> list[SparseD]:
    """Settings of sparsed.

    Raises:
        ValueError: something else.
    """
    found = [parse_method(spec) for spec in split_specs(specs)] if specs else []
    wrong = [method.name for method in found if not isinstance(method, SparseD)]
    if wrong:
        raise ValueError(f"--overlap takes settings of sparsed, such as sparsed(share=0.3), got {wrong[0]}")
    return [method for method in found if isinstance(method, SparseD)]


def _sizes(arguments: argparse.Namespace) -> tuple[list[int], list[int]]:
    from gossamer.evaluate.runner import parse_lengths

    lengths, parts = list(parse_lengths(arguments.lengths)), arguments.steps.split(",")
    if not all(part.strip().isdecimal() and 2 <= int(part) <= 100_000 for part in parts):
        raise ValueError(f"--steps must be numbers from 2 to 100000, got {arguments.steps}")
    steps = [int(part) for part in parts] * (len(lengths) if len(parts) == 1 else 1)
    if len(steps) != len(lengths):
        raise ValueError(
            f"--steps must be one number, or one for each of {len(lengths)} lengths, from the shortest on; got "
            f"{arguments.steps}"
        )
    return lengths, steps


def _run(
    arguments: argparse.Namespace, subject: Any, text: Any, policies: Any, watched: Any, fills: Any, results: Any
) -> None:
    """Text by text, so that a run that is stopped has all methods of the same texts."""
    from gossamer.evaluate.masked.comparison import fill_lines
    from gossamer.evaluate.masked.overlap import Overlaps
    from gossamer.evaluate.masked.passages import draw

    watching = {length: Overlaps(watched, how) for length, how in fills}
    for seed in range(arguments.seeds):
        for index in range(arguments.limit):
            for length, how in fills:
                passage, watch = draw(text, length, index, seed, arguments.share), watching[length]
                heads = watch.heads(passage)
                observe = watch.observe if any(not results.has(head) for head in heads) else None
                for line in fill_lines(subject, policies, [passage], how, has=results.has, observe=observe):
                    results.append(line)
                for line in watch.lines(passage):
                    if not results.has(line):
                        results.append(line)
                print(one_line(f"{length} tokens, text {index}, masks {seed}"), file=sys.stderr, flush=True)


def _print(arguments: argparse.Namespace, records: list[dict[str, Any]]) -> None:
    from gossamer.evaluate.masked.summary import fill_rows, fill_table, overlap_rows, overlap_table

    rows, alike = fill_rows(records), overlap_rows(records)
    if arguments.json:
        own = {"rows": [row.to_dict() for row in rows], "overlaps": [row.to_dict() for row in alike]}
        print_json({"out": str(arguments.out), **own})
        return
    print(table(fill_table(rows)))
    if alike:
        print("\nblocks in common (Jaccard)")
        print(table(overlap_table(alike)))
    print(f"\n{arguments.out}; for pictures: gossamer report {arguments.out}", file=sys.stderr)
