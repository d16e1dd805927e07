"""The page on masked language models says what the files of results have."""

from __future__ import annotations

from typing import Any

import pytest
from repository import ROOT, script

from gossamer.evaluate.masked.summary import Figured, FillRow, overlap_rows, step_costs
from gossamer.evaluate.summary import read_results

FILE = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16" / "masked.jsonl"
tables = script("docs/masked_tables.py")


@pytest.fixture(scope="module")
def records() -> list[dict[str, Any]]:
    return read_results(FILE)


@pytest.fixture(scope="module")
def rows(records: list[dict[str, Any]]) -> dict[tuple[int, str], FillRow]:
    """By length, and as the tables call it."""
    return {(row.length, tables.called(row)): row for row in tables.rows_of_fills(records)}


def test_methods_in_words() -> None:
    def row(method: str) -> FillRow:
        return FillRow(method, "fill", 512, 1, 1, 0.5, {}, {}, 1.0)

    labels = {
        "dense(kernel=gossamer)": "dense",
        "sparsed(share=0.2,block=32,min_tokens=0)": "`sparsed`, 0.2",
        "sparsed_variant(block=32,choice=window)": "window and first block, 0.3",
        "sparsed_variant(share=0.2,block=32,span=first)": "isolated, once, 0.2, first half of the steps",
    }
    assert {label: tables.called(row(label)) for label in labels} == labels


def test_every_figure_is_of_some_texts(rows: dict[tuple[int, str], FillRow], records: list[dict[str, Any]]) -> None:
    assert min(row.texts for row in rows.values()) >= 3
    assert min(row.texts for row in overlap_rows(records)) >= 3
    assert {(512, "dense"), (512, "`sparsed`, 0.2")} <= rows.keys()


def test_tables_have_a_row_for_each_method(records: list[dict[str, Any]]) -> None:
    made = tables.rows_of_fills(records)
    fills, spans = tables.fills_of(made), tables.spans_of(made)
    assert sum(len(body) for _, _, body in [*fills, *spans]) == len(made)
    for _, header, body in [*fills, *spans, *tables.seconds_of(step_costs(records)), *tables.claims_of(records)]:
        assert body
        assert all(len(cells) == len(header) for cells in body)
    ((_, header, body),) = tables.overlaps_of(overlap_rows(records))
    assert {len(cells) for cells in body} == {len(header)}


def test_the_page_has_what_shows(records: list[dict[str, Any]], rows: dict[tuple[int, str], FillRow]) -> None:
    """What its sentences say, which the tables do not say by themselves."""
    page = " ".join((ROOT / "docs" / "masked.md").read_text(encoding="utf-8").split())
    (row,) = [row for row in overlap_rows(records) if row.length == 512]
    assert "to less than 0.9 in their mean" in page
    assert row.later is not None
    assert row.later.high < 0.9
    later = row.by_step[row.chosen + 1 :]
    assert min(later[: len(later) // 4]) > 0.9 > later[-1]
    assert row.others is not None
    assert row.later.mean > row.others > row.chance
    assert "the window and random blocks lose it" in page
    dense, own = rows[512, "dense"], rows[512, "`sparsed`, 0.2"]
    for other in ("window and first block, 0.2", "random blocks, 0.2"):
        lost = rows[512, other].lost["copied_accuracy"]
        assert lost.low > 0
        assert lost.mean > 2 * own.lost["copied_accuracy"].mean
    assert dense.figures["agreement"].mean == 1.0
    ((_, _, claims),) = tables.claims_of(records)
    found = {(claim, share): verdict for claim, tokens, share, _, _, verdict in claims if tokens == "512"}
    assert "That early steps are fragile does not show" in page
    assert "shows" not in {verdict for (claim, _), verdict in found.items() if claim.startswith("early steps")}
    assert "nearer to dense attention in KL at a share of 0.2" in page
    assert found["isolated: less KL than joint, once", "0.2"] == "the other way round"
    assert "The oracle is somewhat nearer to dense attention than `sparsed`" in page
    assert found["oracle: less KL than `sparsed`", "0.2"] == "shows"
    everywhere = {(claim, tokens, share): verdict for claim, tokens, share, _, _, verdict in claims}
    for tokens in ("512", "2,048"):
        assert everywhere["isolated: less KL than joint, once", tokens, "0.2"] == "the other way round"
        assert {everywhere["oracle: less KL than `sparsed`", tokens, share] for share in ("0.2", "0.4")} == {"shows"}
    assert everywhere["more copied than by the window", "2,048", "0.4"] == "not told apart"
    assert "no method loses more than 0.08" in page
    rest = {key: row.figures["rest_accuracy"].mean for key, row in rows.items()}
    assert max(rest[length, "dense"] - mean for (length, _), mean in rest.items()) < 0.08


def test_fills_of_a_length_are_of_the_same_masks(rows: dict[tuple[int, str], FillRow]) -> None:
    assert all(row.fills == row.texts for row in rows.values())


def test_dense_steps_beside_which_costs_stand_were_not_observed(records: list[dict[str, Any]]) -> None:
    costs = {row.length: row for row in step_costs(records)}
    assert {length: row.texts for length, row in costs.items()} == {512: 3, 2048: 3}
    page = " ".join((ROOT / "docs" / "masked.md").read_text(encoding="utf-8").split())
    assert "little less than a dense one at 512 tokens, and about seven tenths at 2,048" in page
    assert 0.85 < costs[512].sparse / costs[512].dense < 1
    assert 0.65 < costs[2048].sparse / costs[2048].dense < 0.75
    assert "The step that chooses costs about two dense ones" in page
    assert all(1.5 < row.chooses / row.dense < 2.5 for row in costs.values())


def test_words_for_differences() -> None:
    assert [tables.told(Figured(0.1, *ends)) for ends in ((0.05, 0.2), (-0.1, 0.2), (-0.2, -0.1))] == [
        *("shows", "not told apart", "the other way round"),
    ]
