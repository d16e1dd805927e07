"""The page of ``gossamer inspect --out``: every head's attention map, in one self-contained HTML file."""

from __future__ import annotations

import base64
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from gossamer.evaluate.heads import BLOCK, DIFFUSE_BELOW, HeadReport
from gossamer.report.heads import PATTERNS
from gossamer.report.html import Html, document, element, join

__all__ = ["make_page"]

# What the patterns mean, with the numbers of a report.
_MEANINGS = {
    "sink": "the first {sink_tokens} tokens",
    "local": "a window of the latest {local_tokens:,} tokens",
    "vertical": "some keys, from all queries",
    "slash": "some distances, from all queries",
    "block": "blocks of 64 by 64",
    "diffuse": f"none of these explains {DIFFUSE_BELOW:.0%}",
}

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --soft: #5c5c5c; --line: #d9d9d9; --ground: #fff; --card: #f7f7f7 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #ececec; --soft: #a8a8a8; --line: #3c3c3c; --ground: #141414; --card: #1e1e1e }
  .map { filter: invert(1) hue-rotate(180deg) }
}
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1240px; padding: 24px 16px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif }
h1 { font-size: 22px; margin: 0 0 4px } h2 { font-size: 16px; margin: 28px 0 8px }
p { margin: 4px 0 12px; color: var(--soft); max-width: 75ch; overflow-wrap: anywhere }
ul { list-style: none; margin: 12px 0; padding: 0; display: flex; flex-wrap: wrap; gap: 6px 18px }
.mark { display: inline-block; width: 22px; height: 22px; border-radius: 4px; color: #fff; text-align: center;
  font: 700 13px/22px ui-monospace, monospace; text-decoration: none }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: 13px }
td, th { padding: 1px; text-align: center; font-weight: 400; color: var(--soft) } th { padding-right: 6px }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px }
article { background: var(--card); border: 1px solid var(--line); border-top: 4px solid var(--hue); border-radius: 6px;
  padding: 10px; font-size: 13px; max-width: 300px }
