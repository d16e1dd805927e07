"""What the page of contenders says stands in the committed results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "intel-xeon-ice-lake-2-cores-avx512"
LONG = 8000


def row(contender: str, length: int = LONG) -> dict[str, Any]:
    found = json.loads((FOLDER / "contenders_smollm2.json").read_text())
    return next(row for row in found["rows"] if (row["contender"], row["length"]) == (contender, length))


def test_all_first_tokens_of_the_timed_are_those_of_the_reference() -> None:
    for name in ("contenders_smollm2.json", "contenders_qwen.json"):
        if (FOLDER / name).exists():
            rows = json.loads((FOLDER / name).read_text())["rows"]
            assert all(row["same_first_tokens"] == row["compared"] for row in rows if "seconds" in row)


def test_the_same_algorithm_loses_the_same() -> None:
    ours, theirs = row("gossamer xattention as openvino's"), row("openvino xattention 0.9")
    assert (round(ours["kl"], 3), round(theirs["kl"], 3)) == (0.085, 0.085)
    assert ours["positions"] == theirs["positions"] == 500


def test_losses_of_the_settings() -> None:
    expected = {"gossamer minference 512/2048": 0.054, "openvino xattention 0.95": 0.038, "openvino trishape": 0.038}
    assert {name: round(row(name)["kl"], 3) for name in expected} == expected


def test_integers_lose_little_and_the_own_reader_much() -> None:
    assert row("openvino int8 dense")["kl"] == pytest.approx(0.006, abs=0.0005)
    assert row("openvino gguf dense")["kl"] == pytest.approx(0.24, abs=0.005)
    assert row("openvino dense")["kl"] < 1e-5


def test_seconds_that_the_page_names() -> None:
    expected = {
        "gossamer dense": 22.0,
        "vllm": 24.9,
        "transformers sdpa": 28.9,
        "openvino dense": 27.3,
        "openvino int8 dense": 18.7,
        "llama.cpp flash": 92.6,
        "gossamer xattention": 16.0,
        "openvino xattention 0.9": 17.4,
        "openvino int8 xattention 0.9": 13.1,
        "gossamer minference 256/1024": 14.5,
        "openvino xattention 0.8": 15.9,
    }
    assert {name: round(row(name)["each_s"][0], 1) for name in expected} == expected


def test_losses_that_the_page_names() -> None:
    expected = {
        "gossamer xattention": 0.093,
        "openvino int8 xattention 0.9": 0.09,
        "gossamer minference 256/1024": 0.165,
        "openvino xattention 0.8": 0.168,
    }
    assert {name: round(row(name)["kl"], 3) for name in expected} == expected
    assert row("openvino xattention 0.9 in chunks of 256")["kl"] == pytest.approx(2.1, abs=0.05)
    halves = {name: row(name)["kl_half"] for name in expected if name != "openvino xattention 0.8"}
    assert max(halves.values()) < 0.03 < row("openvino xattention 0.8")["kl_half"]


def linear(section: str, **wanted: Any) -> dict[str, Any]:
    rows = json.loads((FOLDER / "linear_smollm2.json").read_text())[section]
    return next(row for row in rows if all(row[name] == value for name, value in wanted.items()))


def test_shares_of_linear_layers() -> None:
    dense = linear("shares", length=LONG, method="dense(kernel=gossamer)")
    sparse = linear("shares", length=LONG, method="minference(vertical_size=256,slash_size=1024)")
    assert round(dense["linear_share"], 2) == 0.38
    assert (round(sparse["linear_share"], 2), round(sparse["attention_share"], 2)) == (0.59, 0.22)


def test_other_linear_layers() -> None:
    def of(name: str) -> dict[str, Any]:
        return linear("variants", variant=name, length=600)

    ratios = [of(f"torch.ao int8 {engine}")["linear_ratio"] for engine in ("x86", "fbgemm", "onednn")]
    assert (round(1 / max(ratios), 2), round(1 / min(ratios), 2)) == (0.49, 0.6)
    assert all(of(f"torch.ao int8 {engine}")["kl"] == pytest.approx(1.3, abs=0.05) for engine in ("x86", "onednn"))
    assert of("torchao int8")["kl"] == pytest.approx(0.04, abs=0.005)
    assert of("torchao int8")["linear_ratio"] < 1
    assert [round(1 / of(f"torch {name}")["linear_ratio"]) for name in ("bfloat16", "float16")] == [3, 9]
    assert "unavailable" in of("IPEX float32")
