"""The picture of decode steps and caches, and the numbers that it is made of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.evaluate.summary import summary_rows
from gossamer.report.decoding import decoding
from gossamer.report.overview import in_words, overview, short_table
from gossamer.report.page import findings, write_report

Record = dict[str, Any]
POLICIES: dict[str, Record] = {
    "dense": {},
    "dense+quest(budget=64)": {"read": 0.1, "cache_bytes": 4 << 20, "decode_tokens": 20},
    "dense+quest(budget=256)": {"read": 0.4, "cache_bytes": 4 << 20, "decode_tokens": 10},
    "dense+int8": {"cache_bytes": 2 << 20, "decode_tokens": 16},
}


def samples(length: int = 1024) -> list[Record]:
    lines = []
    for n, (label, more) in enumerate(POLICIES.items()):
        for index in range(4):
            own = {"kind": "sample", "method": label, "task": "needle_single", "length": length, "index": index}
            figures = {"density": 1.0, "score": float(index >= n), "prefill_s": 1.0, "decode_s": 0.4}
            lines.append(own | figures | more)
    return lines


def test_rows_have_what_a_token_takes() -> None:
    rows = {row.method: row for row in summary_rows(samples())}
    assert rows["dense"].token_s is None
    assert rows["dense+quest(budget=64)"].token_s == pytest.approx(0.02)
    assert rows["dense+int8"].token_s == pytest.approx(0.025)


def test_the_figure_says_what_a_step_reads() -> None:
    figure = decoding(summary_rows(samples(1024) + samples(2048)))
    header, *lines = figure.table
    found = {(line[0], line[1]): dict(zip(header, line, strict=True)) for line in lines}
    assert len(found) == 6
    few = found[1024, "dense+quest(budget=64)"]
    assert (few["step MiB"], few["cache MiB"]) == (pytest.approx(0.4), 4)
    assert (few["accuracy"], few["token ms"]) == (0.75, pytest.approx(20.0))
    assert found[2048, "dense+int8"]["step MiB"] == found[2048, "dense+int8"]["cache MiB"] == 2
    assert [caption for caption, _ in figure.panels[:3]] == [
        "1K tokens: accuracy against what a step reads",
        "1K tokens: accuracy against what the cache holds",
        "1K tokens: accuracy against time of a token",
    ]
    assert len(figure.panels) == 6
    assert "dense+quest(budget=64): 0.750 at 0.4" in str(figure.panels[0][1])


def test_without_such_policies_there_is_none(tmp_path: Path) -> None:
    plain = [line for line in samples() if line["method"] == "dense"]
    assert decoding(summary_rows(plain)).panels == []
    out = tmp_path / "report.html"
    assert tmp_path / "report_csv" / "decoding.csv" in write_report(samples(), out, "steps")
    assert 'id="decoding"' in out.read_text(encoding="utf-8")
    assert not any(path.name == "decoding.csv" for path in write_report(plain, tmp_path / "plain.html", "plain"))
    assert json.dumps(plain)  # lines as files have them


def test_where_steps_alone_differ_the_first_screen_speaks_of_steps() -> None:
    """Prompts were read alike: what seconds their reading took says nothing of the settings."""
    rows = summary_rows(samples())
    assert [caption for caption, _ in overview(rows).panels] == ["Answers: accuracy against time of a token"]
    _, answers, _ = in_words(rows)
    assert "The fastest of them is dense+quest(budget=64), 20.0 ms a token, which read 10.0% of the cache" in answers
    header, dense, *steps = short_table(rows)
    assert header == ["method", "ms a token", "of the cache read", "MiB held", "less dense"]
    assert dense == ["dense", "-", "-", "-", "-"]
    assert steps[0][:4] == ["dense+quest(budget=64)", "20.0", "0.100", "4.0"]
    assert [line[0] for line in steps[1:]] == ["dense+quest(budget=256)", "dense+int8"]
    few, _, kept = findings(rows)
    assert "it reads 10.0% of the cache and takes 20.0 ms a token." in few
    assert "it takes 25.0 ms a token." in kept
    prefill = {"kind": "sample", "method": "a_shape", "task": "needle_single", "length": 1024, "index": 0}
    mixed = summary_rows([*samples(), prefill | {"density": 0.3, "score": 1.0, "prefill_s": 0.5, "decode_s": 0.4}])
    assert [caption for caption, _ in overview(mixed).panels] == ["Answers: accuracy against seconds"]
    assert short_table(mixed)[0][1] == "seconds"
