"""``gossamer compare``: methods and their settings on one model, and which of them no other beats."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.inputs import (
    check_environment,
    check_made_for,
    check_profile,
    number_list,
    read_model,
    read_profile,
    require_transformers,
    text_config,
)
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import parse_policy, parse_task, split_specs
from gossamer.cli.subjects import check_device, check_numbers, load_subject
from gossamer.methods import PerHead
from gossamer.methods.registry import available, class_of
from gossamer.policy import Policy
from gossamer.profiles import Profile

if TYPE_CHECKING:
    from gossamer.evaluate.runner import Job

__all__ = ["add_parser"]

_TEXT = "text"
_ALL = "all"


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "compare", execute, "find the methods and settings that no other beats on a model")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument(
        "--methods",
        default=_ALL,
        metavar="LIST",
        help="names, each for several settings, or with fields, such as max_relative(alpha=0.02), for that one; "
        "all: every method that has settings to compare, and the profile (default: %(default)s)",
    )
    parser.add_argument(
        "--prompts",
        default="needle_single,variable_tracking,json_kv,text",
        metavar="LIST",
        help="tasks as in `gossamer eval`, and text: windows of --text (default: %(default)s)",
    )
    parser.add_argument("--lengths", default="4k,16k", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=1, help="prompts of each kind and length (default: %(default)s)")
    parser.add_argument("--layers", metavar="LIST", help="look at these alone, such as 0,3-5 (default: all)")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; the median counts (default: %(default)s)")
    parser.add_argument(
        "--logits",
        choices=("front", "all"),
        default="front",
        help="run these settings through the whole model: those that no other beats, or all (default: %(default)s)",
    )
    parser.add_argument("--out", type=Path, default=Path("compare.jsonl"), help="results; an existing file goes on")
    parser.add_argument("--haystack", default="package", help="text file for the tasks (default: gossamer's own text)")
    parser.add_argument("--text", help="text file for the prompts named text (default: the haystack)")
    parser.add_argument("--profile", type=Path, help="a method for each head, in place of minference or per_head")
    parser.add_argument("--min-tokens", type=int, help="shorter prompts run dense (default: as `gossamer doctor` says)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    check_numbers(arguments, {"limit": 1, "rounds": 1, "min_tokens": 0})
    check_device(arguments.device)
    check_environment(arguments.device)
    arguments.model = model_folder(arguments.model)
    config, profile = read_model(arguments.model), read_profile(arguments.profile)
    layers = number_list("layers", arguments.layers, text_config(config).get("num_hidden_layers"))
    try:
        policies = _policies(arguments, profile)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    check_profile(policies, profile, config)
    require_transformers("compare")
    from gossamer.evaluate.comparison import compare, prompts_of
    from gossamer.evaluate.records import check_out
    from gossamer.evaluate.results import ResultsFile, make_header

    try:
        check_out(arguments.out)
        job = _job(arguments, policies)
        subject = load_subject(arguments, max(job.lengths))
        check_made_for(profile, subject.model)
        job = job.on(subject)
        prompts = list(prompts_of(job, job.windows(subject)))
        with ResultsFile(arguments.out, make_header(subject, job)) as results:
            for _ in compare(
                subject,
                job,
                results,
                layers=layers,
                rounds=arguments.rounds,
                every_logits=arguments.logits == "all",
                progress=_progress(),
            ):
                pass
            records = results.records
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    heads = [prompt.head for prompt in prompts]
    _print(arguments, job, [r for r in records if any(head.items() <= r.items() for head in heads)])
    return 0


def _policies(arguments: argparse.Namespace, profile: Profile | None) -> list[Policy]:
    """Of every setting.

    Raises:
        ValueError, TypeError: an unknown name or field, or a value out of range.
    """
    from gossamer.evaluate.settings import settings_of

    if arguments.methods == _ALL:
        specs = [name for name in available() if class_of(name).settings]
        specs += [PerHead.name] * (profile is not None)
    else:
        specs = split_specs(arguments.methods)
    made: list[Policy] = []
    for spec in specs:
        if spec in available() and class_of(spec).settings:
            made += [Policy(method, arguments.min_tokens) for method in settings_of(class_of(spec))]
        else:
            made.append(parse_policy(spec, profile, arguments.min_tokens))
    return list(dict.fromkeys(made))


def _job(arguments: argparse.Namespace, policies: Sequence[Policy]) -> Job:
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.runner import Job, parse_lengths

    names = split_specs(arguments.prompts)
    haystack = load_haystack(arguments.haystack)
    text = load_haystack(arguments.text) if arguments.text else haystack
    return Job(
        methods=tuple(policies),
        tasks=tuple(parse_task(name, _TEXT) for name in names if name != _TEXT),
        lengths=parse_lengths(arguments.lengths),
        samples=arguments.limit,
        haystack=haystack,
        perplexity=text if _TEXT in names else None,
        seed=arguments.seed,
    )


def _progress() -> Any:
    """A line that is written over on a terminal; else nothing: a comparison takes minutes, not hours."""
    if not sys.stderr.isatty():
        return lambda what: None
    return lambda what: print(f"\r\x1b[K{what}", end="", file=sys.stderr, flush=True)


def _print(arguments: argparse.Namespace, job: Job, records: list[dict[str, Any]]) -> None:
    from gossamer.evaluate.settings import bounds_table, comparison_rows, comparison_table

    rows = comparison_rows([record for record in records if record.get("method", job.labels[0]) in job.labels])
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr)
    if arguments.json:
        print_json({"out": str(arguments.out), "rows": [row.to_dict() for row in rows]})
        return
    print(table(comparison_table(rows)))
    if best := bounds_table(records):
        print("\nthe best that plans can do")
        print(table(best))
    print(f"\n{arguments.out}; for pictures: gossamer report {arguments.out}", file=sys.stderr)
