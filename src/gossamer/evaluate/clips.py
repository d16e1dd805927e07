"""What `gossamer eval-video` found, in rows and tables. Needs no diffusers, so that a report does not either."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean
from typing import Any

from gossamer.evaluate.metrics import Interval, bootstrap_interval, shown_interval
from gossamer.methods.registry import class_of

__all__ = ["ClipRow", "clip_labels", "clip_rows", "clip_table", "series_of", "step_means", "step_table"]

Record = dict[str, Any]
SETTINGS = ("steps", "size", "dtype", "beside")  # of a line, besides its method


@dataclass(frozen=True)
class ClipRow:
    """One setting: means over its clips, with 95% bootstrap intervals over them where there are several.

    Fields:
        method: its label; series: settings of one series differ in how much they compute alone.
        clips: how many; equal: of them as many equal the dense clip, number for number.
        density: of pairs, mean over steps and layers.
        psnr: dB, of those that differ; None if none does. ssim, distance: of all.
        plan_s, attention_s: of the attention over whole clips, all steps; seconds: of a clip.
    """

    method: str
    series: str
    clips: int
    equal: int
    density: float
    psnr: float | None
    psnr_interval: Interval | None
    ssim: float
    ssim_interval: Interval | None
    distance: float
    distance_interval: Interval | None
    plan_s: float
    attention_s: float
    seconds: float

    def to_dict(self) -> Record:
        return asdict(self)


def series_of(record: Record) -> str:
    """A method's name with the fields that are no budget of it; of methods per head, their names.

    What a method's `Method.settings` vary counts as its budget.
    """
    fields = record.get("method_fields") or {}
    name = str(fields.get("method") or str(record["method"]).partition("(")[0])
    if "layers" in fields and name == "per_head":
        return "+".join(sorted({str(head["method"]) for layer in fields["layers"] for head in layer}))
    try:
        known = class_of(name)
    except ValueError:  # of a package that is not installed
        return name
    budgets = {field for setting in known.settings for field in setting}
    usual = known.from_fields({}).to_dict()
    changed = [
        f"{field}={_shown(value)}"
        for field, value in fields.items()
        if field not in budgets and field in usual and _shown(value) != _shown(usual[field])
    ]
    return f"{name}({','.join(changed)})" if changed else name


def _shown(value: Any) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list | tuple) else str(value)


def clip_rows(records: Iterable[Record]) -> list[ClipRow]:
    """In the order in which methods come, those of unlike settings apart.

    Of several lines for one clip the last one counts.
    """
    return [_row(label, list(own.values())) for label, own in _by_label(list(records)).items()]


def clip_labels(records: Iterable[Record]) -> Callable[[Record], str]:
    """Names a ``clip`` line: its method's label, and those settings in which the lines of these records differ."""
    clips = [record for record in records if record["kind"] == "clip"]
    unlike = [name for name in SETTINGS if len({record.get(name) for record in clips}) > 1]

    def label(record: Record) -> str:
        return " ".join([record["method"], *(f"{name}={record.get(name) or '-'}" for name in unlike)])

    return label


def _by_label(records: Sequence[Record]) -> dict[str, dict[Any, Record]]:
    found: dict[str, dict[Any, Record]] = {}
    label = clip_labels(records)
    for record in records:
        if record["kind"] == "clip":
            found.setdefault(label(record), {})[record.get("model"), record["prompt"], record["seed"]] = record
    return found


def _row(label: str, own: Sequence[Record]) -> ClipRow:
    psnr = [record["psnr"] for record in own if record["psnr"] is not None]
    ssim, distance = ([record[name] for record in own] for name in ("ssim", "distance"))
    steps = [record["by_step"] for record in own]
    return ClipRow(
        method=label,
        series=series_of(own[0]) + label.removeprefix(own[0]["method"]),
        clips=len(own),
        equal=len(own) - len(psnr),
        density=fmean(step["density"] for clip in steps for step in clip),
        psnr=fmean(psnr) if psnr else None,
        psnr_interval=_interval(psnr),
        ssim=fmean(ssim),
        ssim_interval=_interval(ssim),
        distance=fmean(distance),
        distance_interval=_interval(distance),
        plan_s=fmean(sum(step["plan_s"] for step in clip) for clip in steps),
        attention_s=fmean(sum(step["attention_s"] for step in clip) for clip in steps),
        seconds=fmean(record["seconds"] for record in own),
    )


def _interval(values: Sequence[float]) -> Interval | None:
    return bootstrap_interval(values) if len(values) > 1 else None


def clip_table(rows: Sequence[ClipRow]) -> list[list[str]]:
    """Header first; an interval follows its mean in brackets."""
    table = [["method", "clips", "density", "PSNR", "SSIM", "distance", "plan s", "attention s", "s"]]
    for row in rows:
        table.append(
            [
                row.method,
                str(row.clips),
                f"{row.density:.3f}",
                "-" if row.psnr is None else f"{row.psnr:.1f}" + shown_interval(row.psnr_interval, "{:.1f}"),
                f"{row.ssim:.4f}" + shown_interval(row.ssim_interval),
                f"{row.distance:.4f}" + shown_interval(row.distance_interval),
                *(f"{seconds:.2f}" for seconds in (row.plan_s, row.attention_s, row.seconds)),
            ]
        )
    return table


def step_means(records: Iterable[Record]) -> dict[str, list[Record]]:
    """By method's label, of each step the means of ``density``, ``plan_s`` and ``attention_s`` over the clips."""
    means = {}
    for label, own in _by_label(list(records)).items():
        clips = [record["by_step"] for record in own.values()]
        means[label] = [
            {name: fmean(clip[n][name] for clip in clips) for name in ("density", "plan_s", "attention_s")}
            for n in range(min(map(len, clips)))
        ]
    return means


def step_table(records: Sequence[Record]) -> list[list[str]]:
    """Density and seconds of attention, planning included, by quarters of the steps; header first."""
    table = [["method", *(f"density, {n}/4" for n in range(1, 5)), *(f"seconds, {n}/4" for n in range(1, 5))]]
    for label, steps in step_means(records).items():
        parts = [steps[n * len(steps) // 4 : (n + 1) * len(steps) // 4] for n in range(4)]
        if all(parts):
            densities = [f"{fmean(step['density'] for step in part):.3f}" for part in parts]
            seconds = [f"{sum(step['plan_s'] + step['attention_s'] for step in part):.2f}" for part in parts]
            table.append([label, *densities, *seconds])
    return table
