"""``gossamer mqar``: settings from a command line, results, tables, and the report's page."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.cli import main
from gossamer.evaluate.mqar.mixers import MIXERS

TINY = ["--task", "plain(vocabulary=16,length=16,pairs=2)", "--widths", "8", "--epochs", "1", "--examples", "16"]
TINY += ["--rates", "0.01", "--seeds", "0,1"]


def run(*arguments: str) -> int:
    return main(["mqar", *TINY, *arguments])


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "r.jsonl"


def test_a_sweep_prints_its_table_and_goes_on(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--mixers", "dense,window(3)+dense", "--out", str(out)) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == ["mixer", "dense", "window(3)+dense"]
    assert (
        "4 of at most 4: window(3)+dense, width 8, plain(vocabulary=16,length=16,pairs=2), rate 0.01, seed 1: accuracy"
        in shown.err
    )
    before = out.read_bytes()
    assert run("--mixers", "dense,window(3)+dense", "--out", str(out), "--json") == 0
    shown = capsys.readouterr()
    rows = json.loads(shown.out)["rows"]
    assert [(row["mixer"], row["seeds"], row["settings"]) for row in rows] == [
        ("dense", 2, ["quick, changed"]),
        ("window(3)+dense", 2, ["quick, changed"]),
    ]
    assert "of at most" not in shown.err
    assert out.read_bytes() == before


def test_a_report_draws_it(out: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("--mixers", "dense,window(3)", "--out", str(out)) == 0
    page = tmp_path / "page.html"
    assert main(["report", str(out), "--out", str(page)]) == 0
    text = page.read_text()
    assert "What each recalls, and at which cost" in text
    assert text.count("accuracy against state") >= 1
    assert "window(3)" in text
    table = (tmp_path / "page_csv" / "mqar.csv").read_text().splitlines()
    assert table[0].startswith("task,mixer,width,accuracy")
    assert len(table) == 3
    capsys.readouterr()


def test_the_mixers_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mqar", "--list"]) == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.partition("(budget)")[0].partition(";")[0] for line in shown] == list(MIXERS)
    assert main(["mqar", "--list", "--json"]) == 0
    assert {row["name"] for row in json.loads(capsys.readouterr().out)["mixers"]} == set(MIXERS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--mixers", "nonesuch"], "unknown mixer 'nonesuch'"),
        (["--mixers", "window(3"], "parentheses do not match"),
        (["--task", "easy"], "unknown variant 'easy'; known: plain"),
        (["--task", "plain(pairs=many)"], "plain.pairs takes int"),
        (["--task", "plain(pairs=40)"], "need a length of 160"),
        (["--widths", "7"], "widths must be even"),
        (["--rates", "fast"], "--rates must be numbers"),
        (["--seeds", "x"], "--seeds takes numbers"),
        (["--epochs", "0"], "epochs must be 1 or more"),
        (["--threads", "0"], "--threads must be 1"),
        (["--setting", "other"], "invalid choice"),
    ],
    ids=str,
)
def test_wrong_arguments_are_one_line(
    arguments: list[str], message: str, out: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--mixers", "dense", "--out", str(out), *arguments) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not out.exists()


def test_a_file_that_is_no_result_is_left_alone(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out.write_text("a diary\n")
    assert run("--mixers", "dense", "--out", str(out)) == 2
    assert "not a results file" in capsys.readouterr().err
    assert out.read_text() == "a diary\n"
