"""A few shapes of SVG, scales and colours that the pictures share. Standard library only."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gossamer.report.html import Html, element

__all__ = ["MARKERS", "PALETTE", "Panel", "colour_of", "number", "stacked", "svg_file", "text_on"]

# Okabe and Ito's colours, which differ for all kinds of colour vision, and markers that differ without colour.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7F6BB3", "#8C8C00")
MARKERS = ("circle", "square", "diamond", "triangle", "cross")
_ARM = 1 / 3
_CROSS = (
    *((-1, -_ARM), (-_ARM, -_ARM), (-_ARM, -1), (_ARM, -1), (_ARM, -_ARM), (1, -_ARM)),
    *((1, _ARM), (_ARM, _ARM), (_ARM, 1), (-_ARM, 1), (-_ARM, _ARM), (-1, _ARM)),
)
# Stops of a scale like cividis: its lightness grows evenly, for all kinds of colour vision.
_STOPS = ((0, 32, 76), (66, 78, 108), (124, 123, 120), (187, 173, 108), (255, 234, 70))

# What a page says elsewhere.
_ALONE = "<style>svg{--grid:#ddd;--axis:#888;color:#222;font-family:sans-serif}</style>"


def colour_of(value: float) -> str:
    """The colour of a value from 0 (dark blue) to 1 (yellow)."""
    place = min(max(value, 0.0), 1.0) * (len(_STOPS) - 1)
    low = min(int(place), len(_STOPS) - 2)
    mixed = (a + (b - a) * (place - low) for a, b in zip(_STOPS[low], _STOPS[low + 1], strict=True))
    return "#" + "".join(f"{round(channel):02x}" for channel in mixed)


def text_on(value: float) -> str:
    """Black or white, whichever is readable on `colour_of` the value."""
    return "#000" if value > 0.5 else "#fff"


def number(value: float) -> str:
    """A short form of a number: 3 significant digits, no exponent in ordinary ranges."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


