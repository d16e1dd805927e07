"""The rooms of the package, which room imports which, and the picture of it: ``python docs/layout.py``."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

HERE = Path(__file__).resolve().parent
PACKAGE = HERE.parent / "src" / "gossamer"
PICTURE = HERE / "images" / "layout.svg"
# From the ground up: a module may import what stands below it, and its own room.
LEVELS = [
    ["plan"],
    ["unread", "rotary"],
    ["layout", "summaries"],
    ["paged", "encoded"],
    ["call", "rules"],
    ["backends"],
    ["oracle", "scores"],
    ["testing", "blocks"],
    ["methods"],
    ["profiles"],
    ["policy"],
    ["attention"],
    ["cache", "modules", "distributed"],
    ["integrations"],
    ["evaluate", "calibrate"],
    ["compressed"],
    ["report", "training"],
    ["cli"],
]
_WIDTH, _ROW, _BOX, _TALL, _GAP = 640, 58, 110, 30, 36


def module_path(module: str) -> Path | None:
    """The file of a module of ours, if there is one."""
    path = PACKAGE.joinpath(*module.split(".")[1:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(["gossamer", *(parts[:-1] if parts[-1] == "__init__" else parts)])


def imported(path: Path) -> set[str]:
    """Modules of ours that a file imports, in functions and for types too.

    Raises:
        ValueError: a relative import.
    """
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            if node.level:
                raise ValueError(f"{path} has a relative import, which the layout does not follow")
            names = {_origin(f"{node.module}.{alias.name}") for alias in node.names}
            modules = {name for name in names if module_path(name) is not None}
            found |= modules | ({node.module} if len(modules) < len(names) else set())
    return {name for name in found if name.split(".")[0] == "gossamer"}


def _origin(name: str) -> str:
    """The module that a public name of ``gossamer`` itself comes from; other names as they are."""
    if not name.startswith("gossamer.") or name.count(".") != 1 or module_path(name) is not None:
        return name
    for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and name.partition(".")[2] in {alias.name for alias in node.names}:
            return str(node.module)
    return name


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def edges() -> set[tuple[str, str]]:
    """(room, room that it imports), without what follows from others."""
    direct: dict[str, set[str]] = {room: set() for level in LEVELS for room in level}
    for path in PACKAGE.rglob("*.py"):
        room = room_of(module_of(path))
        if room in direct:
            direct[room] |= {room_of(m) for m in imported(path)} & direct.keys() - {room}

    def reached(room: str) -> set[str]:
        return direct[room].union(*(reached(other) for other in direct[room]))

    return {
        (room, other)
        for room, others in direct.items()
        for other in others
        if not any(other in reached(third) for third in others - {other})
    }


def draw() -> str:
    """The picture as SVG: the ground below, arrows to what a room imports."""
    arrows = edges()
    shown = {room for arrow in arrows for room in arrow}
    levels = [[room for room in level if room in shown] for level in LEVELS]
    levels = [level for level in levels if level]
    height = _ROW * len(levels) + 10
    places = {
        room: (_WIDTH / 2 + (i - (len(level) - 1) / 2) * (_BOX + _GAP), float(height - _ROW * row - _TALL))
        for row, level in enumerate(levels)
        for i, room in enumerate(level)
    }
    return "\n".join([*_head(height), *_arrows(arrows, places), *_boxes(places), "</svg>", ""])


def _head(height: int) -> Iterator[str]:
    yield f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" role="img"'
    yield '  aria-label="Rooms of the package; arrows lead from a room to those that it imports">'
    yield '<defs><marker id="tip" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
    yield '<path d="M0 0 8 4 0 8z" fill="#00796b"/></marker></defs>'


def _arrows(arrows: set[tuple[str, str]], places: dict[str, tuple[float, float]]) -> Iterator[str]:
    for room, other in sorted(arrows):
        (x, y), (to_x, to_y) = places[room], places[other]
        far = to_y - y > _ROW * 1.5  # around the rooms between
        bend = 150 + 12 * ((to_y - y) // _ROW) if far else 0
        side = 1 if (to_x if x == _WIDTH / 2 else x) >= _WIDTH / 2 else -1
        start = (x + side * _BOX / 2, y) if far else (x, y + _TALL / 2)
        end = (to_x + side * _BOX / 2, to_y) if far else (to_x, to_y - _TALL / 2)
        middle = _WIDTH / 2 + side * (_BOX / 2 + bend)
        curve = f"C{middle:.0f} {start[1]:.0f} {middle:.0f} {end[1]:.0f}" if far else "L"
        yield (
            f'<path d="M{start[0]:.0f} {start[1]:.0f} {curve} {end[0]:.0f} {end[1]:.0f}" fill="none" '
            'stroke="#00796b" stroke-width="1.3" marker-end="url(#tip)"/>'
        )


def _boxes(places: dict[str, tuple[float, float]]) -> Iterator[str]:
    for room, (x, y) in sorted(places.items()):
        yield (
            f'<rect x="{x - _BOX / 2:.0f}" y="{y - _TALL / 2:.0f}" width="{_BOX}" height="{_TALL}" rx="5" '
            'fill="#e0f2f1" stroke="#00796b"/>'
        )
        yield (
            f'<text x="{x:.0f}" y="{y + 5:.0f}" text-anchor="middle" font-family="monospace" font-size="14" '
            f'fill="#1b3a36">{room}</text>'
        )


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
