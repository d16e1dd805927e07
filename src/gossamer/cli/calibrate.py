"""``gossamer calibrate``: a method with its fields for each layer and head of a model, chosen on prompts."""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer import __version__
from gossamer.calibrate.summary import summary_table
from gossamer.cli.calibration_files import check_places, line_path, write
from gossamer.cli.common import BadInput, add_command, first_line, one_line, print_json, table
from gossamer.cli.inputs import check_environment, read_model, require_transformers
from gossamer.cli.machine import add_dtype
from gossamer.cli.pretrained import model_folder
from gossamer.cli.specs import parse_method, parse_task, split_specs
from gossamer.cli.subjects import check_device, check_numbers, load_subject
from gossamer.methods import available
from gossamer.profiles import read_table
from gossamer.profiles.costs import Kernel, at_hand
from gossamer.profiles.machine import Machine

if TYPE_CHECKING:
    from torch import Tensor

    from gossamer.calibrate.prices import Price
    from gossamer.calibrate.samples import Sample, Samples
    from gossamer.calibrate.search import Found
    from gossamer.calibrate.store import Store
    from gossamer.evaluate.subject import Subject

__all__ = ["add_parser"]

_TASKS = "needle_single"
# Of a budget for each head, with what they are where nothing is said.
_RULES = {"nearly": 0.02, "dense_above": 0.4}


def add_parser(commands: Any) -> None:
    parser = add_command(commands, "calibrate", execute, "choose a method for each head of a model, as a profile")
    parser.add_argument("model", type=Path, help="folder or GGUF file of a model (nothing is downloaded)")
    parser.add_argument(
        "-o", "--out", type=Path, required=True, help="the profile; a .jsonl for pictures lies beside it"
    )
    parser.add_argument(
        "--prompts", nargs="+", metavar="FILE", help="your own texts (default: --tasks, and our own text)"
    )
    parser.add_argument(
        "--held-out", nargs="+", metavar="FILE", help="texts to judge the choice on (default: the same)"
    )
    parser.add_argument("--tasks", metavar="LIST", help=f"generated prompts beside texts (without any: {_TASKS})")
    parser.add_argument("--lengths", default="8k", help="tokens of a prompt (default: %(default)s)")
    parser.add_argument("--samples", type=int, default=2, help="prompts of each text and length (default: %(default)s)")
    parser.add_argument("--held-out-samples", type=int, default=2, metavar="N", help="likewise (default: %(default)s)")
    parser.add_argument(
        "--mode", choices=("global", "fixed", "cheapest"), default="global", help="default: %(default)s"
    )
    parser.add_argument("--budget", type=float, help="share of dense attention that heads may cost (default: 0.3)")
    parser.add_argument("--error", type=float, help="for cheapest: the mean error, by --objective, that is accepted")
    parser.add_argument("--kl", type=float, help="for cheapest: nats of the logits on the held-out prompts instead")
    parser.add_argument("--methods", metavar="LIST", help="whose candidates are tried (default: five, see the manual)")
    parser.add_argument(
        "--cost", choices=("auto", "pairs", "machine", "measured"), default="auto", help="default: machine, or pairs"
    )
    objectives = ("asked", "output", "squared_output", "mass")
    parser.add_argument("--objective", choices=objectives, default="asked", help="default: %(default)s")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="what an error counts, by layer and head (JSON)")
    parser.add_argument("--nearly", type=float, help="for fixed: errors so close are as good (default: 0.02)")
    parser.add_argument("--dense-above", type=float, help="for fixed: heads that lose more run dense (default: 0.4)")
    parser.add_argument("--groups", type=int, default=1, metavar="N", help="key/value heads in memory at a time")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts (default: %(default)s)")
    parser.add_argument("--chat", action="store_true", help="wrap prompts in the tokenizer's chat template")
    add_dtype(parser)
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")


