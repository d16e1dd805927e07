"""Figures that a search has measured, as lines of a file: one that was stopped goes on with what is there."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from gossamer.calibrate.figures import FIGURES, LayerFigures
from gossamer.profiles.files import parse_json, read_file

__all__ = ["Store"]


class Store:
    """Figures by prompt and layer.

    Args:
        path: of the file; None to keep them in memory alone.
        about: what the file must have been made from: model, prompts, candidates, how costs are counted.

    Raises:
        ValueError: the file is there, and of something else; the message says of what.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path, self._about = path, json.loads(json.dumps(about))
        self._found: dict[tuple[str, int], LayerFigures] = {}
        self._started = False
        if path is not None and path.exists():
            self._read(path)

    def has(self, prompt: str, layer: int) -> bool:
        return (prompt, layer) in self._found

    def get(self, prompt: str, layer: int) -> LayerFigures:
        return self._found[prompt, layer]

    def add(self, prompt: str, layer: int, figures: LayerFigures) -> None:
        """Keep, and write: the line is on the disk when this returns."""
        self._found[prompt, layer] = figures
        if self.path is None:
            return
        lines = [] if self._started else [self._about]
        lines.append({"prompt": prompt, "layer": layer} | figures.to_dict())
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(line, allow_nan=False) + "\n" for line in lines).encode())
            file.flush()
            os.fsync(file.fileno())
        self._started = True

    def done(self) -> None:
        """The result is written: the file is no longer needed."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)

    def _begins(self, content: bytes) -> bool:
        """That it is what stays of a first line that was cut off."""
        return json.dumps(self._about).encode().startswith(content)

    def _read(self, path: Path) -> None:
        content = read_file(path)
        whole = content.rfind(b"\n") + 1
        try:
            lines = [parse_json(line) for line in content[:whole].split(b"\n")[:-1]]
            if not (lines or self._begins(content)):
                raise ValueError("something else, without an end of a line")
            theirs, *figures = lines or [self._about]
            found = {(line["prompt"], line["layer"]): LayerFigures.from_dict(line) for line in figures}
            if len({getattr(one, name).shape for one in found.values() for name in FIGURES}) > 1:
                raise ValueError("figures of several shapes")
        except (ValueError, TypeError, KeyError, RuntimeError):  # RuntimeError: what torch makes no tensor of
            raise ValueError(f"{path} holds no figures to go on with; remove it, or write elsewhere") from None
        if theirs != self._about:
            names = sorted(self._about.keys() | theirs.keys()) if isinstance(theirs, dict) else []
            other = ", ".join(name for name in names if theirs.get(name) != self._about.get(name))
            raise ValueError(
                f"{path} holds figures of another {other or 'kind'}; remove it, or write elsewhere with -o"
            )
        if whole < len(content):  # cut off within a line
            with path.open("r+b") as file:
                file.truncate(whole)
        self._found, self._started = found, bool(lines)
