"""What the pages say of vLLM's server stands in the committed results."""

from __future__ import annotations

import json
from typing import Any

import pytest
from repository import ROOT

FOLDER = ROOT / "benchmarks" / "results" / "intel-xeon-emerald-rapids-2-cores-amx"
AVX2 = ROOT / "benchmarks" / "results" / "amd-epyc-zen3-2-cores-avx2"
ZEN_5 = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16"


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


def test_of_qwen_on_avx2() -> None:
    ratios = {
        (row["contender"], row["length"]): round(row["ratio"], 2)
        for row in json.loads((AVX2 / "serving.json").read_text())["Qwen2.5-Coder-0.5B-Instruct"]["first_token"]
        if row["contender"] != "stock"
    }
    assert ratios == {
        ("dense(kernel=gossamer)", 8192): 1.62,
        ("max_relative", 8192): 2.17,
        ("max_relative", 16384): 2.57,
    }


def test_of_tokens_that_a_server_gives() -> None:
    rows = json.loads((AVX2 / "serving_decode.json").read_text())["Qwen2.5-Coder-0.5B-Instruct"]["rows"]
    given = {row["contender"]: round(row["tokens_per_s"], 1) for row in rows if row["length"] == 8192}
    assert given == {"stock": 6.4, "quest(budget=1024)": 5.8}


def test_of_decoding_beside_its_kernel() -> None:
    rows = json.loads((AVX2 / "cpu.json").read_text())["sections"]["vllm"]["rows"]
    for dtype, low, high in (("fp32", 1.13, 1.38), ("bf16", 1.18, 1.63)):
        ratios = [r["speedup_over_vllm"] for r in rows if (r["what"], r["dtype"]) == ("decode, dense", dtype)]
        assert len(ratios) == 3
        assert (round(min(ratios), 2), round(max(ratios), 2)) == (low, high)
    rows = json.loads((ZEN_5 / "cpu.json").read_text())["sections"]["vllm"]["rows"]
    found = {
        (r["dtype"], r["length"]): round(r["speedup_over_vllm"], 2)
        for r in rows
        if r["what"] == "decode, dense" and r["date"] == "2026-11-30"
    }
    assert sorted(found[dtype] for dtype in found if dtype[0] == "bf16") == [1.14, 1.33, 1.42]
    assert [found["fp32", n] for n in (4096, 16384, 32768)] == [0.93, 1.12, 1.06]


def test_of_a_mixed_load() -> None:
    found = json.loads((FOLDER / "serving.json").read_text())
    shares = {name: [round(row["ratio"], 2) for row in found[name]["load"]] for name in found}
    assert shares["reference"] == [1.0, 0.91, 1.10, 1.01]
    assert shares["reference, not compiled"] == [1.0, 0.96, 1.03, 0.96]


def test_of_a_mixed_load_where_stock_rows_are_not_copied() -> None:
    found = json.loads((CHECKS.parent / "serving.json").read_text())["reference, not compiled"]
    assert [round(row["ratio"], 2) for row in found["load"]] == [1.0, 1.08, 1.17, 1.05]
    assert {(row["requests"], len(row["each_per_s"])) for row in found["load"]} == {(42, 5)}


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


CHECKS = ROOT / "benchmarks" / "results" / "intel-xeon-ice-lake-2-cores-avx512" / "vllm_checks.json"


def page_of_vllm() -> str:
    return " ".join((ROOT / "docs" / "vllm.md").read_text().split())


def test_of_what_was_run_by_hand() -> None:
    many, equal = (json.loads(CHECKS.read_text())[name] for name in ("many", "equal"))
    page = page_of_vllm()
    assert (many["requests"], many["rows_that_differ"]) == (1000, 0)
    assert many["dense_requests_with_other_tokens_than_alone"] == 0
    assert f"each of {many['rows_attended_twice']:,} rows" in page
    assert f"each of the {many['dense_requests']} requests with dense plans" in page
    assert equal["requests_with_the_same_tokens"] == equal["requests"]
    assert f"greedy tokens for each of {equal['requests']} requests" in page


def test_of_bits_in_a_stock_engine() -> None:
    found, page = json.loads(CHECKS.read_text())["many_stock"], page_of_vllm()
    assert f"{found['first_log_probabilities_with_the_same_bits']} of {found['requests']} first log-prob" in page
    assert f"differed by {found['largest_difference']:.1e} at most" in page


def test_of_memory_where_lengths_come_again() -> None:
    found, page = json.loads(CHECKS.read_text())["passes"]["max_relative"], page_of_vllm()
    before, _, second, third, fourth = found["memory_mib"]
    assert f"{found['prompts']} prompts), memory rose from {before:.0f} MiB to {second:,.0f} in the first two" in page
    assert max(third, fourth) <= second


def test_of_the_soak() -> None:
    found = json.loads(CHECKS.read_text())["soak"]
    ours, stock, page = found["max_relative"], found["stock"], page_of_vllm()
    sent = ours["requests"]
    answered = sum(sent[kind] for kind in ("plain", "few", "dense"))
    assert ours["finished"] == answered
    assert stock["finished"] == sum(n for kind, n in stock["requests"].items() if kind != "gone")
    gone, refused = sent["gone"], sent["refused"]
    assert (
        f"Of {sum(sent.values())} requests {gone} were abandoned, {refused} refused, and the other {answered}" in page
    )
    decoded = ours["no_plan"]["decode"] + ours["no_plan"]["few queries"]
    # Each answer's first token comes from a row of its prompt; those who went away had tokens made for them too.
    assert ours["tokens_of_answers"] - answered <= decoded
    assert sum(ours["rows"].values()) % 6 == 0
    rises = [{name: sizes[-1] - sizes[0] for name, sizes in one["memory_mib"].items()} for one in (ours, stock)]
    assert all(rise < 1 for one in rises for name, rise in one.items() if name != "VLLM::Worker")
    worker = ours["memory_mib"]["VLLM::Worker"][0]
    mine, its = (round(one["VLLM::Worker"]) for one in rises)
    assert f"took {mine} MiB more, of {worker:,.0f}, and the stock server's {its}" in page


def test_the_soak_that_is_flat() -> None:
    path = ROOT / "benchmarks" / "results" / "amd-epyc-zen3-2-cores-avx2" / "vllm_checks.json"
    soak = json.loads(path.read_text())["soak"]
    found, free = soak["max_relative"], soak["unbounded"]
    counts = found["requests"]
    assert (sum(counts.values()), counts["gone"], counts["refused"], found["finished"]) == (996, 113, 57, 826)
    assert found["wrong"] == []
    worker = found["memory_mib"]["VLLM::Worker"]
    assert (round(worker[0]), round(worker[-1])) == (1151, 1153)
    first, last = free["memory_mib"]["VLLM::Worker"]
    assert round(last - first) == 285
