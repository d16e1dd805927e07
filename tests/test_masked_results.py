"""The page on masked language models says what the files of results have."""

from __future__ import annotations

from typing import Any

import pytest
from repository import ROOT, script

from gossamer.evaluate.masked.summary import FillRow, fill_rows, overlap_rows
from gossamer.evaluate.summary import read_results

FILE = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16" / "masked.jsonl"
tables = script("docs/masked_tables.py")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return read_results(FILE)


@pytest.fixture(scope="module")
def rows(records: list[dict[str, Any]]) -> dict[tuple[int, str], FillRow]:
    """By length, and as the tables call it."""
    return {(row.length, tables.called(row)): row for row in fill_rows(records)}


@pytest.fixture(scope="module")
def page() -> str:
    return " ".join((ROOT / "docs" / "masked.md").read_text(encoding="utf-8").split())


def test_methods_in_words() -> None:
    def row(method: str) -> FillRow:
        return FillRow(method, "fill", 512, 1, 1, 0.5, None, {}, {}, 1.0, None, None, None)

    labels = {
        "dense(kernel=gossamer)": "dense",
        "sparsed(share=0.2,block=32,min_tokens=0)": "`sparsed`, 0.2",
        "sparsed_variant(block=32,choice=window)": "window and first block, 0.3",
        "sparsed_variant(share=0.2,block=32,span=first)": "isolated, once, 0.2, first half of the steps",
    }
    assert {label: tables.called(row(label)) for label in labels} == labels


def test_every_figure_is_of_enough_texts(rows: dict[tuple[int, str], FillRow], records: list[dict[str, Any]]) -> None:
    assert {row.texts for row in rows.values()} == {8}
    assert {row.texts for row in overlap_rows(records)} == {8}
    assert {length for length, _ in rows} == {512, 2048}


def test_tables_have_a_row_for_each_method(records: list[dict[str, Any]]) -> None:
    made = tables.fills_of(fill_rows(records))
    assert [above.partition(" tokens")[0] for above, _, _ in made] == ["512", "2,048"]
    for _, header, body in made:
        assert len(body) == 17
        assert all(len(cells) == len(header) for cells in body)
    for _, header, body in [*tables.spans_of(fill_rows(records)), *tables.seconds_of(fill_rows(records))]:
        assert body
        assert all(len(cells) == len(header) for cells in body)
    ((_, header, body),) = tables.overlaps_of(overlap_rows(records))
    assert [len(cells) for cells in body] == [len(header)] * 2