article:target { outline: 3px solid var(--hue) }
.head { display: flex; justify-content: space-between; align-items: center; gap: 6px; margin-bottom: 6px }
.map { display: block; width: 100%; aspect-ratio: 1; image-rendering: pixelated; border: 1px solid var(--line) }
dl { display: grid; grid-template-columns: auto 1fr auto; gap: 1px 8px; margin: 8px 0; align-items: center }
dt, dd { margin: 0 } dd { text-align: right; font-variant-numeric: tabular-nums }
.bar { height: 7px; background: var(--line); border-radius: 2px }
.bar i { display: block; height: 100%; border-radius: 2px }
.more { margin: 0; color: var(--soft); font-size: 12px; line-height: 1.45 }
"""


def make_page(reports: Sequence[HeadReport], model: str, prompt: str, tokens: int, rows: int | None) -> str:
    """HTML without references to anything outside it. The reports have their maps."""
    counts = Counter(report.pattern for report in reports)
    numbers = {"sink_tokens": reports[0].sink_tokens, "local_tokens": reports[0].local_tokens}
    legend = (
        join((_mark(name), element("b", name), counts[name], element("small", meaning.format(**numbers))), " ")
        for name, meaning in _MEANINGS.items()
    )
    layers = [(layer, list(group)) for layer, group in groupby(reports, key=lambda report: report.layer)]
    overview = (
        element(
            "tr",
            element("th", _layer(layer), scope="row"),
            *(element("td", _mark(report.pattern, report)) for report in group),
        )
        for layer, group in layers
    )
    caption = element("caption", "Pattern of each head; rows are layers", hidden="")
    cards = (
        join((element("h2", f"Layer {_layer(layer)}"), element("div", *map(_card, group), class_="grid")))
        for layer, group in layers
    )
    source = "standard input" if prompt == "-" else prompt
    looked = "all queries" if rows is None else f"about {rows:,} queries, evenly spaced"
    title = f"Attention heads of {model}"
    return document(
        title,
        _STYLE,
        element("h1", title),
        element(
            "p",
            f"{source}, {tokens:,} tokens; {looked}. Each bar is the share of the head's attention that a pattern "
            f"explains with at most {reports[0].budget:.1%} of the query-key pairs; the name goes to the simplest "
            "pattern that comes close to the best.",
        ),
        element("ul", *(element("li", entry) for entry in legend)),
        element("div", element("table", caption, *overview), class_="scroll"),
        element(
            "p", "In the maps queries run down and keys across; dark is more attention, on a scale of three decades."
        ),
        *cards,
    )


def _layer(layer: int | None) -> str:
    return "?" if layer is None else str(layer)


def _identifier(report: HeadReport) -> str:
    return f"l{_layer(report.layer)}h{report.head}"


def _mark(pattern: str, report: HeadReport | None = None) -> Html:
    letter, colour = PATTERNS[pattern]
    style = f"background:{colour}"
    if report is None:
        return element("span", letter, class_="mark", style=style, aria_hidden="true")
    name = f"layer {_layer(report.layer)}, head {report.head}: {pattern}"
    return element("a", letter, class_="mark", style=style, href=f"#{_identifier(report)}", title=name, aria_label=name)


def _card(report: HeadReport) -> Html:
    colour = PATTERNS[report.pattern][1]
    lines = [
        f"learned sink takes {report.sink_logit:.0%}" if report.sink_logit else "",
        f"90% within {report.window:,} tokens",
        f"first token {report.first_token:.1%}, first {report.sink_tokens} {report.mass['sink']:.1%}",
        _places("columns", [(str(at), mass) for at, mass in report.columns], 0.01),
        _places("distances", [(str(at), mass) for at, mass in report.diagonals], 0.01),
        _places(f"blocks of {BLOCK} (query:key)", [(f"{m}:{n}", mass) for m, n, mass in report.blocks], 0.001),
    ]
    alt = f"attention map of layer {_layer(report.layer)}, head {report.head}"
    named = element("span", report.pattern, " ", _mark(report.pattern))
    return element(
        "article",
        element("div", element("b", f"Head {report.head}"), named, class_="head"),
        "" if report.map is None else element("img", class_="map", alt=alt, src=_image(report.map)),
        element("dl", *(_bar(name, share) for name, share in report.mass.items())),
        element("p", join(filter(None, lines), element("br")), class_="more"),
        id=_identifier(report),
        style=f"--hue:{colour}",
    )


def _bar(name: str, share: float) -> Html:
    drawn = element("i", style=f"width:{share:.1%};background:{PATTERNS[name][1]}")
    return join((element("dt", name), element("div", drawn, class_="bar"), element("dd", f"{share:.0%}")))


def _places(what: str, places: Sequence[tuple[str, float]], least: float) -> str:
    """The first few places with at least that mass, or nothing."""
    listed = ", ".join(f"{name} ({mass:.1%})" for name, mass in places[:3] if mass >= least)
    return f"{what} {listed}" if listed else ""


def _image(levels: Tensor) -> str:
    """A PNG of uint8 ``[n, n]`` as a data URL: white for 0, to dark blue for 255."""
    stops = ((255, 255, 255), (158, 202, 225), (33, 113, 181), (3, 15, 60))
    palette = bytearray()
    for level in range(256):
        at, part = divmod(level * (len(stops) - 1) / 255, 1)
        low, high = stops[int(at)], stops[min(int(at) + 1, len(stops) - 1)]
        palette += bytes(round(a + (b - a) * part) for a, b in zip(low, high, strict=True))
    rows = b"".join(b"\0" + row.numpy().tobytes() for row in levels.cpu())
    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 8, 3, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"PLTE", bytes(palette)), (b"IDAT", zlib.compress(rows, 9)), (b"IEND", b""))
    png = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"
