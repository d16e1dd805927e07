"""Whether a calibrated profile holds on prompts of another kind, at equal measured time: beside MInference's budgets.

    python benchmarks/calibration.py MODEL --out FILE.jsonl [--length 7680] [--first LIST] [--second LIST] [--samples 2]
        [--prompts 8] [--published FILE,FILE] [--tasks LIST] [--answers N] [--answered RIVAL] [--stages LIST]
        [--directions first,second]

A kind of prompts is a list of texts (files, those joined by ``+`` as one), and of tasks of `gossamer eval`.

Profiles are chosen on the first kind of text and judged on the second, and the other way round. The *rivals* are
budgets that the authors of MInference use, for all heads alike, and what their search found for other models
(``--published``: files of theirs, stretched over the layers and heads of this one: layer i of n takes theirs at the
same depth). For each rival three profiles are chosen from the same candidates: with a budget for each head alike,
with one that all share, and with one that all share where the last queries count as much as all together (*asked*,
what `gossamer calibrate` does unless told otherwise). Their budgets are moved until attention, planning included,
takes as long as under the rival, on a prompt of the calibration's own. What is printed and written was then measured
on prompts that no choice saw, settings in turns:

*error*: relative L2 error of the attention's output, mean over layers and heads, each layer given what it has in a
dense run. *seconds*: planning and attending of all layers. *kl*, *top1*: of the logits of a whole sparse run;
*last_kl*: at the last positions of the prompt alone.
*answers*: scores of generated tasks, for one of the rivals, the profiles beside it, and dense attention.

Each line of the results is one setting on one prompt; a run that was stopped goes on where it was. Of the *stages*
``match`` and ``time`` want the machine for themselves; ``search`` (by a cost model), ``logits`` and ``answers`` do not.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from calibration_rows import Lines, Row, summary
from machines import machine
from timing import write
from torch import Tensor

from gossamer import AttentionCall, SparsePlan, __version__
from gossamer.backends import attend
from gossamer.calibrate.candidates import candidates
from gossamer.calibrate.cost import CostModel
from gossamer.calibrate.figures import LAST_QUERIES
from gossamer.calibrate.prices import Modelled
from gossamer.calibrate.samples import Samples
from gossamer.calibrate.search import Found, Mode, measure
from gossamer.calibrate.store import Store
from gossamer.cli.inputs import check_environment
from gossamer.cli.specs import parse_method, parse_task, split_specs
from gossamer.cli.subjects import load_subject
from gossamer.evaluate import frontier
from gossamer.evaluate.fidelity import compare_logits
from gossamer.evaluate.haystack import Haystack, load_haystack
from gossamer.evaluate.perplexity import Windows
from gossamer.evaluate.runner import Job, parse_lengths
from gossamer.evaluate.subject import Subject
from gossamer.evaluate.tasks import Task
from gossamer.methods import Dense, Method, PerHead, from_dict
from gossamer.policy import Policy
from gossamer.profiles import Profile

ROOT = Path(__file__).resolve().parent.parent
PROSE = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
# The authors' budgets: for a head that no search looked at, for heads of blocks, and for the simplest ones.
RIVALS = (
    "vertical_slash(vertical_size=1000,slash_size=6096)",
    "vertical_slash(vertical_size=500,slash_size=700)",
    "vertical_slash(vertical_size=100,slash_size=800)",
)
MODES: dict[str, tuple[Mode, str]] = {
    "fixed": ("fixed", "output"),
    "global": ("global", "output"),
    "asked": ("global", "asked"),
}
# Seconds within this share are equal.
NEAR = 0.02
STEPS = 4
# More, while none takes as little time as the rival.
MOST_STEPS = 10
# Whole runs whose logits are compared with the dense ones at once.
TOGETHER = 3


@dataclass(frozen=True)
class Setting:
    """A method, and whose time it was made to take."""

    rival: str
    mode: str
    method: Method
    budget: float | None = None

    @property
    def policy(self) -> Policy:
        return Policy(self.method, min_tokens=0)

    @property
    def head(self) -> Row:
        return {"rival": self.rival, "mode": self.mode}


def stretched(profile: Profile, layers: int, heads: int) -> PerHead:
    """A profile of another model, laid over this one: by depth, and heads in their order."""
    return PerHead(
        tuple(
            tuple(profile.layers[i * len(profile.layers) // layers][j * profile.heads // heads] for j in range(heads))
            for i in range(layers)
        )
    )


def rivals(arguments: argparse.Namespace, subject: Subject) -> dict[str, Method]:
    shape = subject.shape()
    found: dict[str, Method] = {spec: parse_method(spec) for spec in split_specs(arguments.rivals)}
    for path in map(Path, filter(None, arguments.published.split(","))):
        found[path.stem] = stretched(Profile.load(path), shape["layers"], shape["heads"])
    return found


def captured(subject: Subject, tokens: Tensor) -> list[AttentionCall]:
    """The attention calls of all layers in one dense prefill."""
    calls: list[AttentionCall] = []
    subject.hidden_states(tokens, Policy.of("dense"), lambda observed: calls.append(observed.call))
    return calls


def seconds(calls: Sequence[AttentionCall], methods: Sequence[Method], rounds: int = 2) -> list[float]:
    """Of planning and attending all calls by each method, in turns: sums of medians, as they count on other prompts."""
    totals = [0.0] * len(methods)
    for call in calls:
        whole = SparsePlan.dense(call.groups, call.query_len, call.key_len, call.extent)
        taken: list[list[float]] = [[] for _ in methods]
        for _ in range(rounds):
            for of_method, method in zip(taken, methods, strict=True):
                started = time.perf_counter()
                attend(call, Policy(method, min_tokens=0).decide(call).plan or whole)
                of_method.append(time.perf_counter() - started)
        totals = [total + statistics.median(of_method) for total, of_method in zip(totals, taken, strict=True)]
    return totals


def matched(found: Found, rival: str, method: Method, calls: Sequence[AttentionCall]) -> list[Setting]:
    """Profiles that take as long as the rival on captured calls, by both ways to share out."""
    least = float(found.calibration["cost"].amin(dim=-1).mean()) * (1 + 1e-6)
    made = []
    for name, (mode, objective) in MODES.items():
        judged = replace(found, objective=objective)
        low, high, best = least, 1.0, None
        budget = (low + high) / 2
        before = None
        for step in range(MOST_STEPS):
            if step >= STEPS and best is not None:
                break
            tried = PerHead(found.methods(judged.choose(mode, budget)))
            if tried == before:
                break
            before = tried
            mine, theirs = seconds(calls, [tried, method])
            print(f"  {name} {budget:.4f}: {mine:.3f} s, {rival} {theirs:.3f} s", file=sys.stderr, flush=True)
            if mine <= theirs * (1 + NEAR):
                best, low = Setting(rival, name, tried, budget), budget
            else:
                high = budget
            if abs(mine / theirs - 1) <= NEAR or high - low < 1e-3:
                break
            guess = budget * theirs / mine
            budget = guess if low < guess < high else (low + high) / 2
        if best is None:
            print(f"  {name}: no profile takes as little time as {rival}", file=sys.stderr, flush=True)
            continue
        made.append(best)
    return made


def of_names(names: str) -> list[Haystack | Task]:
    """Texts from files, or one text of several files that are joined by ``+``; or tasks, by name."""
    found: list[Haystack | Task] = []
    for name in split_specs(names):
        parts = name.split("+")
        if name == "package":
            found.append(load_haystack())
        elif all(Path(part).exists() for part in parts):
            found.append(
                Haystack(
                    Path(parts[0]).name if len(parts) == 1 else "prose",
                    "\n\n".join(Path(part).read_text() for part in parts),
                )
            )
        else:
            found.append(parse_task(name))
    return found


def _name(kind: Haystack | Task) -> str:
    if isinstance(kind, Task):
        return kind.label()
    return "code" if kind.name == "package" else kind.name


def kinds(arguments: argparse.Namespace) -> Row:
    """What results say of both kinds of prompts: names, and of a text its SHA-256, of a task all that makes it."""
    found: Row = {}
    for direction in ("first", "second"):
        own = of_names(getattr(arguments, direction))
        found[direction] = [_name(kind) for kind in own]
        found[f"{direction}_sha256"] = [kind.sha256 if isinstance(kind, Haystack) else kind.label() for kind in own]
    return found


def prompts(subject: Subject, kinds: Sequence[Haystack | Task], length: int, skip: int, count: int) -> list[Tensor]:
    """``count`` of all kinds in turn, from number ``skip`` of each."""
    tasks = tuple(kind for kind in kinds if isinstance(kind, Task))
    text = next((kind for kind in kinds if isinstance(kind, Haystack)), None)
    job = Job((Policy.of("dense"),), tasks, (length,), 1, load_haystack(), text)
    found = []
    for number in range(count):
        kind, index = kinds[number % len(kinds)], skip + number // len(kinds)
        if isinstance(kind, Haystack):
            found.append(Windows(subject, kind, 0).tokens(length, index))
        else:
            found.append(job.prompt(subject, kind.label(), length, index))
    return found


def searched(arguments: argparse.Namespace, subject: Subject, direction: str) -> Found:
    """What every candidate costs and loses on prompts of the direction's own kind; the figures stay in a file."""
    own = of_names(getattr(arguments, direction))
    counts = {"count": arguments.samples, "held_out": 0}
    samples = Samples(subject, own, [arguments.length], **counts, haystack=load_haystack())
    price = Modelled(1, model=CostModel.load(arguments.costs) if arguments.costs else CostModel.here())
    methods = candidates(split_specs(arguments.methods))
    about = {"model": subject.fingerprint(), "candidates": [one.to_dict() for one in methods]} | samples.to_dict()
    store = Store(arguments.out.with_suffix(f".{direction}.partial"), about)
    return measure(subject, samples, methods, price, store, groups=16, progress=_say)