def execute(arguments: argparse.Namespace) -> int:
    started = time.monotonic()
    _check(arguments)
    arguments.model = model_folder(arguments.model)
    read_model(arguments.model)
    require_transformers("calibrate")
    _require_scipy()
    from gossamer.calibrate.candidates import METHODS, candidates
    from gossamer.calibrate.store import Store
    from gossamer.evaluate.runner import parse_lengths

    try:
        specs = split_specs(arguments.methods) if arguments.methods else METHODS
        methods = candidates([spec if spec in available() else parse_method(spec) for spec in specs])
        lengths = parse_lengths(arguments.lengths)
        subject = load_subject(arguments, max(lengths))
        samples = _samples(arguments, subject, lengths)
        weights = _weights(arguments, subject)
        kernel = Kernel.of(subject.query())
        price, counted = _price(arguments, kernel)
        about: dict[str, Any] = {
            "model": subject.fingerprint(),
            "prompts": samples.to_dict(),
            "samples": [sample.key for sample in samples.listed],
            "candidates": [method.to_dict() for method in methods],
            "version": __version__,
            "kernel": str(kernel),
        } | counted
        if price.name == "measured":
            about["machine"] = Machine.here().to_dict()
        store = Store(arguments.out.with_name(arguments.out.name + ".partial"), about)
        found = _measure(arguments, subject, samples, methods, price, store, weights)
        mode, at, chosen = _chosen(arguments, subject, samples, found, store)
        facts = (
            {"kernel": str(kernel), "mode": mode, "at": at, "objective": found.objective} | counted | about["prompts"]
        )
        if mode == "fixed":
            facts |= _rules(arguments)
        if weights is not None:
            facts["weights_sha256"] = _digest(weights.tolist())
        write(arguments, subject, samples, found, chosen, facts)
    except (ValueError, TypeError, ImportError) as error:
        raise BadInput(first_line(error)) from error
    except OSError as error:
        raise BadInput(f"cannot write {arguments.out}: {error.strerror or first_line(error)}") from error
    store.done()
    _print(arguments, found, chosen, time.monotonic() - started)
    return 0


def _require_scipy() -> None:
    """Before hours of measuring that only it can end."""
    try:
        import scipy.optimize  # noqa: F401  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise BadInput("`gossamer calibrate` needs scipy: pip install 'gossamer[calibrate]'") from error


def _check(arguments: argparse.Namespace) -> None:
    check_numbers(arguments, {"samples": 1, "held_out_samples": 0, "groups": 1, "rounds": 1})
    check_device(arguments.device)
    check_environment(arguments.device)
    for name in ("budget", "error", "kl", "nearly", "dense_above"):
        value = getattr(arguments, name)
        if value is not None and not (math.isfinite(value) and value >= 0):
            raise BadInput(f"--{name.replace('_', '-')} must be a number, 0 or more, got {value}")
    bounds = arguments.error is not None, arguments.kl is not None
    if arguments.mode == "cheapest" and sum(bounds) != 1:
        raise BadInput("--mode cheapest needs one bound: --error or --kl")
    if arguments.mode != "cheapest" and any(bounds):
        raise BadInput("--error and --kl are for --mode cheapest; add it, or leave them out")
    if arguments.mode == "cheapest" and arguments.budget is not None:
        raise BadInput("--mode cheapest finds the budget; leave --budget out")
    if arguments.kl is not None and not arguments.held_out_samples:
        raise BadInput("--kl is judged on held-out prompts; ask for at least one by --held-out-samples")
    given = [f"--{name.replace('_', '-')}" for name in _RULES if getattr(arguments, name) is not None]
    if arguments.mode != "fixed" and given:
        raise BadInput(f"{' and '.join(given)}: for --mode fixed alone; add it, or leave them out")
    if arguments.held_out and not arguments.held_out_samples:
        raise BadInput("--held-out names texts to judge on; ask for at least one prompt by --held-out-samples")
    if not arguments.out.parent.is_dir():
        raise BadInput(f"cannot write into {arguments.out.parent}: no such folder; give another --out")
    if not os.access(arguments.out.parent, os.W_OK | os.X_OK):
        raise BadInput(f"cannot write into {arguments.out.parent}: you may not; give another --out")
    if arguments.out.is_dir():
        raise BadInput(f"{arguments.out} is a folder; give the name of a file by --out")
    check_places(arguments.out)


