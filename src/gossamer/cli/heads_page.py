"""The page of ``gossamer inspect --out``: every head's attention map, in one self-contained HTML file."""

from __future__ import annotations

import base64
import html
import struct
import zlib
from collections import Counter
from collections.abc import Sequence
from itertools import groupby

from torch import Tensor

from gossamer.evaluate.heads import BLOCK, DIFFUSE_BELOW, HeadReport
from gossamer.report.heads import PATTERNS

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
    legend = "".join(
        f"<li>{_mark(name)} <b>{name}</b> {counts[name]} <small>{meaning.format(**numbers)}</small></li>"
        for name, meaning in _MEANINGS.items()
    )
    layers = [(layer, list(group)) for layer, group in groupby(reports, key=lambda report: report.layer)]
    overview = "".join(
        f"<tr><th scope=row>{_layer(layer)}</th>"
        + "".join(f"<td>{_mark(report.pattern, report)}</td>" for report in group)
        + "</tr>"
        for layer, group in layers
    )
    cards = "".join(
        f"<h2>Layer {_layer(layer)}</h2><div class=grid>{''.join(map(_card, group))}</div>" for layer, group in layers
    )
    source = "standard input" if prompt == "-" else prompt
    looked = "all queries" if rows is None else f"about {rows:,} queries, evenly spaced"
    title = f"Attention heads of {html.escape(model)}"
    return f"""<!doctype html>
<html lang=en><head><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">
<title>{title}</title><style>{_STYLE}</style></head><body>
<h1>{title}</h1>
<p>{html.escape(source)}, {tokens:,} tokens; {looked}. Each bar is the share of the head's attention that a
pattern explains with at most {reports[0].budget:.1%} of the query-key pairs; the name goes to the simplest pattern that
comes close to the best.</p>
<ul>{legend}</ul>
<div class=scroll><table><caption hidden>Pattern of each head; rows are layers</caption>{overview}</table></div>
<p>In the maps queries run down and keys across; dark is more attention, on a scale of three decades.</p>
{cards}
</body></html>
"""


def _layer(layer: int | None) -> str:
    return "?" if layer is None else str(layer)


def _identifier(report: HeadReport) -> str:
    return f"l{_layer(report.layer)}h{report.head}"


def _mark(pattern: str, report: HeadReport | None = None) -> str:
    letter, colour = PATTERNS[pattern]
    if report is None:
        return f'<span class=mark style="background:{colour}" aria-hidden=true>{letter}</span>'
    name = f"layer {_layer(report.layer)}, head {report.head}: {pattern}"
    link = f'href="#{_identifier(report)}" title="{name}" aria-label="{name}"'
    return f'<a class=mark style="background:{colour}" {link}>{letter}</a>'


def _card(report: HeadReport) -> str:
    colour = PATTERNS[report.pattern][1]
    bars = "".join(
        f'<dt>{name}</dt><div class=bar><i style="width:{share:.1%};background:{PATTERNS[name][1]}"></i></div>'
        f"<dd>{share:.0%}</dd>"
        for name, share in report.mass.items()
    )
    lines = [
        f"90% within {report.window:,} tokens",
        f"first token {report.first_token:.1%}, first {report.sink_tokens} {report.mass['sink']:.1%}",
        _places("columns", [(str(at), mass) for at, mass in report.columns], 0.01),
        _places("distances", [(str(at), mass) for at, mass in report.diagonals], 0.01),
        _places(f"blocks of {BLOCK} (query:key)", [(f"{m}:{n}", mass) for m, n, mass in report.blocks], 0.001),
    ]
    if report.sink_logit:
        lines.insert(0, f"learned sink takes {report.sink_logit:.0%}")
    name = f"layer {_layer(report.layer)}, head {report.head}"
    picture = "" if report.map is None else f'<img class=map alt="attention map of {name}" src="{_image(report.map)}">'
    return (
        f'<article id="{_identifier(report)}" style="--hue:{colour}"><div class=head><b>Head {report.head}</b>'
        f"<span>{report.pattern} {_mark(report.pattern)}</span></div>{picture}<dl>{bars}</dl>"
        f"<p class=more>{'<br>'.join(filter(None, lines))}</p></article>"
    )


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
