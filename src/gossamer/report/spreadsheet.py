"""Tables as CSV that a spreadsheet shows, and does not run."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from typing import Any

__all__ = ["csv_text"]

# A spreadsheet takes such a cell for a formula.
_FORMULA = re.compile(r"\s*[=+\-@]")
# Numbers as our tables write them, with an interval or without: +0.010 [-0.120, +0.140]; a hyphen where there is none.
_NUMBER = re.compile(r"-|[-+]?\d[\d.]*(e[-+]?\d+)?%?( \[[-+]?[\d.]+, [-+]?[\d.]+\])?")


def csv_text(table: Sequence[Sequence[Any]]) -> str:
    """Header and rows. Text that begins as a formula does gets a quotation mark in front, by which it stays text.

    What UTF-8 cannot hold becomes a question mark.
    """
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([_cell(value) for value in row] for row in table)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    value = value.encode("utf-8", "replace").decode()
    return f"'{value}" if _FORMULA.match(value) and not _NUMBER.fullmatch(value) else value
