"""Clips with sparse attention beside dense ones, from the lines of ``gossamer eval-video``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gossamer.evaluate.clips import ClipRow, clip_labels, clip_rows, clip_table, step_means, step_table
from gossamer.evaluate.metrics import Interval
from gossamer.report.figure import Figure, Record, Style, Table, label_styles, legend
from gossamer.report.html import Html, element
from gossamer.report.svg import PALETTE, Panel

__all__ = [
    "FIGURES",
    "choice_of",
    "choice_styles",
    "clip_frames",
    "clip_frontier",
    "clip_modes",
    "clip_steps",
    "frontier_panel",
    "map_of_choices",
]

# Field of a row, its name on an axis, whether more is better.
FIGURES = (("psnr", "PSNR, dB", True), ("ssim", "SSIM", True), ("distance", "distance of features", False))
_TICKS = (0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
_MOST_FRAMES = 40


def clip_frontier(records: Sequence[Record]) -> Figure:
    """What clips lose against what was computed for them."""
    rows = clip_rows(records)
    header = ["method", "series", "clips", "equal", "density"]
    header += [f"{name}{part}" for name, _, _ in FIGURES for part in ("", " low", " high")]
    table: Table = [[*header, "plan s", "attention s", "seconds"]]
    for row in rows:
        figures = [value for name, _, _ in FIGURES for value in _with_interval(row, name)]
        seconds = [row.plan_s, row.attention_s, row.seconds]
        table.append([row.method, row.series, row.clips, row.equal, row.density, *figures, *seconds])
    styles = label_styles(row.series for row in rows)
    panels = [
        (f"{axis} against density", frontier_panel(rows, name, axis, styles).render(scale=1.2))
        for name, axis, _ in FIGURES
        if any(getattr(row, name) is not None for row in rows)
    ]
    note = (
        "Each clip is held beside the dense one of the same prompt and seed; points are means over clips, bars 95% "
        "intervals over them. Density is the share of pairs that was computed, over all steps and layers, dense steps "
        "included. Settings of one method are joined. Further left is cheaper; of PSNR and SSIM further up is nearer "
        "to the dense clip, of the distance further down. It has the form of LPIPS with a fixed random network, and is "
        "no number of LPIPS. PSNR is that of the clips that differ."
    )
    shown = legend(styles) if panels else Html()
    words = clip_table(rows) if rows else []
    return Figure("clips", "What clips lose", note, panels, table, "three", shown, words)


def _with_interval(row: ClipRow, name: str) -> tuple[Any, Any, Any]:
    interval: Interval | None = getattr(row, f"{name}_interval")
    low, high = interval or (None, None)
    return getattr(row, name), low, high


def frontier_panel(rows: Sequence[ClipRow], name: str, axis: str, styles: Mapping[str, Style]) -> Panel:
    """One figure of the rows against density."""
    shown = [row for row in rows if getattr(row, name) is not None and row.density > 0]
    ends = [value for row in shown for value in _with_interval(row, name) if value is not None]
    panel = Panel(400, 300, f"{axis} against density")
    low = min(row.density for row in shown) * 0.85
    spread = max(max(ends) - min(ends), 1e-3 * max(map(abs, ends))) or 1.0
    low_y = min(ends) - 0.05 * spread
    y = (max(0.0, low_y) if min(ends) >= 0 else low_y), max(ends) + 0.05 * spread
    panel.axes((low, 1.1), y, ("density", axis), (True, False), [tick for tick in _TICKS if tick >= low])
    for series, style in styles.items():
        own = sorted((row for row in shown if row.series == series), key=lambda row: row.density)
        panel.line([panel.place(row.density, getattr(row, name)) for row in own], style.colour, 1.4, style.dash)
        for row in own:
            value, bottom, top = _with_interval(row, name)
            if bottom is not None:
                panel.line([panel.place(row.density, end) for end in (bottom, top)], style.colour, 1.0)
            hint = f"{row.method}: {value:.4g} at density {row.density:.3f}, {row.clips} clips"
            panel.marker(*panel.place(row.density, value), style.marker or "circle", style.colour, hint, 0.9)
    return panel


def clip_steps(records: Sequence[Record]) -> Figure:
    """Density and seconds of each step."""
    means = step_means(records)
    table: Table = [["method", "step", "density", "plan s", "attention s"]]
    for label, steps in means.items():
        for number, step in enumerate(steps):
            table.append([label, number, step["density"], step["plan_s"], step["attention_s"]])
    styles = label_styles(means)
    panels = []
    if means:
        seconds = {label: [s["plan_s"] + s["attention_s"] for s in steps] for label, steps in means.items()}
        densities = {label: [s["density"] for s in steps] for label, steps in means.items()}
        panels = [
            ("Density by step", _by_step(densities, "density", styles)),
            ("Seconds of attention by step, planning included", _by_step(seconds, "seconds", styles)),
        ]
    note = (
        "Means over clips: the share of pairs that each step computed, over all layers, and its seconds of planning "
        "and attention on the clock of the machine that made the clips. The table has sums of quarters of the steps."
    )
    words = step_table(records)
    shown = legend(styles) if panels else Html()
    return Figure(
        "clip-steps", "What each step computes", note, panels, table, "", shown, words if len(words) > 1 else []
    )


def _by_step(lines: Mapping[str, Sequence[float]], name: str, styles: Mapping[str, Style]) -> Html:
    panel = Panel(440, 300, f"{name} by step")
    most = max(len(values) for values in lines.values())
    top = max(value for values in lines.values() for value in values)
    ticks = [float(n) for n in range(0, most, max(1, most // 10))]
    panel.axes((0, max(1, most - 1)), (0, 1.05 * top or 1.0), ("step", name), (False, False), ticks)
    for label, values in lines.items():
        panel.line(
            [panel.place(n, value) for n, value in enumerate(values)], styles[label].colour, 1.4, styles[label].dash
        )
    return panel.render(scale=1.3)


def clip_frames(records: Sequence[Record]) -> Figure:
    """Frames of one clip of each method below those of the dense one."""
    shown = [record for record in records if record["kind"] == "clip" and "frames" in record][:_MOST_FRAMES]
    densities, name_of = {row.method: row.density for row in clip_rows(records)}, clip_labels(records)
    panels: list[tuple[str, Html]] = []
    table: Table = [["method", "prompt", "seed", "psnr", "density"]]
    for record in shown:
        label, known = name_of(record), record["psnr"]
        said = "equal" if known is None else f"PSNR {known:.1f} dB"
        picture = element(
            "img",
            style="width:100%;image-rendering:pixelated",
            src=f"data:image/png;base64,{record['frames']}",
            alt=f"frames of {label}, {record['prompt']}",
        )
        panels.append((f"{label}: {record['prompt']}, {said}, density {densities[label]:.2f}", picture))
        table.append([label, record["prompt"], record["seed"], known, densities[label]])
    note = "Some frames, in their order: above of the dense clip, below of the same prompt and seed with the method."
    return Figure("clip-frames", "Frames beside dense ones", note, panels, table)


def clip_modes(records: Sequence[Record]) -> Figure:
    """What each layer and head has, of methods by layer and head."""
    found: dict[str, Any] = {}
    for record in records:
        layers = (record.get("method_fields") or {}).get("layers") if record["kind"] == "clip" else None
        if layers and isinstance(layers[0], list):
            found.setdefault(record["method"], layers)
    table: Table = [["method", "layer", "head", "choice", "fields"]]
    panels = []
    styles = choice_styles([choice_of(head)[0] for layers in found.values() for layer in layers for head in layer])
    for label, layers in found.items():
        panels.append((f"{label}: layers down, heads across", map_of_choices(layers, styles).render(scale=1.2)))
        for number, layer in enumerate(layers):
            for head, method in enumerate(layer):
                fields = ", ".join(f"{name}={value}" for name, value in method.items() if name != "method")
                table.append([label, number, head, choice_of(method)[0], fields])
    note = "The colour is the mode or the order of axes; the number below it what a mode leaves in, as a share."
    return Figure(
        "clip-modes", "Modes by layer and head", note, panels, table, "", legend(styles) if panels else Html()
    )


def choice_of(method: Mapping[str, Any]) -> tuple[str, str]:
    """What was chosen for a head, and its budget: a mode and its share, an order of axes, or a method's name."""
    if "mode" in method:
        some = method["mode"] not in ("dense", "skip")
        return str(method["mode"]), f"{method.get('share', '')}" if some else ""
    return str(method.get("order", method["method"])), ""


def choice_styles(choices: Sequence[str]) -> dict[str, Style]:
    return {name: Style(PALETTE[n % len(PALETTE)], "square") for n, name in enumerate(sorted(set(choices)))}


def map_of_choices(layers: Sequence[Sequence[Mapping[str, Any]]], styles: Mapping[str, Style]) -> Panel:
    """Cells of layers down and heads across."""
    wide, high = 66, 34
    panel = Panel(44 + wide * len(layers[0]), 8 + high * len(layers), "choices by layer and head")
    for number, layer in enumerate(layers):
        panel.text(36, 26 + high * number, f"L{number}", "end")
        for head, method in enumerate(layer):
            choice, budget = choice_of(method)
            x, y = 40 + wide * head, 4 + high * number
            panel.rect(
                x, y, wide - 2, high - 2, styles[choice].colour, f"layer {number}, head {head}: {choice} {budget}"
            )
            panel.text(x + wide / 2 - 1, y + (14 if budget else 20), choice.replace("_", " "), fill="#000", size=9)
            if budget:
                panel.text(x + wide / 2 - 1, y + 26, budget, fill="#000", size=9)
    return panel
