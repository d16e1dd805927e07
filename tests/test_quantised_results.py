"""What docs/benchmarks.md says of products in integers on Zen 5 stands in the committed results."""

from __future__ import annotations

import json
import statistics
from typing import Any

import pytest
from repository import ROOT

RESULTS = ROOT / "benchmarks" / "results"
FOUND = json.loads((RESULTS / "amd-epyc-zen5-2-cores-avx512-bf16" / "quantised.json").read_text())
PAGE = (ROOT / "docs" / "benchmarks.md").read_text()


def speed(scores: str, *isas: str) -> list[dict[str, Any]]:
    return [row for row in FOUND["speed"] if row["scores"] == scores and row["isa"] in isas]


def span(numbers: list[float]) -> tuple[float, float]:
    """The least and the most, to two places."""
    return round(min(numbers), 2), round(max(numbers), 2)


@pytest.mark.parametrize(
    ("scores", "isas", "least", "most", "said"),
    [
        ("int8", ("avx512_bf16",), 1.12, 1.21, "the whole call is 1.12 to 1.21"),
        ("int8, values too", ("avx512_bf16",), 1.33, 1.54, "values in int8 too make it 1.33 to 1.54"),
        ("no product", ("avx512_bf16",), 1.84, 1.89, "1.84 to 1.89 times as fast"),
        ("int8", ("avx2", "avx512"), 1.39, 1.55, "For fp32 inputs it is 1.39 to 1.55 times"),
        ("int16", ("avx2", "avx512"), 1.22, 1.30, "fp32 inputs gain 1.22 to 1.30 times"),
    ],
)
def test_of_speed(scores: str, isas: tuple[str, ...], least: float, most: float, said: str) -> None:
    assert span([row["speedup"] for row in speed(scores, *isas)]) == (least, most)
    assert said in PAGE


def test_of_the_product_alone() -> None:
    plain, int8 = speed("as it is", "avx512_bf16"), speed("int8", "avx512_bf16")
    shares = [statistics.median(row["scores_s"]) / statistics.median(row["attend_s"]) for row in plain]
    assert span(shares) == (0.38, 0.44)
    assert span([1 / row["scores_speedup"] for row in int8]) == (0.67, 0.86)
    assert "38 to 44% of the kernel" in PAGE
    assert "0.67 to 0.86 of its time" in PAGE


def errors(what: str, of: str = "") -> list[float]:
    """How many times those of bf16, of inputs with a word in their name, in the files of both machines that have it."""
    files = [json.loads(path.read_text()) for path in sorted(RESULTS.glob("*/quantised.json"))]
    rows = [row for found in files for row in found["errors"] if of in row["inputs"] and what in row["errors"]]
    return [row["errors"][what] / row["errors"]["bf16 throughout"] for row in rows]


@pytest.mark.parametrize(
    ("what", "of", "least", "most", "said"),
    [
        ("int8 by tokens", "", 1.49, 3.42, "With a scale a token it makes 1.5 to 3.4 times the error of bf16"),
        ("int8 by blocks", "", 1.81, 4.05, "SageAttention, 1.8 to 4.1 times"),
        ("int8 by blocks, not smoothed", "", 2.41, 5.26, "without smoothing up to 5.3 times"),
        ("int8 by tokens, keys alone", "", 0.62, 2.61, "keys alone makes 0.6 to 2.6 times"),
        ("int8 by blocks, values too", "layer", 3.74, 16.4, "3.7 to 16 times that error on the models' inputs"),
        ("int8 by blocks, values too", "random", 5.05, 5.29, "5.1 to 5.3 on random ones"),
        ("int8 by blocks, values too", "video", 22.59, 23.7, "23 to 24 on those like a video"),
    ],
)
def test_of_errors(what: str, of: str, least: float, most: float, said: str) -> None:
    found = errors(what, of)
    assert min(found) == pytest.approx(least, abs=0.01)
    assert max(found) == pytest.approx(most, abs=0.01)
    assert said in PAGE


def test_int16_errs_far_less_than_bf16() -> None:
    assert max(errors("int16 by tokens")) < 1 / 30
    assert "less than a thirtieth of the error" in PAGE