class Panel:
    """One picture of a given size, with an optional pair of axes. Coordinates grow to the right and down."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self.parts: list[Html] = []
        self.x: _Scale | None = None
        self.y: _Scale | None = None

    def rect(
        self, x: float, y: float, width: float, height: float, fill: str, hint: str = "", stroke: str | None = None
    ) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}", "width": f"{width:.1f}", "height": f"{height:.1f}"}
        self.parts.append(element("rect", *_title(hint), **place, fill=fill, stroke=stroke))

    def text(
        self, x: float, y: float, text: str, anchor: str = "middle", fill: str = "currentColor", size: int = 11
    ) -> None:
        place = {"x": f"{x:.1f}", "y": f"{y:.1f}"}
        self.parts.append(element("text", text, **place, text_anchor=anchor, fill=fill, font_size=size))

    def line(self, points: Sequence[tuple[float, float]], colour: str, width: float = 1.6, dash: str = "") -> None:
        style = {"fill": "none", "stroke": colour, "stroke_width": width, "stroke_dasharray": dash or None}
        self.parts.append(element("polyline", points=_path(points), **style))

    def marker(self, x: float, y: float, shape: str, colour: str, hint: str = "", scale: float = 1.0) -> None:
        r = 4.5 * scale
        corners = {
            "square": [(-r, -r), (r, -r), (r, r), (-r, r)],
            "diamond": [(0, -r * 1.3), (r * 1.3, 0), (0, r * 1.3), (-r * 1.3, 0)],
            "triangle": [(0, -r * 1.2), (r * 1.2, r), (-r * 1.2, r)],
            "cross": [(a * r, b * r) for a, b in _CROSS],
        }.get(shape)
        if corners is None:
            shown = element("circle", *_title(hint), cx=f"{x:.1f}", cy=f"{y:.1f}", r=r, fill=colour)
        else:
            path = _path([(x + a, y + b) for a, b in corners])
            shown = element("polygon", *_title(hint), points=path, fill=colour)
        self.parts.append(shown)

    def axes(
        self,
        x: tuple[float, float],
        y: tuple[float, float],
        names: tuple[str, str],
        logs: tuple[bool, bool],
        ticks: list[float],
    ) -> None:
        """Draw axes for data ranges x and y; ``ticks`` of x are given, those of y are found."""
        left, right, top, bottom = 52, self.width - 12, 14, self.height - 40
        self.x = _Scale(x, (left, right), logs[0])
        self.y = _Scale(y, (bottom, top), logs[1])
        for value in self.y.ticks():
            at = self.y(value)
            self.line([(left, at), (right, at)], "var(--grid)", 1)
            self.text(left - 6, at + 4, number(value), "end")
        for value in ticks:
            self.text(self.x(value), bottom + 16, _short(value))
        self.line([(left, top), (left, bottom), (right, bottom)], "var(--axis)", 1)
        self.text((left + right) / 2, self.height - 6, names[0])
        turned = f"translate(12 {(top + bottom) / 2:.0f}) rotate(-90)"
        style = {"text_anchor": "middle", "fill": "currentColor", "font_size": 11}
        self.parts.append(element("text", names[1], transform=turned, **style))

    def place(self, x: float, y: float) -> tuple[float, float]:
        """Data to picture coordinates."""
        assert self.x is not None
        assert self.y is not None
        return self.x(x), self.y(y)

    def render(self, scale: float = 1.0, **attributes: object) -> Html:
        """The picture, drawn at most ``scale`` times its size where there is room."""
        return element(
            "svg",
            *self.parts,
            **attributes,
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=self.title,
            style=f"max-width:{self.width * scale:.0f}px",
        )


def stacked(panels: Sequence[Panel], title: str) -> Panel:
    """One picture of several, from top to bottom."""
    whole = Panel(max(panel.width for panel in panels), sum(panel.height for panel in panels), title)
    top = 0
    for panel in panels:
        whole.parts.append(element("g", *panel.parts, transform=f"translate(0 {top})"))
        top += panel.height
    return whole


def svg_file(panel: Panel) -> str:
    """A picture as a file of its own, on white."""
    body = panel.render().replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)
    start = body.index(">") + 1
    ground = f'<rect width="{panel.width}" height="{panel.height}" fill="#fff"/>'
    return body[:start] + _ALONE + ground + body[start:] + "\n"


def _title(hint: str) -> list[Html]:
    return [element("title", hint)] if hint else []


def _path(points: Sequence[tuple[float, float]]) -> str:
    return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)


class _Scale:
    """A linear or logarithmic map of a range of data to a range of the picture."""

    def __init__(self, data: tuple[float, float], picture: tuple[float, float], log: bool) -> None:
        low, high = data
        if low == high:
            low, high = (low / 2, high * 2) if log else (low - 0.5, high + 0.5)
        self.low, self.high, self.picture, self.log = low, high, picture, log

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = math.log(low), math.log(high), math.log(max(value, self.low * 1e-3))
        share = (value - low) / (high - low)
        return self.picture[0] + (self.picture[1] - self.picture[0]) * share

    def ticks(self) -> list[float]:
        if self.log:
            first = math.floor(math.log10(self.low))
            found = [m * 10.0**e for e in range(first, math.ceil(math.log10(self.high)) + 1) for m in (1, 2, 5)]
            return [value for value in found if self.low * 0.999 <= value <= self.high * 1.001]
        step = 10 ** math.floor(math.log10((self.high - self.low) / 2))
        step *= next(m for m in (5, 2, 1) if (self.high - self.low) / (step * m) >= 3 or m == 1)
        first = math.ceil(self.low / step - 1e-9)
        return [step * i for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _short(value: float) -> str:
    """Tokens as 16K, other numbers as they are."""
    return f"{value / 1024:g}K" if value >= 1024 and value % 256 == 0 else number(value)
