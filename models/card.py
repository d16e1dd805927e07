"""Write the model card and its pictures from measurements: `python models/card.py models/reference RESULTS.json`.

heads.json in the model's folder comes from `models/heads.py`.
"""

import argparse
import base64
import json
import statistics
from itertools import pairwise
from pathlib import Path
from typing import Any

from gossamer.report.png import grey_png

# What the model was made for: task, longest length, share of samples where all is right.
TARGETS = (
    ("needle_single", 32768, 0.97),
    ("needle_multikey(keys=8)", 16384, 0.90),
    ("needle_multivalue", 16384, 0.90),
    ("needle_multiquery", 16384, 0.90),
    ("variable_tracking", 16384, 0.80),
)
COLOURS = ("#3b6fb6", "#c8553d", "#4f9d69", "#8a63a8", "#b08b2e", "#5b8a99", "#a0526d")
Point = tuple[float, float]


class Panel:
    """One set of axes in an SVG picture, 340 by 220 units, at a horizontal offset."""

    def __init__(self, left: float, title: str, x_label: str, x: Point, y: Point):
        self.left, self.x, self.y = left, x, y
        self.parts = [
            f'<text x="{left + 170}" y="18" text-anchor="middle" font-weight="bold">{title}</text>',
            f'<text x="{left + 170}" y="258" text-anchor="middle">{x_label}</text>',
            f'<rect x="{left + 40}" y="28" width="290" height="190" fill="none" stroke="#999"/>',
        ]
        for i in range(5):
            value = y[0] + (y[1] - y[0]) * i / 4
            at = self.place((x[0], value))[1]
            self.parts.append(f'<text x="{left + 35}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>')
            self.parts.append(f'<line x1="{left + 40}" x2="{left + 330}" y1="{at:.1f}" y2="{at:.1f}" stroke="#ddd"/>')

    def place(self, point: Point) -> Point:
        """A data point in picture units."""
        across = (point[0] - self.x[0]) / (self.x[1] - self.x[0])
        up = (min(max(point[1], self.y[0]), self.y[1]) - self.y[0]) / (self.y[1] - self.y[0])
        return self.left + 40 + 290 * across, 218 - 190 * up

    def tick(self, x: float, text: str) -> None:
        """A label below the axis."""
        self.parts.append(f'<text x="{self.place((x, 0))[0]:.1f}" y="236" text-anchor="middle">{text}</text>')

    def line(self, points: list[Point], colour: str) -> None:
        """Connected points."""
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in map(self.place, points))
        self.parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>')

    def bar(self, x: float, low: float, middle: float, high: float, colour: str) -> None:
        """A point with its interval."""
        (a, b), (_, top), (_, bottom) = (self.place((x, v)) for v in (middle, high, low))
        self.parts.append(
            f'<line x1="{a:.1f}" x2="{a:.1f}" y1="{top:.1f}" y2="{bottom:.1f}" stroke="{colour}" stroke-width="1.5"/>'
        )
        self.parts.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3.5" fill="{colour}"/>')

    def note(self, row: int, text: str, colour: str) -> None:
        """A line of the legend, from the bottom left up."""
        self.parts.append(f'<text x="{self.left + 48}" y="{210 - 14 * row}" fill="{colour}">{text}</text>')


def write_svg(path: Path, panels: list[Panel]) -> None:
    """Panels side by side."""
    body = "\n".join(part for panel in panels for part in panel.parts)
    width = 350 * len(panels)
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} 270" font-family="sans-serif" font-size="11">\n'
        f'<rect width="{width}" height="270" fill="white"/>\n{body}\n</svg>\n'
    )


def smooth(points: list[Point], window: int = 9) -> list[Point]:
    """Running mean of the values."""
    half = window // 2
    values = [value for _, value in points]
    return [(x, statistics.mean(values[max(0, i - half) : i + half + 1])) for i, (x, _) in enumerate(points)]


