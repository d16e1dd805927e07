"""Results of `gossamer eval` in one table: each method at each length, beside dense attention."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from gossamer.evaluate.closeness import Closeness, closeness_rows
from gossamer.evaluate.metrics import (
    Interval,
    bootstrap_interval,
    difference_interval,
    pooled_interval,
    score_interval,
)
from gossamer.evaluate.records import cell_of, read_lines
from gossamer.evaluate.schema import KINDS
from gossamer.evaluate.step_bytes import step_bytes
from gossamer.policy import TOO_DENSE
from gossamer.profiles.files import read_file, shown

__all__ = [
    "SummaryRow",
    "closeness_of",
    "common_cells",
    "dense_notes",
    "main_table",
    "read_results",
    "summary_rows",
    "task_table",
    "warnings_of",
]

Record = dict[str, Any]

# Kinds of lines that measure a method at a length; and all that are of a method.
_MEASURED = ("sample", "perplexity", "fidelity")
_OF_METHODS = (*_MEASURED, "lm_eval")


@dataclass(frozen=True)
class SummaryRow:
    """One method at one length. None where nothing was measured.

    Fields:
        samples: samples of all tasks; each weighs the same.
        accuracy: mean score, with its 95% interval over samples; tasks are strata (`pooled_interval`).
        difference: accuracy less that of dense on the same samples, with its interval (paired).
        tasks: mean score of each task, its interval, and the number of samples.
        recall, oracle_recall: attention mass in the plan, and in the best plan of as many whole blocks.
        kl, top1: logits against those of the dense run: nats, and share of equal choices, with their intervals over
            the prompts where there are several of each kind (`closeness_rows`).
        density: share of the pairs that was computed, of prompts.
        read: share of the cache that questions and answers read token by token, where a method chose it.
        cache_bytes: what the cache of a sample holds at the end, where `--cache` or `--decode` was given.
        cache_peak_bytes: the most that it has held.
        step_bytes: of the cache that a step reads, and of what is beside it, to choose; see
            `gossamer.evaluate.step_bytes`.
        token_s: seconds of a token after a prompt, over all samples.
        prefill_s: median seconds; speedup: median of dense over that of the method, on what both have measured.
        nats: mean loss of a token of text, with its interval over windows (None for one window).
        nats_difference: the loss less that of dense on the same windows, with its interval (paired).
        dense_because: share of the layers' prefills that ran dense, by reason.
        thresholds: of the policy, such as ``min_tokens=2048,max_density=0.9``.
    """

    method: str
    length: int
    samples: int
    accuracy: float | None
    interval: Interval | None
    difference: float | None
    difference_interval: Interval | None
    tasks: dict[str, tuple[float, Interval, int]]
    recall: float | None
    oracle_recall: float | None
    kl: float | None
    top1: float | None
    density: float | None
    prefill_s: float | None
    speedup: float | None
    nats: float | None
    nats_interval: Interval | None = None
    nats_difference: float | None = None
    nats_difference_interval: Interval | None = None
    kl_interval: Interval | None = None
    top1_interval: Interval | None = None
    dense_because: dict[str, float] = field(default_factory=dict)
    thresholds: str = ""
    read: float | None = None
    cache_bytes: float | None = None
    cache_peak_bytes: float | None = None
    step_bytes: float | None = None
    token_s: float | None = None

    @property
    def fewest(self) -> int:
        """Samples of the task that has the fewest: what a statement about all of them rests on."""
        return min((count for _, _, count in self.tasks.values()), default=0)

    def to_dict(self) -> Record:
        return asdict(self)


def read_results(path: Path) -> list[Record]:
    """All lines of a results file; a line that was cut off at the end is left out.

    Raises:
        ValueError: the file cannot be read, is empty, or holds something else.
    """
    try:
        content = read_file(path)
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}; give a file that `gossamer eval` wrote") from error
    records = read_lines(content, path)
    if not any(record["kind"] in KINDS and record["kind"] != "run" for record in records):
        others = ", ".join(sorted({shown(record["kind"]) for record in records if record["kind"] not in KINDS}))
        what = f"no results that this version knows, only lines of kind {others}" if others else "no results"
        raise ValueError(f"{path} holds {what}; run `gossamer eval` with --out {path}")
    return records


def warnings_of(records: Sequence[Record]) -> list[str]:
    """What makes rows of these records say less than they seem to, a sentence each."""
    runs = [record for record in records if record["kind"] == "run"]
    lines = []
    if len(seeds := sorted({str(run.get("seed")) for run in runs})) > 1:
        lines.append(
            f"The results are of several seeds ({', '.join(seeds)}), whose samples are pooled; each is compared with "
            "dense on the same sample."
        )
    if len({run.get("chat", False) for run in runs}) > 1:
        lines.append("Some results were made with a chat template and some without.")
    if again := sum(record["kind"] in _OF_METHODS for record in records) - len(_different(records)):
        lines.append(f"{again:,} results are there more than once and count once.")
    return lines


def _different(records: Sequence[Record]) -> list[Record]:
    """The results of methods without repetitions, with the ``origin`` of their samples, the model's ``layers`` and what
    a step reads (`step_bytes`)."""
    runs = {record["run"]: record for record in records if record["kind"] == "run" and "run" in record}
    kept: dict[Any, Record] = {}
    for record in records:
        if record["kind"] in _OF_METHODS:
            run = runs.get(record.get("run"), {})
            model, haystack = run.get("model", {}).get("fingerprint"), run.get("haystack", {}).get("sha256")
            origin = model, haystack, run.get("seed"), run.get("chat", False)
            # Lines made by hand have no fields of the method: the label stands for them.
            key = origin, cell_of(record), None if "method_fields" in record else record.get("method")
            of_model = run.get("model", {})
            more = {"origin": origin, "layers": of_model.get("layers"), "step_bytes": step_bytes(record, of_model)}
            kept.setdefault(key, record | more)
    return list(kept.values())


def _sample_of(record: Record) -> Any:
    """What two methods' lines have in common when they are of the same sample."""
    task = json.dumps(record.get("task_fields"), sort_keys=True)
    window = record.get("text_sha256"), record.get("start")
    return record["kind"], record["origin"], record.get("task"), task, record["length"], record["index"], window


