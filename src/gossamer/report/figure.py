"""What the pictures of a report are made of: panels, the numbers that they show, and how methods are told apart."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from gossamer.report.html import Html, breakable, element, join
from gossamer.report.svg import MARKERS, PALETTE, Panel

__all__ = [
    "Figure",
    "Record",
    "Style",
    "Table",
    "family",
    "family_styles",
    "label_styles",
    "legend",
    "short_length",
]

Record = dict[str, Any]
Table = list[list[Any]]

_DASHES = ("", "7 3", "2 3", "9 3 2 3", "4 2")


@dataclass(frozen=True)
class Figure:
    """One picture, of one or more panels.

    Fields:
        name: identifier, and stem of its CSV.
        title, note: what it shows and how to read it; plain text.
        panels: (caption, markup) of each.
        table: header and rows; what the CSV holds.
        layout: of the panels: as they come (""), one of full width ("wide"), or many small ones ("small").
        legend: names what is drawn in all panels.
        words: a short table to read below the panels, header first; none if empty.
    """

    name: str
    title: str
    note: str
    panels: list[tuple[str, Html]] = field(default_factory=list)
    table: Table = field(default_factory=list)
    layout: str = ""
    legend: Html = field(default_factory=Html)
    words: list[list[str]] = field(default_factory=list)


@dataclass(frozen=True)
class Style:
    """How a method is drawn. Without a marker where that is empty."""

    colour: str
    marker: str
    dash: str = ""


def family(label: str) -> str:
    """The name of a method without its fields."""
    return label.partition("(")[0]


def family_styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each name of a method, whatever its fields; a dashed line without markers for dense."""
    names = list(dict.fromkeys(map(family, labels)))
    places = {name: i for i, name in enumerate(name for name in names if name != "dense")}
    styles = {name: Style(PALETTE[i % len(PALETTE)], MARKERS[i % len(MARKERS)]) for name, i in places.items()}
    return ({"dense": Style("var(--axis)", "", "5 4")} if "dense" in names else {}) | styles


def label_styles(labels: Iterable[str]) -> dict[str, Style]:
    """A style for each label: methods of one name share the colour and differ in marker and dash; dense is grey."""
    labels = list(dict.fromkeys(labels))
    names = list(dict.fromkeys(family(label) for label in labels if family(label) != "dense"))
    styles = {}
    for label in sorted(labels, key=lambda label: family(label) != "dense"):
        rank = sum(family(other) == family(label) for other in styles)
        if family(label) == "dense":
            colour, dash = (("var(--text)", "5 4"), ("var(--axis)", "2 3"))[rank % 2]
            styles[label] = Style(colour, MARKERS[rank % len(MARKERS)], dash)
        else:
            # Beyond as many names as there are colours, or methods of a name as there are markers, other dashes.
            turns, place = divmod(names.index(family(label)), len(PALETTE))
            dash = _DASHES[(rank + rank // len(MARKERS) + turns) % len(_DASHES)]
            styles[label] = Style(PALETTE[place], MARKERS[rank % len(MARKERS)], dash)
    return styles


def legend(styles: Mapping[str, Style]) -> Html:
    """Names each style, with its line and marker."""
    entries = []
    for name, style in styles.items():
        sample = Panel(34, 14, "")
        sample.line([(0, 7), (34, 7)], style.colour, 1.8, style.dash)
        if style.marker:
            sample.marker(17, 7, style.marker, style.colour)
        drawn = sample.render(width=34, height=14, aria_hidden="true")
        entries.append(element("span", drawn, " ", element("span", breakable(name))))
    return element("div", join(entries), class_="legend")


def short_length(tokens: float) -> str:
    """Tokens as 16K where they are a multiple of a quarter of 1024."""
    return f"{tokens / 1024:g}K" if tokens % 256 == 0 else f"{tokens:g}"