def quiet_seconds(log: list[dict[str, Any]]) -> float:
    """What the steps would take on a machine of their own: each at the lower quintile of its phase's step times."""
    total = 0.0
    for phase in sorted({row["phase"] for row in log}):
        rows = [row for row in log if row["phase"] == phase]
        times = sorted(b["wall_s"] - a["wall_s"] for a, b in pairwise(rows))
        total += len(rows) * times[len(times) // 5]
    return total


def draw(out: Path, training: dict, results: dict) -> None:
    """curves.svg: loss, accuracy in training, accuracy by length."""
    log = training["log"]
    last = log[-1]["tokens"] / 1e6
    panels = [
        Panel(0, "loss on text in training (nats per token)", "million tokens seen", (0, last), (1, 7)),
        Panel(350, "answer tokens right in training", "million tokens seen", (0, last), (0, 1)),
        Panel(700, "all right, by length (95% interval)", "tokens of prompt and answer", (0, 5), (0, 1)),
    ]
    for panel, field in zip(panels, ("text_loss", "answer_accuracy"), strict=False):
        for tick in range(0, int(last) + 1, max(1, int(last) // 5)):
            panel.tick(tick, str(tick))
        lengths: list[str] = []
        for phase in sorted({row["phase"] for row in log}):
            rows = [row for row in log if row["phase"] == phase and row[field] is not None]
            colour = COLOURS[phase % len(COLOURS)]
            panel.line(smooth([(row["tokens"] / 1e6, row[field]) for row in rows]), colour)
            settings = training["schedule"][phase]
            lengths.append(f"{settings['length']} tokens" + (", tail only" if settings["tail"] else ""))
        if field == "answer_accuracy":
            for phase, text in enumerate(lengths):
                panel.note(len(lengths) - phase, text, COLOURS[phase % len(COLOURS)])
    panel = panels[2]
    sizes = sorted({cell["length"] for cell in results["cells"]})
    for i, size in enumerate(sizes):
        panel.tick(i + 1, f"{size // 1024}K")
    tasks = list(dict.fromkeys(cell["task"] for cell in results["cells"]))
    for j, task in enumerate(tasks):
        for cell in results["cells"]:
            if cell["task"] == task:
                x = sizes.index(cell["length"]) + 1 + (j - len(tasks) / 2) * 0.12
                panel.bar(x, cell["exact_interval"][0], cell["exact"], cell["exact_interval"][1], COLOURS[j])
        panel.note(len(tasks) - j, task, COLOURS[j])
    write_svg(out / "curves.svg", panels)


def draw_heads(out: Path, record: dict) -> None:
    """heads.svg: the attention map of each head, its pattern, and the mass that each pattern explains."""
    pitch, map_size, top = 160, 116, 24
    rows = sorted({head["layer"] for head in record["heads"]})
    columns = sorted({head["head"] for head in record["heads"]})
    maps = {(m["layer"], m["head"]): m for m in record["maps"]}
    height = top + len(rows) * pitch
    parts = []
    for head in record["heads"]:
        x, y = 20 + columns.index(head["head"]) * 216, top + rows.index(head["layer"]) * pitch
        drawn = maps[head["layer"], head["head"]]
        pixels = bytes(255 - level for level in base64.b64decode(drawn["data"]))
        name = f"layer {head['layer']}, head {head['head']}"
        parts.append(f'<text x="{x}" y="{y}"><tspan font-weight="bold">{name}</tspan> {head["pattern"]}</text>')
        parts.append(
            f'<image x="{x}" y="{y + 6}" width="{map_size}" height="{map_size}" style="image-rendering:pixelated" '
            f'href="{grey_png(pixels, drawn["size"], drawn["size"])}"><title>{name}</title></image>'
            f'<rect x="{x}" y="{y + 6}" width="{map_size}" height="{map_size}" fill="none" stroke="#999"/>'
        )
        for n, (pattern, mass) in enumerate(head["mass"].items()):
            at = y + 18 + n * 22
            parts.append(f'<text x="{x + map_size + 6}" y="{at}" font-size="9">{pattern} {mass:.0%}</text>')
            parts.append(f'<rect x="{x + map_size + 6}" y="{at + 3}" width="66" height="5" fill="#e3e3e3"/>')
            colour = COLOURS[0] if pattern == head["pattern"] else "#9ab"
            parts.append(
                f'<rect x="{x + map_size + 6}" y="{at + 3}" width="{66 * mass:.1f}" height="5" fill="{colour}"/>'
            )
        parts.append(
            f'<text x="{x}" y="{y + map_size + 20}" font-size="9" fill="#555">first token '
            f"{head['first_token']:.0%}, 90% in {head['window']:,} tokens</text>"
        )
    width, body = 20 + len(columns) * 216, "\n".join(parts)
    (out / "heads.svg").write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="{width}" height="{height}" fill="white"/>\n{body}\n</svg>\n'
    )


def heads_table(record: dict) -> str:
    """What each head does, in Markdown."""
    patterns = list(record["heads"][0]["mass"])
    lines = [
        f"| layer | head | pattern | {' | '.join(patterns)} | first token |",
        "|---|---|---|" + "---|" * (len(patterns) + 1),
    ]
    for head in record["heads"]:
        shares = " | ".join(f"{head['mass'][name]:.0%}" for name in patterns)
        lines.append(f"| {head['layer']} | {head['head']} | {head['pattern']} | {shares} | {head['first_token']:.0%} |")
    return "\n".join(lines)


def table(results: dict) -> str:
    """Accuracy by task and length in Markdown."""
    lines = [
        "| task | length | samples | mean score | all right | 95% interval of that |",
        "|---|---|---|---|---|---|",
    ]
    for cell in sorted(results["cells"], key=lambda cell: (cell["task"], cell["length"])):
        low, high = cell["exact_interval"]
        lines.append(
            f"| {cell['task']} | {cell['length']:,} | {cell['samples']} | {cell['score']:.3f} | {cell['exact']:.3f} | "
            f"{low:.3f} to {high:.3f} |"
        )
    return "\n".join(lines)


def targets(results: dict) -> str:
    """What was aimed at and what was reached, at the length of each target where accuracy is lowest."""
    lines = ["| task | up to | aimed at | reached (95% interval) | |", "|---|---|---|---|---|"]
    for task, longest, aim in TARGETS:
        measured = [c for c in results["cells"] if c["task"] == task and c["length"] <= longest]
        if longest not in {cell["length"] for cell in measured}:
            raise ValueError(
                f"the results have no cell of {task} at {longest} tokens; run models/evaluate.py to its end"
            )
        worst = min(measured, key=lambda cell: cell["exact"])
        low, high = worst["exact_interval"]
        missed = "**missed**" if high < aim else "**missed**, within the interval"
        verdict = "met" if worst["exact"] >= aim else missed
        lines.append(
            f"| {task} | {longest:,} | {aim:.2f} | {worst['exact']:.3f} ({low:.3f} to {high:.3f}) | {verdict} |"
        )
    return "\n".join(lines)


def schedule(training: dict) -> str:
    """The phases in Markdown."""
    lines = [
        "| length | samples per step | steps | gradient through | position skips | learning rate |",
        "|---|---|---|---|---|---|",
    ]
    for phase in training["schedule"]:
        tail = f"last {phase['tail']:,}" if phase["tail"] else "all"
        lines.append(
            f"| {phase['length']:,} | {phase['rows']} | {phase['steps']} | {tail} | {phase['skip']:.0%} | "
            f"{phase['first']:g} to {phase['last']:g} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Read the measurements, write README.md and curves.svg beside the weights."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("results", type=Path)
    arguments = parser.parse_args()
    training = json.loads((arguments.model / "training_log.json").read_text())
    results = json.loads(arguments.results.read_text())
    heads = json.loads((arguments.model / "heads.json").read_text())
    draw(arguments.model, training, results)
    draw_heads(arguments.model, heads)
    mass = results["first_token_attention_mass_4096"]
    loss = results["text_loss"]
    corpus = training["corpus"]
    words = {
        "parameters": f"{training['parameters'] / 1e6:.2f}",
        "megabytes": f"{(arguments.model / 'model.safetensors').stat().st_size / 1e6:.1f}",
        "table": table(results),
        "targets": targets(results),
        "schedule": schedule(training),
        "steps": f"{training['steps']:,}",
        "tokens": f"{training['tokens'] / 1e6:.1f}",
        "seed": training["seed"],
        "machine": training["machine"],
        "wall": f"{training['wall_s'] / 60:.0f}",
        "cpu": f"{training['process_cpu_s'] / 60 / training['threads']:.0f}",
        "quiet": f"{quiet_seconds(training['log']) / 60:.0f}",
        "characters": f"{corpus['train_characters'] / 1e6:.1f}",
        "corpus_tokens": f"{corpus['train_tokens'] / 1e6:.1f}",
        "held_out": f"{corpus['held_out_characters'] / 1e6:.1f}",
        "sha256": corpus["sha256"],
        "versions": ", ".join(f"{name} {version}" for name, version in corpus["versions"].items()),
        "nats": f"{loss['nats_per_token']:.2f}",
        "bits": f"{loss['bits_per_byte']:.2f}",
        "windows": loss["windows"],
        "window": f"{loss['length']:,}",
        "mass": "\n".join(f"| {i} | " + " | ".join(f"{v:.3f}" for v in row) + " |" for i, row in enumerate(mass)),
        "heads": heads_table(heads),
        "heads_budget": f"{heads['heads'][0]['budget']:.1%}",
        "heads_tokens": f"{heads['length']:,}",
        "dtype": results["model"]["dtype"],
        "eval_machine": results["machine"]["processor"],
        "eval_versions": ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
    }
    template = (Path(__file__).parent / "card_template.md").read_text()
    (arguments.model / "README.md").write_text(template.format(**words))


if __name__ == "__main__":
    main()
