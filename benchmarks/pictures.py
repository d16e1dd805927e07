"""Pictures of each machine's results for the documentation: `python benchmarks/pictures.py`."""

from __future__ import annotations

import json
from pathlib import Path

import weight_curves
from machines import measured

from gossamer.evaluate.clips import ClipRow, clip_labels, clip_rows
from gossamer.evaluate.masked.summary import fill_rows, overlap_rows, same_seeds
from gossamer.evaluate.mqar.summary import RecallRow, recall_rows
from gossamer.evaluate.summary import read_results
from gossamer.report.figure import label_styles
from gossamer.report.html import element
from gossamer.report.masked import SHOWN, kind_of, overlap_panel, panel_of, styles_of
from gossamer.report.svg import MARKERS, PALETTE, Panel, stacked, svg_file
from gossamer.report.videos import choice_of, choice_styles, frontier_panel, map_of_choices

IMAGES = Path(__file__).resolve().parent.parent / "docs" / "images"
BLOCK_K = 128
NO_LOSS = 1e-3


def save(panel: Panel, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(svg_file(panel))


def legend(panel: Panel, names: list[str], x: float, y: float) -> None:
    for n, name in enumerate(names):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        panel.marker(x, y + 16 * n - 4, marker, colour)
        panel.text(x + 10, y + 16 * n, name, "start")


def latency(sections: dict) -> Panel:
    """Seconds by length: SDPA, our kernel dense, and at each density."""
    rows = [
        row
        for row in sections["prefill"]["rows"]
        if (row["dtype"], row["dim"]) == ("bf16", 128) and (row["what"] == "dense" or row["block_k"] == BLOCK_K)
    ]
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["what"] == "dense":
            lines.setdefault("torch SDPA, dense", []).append((row["length"], row["sdpa"]["median_s"]))
        name = "gossamer, dense" if row["what"] == "dense" else f"gossamer, {row['what'].split(' ')[0]}"
        lines.setdefault(name, []).append((row["length"], row["median_s"]))
    lengths = sorted({row["length"] for row in rows})
    seconds = [s for points in lines.values() for _, s in points]
    panel = Panel(640, 400, "Seconds of attention against length")
    names = ("tokens", "seconds, 4 heads of 128, bfloat16")
    panel.axes((lengths[0], lengths[-1]), (min(seconds) * 0.8, max(seconds) * 1.2), names, (True, True), lengths)
    for n, points in enumerate(lines.values()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        placed = [panel.place(*point) for point in points]
        panel.line(placed, colour)
        for (x, y), (length, value) in zip(placed, points, strict=True):
            panel.marker(x, y, marker, colour, f"{length} tokens: {value:.4g} s")
    legend(panel, list(lines), 70, 34)
    return panel


def roofline(sections: dict) -> Panel:
    """Arithmetic per byte of packed keys and values against the rate, under what the machine can do."""
    scale = {row["what"] + row.get("dtype", ""): row for row in sections["gemm"]["rows"]}
    prefill = next(row for row in sections["prefill"]["rows"] if (row["dtype"], row["dim"]) == ("bf16", 128))
    registers = next((row for row in sections["gemm"]["rows"] if row.get("isa") == prefill["isa"]), None)
    # Files of before the arithmetic on registers was measured have torch's matrix product alone.
    peak, read = (registers or scale["gemmbf16"])["gflops"], scale["read"]["gb_per_s"]
    roof = "torch's matrix product" if registers is None else f"{prefill['isa']} on registers"
    points: dict[str, list[tuple[float, float, str]]] = {}
    for row in sections["decode"]["rows"]:
        if row["dtype"] == "bf16":
            # Each key and value, 4 bytes an element pair, serves the heads of a group: 4 flops each.
            points.setdefault(row["what"], []).append((row["heads"] / row["groups"], row["gflops"], str(row["length"])))
    for row in sections["prefill"]["rows"]:
        if (row["dtype"], row["dim"]) == ("bf16", 128) and (row["what"] == "dense" or row["block_k"] == BLOCK_K):
            what = "prefill, dense" if row["what"] == "dense" else f"prefill, {row['what'].split(' ')[0]}"
            # A panel of 64 tokens in the heads of the group.
            intensity = 64 * row["heads"] / row["groups"]
            points.setdefault(what, []).append((intensity, row["gflops"], str(row["length"])))
    panel = Panel(640, 400, "Roofline")
    low = min(y for series in points.values() for _, y, _ in series) * 0.7
    names = ("flops for each byte of keys and values", "GFLOP/s, bfloat16")
    panel.axes((1, 1024), (low, peak * 1.5), names, (True, True), [1, 4, 16, 64, 256, 1024])
    knee = peak / read
    panel.line(
        [panel.place(max(1, low / read), max(low, read)), panel.place(knee, peak), panel.place(1024, peak)], "#444"
    )
    panel.text(*panel.place(knee, peak * 1.08), f"{roof}, {peak:.0f} GFLOP/s", "start", size=10)
    panel.text(*panel.place(1.2, 6 * read), f"reading memory, {read:.0f} GB/s", "start", size=10)
    if registers is not None:
        product = scale["gemmbf16"]["gflops"]
        panel.line([panel.place(product / read, product), panel.place(1024, product)], "#bbb")
        panel.text(*panel.place(product / read * 1.3, product * 0.85), "torch's matrix product", "start", size=10)
    for n, series in enumerate(points.values()):
        for x, y, hint in series:
            panel.marker(
                *panel.place(x, y), MARKERS[n % len(MARKERS)], PALETTE[n % len(PALETTE)], f"{hint} tokens: {y:.0f}"
            )
    legend(panel, list(points), 430, 220)
    return panel


def losses(found: dict) -> Panel:
    """KL divergence against seconds to the first token at the longest length; programs are told apart by colour."""
    length = max(row["length"] for row in found["rows"] if "seconds" in row)
    rows = [row for row in found["rows"] if row["length"] == length and "seconds" in row]
    programs = list(dict.fromkeys(row["contender"].split()[0] for row in rows))
    points = {row["contender"]: max(row.get("kl", 0.0), NO_LOSS) for row in rows}
    panel = Panel(640, 440, f"Loss against seconds to the first token, {length:,} tokens of {found['model']['name']}")
    seconds = [row["seconds"] for row in rows]
    ticks = [round(min(seconds) + n * (max(seconds) - min(seconds)) / 4, 1) for n in range(5)]
    names = ("seconds to the first token", f"KL divergence, nats; {NO_LOSS:g}: less, or exact attention")
    wide = (min(seconds) * 0.9, max(seconds) * 1.3)
    panel.axes(wide, (NO_LOSS / 2, max(points.values()) * 2), names, (True, True), ticks)
    marks: list[tuple[float, float, str]] = []
    for row in rows:
        name, _, setting = row["contender"].partition(" ")
        n, kl = programs.index(name), points[row["contender"]]
        x, y = panel.place(row["seconds"], kl)
        shape, colour = MARKERS[n % len(MARKERS)], PALETTE[n % len(PALETTE)]
        panel.marker(x, y, shape, colour, f"{row['contender']}: {row['seconds']:.1f} s, KL {kl:.2g}")
        if kl > NO_LOSS:
            marks.append((x, y, setting))
    for x, y, setting, anchor in placed(marks):
        panel.text(x, y, setting, anchor, size=9)
    legend(panel, programs, 500, 34)
    return panel


def training_curves(found: dict) -> Panel:
    """The loss of answers against steps of training, and against their seconds."""
    seconds = found["parts"]["time"]["seconds"]
    curves = {kind: found["parts"][f"{kind}-0"]["curve"] for kind in seconds if f"{kind}-0" in found["parts"]}
    panel = Panel(640, 400, "Loss of answers against processor seconds of training")
    ends = [(point["step"] * seconds[kind], point["answer_loss"]) for kind, curve in curves.items() for point in curve]
    most, names = max(x for x, _ in ends), ("processor seconds of training", "loss of answers, nats a token")
    heights = [y for _, y in ends]
    panel.axes((0, most * 1.05), (min(heights) * 0.9, max(heights) * 1.05), names, (False, False), even(most))
    for n, (kind, curve) in enumerate(curves.items()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        points = [panel.place(point["step"] * seconds[kind], point["answer_loss"]) for point in curve]
        panel.line(points, colour)
        for (x, y), point in zip(points, curve, strict=True):
            panel.marker(x, y, marker, colour, f"{kind}, step {point['step']}: {point['answer_loss']:.3f}")
    legend(panel, list(curves), 500, 140)
    return panel


def needles(found: dict) -> Panel:
    """The share of right answers by length after equal steps, each model on the attention of its training."""
    steps, parts = found["long_stage"]["steps"], found["parts"]
    series = {"before": parts["base.dense"]["texts"]}
    for kind in found["steps"]:
        texts = [parts[name]["texts"] for seed in range(3) if (name := f"{kind}-{seed}-{steps}.{kind}") in parts]
        series |= {kind: [text for part in texts for text in part]} if texts else {}
    lengths = sorted({text["length"] for text in series["before"]})
    panel = Panel(640, 400, "Right answers by length, after equal steps")
    panel.axes((lengths[0], lengths[-1]), (0, 1), ("tokens", "share of answers"), (True, False), lengths)
    for n, (kind, texts) in enumerate(series.items()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        shares = []
        for length in lengths:
            own = [text for text in texts if text["length"] == length]
            shares.append(sum(text["right"] for text in own) / sum(text["asked"] for text in own))
        points = [panel.place(*point) for point in zip(lengths, shares, strict=True)]
        panel.line(points, colour)
        for (x, y), share in zip(points, shares, strict=True):
            panel.marker(x, y, marker, colour, f"{kind}: {share:.2f}")
    legend(panel, list(series), 70, 290)
    return panel


def found_by_step(rows: list[dict]) -> Panel:
    """The share of the keys with the largest weights that each step read, of one model at one length."""
    steps = max(len(row["found"]) for row in rows)
    panel = Panel(720, 420, f"Best keys among those read, {rows[0]['model']}, {rows[0]['length']:,} tokens")
    names = ("step after the prompt", "share of as many best keys")
    # Names stand to the right of the last step.
    panel.axes((1, max(2, 1.9 * steps)), (0, 1.02), names, (False, False), [1, *range(8, steps + 1, 8)])
    for n, row in enumerate(rows):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        points = [panel.place(step, share) for step, share in enumerate(row["found"], start=1)]
        panel.line(points, colour)
        for step in range(0, len(points), 4):
            panel.marker(*points[step], marker, colour, f"{row['method']}, step {step + 1}: {row['found'][step]:.2f}")
    legend(panel, [row["method"] for row in rows], panel.place(1.05 * steps, 0)[0], 60)
    return panel


def clip_losses(rows: list[ClipRow]) -> Panel:
    """PSNR and the distance of features against density, with intervals over clips."""
    rows = [row for row in rows if row.psnr is not None]
    styles = label_styles(row.series for row in rows)
    drawn = [frontier_panel(rows, "psnr", "PSNR, dB", styles), frontier_panel(rows, "distance", "distance", styles)]
    whole = stacked(drawn, "What clips lose against density")
    whole.width += 230
    for n, (name, style) in enumerate(styles.items()):
        whole.line([(410, 30 + 18 * n), (440, 30 + 18 * n)], style.colour, 1.4, style.dash)
        whole.marker(425, 30 + 18 * n, style.marker or "circle", style.colour)
        whole.text(448, 34 + 18 * n, name, "start")
    return whole


def frames_of_clips(records: list[dict], most: int = 12) -> Panel:
    """Frames of one prompt's clip by each method, the dense ones above, of settings of about a quarter of the pairs."""
    densities, label = {row.method: row.density for row in clip_rows(records)}, clip_labels(records)
    shown = [record for record in records if "frames" in record and record["psnr"] is not None]
    near: dict[str, dict] = {}
    for record in sorted(shown, key=lambda record: abs(densities[label(record)] - 0.25)):
        near.setdefault(record["method"].partition("(")[0].partition("-")[0], record)
    shown = list(near.values())[:most]
    wide, high, pitch = 4 * 48, 2 * 48, 2 * 48 + 30
    panel = Panel(3 * (wide + 20) + 10, -(-len(shown) // 3) * pitch + 10, f"Frames: {shown[0]['prompt']}")
    for n, record in enumerate(shown):
        x, y = 10 + n % 3 * (wide + 20), 20 + n // 3 * pitch
        name = record["method"].partition(".json(")[0].partition("(")[0]
        panel.text(x, y - 4, f"{name}, {densities[label(record)]:.0%}, {record['psnr']:.1f} dB", "start", size=10)
        given = {"x": x, "y": y, "width": wide, "height": high, "style": "image-rendering:pixelated"}
        panel.parts.append(element("image", href=f"data:image/png;base64,{record['frames']}", **given))
    return panel


def choices_of_heads(records: list[dict]) -> Panel:
    """Modes and orders of axes by layer and head, below each other."""
    found: dict[str, list] = {}
    for record in records:
        layers = record.get("method_fields", {}).get("layers")
        if layers and isinstance(layers[0], list):
            # Orders are the same in all profiles of orders, which differ in density.
            found.setdefault(json.dumps([[choice_of(head) for head in layer] for layer in layers]), layers)
    kinds = [choice_of(head)[0] for layers in found.values() for layer in layers for head in layer]
    styles = choice_styles(kinds)
    return stacked([map_of_choices(layers, styles) for layers in found.values()], "Choices by layer and head")


def masked_fills(records: list[dict]) -> Panel:
    """What is right and what is as in dense runs against density, a panel for each length and figure."""
    rows = [row for row in fill_rows(same_seeds(records)) if "span=" not in row.method]
    styles, panels = styles_of(rows), []
    for length in dict.fromkeys(row.length for row in rows):
        for figure in SHOWN:
            panel = panel_of([row for row in rows if row.length == length], figure, styles, (720, 300))
            panel.text(60, 26, f"{length:,} tokens", "start")
            panels.append(panel)
    names = Panel(720, 24 + 16 * len(styles), "")
    for n, (kind, style) in enumerate(styles.items()):
        y = 16 + 16 * n
        names.line([(60, y - 4), (90, y - 4)], style.colour, 1.4, style.dash)
        if style.marker:
            names.marker(75, y - 4, style.marker, style.colour)
        names.text(98, y, kind, "start")
    return stacked([names, *panels], "What is filled in under masks, against density")


def masked_overlaps(records: list[dict]) -> Panel:
    """Blocks in common with those that are chosen, by step."""
    panels = []
    for row in overlap_rows(records):
        panel = overlap_panel(row, (720, 280))
        panel.text(60, 26, f"{kind_of(row.method)}, {row.length:,} tokens, {row.texts} texts", "start")
        panels.append(panel)
    return stacked(panels, "Blocks in common by step")


# What recalls in the second layer, and what it is recalled with.
RECALL_TASK, RECALL_FIRST = "plain(vocabulary=256,length=64,pairs=8)", "convolution(3)+"


def quick_recall(records: list[dict]) -> list[RecallRow]:
    """Rows of the setting `quick` with one kind of layer after a convolution over three tokens."""
    rows = [row for row in recall_rows(records) if (row.settings, row.task) == (("quick",), RECALL_TASK)]
    return [row for row in rows if row.mixer.startswith(RECALL_FIRST)]


def recall_by_width(rows: list[RecallRow]) -> Panel:
    """Accuracy against width, of the kinds that were trained at several, from the worst to the best seed."""
    lines: dict[str, list[RecallRow]] = {}
    for row in sorted(rows, key=lambda row: row.width):
        lines.setdefault(row.mixer.removeprefix(RECALL_FIRST), []).append(row)
    lines = {name: line for name, line in lines.items() if len(line) > 1}
    widths = sorted({row.width for line in lines.values() for row in line})
    panel = Panel(640, 400, "Associative recall against width")
    panel.axes(
        (widths[0] * 0.8, widths[-1] * 1.25),
        (0, 1.02),
        ("width", "share recalled"),
        (True, False),
        [float(width) for width in widths],
    )
    for n, line in enumerate(lines.values()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        panel.line([panel.place(row.width, row.accuracy) for row in line], colour)
        for row in line:
            panel.line([panel.place(row.width, row.low), panel.place(row.width, row.high)], colour, 1.0)
            hint = f"{row.mixer}, width {row.width}: {row.accuracy:.3f}"
            panel.marker(*panel.place(row.width, row.accuracy), marker, colour, hint)
    legend(panel, list(lines), 70, 200)
    return panel


def recall_by_state(rows: list[RecallRow], width: int = 32) -> Panel:
    """Accuracy against what a step of decoding holds, each kind a mark with its name, from worst to best seed."""
    rows = [row for row in rows if row.width == width]
    states = [row.state for row in rows]
    panel = Panel(720, 460, f"Associative recall against state, width {width}")
    ticks = [2.0**n for n in range(8, 16) if min(states) * 0.7 <= 2**n <= max(states) * 1.6]
    names = ("numbers that a step of decoding holds", "share recalled")
    panel.axes((min(states) * 0.7, max(states) * 1.6), (0, 1.02), names, (True, False), ticks)
    marks = []
    for n, row in enumerate(rows):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n // len(PALETTE) % len(MARKERS)]
        panel.line([panel.place(row.state, row.low), panel.place(row.state, row.high)], colour, 1.0)
        x, y = panel.place(row.state, row.accuracy)
        panel.marker(x, y, marker, colour, f"{row.mixer}: {row.accuracy:.3f}")
        marks.append((x, y, row.mixer.removeprefix(RECALL_FIRST)))
    for x, y, name, anchor in placed(marks):
        panel.text(x, y, name, anchor, size=9)
    return panel


def even(most: float) -> list[float]:
    return [round(most * n / 4, 1) for n in range(5)]


def placed(marks: list[tuple[float, float, str]]) -> list[tuple[float, float, str, str]]:
    """Where the names of marks go: right or left of them, or higher or lower, where no other name or mark is."""
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y, _ in marks]
    found: list[tuple[float, float, str, str]] = []
    for x, y, name in sorted(marks, key=lambda mark: -mark[1]):
        width = 5 * len(name)
        choices: list[tuple[float, float, str]] = [
            (x + side * 8, y + 3 + rise, "start" if side > 0 else "end")
            for rise in (0, 11, -11, 22)
            for side in (1, -1)
        ]
        boxes = [(a if c == "start" else a - width, b - 8, a + width if c == "start" else a, b) for a, b, c in choices]
        n = next((n for n, box in enumerate(boxes) if box[0] > 60 and not any(overlap(box, o) for o in taken)), 0)
        taken.append(boxes[n])
        found.append((choices[n][0], choices[n][1], name, choices[n][2]))
    return found


def overlap(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def main() -> None:
    for file in measured("contenders_*.json"):
        found = json.loads(file.read_text())
        if any("seconds" in row for row in found["rows"]):
            save(losses(found), IMAGES / file.parent.name / f"{file.stem}.svg")
    for file in measured("extend_context.json"):
        found = json.loads(file.read_text())
        save(training_curves(found), IMAGES / file.parent.name / "extend_loss.svg")
        save(needles(found), IMAGES / file.parent.name / "extend_needles.svg")
    for name in ("recover_pruned", "sparse_training"):
        for file in measured(f"{name}.json"):
            panel = getattr(weight_curves, name)(json.loads(file.read_text()))
            save(panel, IMAGES / file.parent.name / f"{name}.svg")
    for file in measured("decoding.json"):
        rows = [row for row in json.loads(file.read_text())["rows"] if row.get("found")]
        for model, length in dict.fromkeys((row["model"], row["length"]) for row in rows):
            own = [row for row in rows if (row["model"], row["length"]) == (model, length)]
            save(found_by_step(own), IMAGES / file.parent.name / f"found_{model}_{length}.svg")
    for file in measured("video_clips.jsonl"):
        records = read_results(file)
        save(clip_losses(clip_rows(records)), IMAGES / file.parent.name / "video_frontier.svg")
        save(frames_of_clips(records), IMAGES / file.parent.name / "video_frames.svg")
        save(choices_of_heads(records), IMAGES / file.parent.name / "video_modes.svg")
    for file in measured("masked.jsonl"):
        records = read_results(file)
        save(masked_fills(records), IMAGES / file.parent.name / "masked_fills.svg")
        save(masked_overlaps(records), IMAGES / file.parent.name / "masked_overlaps.svg")
    for file in measured("mqar.jsonl"):
        rows = quick_recall(read_results(file))
        save(recall_by_width(rows), IMAGES / file.parent.name / "recall_width.svg")
        save(recall_by_state(rows), IMAGES / file.parent.name / "recall_state.svg")
    for file in measured("cpu.json"):
        sections = json.loads(file.read_text())["sections"]
        if {"gemm", "prefill", "decode"} <= sections.keys():
            save(latency(sections), IMAGES / file.parent.name / "cpu_latency.svg")
            save(roofline(sections), IMAGES / file.parent.name / "cpu_roofline.svg")


if __name__ == "__main__":
    main()
