"""The figures of benchmarks/gpu.py: a file that is whole after each row, and a line a row for the terminal."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from timing import write

Row = dict[str, Any]
# Cells are done again where one of these changed. The driver and the clocks are told, not compared.
_SAME = ("device", "torch", "triton", "source")
_WIDTH = 120
_SHOWN = {
    "density": "density {:.3g}",
    "tflops": "{:.0f} TFLOP/s",
    "gb_per_s": "{:.0f} GB/s",
    "efficiency": "efficiency {:.2f}",
    "speedup_over_flex": "{:.2f}x flex",
    "speedup_over_sdpa": "{:.2f}x sdpa",
    "speedup_over_dense": "{:.2f}x dense",
    "share_of_best_sdpa": "{:.2f}x sdpa",
    "speedup_over_table": "{:.2f}x the table",
    "planning_share": "planning {:.0%}",
    "plan_mib": "plan {:.0f} MiB",
    "peak_gib": "peak {:.1f} GiB",
    "best_sdpa": "{}",
    "rates": "{}",
    "config": "{}",
}


class Report:
    """Measured rows by section and cell. A cell is what is measured together, such as a length.

    A file of the same code, machine and request is taken up again: its cells count as measured. Any other is replaced.
    """

    def __init__(self, path: Path | None, about: dict[str, Any]) -> None:
        self.path = path
        self._about, self._sections = dict(about), {}
        if path is not None and path.exists():
            found = json.loads(path.read_text())
            if _request(found) == _request(about):
                self._about = found | about
                self._sections = self._about.pop("sections", {})

    @property
    def verified(self) -> bool:
        """Whether all checks were right, none left out, when an earlier command verified this code on this machine."""
        found = self._about.get("verified")
        return found is not None and not found["left_out"]

    def rows(self, section: str) -> list[Row]:
        return self._section(section)["rows"]

    def has(self, section: str, cell: str) -> bool:
        """Whether the cell was measured, nothing of it skipped for want of time."""
        rows = [row for row in self.rows(section) if row["cell"] == cell]
        return cell in self._section(section)["done"] and not any(row.get("skipped") for row in rows)

    def add(self, section: str, cell: str, row: Row) -> None:
        """Keep a row in the file, instead of an older one of the same name; a skipped one replaces none."""
        rows = self.rows(section)
        at = next((n for n, old in enumerate(rows) if (old["cell"], old["what"]) == (cell, row["what"])), len(rows))
        if at == len(rows) or rows[at].get("skipped") or not row.get("skipped"):
            rows[at : at + 1] = [{"cell": cell, **row}]
        self.save()

    def finish(self, section: str, cell: str) -> None:
        done = self._section(section)["done"]
        if cell not in done:
            done.append(cell)
        self.save()

    def note(self, **about: object) -> None:
        self._about |= about
        self.save()

    def save(self) -> None:
        if self.path is not None:
            write(self.path, {**self._about, "sections": self._sections})

    def _section(self, name: str) -> dict[str, Any]:
        return self._sections.setdefault(name, {"done": [], "rows": []})


def _request(about: dict[str, Any]) -> tuple[object, ...]:
    machine = about.get("machine", {})
    return (*(machine.get(name) for name in _SAME), about.get("quick"))


def line(row: Row) -> str:
    """A row for the terminal, in one line of it."""
    where = " ".join(str(row[name]) for name in ("length", "dim") if row.get(name) is not None)
    what = row["what"].replace("vertical_size=", "").replace("slash_size=", "")
    seconds = row.get("median_s") or row.get("seconds_whole")
    figures = [f"{seconds * 1e3:.5g} ms"] if seconds else []
    for name, form in _SHOWN.items():
        value = row.get(name)
        if value is not None:
            figures.append(form.format(_rates(value) if isinstance(value, dict) else value))
    figures += [f"{name}: {row[name]}" for name in ("failure", "skipped") if row.get(name)]
    text = f"{what:<24} {where:>10}  {', '.join(figures)}"
    return text if len(text) <= _WIDTH else text[: _WIDTH - 3] + "..."


def _rates(rates: dict[str, float]) -> str:
    return " ".join(f"{name.replace('sdpa ', '')} {rate:.0f}" for name, rate in rates.items())