def _say(sample: Any, layer: int) -> None:
    print(f"  {sample.key}, layer {layer}", file=sys.stderr, flush=True)


def match(arguments: argparse.Namespace, subject: Subject, direction: str, lines: Lines) -> None:
    """Choose profiles beside each rival."""
    known = rivals(arguments, subject)
    done = {row["rival"] for row in lines.find(kind="setting", direction=direction)}
    if not set(known) - done:
        return
    found = searched(arguments, subject, direction)
    own = of_names(getattr(arguments, direction))
    calls = captured(subject, prompts(subject, own, arguments.length, 0, 1)[0])
    for name, method in known.items():
        if name in done:
            continue
        for setting in [Setting(name, "rival", method), *matched(found, name, method, calls)]:
            row = {"kind": "setting", "direction": direction, "budget": setting.budget} | setting.head
            lines.add(row | {"method": setting.method.to_dict()})


def settings_of(lines: Lines, direction: str) -> list[Setting]:
    rows = lines.find(kind="setting", direction=direction)
    return [Setting(row["rival"], row["mode"], from_dict(row["method"]), row["budget"]) for row in rows]


def unseen(
    arguments: argparse.Namespace, subject: Subject, direction: str, kind: str, lines: Lines
) -> Iterator[tuple[Row, Tensor, list[Setting]]]:
    """Prompts of the other kind, with the settings that lack a line of this kind."""
    other = of_names(arguments.second if direction == "first" else arguments.first)
    for index, tokens in enumerate(prompts(subject, other, arguments.length, arguments.samples, arguments.prompts)):
        where = {"kind": kind, "direction": direction, "prompt": index}
        lacking = [one for one in settings_of(lines, direction) if not lines.find(**where, **one.head)]
        if lacking:
            print(f"  {kind}, {direction}, prompt {index}", file=sys.stderr, flush=True)
            yield where, tokens, lacking


