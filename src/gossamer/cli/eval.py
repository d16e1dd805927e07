"""``gossamer eval``: methods on tasks, one line of results a sample, and a table beside dense attention."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gossamer.attention import Policy
from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.inputs import check_environment, check_model, check_profile
from gossamer.cli.specs import parse_method, parse_task, split_specs
from gossamer.profile import Profile

__all__ = ["add_parser"]

_PERPLEXITY = "perplexity"


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "eval", execute, "measure what a model's answers lose under sparse attention")
    parser.add_argument("model", type=Path, help="folder of a transformers model (nothing is downloaded)")
    parser.add_argument(
        "--methods",
        default="dense,minference,max_relative",
        metavar="LIST",
        help="names with fields, such as max_relative(alpha=0.02); see `gossamer methods` (default: %(default)s)",
    )
    parser.add_argument(
        "--tasks",
        default="needle_single,needle_multikey,variable_tracking",
        metavar="LIST",
        help="names with fields, such as needle_multikey(turns=4); perplexity; or `list` (default: %(default)s)",
    )
    parser.add_argument("--lengths", default="4k,16k", help="tokens of prompt and answer (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=20, help="samples a task and length (default: %(default)s)")
    parser.add_argument("--turns", type=int, default=1, help="questions on each context, for all tasks (default: 1)")
    parser.add_argument("--fidelity", type=int, default=1, help="prompts a length for fidelity (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="prompts that run together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="results; an existing file goes on")
    parser.add_argument(
        "--haystack", default="package", help="text file to hide things in (default: gossamer's own text)"
    )
    parser.add_argument("--text", help="text file for perplexity (default: the haystack)")
    parser.add_argument("--profile", type=Path, help="per-head patterns, for methods that take a profile")
    parser.add_argument("--min-tokens", type=int, help="shorter prompts run dense (default: 2048)")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16", "float16"), default="auto")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="also run tasks of lm-evaluation-harness, such as ruler, through the same model (most need a network)",
    )


def execute(arguments: argparse.Namespace) -> int:
    from gossamer.evaluate import tasks

    if arguments.tasks == "list":
        print("\n".join([*tasks.available(), _PERPLEXITY]))
        return 0
    check_environment()
    config = check_model(arguments.model)
    try:
        policies = [_policy(arguments, spec) for spec in split_specs(arguments.methods)]
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    for policy in policies:
        check_profile(policy, config)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise BadInput("`gossamer eval` needs transformers: pip install 'gossamer[cli]'") from error
    from gossamer.cli.generation import load_model, load_tokenizer
    from gossamer.evaluate import runner
    from gossamer.evaluate.haystack import load_haystack
    from gossamer.evaluate.subject import Subject

    try:
        names = split_specs(arguments.tasks)
        haystack = load_haystack(arguments.haystack)
        text = load_haystack(arguments.text) if arguments.text else haystack
        job = runner.Job(
            methods=tuple(policies),
            tasks=tuple(parse_task(name, turns=arguments.turns) for name in names if name != _PERPLEXITY),
            lengths=runner.parse_lengths(arguments.lengths),
            samples=arguments.limit,
            haystack=haystack,
            perplexity=text if _PERPLEXITY in names else None,
            fidelity=arguments.fidelity,
            seed=arguments.seed,
            batch=arguments.batch,
        )
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    tokenizer = load_tokenizer(arguments.model)
    # Samples are cut to their length here; the tokenizer's own limit only makes it warn.
    tokenizer.model_max_length = sys.maxsize
    model = load_model(arguments.model, arguments.dtype, progress=sys.stderr.isatty())
    subject = Subject(_to_device(model, arguments.device), tokenizer, arguments.model.name)
    longest = max(job.lengths)
    if subject.max_length is not None and longest > subject.max_length:
        raise BadInput(f"this model takes {subject.max_length} tokens, got a length of {longest}; ask for less")
    try:
        if arguments.lm_eval:
            from gossamer.evaluate import harness

            harness.require()
        with runner.ResultsFile(arguments.out, runner.make_header(subject, job)) as results:
            _run(subject, job, results)
            if arguments.lm_eval:
                _run_harness(arguments, subject, job, results)
            records = [results.header, *results.records]
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    _print(arguments, job, records)
    return 0


def _policy(arguments: argparse.Namespace, spec: str) -> Policy:
    given: dict[str, Any] = {}
    if arguments.profile is not None:
        try:
            given["profile"] = Profile.load(arguments.profile)
        except OSError as error:
            raise ValueError(f"cannot read the profile {arguments.profile}: {error.strerror}") from error
    policy = Policy(parse_method(spec, **given))
    return policy if arguments.min_tokens is None else replace(policy, min_tokens=arguments.min_tokens)


def _to_device(model: Any, device: str) -> Any:
    try:
        return model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        raise BadInput(f"--device {device}: {first_line(error)}") from error


def _run(subject: Any, job: Any, results: Any) -> None:
    from tqdm import tqdm

    from gossamer.evaluate import runner

    total = runner.total_tokens(job)
    # Cells that are there already pass at once and must not make the time left look short.
    bar = tqdm(
        total=total, unit="tok", unit_scale=True, file=sys.stderr, disable=not sys.stderr.isatty(), smoothing=0.1
    )
    with bar:

        def progress(tokens: int, what: str, ran: bool) -> None:
            if ran:
                bar.update(tokens)
            else:
                bar.total -= tokens
                bar.refresh()
            bar.set_description(what)

        for _ in runner.run(subject, job, results, progress):
            pass


def _run_harness(arguments: argparse.Namespace, subject: Any, job: Any, results: Any) -> None:
    from gossamer.evaluate import harness

    for label, policy in zip(job.labels, job.methods, strict=True):
        record = harness.record_of(label, policy, arguments.lm_eval, job.lengths, arguments.limit)
        if not results.has(record):
            print(f"lm-evaluation-harness: {arguments.lm_eval} with {label}", file=sys.stderr)
            results.append(record | harness.run(subject, policy, arguments.lm_eval, job.lengths, arguments.limit))


def _print(arguments: argparse.Namespace, job: Any, records: list[dict[str, Any]]) -> None:
    from gossamer.evaluate.summary import main_table, summary_rows, task_table

    wanted = [record for record in records if record["kind"] == "run" or record.get("method") in job.labels]
    rows = summary_rows(wanted)
    if arguments.json:
        harness = [record for record in wanted if record["kind"] == "lm_eval"]
        print_json({"out": str(arguments.out), "rows": [row.to_dict() for row in rows], "lm_eval": harness})
        return
    print(table(main_table(rows)))
    if len(job.tasks) > 1:
        print("\naccuracy by task")
        print(table(task_table(rows)))
    scores = _harness_table(wanted)
    if len(scores) > 1:
        print("\nlm-evaluation-harness")
        print(table(scores))
    print(f"\n{arguments.out}; for pictures: gossamer report {arguments.out}", file=sys.stderr)


def _harness_table(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["method", "task", "metric", "score"]]
    for record in records:
        if record["kind"] == "lm_eval":
            for task, metrics in record["scores"].items():
                for metric, value in metrics.items():
                    if isinstance(value, float):
                        rows.append([record["method"], task, metric.removesuffix(",none"), f"{value:.3f}"])
    return rows
