"""Closeness: means over prompts, intervals over them, kinds as strata."""

from __future__ import annotations

from typing import Any

import pytest

from gossamer.evaluate.closeness import EVERY_KIND, closeness_rows, closeness_table
from gossamer.evaluate.metrics import bootstrap_interval, pooled_interval


def line(method: str, kl: float, index: int, text: str | None = None, length: int = 100) -> dict[str, Any]:
    of_text = {} if text is None else {"text": text}
    return {
        "kind": "fidelity",
        "task": "needle_single" if text is None else "perplexity",
        "method": method,
        "length": length,
        "index": index,
        "density": 0.5,
        "mean": {"recall": 0.8 - kl, "oracle_recall": 0.9},
        "logits": {"mean_kl": kl, "mean_top1": 1 - kl, "nats": 2 + kl, "dense_nats": 2.0},
    } | of_text


def test_kinds_are_strata_and_come_after_all_of_them() -> None:
    prose, code = [0.1, 0.3, 0.2], [0.01, 0.02, 0.03]
    lines = [line("fast", kl, i, "prose.txt") for i, kl in enumerate(prose)]
    lines += [line("fast", kl, i, "code.py") for i, kl in enumerate(code)]
    both, of_prose, of_code = closeness_rows([*lines, {"kind": "run"}])
    assert [row.kind for row in (both, of_prose, of_code)] == [EVERY_KIND, "prose.txt", "code.py"]
    assert (both.prompts, of_prose.prompts) == (6, 3)
    assert both.kl == (pytest.approx(0.11), pooled_interval([prose, code], bootstrap_interval))
    assert of_prose.kl == (pytest.approx(0.2), bootstrap_interval(prose))
    assert of_code.top1[0] == pytest.approx(0.98)
    assert of_code.nats is not None
    assert of_code.nats[0] == pytest.approx(0.02)
    assert of_prose.recall[0] == pytest.approx(0.6)
    assert both.to_dict()["density"] == 0.5
    shown = closeness_table([of_prose])[1]
    assert shown[:5] == ["fast", "100", "prose.txt", "3", "0.500"]
    assert shown[7].startswith("0.2000 [0.1")


def test_a_single_prompt_of_a_kind_has_no_interval() -> None:
    lines = [line("fast", 0.1, 0), line("fast", 0.1, 0, "a"), line("fast", 0.2, 1, "a")]
    rows = {row.kind: row for row in closeness_rows(lines)}
    assert rows["needle_single"].kl == (0.1, None)
    assert rows[EVERY_KIND].kl[1] is None
    assert rows["a"].kl[1] is not None


def test_one_kind_stands_alone_and_lengths_apart() -> None:
    rows = closeness_rows([line("a", 0.1, 0), line("b", 0.2, 0), line("a", 0.4, 0, length=50)])
    assert [(row.length, row.method, row.kind) for row in rows] == [
        (50, "a", "needle_single"),
        (100, "a", "needle_single"),
        (100, "b", "needle_single"),
    ]


def test_old_lines_have_no_loss() -> None:
    old = line("a", 0.1, 0)
    del old["logits"]["nats"], old["task"]
    (row,) = closeness_rows([old])
    assert (row.nats, row.kind) == (None, "prompts")