def take_times(arguments: argparse.Namespace, subject: Subject, direction: str, lines: Lines) -> None:
    for where, tokens, settings in unseen(arguments, subject, direction, "point", lines):
        policies = [one.policy for one in settings]
        found = frontier.measure(subject, tokens, policies, rounds=arguments.rounds, bounds=False)
        for one, point in zip(settings, found.points, strict=True):
            figures = {name: value for name, value in point.to_dict().items() if name != "layers"}
            lines.add(where | one.head | figures | {"dense_s": found.dense_s})


def take_logits(arguments: argparse.Namespace, subject: Subject, direction: str, lines: Lines) -> None:
    for where, tokens, settings in unseen(arguments, subject, direction, "logits", lines):
        dense, _ = subject.hidden_states(tokens, Policy.of("dense"))
        for start in range(0, len(settings), TOGETHER):
            some = settings[start : start + TOGETHER]
            runs = [subject.hidden_states(tokens, one.policy)[0] for one in some]
            last = compare_logits(subject, dense[-LAST_QUERIES:], [run[-LAST_QUERIES:] for run in runs])
            for one, logits, of_last in zip(some, compare_logits(subject, dense, runs), last, strict=True):
                figures = {"kl": logits["mean_kl"], "top1": logits["mean_top1"], "last_kl": of_last["mean_kl"]}
                lines.add(where | one.head | figures)


