"""What the pages say of vLLM's server stands in the committed results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "intel-xeon-emerald-rapids-2-cores-amx"


def first_token(model: str, contender: str, length: int) -> dict[str, Any]:
    rows = json.loads((FOLDER / "serving.json").read_text())[model]["first_token"]
    return next(row for row in rows if (row["contender"], row["length"]) == (contender, length))


def test_of_qwen() -> None:
    model = "Qwen2.5-Coder-0.5B-Instruct"
    fast, stock = first_token(model, "max_relative", 16384), first_token(model, "stock", 16384)
    assert fast["ratio"] == pytest.approx(1.90, abs=0.005)
    assert fast["attention_ratio"] == pytest.approx(9.2, abs=0.05)
    assert fast["rest_share"] == pytest.approx(0.88, abs=0.005)
    assert stock["rest_share"] == pytest.approx(0.40, abs=0.005)


def test_of_a_mixed_load() -> None:
    found = json.loads((FOLDER / "serving.json").read_text())
    shares = {name: [round(row["ratio"], 2) for row in found[name]["load"]] for name in found}
    assert shares["reference"] == [1.0, 0.91, 1.10, 1.01]
    assert shares["reference, not compiled"] == [1.0, 0.96, 1.03, 0.96]


def test_of_answers() -> None:
    found = json.loads((FOLDER / "serving_answers.json").read_text())["reference"]
    assert (found["length"], found["chunk"], len(found["rows"])) == (16384, 2048, 6)
    for row in found["rows"]:
        assert row["same_texts"] == row["samples"] == 8
        assert row["server"][0] == row["transformers"][0] == 1


def test_of_what_is_not_attention_at_32k() -> None:
    for model in ("reference", "reference, not compiled"):
        assert 0.1 < first_token(model, "stock", 32768)["rest_share"] < 0.15
        for method in ("max_relative", "minference"):
            assert 0.295 < first_token(model, method, 32768)["rest_share"] < 0.505


def test_of_what_was_run_by_hand() -> None:
    file = ROOT / "benchmarks" / "results" / "intel-xeon-ice-lake-2-cores-avx512" / "vllm_checks.json"
    many, equal = (json.loads(file.read_text())[name] for name in ("many", "equal"))
    page = " ".join((ROOT / "docs" / "vllm.md").read_text().split())
    assert (many["requests"], many["rows_that_differ"]) == (1000, 0)
    assert many["dense_requests_with_other_tokens_than_alone"] == 0
    assert f"each of {many['rows_attended_twice']:,} rows" in page
    assert f"each of the {many['dense_requests']} requests with dense plans" in page
    assert equal["requests_with_the_same_tokens"] == equal["requests"]
    assert f"greedy tokens for each of {equal['requests']} requests" in page