def common_cells(records: Sequence[Record], methods: Sequence[str]) -> list[Record]:
    """The samples and windows of text that all these methods, by label, have; all other records stay."""
    different = [r for r in _different(records) if r["method"] in methods and r["kind"] in ("sample", "perplexity")]
    owners = Counter(map(_sample_of, different))
    lacking = {cell_of(record) for record in different if owners[_sample_of(record)] < len(methods)}
    return [record for record in records if record["kind"] == "run" or cell_of(record) not in lacking]


def summary_rows(records: Iterable[Record]) -> list[SummaryRow]:
    """A row for each length and method, in order of length; dense first, then in the order of the records."""
    records = [record for record in _different(list(records)) if record["kind"] in _MEASURED]
    order: dict[str, int] = {}
    for record in records:
        order.setdefault(record["method"], len(order) + 1)
    plain = [label for label in order if label.startswith("dense") and "+" not in label]
    baseline = "dense" if "dense" in order else next(iter(plain), None)
    rank = {label: (label != baseline, label not in plain, place) for label, place in order.items()}
    lengths = sorted({record["length"] for record in records})
    rows = []
    for length in lengths:
        here = [record for record in records if record["length"] == length]
        dense = [record for record in here if record["method"] == baseline]
        for label in sorted(order, key=rank.__getitem__):
            mine = [record for record in here if record["method"] == label]
            if mine:
                rows.append(_row(label, length, mine, dense if label != baseline else []))
    return rows