def _samples(arguments: argparse.Namespace, subject: Subject, lengths: Any) -> Samples:
    from gossamer.calibrate.samples import Samples
    from gossamer.evaluate.haystack import load_haystack

    package = load_haystack("package")
    specs = arguments.tasks if arguments.tasks or arguments.prompts else _TASKS
    tasks = [parse_task(name) for name in split_specs(specs)] if specs else []
    texts = [load_haystack(name) for name in arguments.prompts] if arguments.prompts else [package]
    others = [load_haystack(name) for name in arguments.held_out or ()]
    counts = {"count": arguments.samples, "held_out": arguments.held_out_samples}
    return Samples(subject, [*tasks, *texts], lengths, **counts, others=others, haystack=package, seed=arguments.seed)


def _price(arguments: argparse.Namespace, kernel: Kernel) -> tuple[Price, dict[str, str]]:
    """How costs are counted, and what a profile says of it."""
    from gossamer.calibrate.cost import CostModel
    from gossamer.calibrate.prices import Measured, Modelled, Pairs

    kind = arguments.cost
    if kind == "auto":
        costs, reason = at_hand()
        if costs is not None and costs.kernel(kernel) is None:
            reason = f"it knows no {kernel}"
        kind = "pairs" if costs is None or costs.kernel(kernel) is None else "machine"
        if kind == "pairs":
            why = f"no cost model of this machine is at hand ({reason})"
            print(one_line(f"note: costs are counted in pairs, since {why}"), file=sys.stderr)
    if kind != "machine":
        price = Pairs() if kind == "pairs" else Measured(arguments.rounds)
        return price, {"cost": price.name}
    price = Modelled(arguments.rounds, model=CostModel.here())
    return price, {"cost": price.name, "costs_sha256": _digest(price.model.costs.to_dict())}


def _digest(data: Any) -> str:
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()


def _weights(arguments: argparse.Namespace, subject: Subject) -> Tensor | None:
    """``[layers, H]``, of all layers of the model."""
    import torch

    if arguments.weights is None:
        return None
    try:
        rows = read_table(arguments.weights, "weights")
    except OSError as error:
        raise BadInput(f"cannot read {arguments.weights}: {error.strerror or first_line(error)}") from error
    layers, heads = int(subject.config.num_hidden_layers), int(subject.config.num_attention_heads)
    if [len(row) for row in rows] != [heads] * layers or not all(weight >= 0 for row in rows for weight in row):
        raise ValueError(
            f"{arguments.weights} must hold a number, 0 or more, for each of {layers} layers of {heads} heads"
        )
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _measure(
    arguments: argparse.Namespace,
    subject: Subject,
    samples: Samples,
    methods: Any,
    price: Price,
    store: Store,
    weights: Tensor | None,
) -> Found:
    from gossamer.calibrate.search import measure
    from gossamer.cli.eval_progress import Progress
    from gossamer.evaluate.runner import relative_cost

    layers = int(subject.config.num_hidden_layers)
    # Attention is what is measured, many times: it grows with the square.
    cells = [
        (s.length, _prompt(samples, s), relative_cost(subject, s.length) + s.length**2)
        for s in samples.listed
        for layer in range(layers)
        if not store.has(s.key, layer)
    ]
    try:
        with Progress(cells) as progress:
            return measure(
                subject,
                samples,
                methods,
                price,
                store,
                groups=arguments.groups,
                objective=arguments.objective,
                weights=weights,
                progress=lambda sample, layer: progress.advance(sample.length, _prompt(samples, sample)),
            )
    except KeyboardInterrupt:
        if store.path is not None and store.path.exists():
            print(one_line(f"stopped; the same command goes on with {store.path}"), file=sys.stderr)
        raise


