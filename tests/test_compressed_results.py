"""What the page on linear layers says, from the files that were measured."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT, script

RESULTS = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16"


def page() -> str:
    return " ".join((ROOT / "docs" / "compressing.md").read_text(encoding="utf-8").split())


def test_decoding_is_as_much_faster_as_the_page_says() -> None:
    found = json.loads((RESULTS / "linear_decode.json").read_text())
    small, large = ({name: own["speedup"] for name, own in row["contenders"].items()} for row in found["steps"])
    assert found["steps"][0]["model"].startswith("Qwen")
    text = page()
    assert f"{small['70% zeros']:.1f} times as fast as torch's in bf16 in the shapes of Qwen2.5-Coder-0.5B" in text
    assert f"and {large['70% zeros']:.1f} times in those of" in text
    assert f"{small['70% zeros, int8']:.1f} and {large['70% zeros, int8']:.1f} times, and with one bit" in text
    assert f"one bit {small['1 bit']:.1f} and {large['1 bit']:.1f} times" in text
    whole = [
        own["speedup"] for row in found["prompts"] for name, own in row["contenders"].items() if "whole" not in name
    ]
    whole = [speedup for speedup in whole if speedup != 1.0]
    assert f"{min(whole):.2f} to {max(whole):.2f} of a bf16 layer's speed at 512 tokens" in text
    least = min(row["contenders"]["1 bit"]["speedup"] for row in found["layers"])
    assert least == min(row["contenders"]["1 bit"]["speedup"] for row in found["layers"] if min(row["shape"]) < 600)


def test_the_table_of_first_tokens() -> None:
    row: dict[str, Any] = {
        "length": 8192,
        "contender": "sdpa bfloat16",
        "memory": "kept",
        "total_s": 40.04,
        "rounds": 3,
    }
    sparse = row | {"contender": "a int8", "linear_s": 4.0, "planning_s": 0.5, "attention_s": 1.0, "total_s": 8.0}
    sparse |= {"times_sdpa_bfloat16": 5.005, "kl": 0.01234, "top1": 0.5}
    found = {"model": {"name": "m"}, "threads": 2, "rows": [row, sparse]}
    above, header, rows = script("docs/compressed_tables.py").first_token_table(found)
    assert above.startswith("m, 2 threads; medians")
    assert rows[0] == ("8,192", "`sdpa bfloat16`", "kept", "40.0", "", "", "", "", "", 3)
    assert rows[1] == ("8,192", "`a int8`", "kept", "8.0", "4.0", "1.5", "5.0", "0.012", "0.500", 3)
    assert len(header) == len(rows[0])


def test_the_first_token_is_as_much_earlier_as_the_page_says() -> None:
    found = json.loads((RESULTS / "first_token_qwen.json").read_text())
    assert {row["memory"] for row in found["rows"]} == {"kept"}
    ratios = [row["times_sdpa_bfloat16"] for row in found["rows"] if row["contender"].endswith(" int8")]
    assert min(ratios) > 4


@pytest.mark.parametrize("what", ["linear", "attention"])
def test_what_is_said_of_parts_adds_up(what: str) -> None:
    for row in json.loads((RESULTS / "first_token_qwen.json").read_text())["rows"]:
        assert row.get(f"{what}_s", 0.0) <= row["total_s"]
