"""What heads do under dense attention, and the plans that methods make for them, drawn."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

from gossamer.report.figure import Figure, Record, Table, short_length
from gossamer.report.html import Html, element
from gossamer.report.png import grey_png
from gossamer.report.svg import Panel

__all__ = ["PATTERNS", "attention_maps", "head_patterns", "plan_maps"]

# Letter and colour. The colours are Okabe and Ito's, which stay apart under colour blindness, darkened until a white
# letter can be read on them.
PATTERNS = {
    "sink": ("S", "#c15400"),
    "local": ("L", "#0072b2"),
    "vertical": ("V", "#007f5c"),
    "slash": ("/", "#a8527f"),
    "block": ("B", "#8f6b00"),
    "diffuse": ("·", "#6e6e6e"),
}


def head_patterns(records: Sequence[Record]) -> Figure:
    """What each head does under dense attention."""
    kinds = ("sink", "local", "vertical", "slash", "block")
    table: Table = [["task", "length", "layer", "head", "pattern", *kinds]]
    panels = []
    for record in records:
        if record["kind"] != "heads":
            continue
        heads = record["heads"]
        for head in heads:
            mass = [head["mass"].get(kind) for kind in kinds]
            table.append(
                [record.get("task"), record.get("length"), head["layer"], head["head"], head["pattern"], *mass]
            )
        wide = 30
        panel = Panel(
            40 + wide * (1 + max(h["head"] for h in heads)), 26 + 24 * (1 + max(h["layer"] for h in heads)), "patterns"
        )
        for layer in sorted({head["layer"] for head in heads}):
            panel.text(32, 22 + 24 * layer, f"L{layer}", "end")
        for head in heads:
            x, y = 38 + wide * head["head"], 6 + 24 * head["layer"]
            letter, colour = PATTERNS.get(head["pattern"], ("?", PATTERNS["diffuse"][1]))
            masses = ", ".join(f"{name} {value:.2f}" for name, value in head["mass"].items())
            panel.rect(x, y, wide - 2, 22, colour, f"{head['pattern']}: {masses}")
            panel.text(x + wide / 2 - 1, y + 16, letter, fill="#fff", size=13)
        key = ", ".join(f"{letter} {name}{_tokens(heads[0], name)}" for name, (letter, _) in PATTERNS.items())
        panels.append((f"{short_length(record.get('length') or 0)} tokens: {key}", panel.render()))
    note = (
        "The pattern that explains most of a head's attention at an equal budget of pairs; layers down, heads across."
    )
    return Figure("heads", "What the heads do", note, panels, table)


def _tokens(head: Record, name: str) -> str:
    """How many tokens a pattern stands for, where the record says so."""
    return {
        "sink": f" (the first {head['sink_tokens']})" if "sink_tokens" in head else "",
        "local": f" (the latest {head['local_tokens']})" if "local_tokens" in head else "",
    }.get(name, "")


def attention_maps(records: Sequence[Record]) -> Figure:
    """The attention of each head under dense attention."""
    table: Table = [["length", "layer", "head", "row", "level, by column"]]
    panels = []
    several = sum(record["kind"] == "heads" for record in records) > 1
    for record in records:
        if record["kind"] == "heads":
            length = f", {short_length(record.get('length') or 0)}" if several else ""
            patterns = {(head["layer"], head["head"]): head["pattern"] for head in record["heads"]}
            for drawn in record.get("maps", []):
                at = (drawn["layer"], drawn["head"])
                caption = f"layer {at[0]}, head {at[1]}: {patterns.get(at, 'no pattern')}{length}"
                panels.append((caption, _image(caption, drawn)))
                table += [[record.get("length"), *at, row, levels] for row, levels in _levels(drawn)]
    note = (
        "Queries down, keys across; black is the tile with the most attention, on a scale of three decades (255 to 0 "
        "in the CSV)."
    )
    return Figure("attention", "What each head attends to, drawn", note, panels, table, "small")


def plan_maps(records: Sequence[Record]) -> Figure:
    """Plans of a few heads."""
    table: Table = [["method", "length", "layer", "head", "row", "share in plan, by column"]]
    panels = []
    seen = set()
    for record in records:
        if record["kind"] != "fidelity":
            continue
        for drawn in record.get("maps", []):
            where = f"layer {drawn['layer']}, head {drawn['head']}, {short_length(record['length'])}"
            caption = f"{record['method']}, {where}"
            if caption in seen:
                continue
            seen.add(caption)
            panels.append((caption, _image(caption, drawn)))
            about = [record["method"], record["length"], drawn["layer"], drawn["head"]]
            table += [[*about, row, shares] for row, shares in _levels(drawn)]
    note = (
        "Queries down, keys across; black tiles are computed whole, grey ones in part, white ones are left out "
        "(255 to 0 in the CSV)."
    )
    return Figure("maps", "Plans, drawn", note, panels, table, "small")


def _image(caption: str, drawn: dict[str, Any]) -> Html:
    inverted = bytes(255 - level for level in base64.b64decode(drawn["data"]))
    return element("img", class_="map", alt=caption, src=grey_png(inverted, drawn["size"], drawn["size"]))


def _levels(drawn: dict[str, Any]) -> list[tuple[int, str]]:
    size, pixels = drawn["size"], base64.b64decode(drawn["data"])
    return [(row, " ".join(map(str, pixels[row * size : (row + 1) * size]))) for row in range(size)]
