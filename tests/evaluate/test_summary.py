"""The table of results on cases made by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gossamer.evaluate.metrics import difference_interval, score_interval
from gossamer.evaluate.summary import (
    common_cells,
    dense_notes,
    main_table,
    read_results,
    summary_rows,
    task_table,
    warnings_of,
)


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
        **{name: [[0.5]] for name in ("head_density", "recall", "oracle_recall", "relative_l2")},
        "mean": {"recall": 0.8, "oracle_recall": 0.9},
        "logits": {"edges": [0, 100], "kl": [0.1], "top1": [0.95], "mean_kl": 0.1, "mean_top1": 0.95},
    },
]


def test_rows_are_by_length_with_dense_first() -> None:
    assert [(row.length, row.method) for row in summary_rows(RECORDS)] == [(50, "fast"), (100, "dense"), (100, "fast")]


def test_figures() -> None:
    alone, dense, fast = summary_rows(RECORDS)
    assert (dense.accuracy, dense.interval, dense.difference) == (1.0, score_interval([1.0] * 4), None)
    assert (dense.nats, dense.recall) == (2.0, None)
    assert dense.prefill_s == 3.5
    assert fast.samples == 5
    assert fast.accuracy == pytest.approx(2.25 / 5)
    assert fast.difference == pytest.approx(-0.5)  # of the four samples that dense has too
    assert fast.tasks == {"a": (0.5, score_interval([1.0, 0.0] * 2), 4), "b": (0.25, score_interval([0.25]), 1)}
    assert (fast.fewest, dense.fewest, alone.fewest) == (1, 4, 1)
    assert (fast.recall, fast.oracle_recall, fast.kl, fast.top1) == (0.8, 0.9, 0.1, 0.95)
    assert fast.speedup == 7.0
    assert fast.difference_interval is not None
    low, high = fast.difference_interval
    assert -1.0 <= low < -0.5 < high <= 0.0
    assert (alone.difference, alone.speedup) == (None, None)


def test_tables_have_no_empty_columns() -> None:
    table = main_table(summary_rows(RECORDS[1:9]))
    assert table[0] == ["method", "length", "n", "accuracy", "less dense", "density", "prefill s", "speed-up"]
    assert table[1][:4] == ["dense", "100", "4", "1.000 [0.510, 1.000]"]
    assert task_table(summary_rows(RECORDS))[0] == ["method", "length", "a", "b"]
    assert task_table(summary_rows(RECORDS))[2] == ["dense", "100", "1.000 [0.510, 1.000] n=4", "-"]


def test_reading(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    lines = "".join(json.dumps(record) + "\n" for record in RECORDS)
    path.write_text(lines + '{"kind": "samp')
    assert read_results(path) == RECORDS
    path.write_text(lines.replace('{"kind": "run"}', "[1]"))
    with pytest.raises(ValueError, match="line 1 is not a JSON object"):
        read_results(path)
    path.write_text('{"kind": "run"}\n')
    with pytest.raises(ValueError, match="no results"):
        read_results(path)
    with pytest.raises(ValueError, match="cannot read"):
        read_results(tmp_path / "none")


def run_line(name: str, seed: int = 0) -> dict[str, Any]:
    model = {"fingerprint": "m", "layers": 6}
    return {"kind": "run", "run": name, "seed": seed, "haystack": {"sha256": "h"}, "model": model}


def test_samples_of_several_seeds_are_compared_with_dense_on_their_own() -> None:
    """Dense and sparse agree on every sample; pairing seed 1 with seed 0 would show a difference."""
    records = [run_line("one", 0), run_line("two", 1)]
    for run, score in (("one", 1.0), ("two", 0.0)):
        records += [sample(method, score, 0) | {"run": run} for method in ("dense", "fast")]
    dense, fast = summary_rows(records)
    assert (dense.samples, fast.samples, fast.difference) == (2, 2, 0.0)
    assert [line for line in warnings_of(records) if "several seeds (0, 1)" in line]
    assert warnings_of([run_line("one"), sample("dense", 1.0, 0) | {"run": "one"}]) == []


def test_a_file_given_twice_counts_once() -> None:
    records = [run_line("one"), *(sample("dense", 1.0, i) | {"run": "one"} for i in range(3))]
    assert summary_rows(records + records) == summary_rows(records)
    assert warnings_of(records + records) == ["3 results are there more than once and count once."]


def test_tasks_of_other_fields_are_no_pairs() -> None:
    dense, fast = sample("dense", 1.0, 0), sample("fast", 0.0, 0)
    same, other = {"task_fields": {"keys": 1}}, {"task_fields": {"keys": 8}}
    assert summary_rows([dense | same, fast | same])[1].difference == -1.0
    assert summary_rows([dense | same, fast | other])[1].difference is None


def test_ten_samples_without_a_difference_leave_one_open() -> None:
    records = [sample(method, 1.0, i) for method in ("dense", "fast") for i in range(10)]
    row = summary_rows(records)[1]
    assert row.difference == 0.0
    assert row.difference_interval == difference_interval([0.0] * 10)


def test_tasks_are_strata_of_the_difference() -> None:
    scores = {"a": [1.0] * 20, "b": [0.0] * 20}
    records = [sample("dense", 1.0, i, task) for task in scores for i in range(20)]
    records += [sample("fast", score, i, task) for task, values in scores.items() for i, score in enumerate(values)]
    interval = summary_rows(records)[1].difference_interval
    assert interval is not None
    assert -0.6 < interval[0] < -0.5 < interval[1] < -0.3


def test_loss_has_an_interval_and_a_paired_difference() -> None:
    def window(method: str, index: int, nats: float, start: int = 0) -> dict[str, Any]:
        line = {"kind": "perplexity", "method": method, "length": 100, "index": index, "start": start, "nats": nats}
        return line | {"density": 1.0, "prefill_s": 1.0}

    losses = [1.0, 2.0, 3.0, 4.0]
    records = [window("dense", i, nats) for i, nats in enumerate(losses)]
    records += [window("fast", i, nats + 0.1 + 0.01 * i) for i, nats in enumerate(losses)]
    records += [window("fast", 0, 50.0, start=9)]  # of another place of the text, without its like
    dense, fast = summary_rows(records)
    assert dense.nats_interval is not None
    assert dense.nats_interval[0] < 2.5 < dense.nats_interval[1]
    assert fast.nats_difference == pytest.approx(0.115)
    assert fast.nats_difference_interval is not None
    assert 0.1 <= fast.nats_difference_interval[0] < 0.115 < fast.nats_difference_interval[1] <= 0.13
    table = main_table(summary_rows(records[:1] + records[4:5]))
    assert table[0][-4:-2] == ["nats", "more nats"]
    assert table[2][-4:-2] == ["1.100", "+0.100"]


def test_rows_that_ran_dense_say_so() -> None:
    policy = {"run": "one", "policy": "min_tokens=2048,max_density=0.5"}
    records = [run_line("one")]
    records += [sample("fast", 1.0, i, length=1024) | policy | {"dense_because": {"short prompt": 6}} for i in range(2)]
    records += [sample("fast", 1.0, 0) | policy | {"dense_because": {"plan too dense to pay": 3}}]
    assert dense_notes(summary_rows(records)) == [
        "fast at 100 tokens: 50% of the layers' prefills ran dense (plan too dense to pay); plans above "
        "max_density=0.5 do",
        "fast at 1,024 tokens: 100% of the layers' prefills ran dense (short prompt); prompts below min_tokens=2048 "
        "do, --min-tokens sets it",
    ]
    assert dense_notes(summary_rows(RECORDS)) == []


def test_common_cells_are_those_of_all_methods() -> None:
    kept = common_cells(RECORDS, ["dense", "fast"])
    assert {(r["task"], r["length"]) for r in kept if r["kind"] == "sample"} == {("a", 100)}
    assert [r["kind"] for r in kept].count("fidelity") == 1
    assert "perplexity" not in {r["kind"] for r in kept}
