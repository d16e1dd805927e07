"""The page on vLLM names what is in the code."""

from __future__ import annotations

import re
from pathlib import Path

from methods.listed import LISTED

from gossamer.integrations.vllm.counters import METRICS
from gossamer.methods import available, create

ROOT = Path(__file__).resolve().parents[3]

PAGE = (ROOT / "docs" / "vllm.md").read_text(encoding="utf-8")


def row(first: str) -> list[str]:
    """The methods of the table's row that begins so."""
    (line,) = re.findall(rf"^\| {first}.*$", PAGE, re.MULTILINE)
    return re.findall(r"`(\w+)`", line.rpartition("|")[0].rpartition("|")[2])


def test_methods_stand_where_the_tests_of_chunks_have_them() -> None:
    names = ("do not depend on chunks", "likewise", "depend on them", "plan whole prompts", "as the methods")
    whole, tail, dependent, one_piece, made = map(row, names)
    assert sorted(whole + tail + dependent + one_piece + made) == sorted(available())
    assert one_piece == [name for name in available() if "whole prompt" in create(name).needs]
    by_block = {one.name for one in LISTED if one.by_block}
    tails = {one.name for one in LISTED if one.by_block and one.tail(1)}
    assert set(whole) == by_block - tails - set(made)
    assert set(tail) == tails - set(made)


def test_every_metric_is_named() -> None:
    assert not [metric for metric in METRICS if f"`{metric}_total`" not in PAGE]


def test_every_reason_is_named() -> None:
    folder = ROOT / "src" / "gossamer" / "integrations" / "vllm"
    code = "".join((folder / f"{name}.py").read_text() for name in ("backend", "cpu", "gpu", "limits", "rows"))
    reasons = set(re.findall(r'(?:return|refused\(rows,|reason =) "([A-Za-z0-9][\w -]+)"', code))
    reasons |= set(re.findall(r'"([\w -]+)" if ', code))
    reasons -= {"CUSTOM", "layers are not served"}  # a name; a step of whose layers each has a reason of its own
    assert len(reasons) > 10
    assert not [reason for reason in reasons if f"`{reason}`" not in PAGE]
