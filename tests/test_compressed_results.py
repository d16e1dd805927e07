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
    sparse |= {"times_sdpa_bfloat16": 5.005, "kl": 0.01234, "top1": 0.5, "used_by_others": 0.25}
    found = {"model": {"name": "m"}, "threads": 2, "rows": [row, sparse]}
    above, header, rows = script("docs/compressed_tables.py").first_token_table(found)
    assert above.startswith("m, 2 threads; medians")
    assert rows[0] == ("8,192", "`sdpa bfloat16`", "kept", "40.0", "", "", "", "", "", 3, "")
    assert rows[1] == ("8,192", "`a int8`", "kept", "8.0", "4.0", "1.5", "5.0", "0.012", "0.500", 3, "25%")
    assert len(header) == len(rows[0])


def test_the_first_token_is_as_much_earlier_as_the_page_says() -> None:
    found = json.loads((RESULTS / "first_token_qwen.json").read_text())
    assert {row["memory"] for row in found["rows"]} == {"kept"}
    text = page()
    rows = {(row["length"], row["contender"]): row for row in found["rows"]}
    dense, int8, half = (rows[32768, name] for name in ("sdpa bfloat16", "xattention int8", "xattention bfloat16"))
    assert f"{int8['times_sdpa_bfloat16']:.1f} times as early with `xattention` and int8 layers" in text
    assert f"{int8['total_s']:.1f} and {dense['total_s']:.0f} seconds, in one round; with bf16 layers" in text
    assert f"bf16 layers {half['times_sdpa_bfloat16']:.1f} times" in text
    more, few = (f"minference(vertical_size={n},slash_size={4 * n})" for n in (512, 256))
    times = [rows[16384, f"{name} int8"]["times_sdpa_bfloat16"] for name in (more, few)]
    assert "{:.1f} and {:.1f} times, in three".format(*times) in text
    assert {rows[16384, f"{name} int8"]["rounds"] for name in (more, few)} == {3}
    kl = {key: f"{row['kl']:.3f}" for key, row in rows.items() if "kl" in row}
    said = f"{kl[16384, f'{more} int8']} with int8 layers and {kl[16384, f'{more} bfloat16']} with bf16 ones"
    assert said in text
    assert f"{kl[16384, f'{few} int8']} and {kl[16384, f'{few} bfloat16']} with half of their pairs" in text
    assert f"loses {kl[16384, 'xattention int8']}" in text
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"comes after {int8['total_s']:.0f} seconds at 32K tokens" in readme
    assert f"after {dense['total_s']:.0f} with torch's dense attention in bf16" in readme


def test_what_is_lost_is_what_the_page_says() -> None:
    lines = [json.loads(line) for line in (RESULTS / "compressed_smollm2.jsonl").read_text().splitlines()]
    text, found = page(), {}
    for line in lines[2:]:
        recipe = line["recipe"]
        found.setdefault((recipe["recipe"], recipe.get("pattern")), line["perplexity"])
    assert f"perplexity is {lines[1]['perplexity']:.2f}" in text
    assert f"{found['sparsegpt', '0.5']:.1f} beside {found['magnitude', '0.5']:.0f} at 50%" in text
    assert f"{found['sparsegpt', '0.7']:.1f} beside {round(found['magnitude', '0.7'], -3):,.0f} at 70%" in text
    assert found["billm", None] < found["sign_and_scale", None] < found["rounded", None]
    assert f"{found['billm', None]:,.0f} at best" in text
    (dropped,) = [line["perplexity"] for line in lines if line.get("recipe", {}).get("outliers") == 0.0]
    assert f"and at {dropped:.0f} where what is beyond" in text
    assert f"int8 stands at {found['int8', None]:.2f}" in text
    above, header, rows = script("docs/compressed_tables.py").quality_table(lines)
    assert "8 windows of 1024 tokens" in above
    assert rows[1][:3] == ("`sparsegpt`", "`pattern=0.5`", "13.28")
    assert {len(row) for row in rows} == {len(header)}


@pytest.mark.parametrize("what", ["linear", "attention"])
def test_what_is_said_of_parts_adds_up(what: str) -> None:
    for row in json.loads((RESULTS / "first_token_qwen.json").read_text())["rows"]:
        assert row.get(f"{what}_s", 0.0) <= row["total_s"]