def closeness_of(records: Iterable[Record]) -> list[Closeness]:
    """`closeness_rows` of all lines, each prompt once."""
    return closeness_rows(_different(list(records)))


def _row(label: str, length: int, mine: list[Record], dense: list[Record]) -> SummaryRow:
    samples, windows, fidelity = (_of_kind(mine, kind) for kind in ("sample", "perplexity", "fidelity"))
    dense_of = {_sample_of(record): record for record in dense}
    pairs = [(record, dense_of[key]) for record in mine if (key := _sample_of(record)) in dense_of]
    by_task: dict[str, list[float]] = {}
    for record in samples:
        by_task.setdefault(record["task"], []).append(record["score"])
    lost: dict[str, list[float]] = {}
    for record, other in pairs:
        if record["kind"] == "sample":
            lost.setdefault(record["task"], []).append(record["score"] - other["score"])
    nats = [record["nats"] for record in windows]
    gained = [record["nats"] - other["nats"] for record, other in pairs if record["kind"] == "perplexity"]
    seconds, dense_seconds = (_seconds([pair[i] for pair in pairs]) for i in (0, 1))
    near = next(iter(closeness_rows(fidelity)), None)
    return SummaryRow(
        method=label,
        length=length,
        samples=len(samples),
        accuracy=_mean([record["score"] for record in samples]),
        interval=pooled_interval(list(by_task.values()), score_interval) if by_task else None,
        difference=_mean([value for values in lost.values() for value in values]),
        difference_interval=pooled_interval(list(lost.values()), difference_interval) if lost else None,
        tasks={
            task: (sum(values) / len(values), score_interval(values), len(values)) for task, values in by_task.items()
        },
        recall=_mean([r["mean"]["recall"] for r in fidelity]),
        oracle_recall=_mean([r["mean"]["oracle_recall"] for r in fidelity]),
        kl=near.kl[0] if near else None,
        top1=near.top1[0] if near else None,
        density=_mean([r["density"] for r in samples or windows or fidelity]),
        read=_mean([r["read"] for r in samples if "read" in r]),
        cache_bytes=_mean([r["cache_bytes"] for r in samples if "cache_bytes" in r]),
        cache_peak_bytes=_mean([r["cache_peak_bytes"] for r in samples if "cache_peak_bytes" in r]),
        step_bytes=_mean([r["step_bytes"] for r in samples if r["step_bytes"] is not None]),
        token_s=_token_seconds(samples),
        prefill_s=_seconds(mine),
        speedup=dense_seconds / seconds if seconds and dense_seconds else None,
        nats=_mean(nats),
        nats_interval=_over_windows(nats),
        nats_difference=_mean(gained),
        nats_difference_interval=_over_windows(gained),
        kl_interval=near.kl[1] if near else None,
        top1_interval=near.top1[1] if near else None,
        dense_because=_dense_because(samples + windows or fidelity),
        thresholds=next((r["policy"] for r in mine if "policy" in r), ""),
    )


def _over_windows(values: list[float]) -> Interval | None:
    return bootstrap_interval(values) if len(values) > 1 else None


def _dense_because(records: list[Record]) -> dict[str, float]:
    """Share of the layers' prefills, by reason."""
    counts: Counter[str] = Counter()
    for record in records:
        counts.update(record.get("dense_because") or {})
    layers = sum(record["layers"] or 0 for record in records)
    return {reason: count / max(count, layers, 1) for reason, count in counts.most_common()}


def dense_notes(rows: Sequence[SummaryRow]) -> list[str]:
    """A sentence for each row that ran dense, whole or in part, though a plan was asked for."""
    notes = []
    for row in rows:
        limits = dict(part.split("=", 1) for part in row.thresholds.split(",") if "=" in part)
        for reason, share in row.dense_because.items():
            line = f"{row.method} at {row.length:,} tokens: {share:.0%} of the layers' prefills ran dense ({reason})"
            if reason in ("short prompt", "short model window") and "min_tokens" in limits:
                line += f"; prompts below min_tokens={limits['min_tokens']} do, --min-tokens sets it"
            elif reason == TOO_DENSE and "max_density" in limits:
                line += f"; plans above max_density={limits['max_density']} do"
            notes.append(line)
    return notes


