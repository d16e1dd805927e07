"""Curves of `examples/sparse_training.py` and `examples/recover_pruned.py`, means over seeds."""

from __future__ import annotations

import statistics
from typing import Any

from gossamer.report.svg import MARKERS, PALETTE, Panel

Curves = dict[str, list[list[tuple[float, float]]]]


def by_kind(found: dict[str, Any]) -> Curves:
    """Of each kind the curves of its seeds, points of a step and what was measured."""
    curves: Curves = {}
    for row in found["rows"]:
        points = [(p["step"], p["loss"]) if isinstance(p, dict) else (p[0], p[1]) for p in row["curve"]]
        curves.setdefault(row["kind"], []).append(points)
    return curves


def panel_of(curves: Curves, title: str, measured: str, log: bool = False) -> Panel:
    """A line for each kind, and at each point a thin one from its best to its worst seed."""
    points = [point for seeds in curves.values() for seed in seeds for point in seed]
    most = max(x for x, _ in points)
    low, high = min(y for _, y in points), max(y for _, y in points)
    panel = Panel(680, 420, title)
    ticks = sorted({x for x, _ in next(iter(curves.values()))[0]})
    shown = [x for n, x in enumerate(ticks) if n % max(1, len(ticks) // 5) == 0]
    panel.axes((0, most * 1.02), (low * 0.98, high * 1.02), ("steps", measured), (False, log), shown)
    for n, (kind, seeds) in enumerate(curves.items()):
        colour, marker = PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)]
        means = [(p[0][0], statistics.fmean(y for _, y in p), [y for _, y in p]) for p in zip(*seeds, strict=True)]
        panel.line([panel.place(x, mean) for x, mean, _ in means], colour)
        for x, mean, all_of in means:
            panel.line([panel.place(x, min(all_of)), panel.place(x, max(all_of))], colour, 1.0)
            panel.marker(*panel.place(x, mean), marker, colour, f"{kind}, step {x:.0f}: {mean:.3f}")
        panel.marker(500, 40 + 16 * n, marker, colour)
        panel.text(510, 44 + 16 * n, kind, "start")
    return panel


def sparse_training(found: dict[str, Any]) -> Panel:
    """Without what comes before anything was learned, which is the same for all."""
    curves = {kind: [seed[1:] for seed in seeds] for kind, seeds in by_kind(found).items()}
    return panel_of(curves, "Held-out text while training with N:M weights", "bits a character")


def recover_pruned(found: dict[str, Any]) -> Panel:
    return panel_of(by_kind(found), "Held-out text after pruning, and while training on", "nats a token")
