"""``gossamer eval``: methods on tasks, one line of results a sample, and a table beside dense attention."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from gossamer.cli.common import BadInput, add_command, first_line, print_json, table
from gossamer.cli.eval_progress import Progress
from gossamer.cli.inputs import (
    check_environment,
    check_made_for,
    check_profile,
    read_model,
    read_profile,
    require_transformers,
)
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import parse_policies, parse_task, split_specs, task_names
from gossamer.cli.subjects import check_device, check_numbers, load_subject
from gossamer.policy import Policy

__all__ = ["add_parser"]

_PERPLEXITY = "perplexity"


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "eval", execute, "measure what a model's answers lose under sparse attention")
    parser.add_argument("model", type=Path, nargs="?", help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument(
        "--methods",
        default="dense,minference,max_relative",
        metavar="LIST",
        help="names with fields, such as max_relative(alpha=0.02); see `gossamer methods` (default: %(default)s)",
    )
    parser.add_argument(
        "--decode",
        metavar="LIST",
        help="what questions and answers, token by token, read of the cache: each of these under each of --methods, "
        "such as none,quest(budget=1024) (default: none, all of it)",
    )
    parser.add_argument(
        "--cache",
        metavar="LIST",
        help="what caches keep of a prompt, and how: each of these under each of the others, such as "
        "none,snapkv(budget=1024),kivi (default: none, everything)",
    )
    parser.add_argument(
        "--tasks",
        default="needle_single,needle_multikey,variable_tracking",
        metavar="LIST",
        help="names with fields, such as needle_multikey(turns=4); perplexity; or `list` (default: %(default)s)",
    )
    parser.add_argument("--lengths", default="4k,16k", help="tokens of prompt and answer (default: %(default)s)")
    parser.add_argument(
        "--limit", type=int, default=20, help="samples a task and length; 0: fidelity alone (default: %(default)s)"
    )
    parser.add_argument("--turns", type=int, help="questions on each context, for all tasks (default: the task's own)")
    parser.add_argument(
        "--fidelity", type=int, help="prompts a length and kind for fidelity (default: 1 where there is a task)"
    )
    parser.add_argument(
        "--fidelity-of", metavar="LIST", help="kinds of these prompts, each one of --tasks (default: the first task)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="prompts that run together (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("results.jsonl"), help="results; an existing file goes on")
    parser.add_argument(
        "--haystack", default="package", help="text file to hide things in (default: gossamer's own text)"
    )
    parser.add_argument("--text", help="text file for perplexity (default: the haystack)")
    parser.add_argument("--profile", type=Path, help="a method for each head, in place of minference or per_head")
    parser.add_argument("--min-tokens", type=int, help="shorter prompts run dense (default: as `gossamer doctor` says)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument(
        "--lm-eval",
        metavar="TASKS",
        help="also run tasks of lm-evaluation-harness, such as ruler, through the same model (most need a network)",
    )


def execute(arguments: argparse.Namespace) -> int:
    if arguments.tasks == "list":
        names = task_names(_PERPLEXITY)
        if arguments.json:
            print_json({"tasks": names})
        else:
            print("\n".join(names))
        return 0
    if arguments.model is None:
        raise BadInput("name a folder or a GGUF file: gossamer eval MODEL (`gossamer eval --tasks list` needs none)")
    _check_numbers(arguments)
    check_environment(arguments.device)
    arguments.model = model_folder(arguments.model)
    config, profile = read_model(arguments.model), read_profile(arguments.profile)
    try:
        specs = arguments.methods, arguments.decode, profile, arguments.min_tokens, arguments.cache
        policies = parse_policies(*specs)
    except (ValueError, TypeError) as error:
        raise BadInput(first_line(error)) from error
    check_profile(policies, profile, config)
    require_transformers("eval")
    from gossamer.evaluate import runner
    from gossamer.evaluate.records import check_out

    try:
        check_out(arguments.out)
        job = _job(arguments, policies)
        subject = load_subject(arguments, max(job.lengths))
        check_made_for(profile, subject.model)
        job = job.on(subject)
        if arguments.lm_eval:
            from gossamer.evaluate import harness

            harness.require()
        windows = job.windows(subject)
        with runner.ResultsFile(arguments.out, runner.make_header(subject, job)) as results:
            failure = _run(subject, job, results, windows)
            if arguments.lm_eval and failure is None:
                _run_harness(arguments, subject, job, results)
            records = [*results.headers, results.header, *results.records]
    except ValueError as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    _print(arguments, job, windows, records)
    if failure is not None:
        raise BadInput(f"{failure}; the table is of what was done before") from failure
    return 0


def _check_numbers(arguments: argparse.Namespace) -> None:
    least = 0 if arguments.fidelity else 1  # without samples there is fidelity alone
    check_numbers(arguments, {"limit": least, "batch": 1, "turns": 1, "fidelity": 0, "min_tokens": 0})
    check_device(arguments.device)


def _job(arguments: argparse.Namespace, policies: list[Policy]) -> Any:
    from gossamer.evaluate import runner
    from gossamer.evaluate.haystack import load_haystack

    turns = {} if arguments.turns is None else {"turns": arguments.turns}
    names = split_specs(arguments.tasks)
    tasks = tuple(parse_task(name, _PERPLEXITY, **turns) for name in names if name != _PERPLEXITY)
    haystack = load_haystack(arguments.haystack)
    text = load_haystack(arguments.text) if arguments.text else haystack
    kinds = split_specs(arguments.fidelity_of) if arguments.fidelity_of else []
    compared = tuple(name if name == _PERPLEXITY else parse_task(name, _PERPLEXITY, **turns).label() for name in kinds)
    return runner.Job(
        methods=tuple(policies),
        tasks=tasks,
        lengths=runner.parse_lengths(arguments.lengths),
        samples=arguments.limit,
        haystack=haystack,
        perplexity=text if _PERPLEXITY in names else None,
        fidelity=int(bool(tasks)) if arguments.fidelity is None else arguments.fidelity,
        fidelity_of=compared,
        seed=arguments.seed,
        batch=arguments.batch,
    )


def _run(subject: Any, job: Any, results: Any, windows: Any) -> ValueError | None:
    """Run what the file lacks. What stopped it in the middle, if anything did, so that the rest can be shown.

    Raises:
        ValueError: something cannot be run, as a first look shows.
    """
    from gossamer.evaluate import runner

    todo = runner.pending(job, results, windows)
    for note in runner.check(subject, job, todo, windows):
        print(f"note: {note}", file=sys.stderr)
    costs = {length: runner.relative_cost(subject, length) for length in job.lengths}
    with Progress([(cell.length, cell.what, costs[cell.length]) for cell in todo]) as progress:
        try:
            for _ in runner.run(subject, job, results, lambda cell: progress.advance(cell.length, cell.what)):
                pass
        except ValueError as error:
            return error
    return None


def _run_harness(arguments: argparse.Namespace, subject: Any, job: Any, results: Any) -> None:
    from gossamer.evaluate import harness

    for label, policy in zip(job.labels, job.methods, strict=True):
        record = harness.record_of(policy, arguments.lm_eval, job.lengths, arguments.limit)
        if not results.has(record):
            print(f"lm-evaluation-harness: {arguments.lm_eval} with {label}", file=sys.stderr)
            results.append(record | harness.run(subject, policy, arguments.lm_eval, job.lengths, arguments.limit))


def _print(arguments: argparse.Namespace, job: Any, windows: Any, records: list[dict[str, Any]]) -> None:
    """The table of what was asked for, whatever else the file holds."""
    from gossamer.evaluate.closeness import closeness_table
    from gossamer.evaluate.records import cell_of
    from gossamer.evaluate.runner import all_cells
    from gossamer.evaluate.summary import closeness_of, common_cells, dense_notes, main_table, summary_rows, task_table

    asked = {cell_of(cell.head) for cell in all_cells(job, windows)}
    mine = [record for record in records if record["kind"] == "run" or cell_of(record) in asked]
    rows = summary_rows(common_cells(mine, job.labels))
    scores = _of_harness(arguments, job, records)
    if arguments.json:
        near = [row.to_dict() for row in closeness_of(mine)]
        rows_of = [row.to_dict() for row in rows]
        print_json({"out": str(arguments.out), "rows": rows_of, "closeness": near, "lm_eval": scores})
        return
    if rows:
        print(table(main_table(rows)))
        if len(job.tasks) > 1:
            print("\naccuracy by task")
            print(table(task_table(rows)))
    near = closeness_of(mine)
    if len({row.kind for row in near}) > 1:
        print("\ninside the model, by kind of prompt")
        print(table(closeness_table(near)))
    if notes := dense_notes(rows):
        print("\n" + "\n".join(notes))
    if scores:
        print("\nlm-evaluation-harness")
        print(table(_harness_table(scores)))
    print(f"\n{arguments.out}; for pictures: gossamer report {arguments.out}", file=sys.stderr)


def _of_harness(arguments: argparse.Namespace, job: Any, records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    from gossamer.evaluate import harness
    from gossamer.evaluate.records import cell_of

    if not arguments.lm_eval:
        return []
    asked = {cell_of(harness.record_of(p, arguments.lm_eval, job.lengths, arguments.limit)) for p in job.methods}
    return [record for record in records if record["kind"] == "lm_eval" and cell_of(record) in asked]


def _harness_table(records: list[dict[str, Any]]) -> list[list[str]]:
    rows = [["method", "task", "metric", "score"]]
    for record in records:
        for task, metrics in record["scores"].items():
            for metric, value in metrics.items():
                if isinstance(value, float):
                    rows.append([record["method"], task, metric.removesuffix(",none"), f"{value:.3f}"])
    return rows