def _prompt(samples: Samples, sample: Sample) -> str:
    return f"{samples.name(sample.source)}, {'held out' if sample.held_out else 'prompt'} {sample.index}"


def _chosen(
    arguments: argparse.Namespace, subject: Subject, samples: Samples, found: Found, store: Store
) -> tuple[str, float, Tensor]:
    """As `_choose`; where nothing fits, what was measured is not lost."""
    try:
        return _choose(arguments, subject, samples, found)
    except ValueError as error:
        kept = f"what was measured is kept in {store.path}, so that the same command with another bound takes seconds"
        raise ValueError(f"{first_line(error)}; {kept}") from error


def _choose(
    arguments: argparse.Namespace, subject: Subject, samples: Samples, found: Found
) -> tuple[str, float, Tensor]:
    """Mode, what it was held to, and the choice."""
    if arguments.kl is not None:
        budget = _least_budget(arguments.kl, subject, samples, found)
        return "kl", arguments.kl, found.choose("global", budget)
    if arguments.mode == "cheapest":
        return "cheapest", arguments.error, found.choose("cheapest", arguments.error)
    budget = 0.3 if arguments.budget is None else arguments.budget
    rules = _rules(arguments) if arguments.mode == "fixed" else {}
    return arguments.mode, budget, found.choose(arguments.mode, budget, **rules)


def _rules(arguments: argparse.Namespace) -> dict[str, float]:
    """How a budget for each head is spent."""
    given = {name: getattr(arguments, name) for name in _RULES}
    return _RULES | {name: value for name, value in given.items() if value is not None}


def _least_budget(bound: float, subject: Subject, samples: Samples, found: Found) -> float:
    """By bisection, the least shared budget under which held-out prompts' logits stay within a KL of the dense ones."""
    from gossamer.calibrate.choice import least_under
    from gossamer.evaluate.fidelity import compare_logits
    from gossamer.methods import PerHead
    from gossamer.policy import Policy

    tokens = [samples.tokens(sample) for sample in samples.listed if sample.held_out]

    def kl(budget: float) -> float:
        policy = Policy(PerHead(found.methods(found.choose("global", budget))), min_tokens=0)
        total = 0.0
        for prompt in tokens:
            dense, _ = subject.hidden_states(prompt, Policy.of("dense"))
            sparse, _ = subject.hidden_states(prompt, policy)
            total += compare_logits(subject, dense, [sparse])[0]["mean_kl"] / len(tokens)
        print(f"budget {budget:.4f}: KL {total:.5f} on held-out prompts", file=sys.stderr, flush=True)
        return total

    low = float(found.calibration["cost"].amin(dim=-1).mean()) * (1 + 1e-6)
    return least_under(kl, bound, low, 1.0)


def _print(arguments: argparse.Namespace, found: Found, chosen: Tensor, seconds: float) -> None:
    summary = found.summary(chosen)
    counts: dict[str, int] = {}
    for index in chosen.flatten().tolist():
        name = found.candidates[index].name
        counts[name] = counts.get(name, 0) + 1
    if arguments.json:
        print_json({"out": str(arguments.out), "methods": counts, "figures": summary})
    else:
        print(table(summary_table(summary)))
        listed = ", ".join(f"{count} {name}" for name, count in sorted(counts.items(), key=lambda one: -one[1]))
        print(f"\nheads: {listed}")
    unit = 1 if sys.platform == "darwin" else 1024  # bytes there, and kilobytes elsewhere
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
    line = f"{arguments.out}; pictures: gossamer report {line_path(arguments.out)}"
    print(one_line(f"{line}; {seconds:.0f} s, at most {peak:.2f} GiB"), file=sys.stderr)
