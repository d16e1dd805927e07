"""The table of results on cases made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.evaluate.summary import main_table, read_results, summary_rows, task_table


def sample(method: str, score: float, index: int, task: str = "a", length: int = 100, seconds: float = 1.0) -> dict:
    return {
        "kind": "sample",
        "method": method,
        "task": task,
        "length": length,
        "index": index,
        "score": score,
        "density": 0.5,
        "prefill_s": seconds,
    }


RECORDS: list[dict[str, Any]] = [
    {"kind": "run"},
    *(sample("fast", score, i, seconds=0.5) for i, score in enumerate([1.0, 0.0, 1.0, 0.0])),
    *(sample("dense", 1.0, i, seconds=float(2 + i)) for i in range(4)),
    sample("fast", 0.25, 0, task="b"),
    sample("fast", 1.0, 0, length=50),
    {"kind": "perplexity", "method": "dense", "length": 100, "index": 0, "nats": 2.0, "density": 1.0, "prefill_s": 9.0},
    {
        "kind": "fidelity",
        "method": "fast",
        "length": 100,
        "index": 0,
        "density": 0.4,
        "mean": {"recall": 0.8, "oracle_recall": 0.9},
        "logits": {"mean_kl": 0.1, "mean_top1": 0.95},
    },
]


def test_rows_are_by_length_with_dense_first() -> None:
    assert [(row.length, row.method) for row in summary_rows(RECORDS)] == [(50, "fast"), (100, "dense"), (100, "fast")]


def test_figures() -> None:
    alone, dense, fast = summary_rows(RECORDS)
    assert (dense.accuracy, dense.interval, dense.difference) == (1.0, (1.0, 1.0), None)
    assert (dense.nats, dense.recall) == (2.0, None)
    assert dense.prefill_s == 3.5
    assert fast.samples == 5
    assert fast.accuracy == pytest.approx(2.25 / 5)
    assert fast.difference == pytest.approx(-0.5)  # of the four samples that dense has too
    assert fast.tasks == {"a": (0.5, (0.0, 1.0), 4), "b": (0.25, (0.25, 0.25), 1)}
    assert (fast.recall, fast.oracle_recall, fast.kl, fast.top1) == (0.8, 0.9, 0.1, 0.95)
    assert fast.speedup == 7.0
    assert fast.difference_interval is not None
    low, high = fast.difference_interval
    assert -1.0 <= low < -0.5 < high <= 0.0
    assert (alone.difference, alone.speedup) == (None, None)


def test_tables_have_no_empty_columns() -> None:
    table = main_table(summary_rows(RECORDS[1:9]))
    assert table[0] == ["method", "length", "n", "accuracy", "less dense", "density", "prefill s", "speed-up"]
    assert table[1][:4] == ["dense", "100", "4", "1.000 [1.000, 1.000]"]
    assert task_table(summary_rows(RECORDS))[0] == ["method", "length", "a", "b"]


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    path.write_text(lines + '{"kind": "samp')
    assert read_results(path) == RECORDS
    path.write_text(lines.replace('{"kind": "run"}', "[1]"))
    with pytest.raises(ValueError, match="line 1, is not a JSON object"):
        read_results(path)
    path.write_text('{"kind": "run"}\n')
    with pytest.raises(ValueError, match="no results"):
        read_results(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_results(tmp_path / "none")