def take_answers(arguments: argparse.Namespace, subject: Subject, direction: str, lines: Lines) -> None:
    """Scores of generated tasks; dense and the rival, which are the same both ways, stand there once."""
    tasks = tuple(parse_task(name) for name in split_specs(arguments.tasks)) if arguments.tasks else ()
    if not tasks:
        return
    job = Job((Policy.of("dense"),), tasks, (arguments.length,), arguments.answers, load_haystack())
    chosen = [one for one in settings_of(lines, direction) if one.rival == arguments.answered]
    asked = [("", Setting(arguments.answered, "dense", Dense()))]
    asked += [("" if one.mode == "rival" else direction, one) for one in chosen]
    for task in tasks:
        for index in range(arguments.answers):
            sample = job.sample(subject, task, arguments.length, index)
            for way, one in asked:
                where = {"kind": "answer", "direction": way, "task": task.label(), "index": index} | one.head
                if not lines.find(**where):
                    text = subject.answer([sample], one.policy, task.max_new_tokens, one_line=task.one_line)[0].texts[0]
                    lines.add(where | {"score": task.score(text, sample.turns[0].references)})
            print(f"  answers, {direction}, {task.label()} {index}", file=sys.stderr, flush=True)


STAGES = {"match": match, "time": take_times, "logits": take_logits, "answers": take_answers}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--length", default="7680")
    parser.add_argument("--first", default="+".join(map(str, PROSE)))
    parser.add_argument("--second", default="package")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--rivals", default=",".join(RIVALS))
    parser.add_argument("--published", default="")
    parser.add_argument("--methods", default="a_shape,vertical_slash,block_sparse,xattention,max_relative")
    parser.add_argument("--costs", type=Path)
    parser.add_argument("--tasks", default="")
    parser.add_argument("--answers", type=int, default=20)
    parser.add_argument("--answered", default=RIVALS[1])
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--stages", default=",".join(("search", *STAGES)))
    parser.add_argument("--directions", default="first,second")
    parser.add_argument("--chat", action="store_true")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    (arguments.length,) = parse_lengths(arguments.length)
    check_environment(arguments.device)
    torch.manual_seed(0)
    subject = load_subject(arguments, arguments.length)
    about = {
        **kinds(arguments),
        "model": subject.to_dict(),
        "length": arguments.length,
        "samples": arguments.samples,
        "version": __version__,
    }
    lines = Lines(arguments.out, about | {"machine": machine()})
    stages = split_specs(arguments.stages)
    for stage in stages:
        for direction in split_specs(arguments.directions):
            if stage == "search":
                searched(arguments, subject, direction)
            else:
                STAGES[stage](arguments, subject, direction, lines)
    rows = list(summary(lines))
    write(arguments.out.with_suffix(".json"), {"date": date.today().isoformat()} | lines.rows[0] | {"rows": rows})
    for row in rows:
        shown = (f"{name} {v[0]:.4g} ({v[1]:.4g} to {v[2]:.4g})" for name, v in row.items() if isinstance(v, list))
        print(f"{row['direction']} {row['rival']} {row['mode']}: {'  '.join(shown)}")


if __name__ == "__main__":
    main()