def _of_kind(records: list[Record], kind: str) -> list[Record]:
    return [record for record in records if record["kind"] == kind]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _token_seconds(samples: list[Record]) -> float | None:
    """Of the samples that say how many tokens they took."""
    timed = [record for record in samples if record.get("decode_tokens") and "decode_s" in record]
    tokens = sum(record["decode_tokens"] for record in timed)
    return sum(record["decode_s"] for record in timed) / tokens if tokens else None


def _seconds(records: list[Record]) -> float | None:
    """Median prefill of the tasks (of the perplexity windows where there are none)."""
    values = sorted(r["prefill_s"] for r in _of_kind(records, "sample") or _of_kind(records, "perplexity"))
    return (values[(len(values) - 1) // 2] + values[len(values) // 2]) / 2 if values else None


def main_table(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Header and cells, for a terminal. Columns that nothing was measured for are left out."""
    columns: list[tuple[str, list[str]]] = [
        ("method", [row.method for row in rows]),
        ("length", [str(row.length) for row in rows]),
        ("n", [str(row.samples) for row in rows]),
        ("accuracy", [_with_interval(row.accuracy, row.interval) for row in rows]),
        ("less dense", [_with_interval(row.difference, row.difference_interval, "+") for row in rows]),
        ("recall", [_number(row.recall, ".3f") for row in rows]),
        ("oracle", [_number(row.oracle_recall, ".3f") for row in rows]),
        ("KL", [_with_interval(row.kl, row.kl_interval) for row in rows]),
        ("top-1", [_with_interval(row.top1, row.top1_interval) for row in rows]),
        ("density", [_number(row.density, ".3f") for row in rows]),
        ("read", [_number(row.read, ".3f") for row in rows]),
        ("cache MiB", [_number(row.cache_bytes and row.cache_bytes / 2**20, ".2f") for row in rows]),
        ("peak MiB", [_number(row.cache_peak_bytes and row.cache_peak_bytes / 2**20, ".2f") for row in rows]),
        ("step MiB", [_number(row.step_bytes and row.step_bytes / 2**20, ".2f") for row in rows]),
        ("token ms", [_number(row.token_s and 1e3 * row.token_s, ".1f") for row in rows]),
        ("nats", [_with_interval(row.nats, row.nats_interval) for row in rows]),
        ("more nats", [_with_interval(row.nats_difference, row.nats_difference_interval, "+") for row in rows]),
        ("prefill s", [_number(row.prefill_s, ".2f") for row in rows]),
        ("speed-up", [_number(row.speedup, ".2f") for row in rows]),
    ]
    shown = [(name, cells) for name, cells in columns if any(cell != "-" for cell in cells)]
    return [[name for name, _ in shown], *map(list, zip(*(cells for _, cells in shown), strict=True))]


def task_table(rows: Sequence[SummaryRow]) -> list[list[str]]:
    """Header and cells: the accuracy of each task, with its interval and the number of samples."""
    tasks = list(dict.fromkeys(task for row in rows for task in row.tasks))
    table = [["method", "length", *tasks]]
    for row in rows:
        cells = [
            f"{_with_interval(*row.tasks[task][:2])} n={row.tasks[task][2]}" if task in row.tasks else "-"
            for task in tasks
        ]
        table.append([row.method, str(row.length), *cells])
    return table


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _with_interval(value: float | None, interval: Interval | None, sign: str = "") -> str:
    if value is None:
        return "-"
    if interval is None:
        return f"{value:{sign}.3f}"
    low, high = interval
    return f"{value:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"
