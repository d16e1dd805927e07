"""What the page of decoding says of steps stands in the committed results."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT

from gossamer.evaluate.summary import SummaryRow, read_results, summary_rows

RESULTS = ROOT / "benchmarks" / "results"
FOUND = RESULTS / "intel-xeon-ice-lake-2-cores-avx512" / "decoding.json"
ZEN = RESULTS / "amd-epyc-zen3-2-cores-avx2"
ZEN_5 = RESULTS / "amd-epyc-zen5-2-cores-avx512-bf16"


def row(method: str, length: int, dtype: str, path: Path = FOUND) -> dict[str, Any]:
    rows = json.loads(path.read_text())["rows"]
    (one,) = [
        row
        for row in rows
        if row["section"] == "attention" and (row["method"], row["length"], row["dtype"]) == (method, length, dtype)
    ]
    return one


def test_how_many_times_as_fast() -> None:
    def ratios(method: str, length: int) -> list[float]:
        return [row(method, length, dtype)["ratio"] for dtype in ("float32", "bfloat16")]

    assert ratios("lserve(budget=2048)", 32768) == pytest.approx([6.2, 5.6], abs=0.05)
    assert ratios("lserve(budget=2048)", 131072) == pytest.approx([21, 17], abs=0.5)
    assert ratios("quest", 32768) == pytest.approx([4.5, 4.5], abs=0.05)
    assert ratios("quest", 131072) == pytest.approx([13, 9], abs=0.5)


def test_what_the_choice_takes() -> None:
    for length in (32768, 131072):
        for dtype in ("float32", "bfloat16"):
            quest = row("quest", length, dtype)
            assert 0.5 < quest["planning_share"] < 0.69
            apart = row("quest(per_query_head=true)", length, dtype)
            assert 1.25 < apart["median_s"] / quest["median_s"] < 1.85
    for dtype, times in (("float32", 2), ("bfloat16", 4)):
        quest, dense = row("quest", 131072, dtype), row("dense", 131072, dtype)
        tokens = dense["bytes"] * quest["density"]
        assert (quest["bytes"] - tokens) / tokens == pytest.approx(times, rel=0.02)


def test_what_choices_lose() -> None:
    rows = [row for row in json.loads(FOUND.read_text())["rows"] if row["section"] == "model"]
    assert {(row["model"], row["length"], row["texts"]) for row in rows} == {("reference", 4096, 3)}
    lost = {row["method"]: row["kl"] for row in rows}
    assert lost["quest(budget=128)"] == pytest.approx(0.006, abs=0.0005)
    assert 6.5 < lost["quest(budget=128)"] / lost["oracle_topk(budget=128)"] < 7.6
    assert lost["quest(budget=512)"] < 0.0005
    assert all(0.65 < lost[f"lserve(budget={budget})"] < 1.55 for budget in (128, 256, 512, 1024))


def test_how_much_faster_a_file_is_read_in_part() -> None:
    found = json.loads((ZEN / "tiers.json").read_text())
    rows = {row["method"]: row for row in found["rows"]}
    ratios = [rows[name]["ratio"] for name in ("infllm(local=2048)", "quest(budget=2048)", "lserve(budget=2048)")]
    assert ratios == pytest.approx([29, 14, 34], abs=0.5)
    held = [row["memory_bytes"] / rows["memory"]["memory_bytes"] for row in rows.values() if row["method"] != "memory"]
    assert all(share < 0.19 for share in held)
    assert rows["quest(budget=2048)"]["density"] / rows["infllm(local=2048)"]["density"] == pytest.approx(0.5, abs=0.03)


def test_steps_on_zen_3() -> None:
    found = [
        row("lserve(budget=2048)", n, dtype, ZEN / "decoding.json")
        for n in (32768, 131072)
        for dtype in ("float32", "bfloat16")
    ]
    assert [one["ratio"] for one in found[:2]] == pytest.approx([7.3, 5.4], abs=0.05)
    assert [one["ratio"] for one in found[2:]] == pytest.approx([18, 14], abs=0.5)
    assert all(0.36 <= one["planning_share"] <= 0.4 for one in found[:2])


def test_steps_on_zen_5() -> None:
    found = [
        row("lserve(budget=2048)", n, dtype, ZEN_5 / "decoding.json")["ratio"]
        for n in (32768, 131072)
        for dtype in ("float32", "bfloat16")
    ]
    assert found[:2] == pytest.approx([8.3, 7.9], abs=0.05)
    assert found[2:] == pytest.approx([21, 19], abs=0.5)


def test_tokens_of_a_model() -> None:
    for machine, dense in ((ZEN, 1.9), (ZEN_5, 2.1)):
        every = json.loads((machine / "decoding.json").read_text())["rows"]
        rows = {one["method"]: one for one in every if one["section"] == "tokens"}
        assert {(one["model"], one["length"]) for one in rows.values()} == {("qwen", 32768)}
        assert rows["dense"]["ratio"] == pytest.approx(dense, abs=0.06)
        assert all(2.15 < one["ratio"] < 2.55 for name, one in rows.items() if name not in ("sdpa", "dense"))


def test_what_caches_lose_and_take() -> None:
    found = json.loads((ZEN / "caches.json").read_text())
    lost = {one["cache"]: one for one in found["rows"]}
    assert {one["model"] for one in lost.values()} == {"smollm2"}
    assert lost["int8"]["kl"] < 0.0002
    assert (lost["kivi(bits=4)"]["kl"], lost["kivi(bits=4)"]["share"]) == pytest.approx((0.003, 0.2), rel=0.03)
    assert lost["snapkv(budget=1024)"]["kl"] == pytest.approx(0.014, abs=0.0005)
    most = [
        lost[name]["kl"]
        for name in ("kivi(bits=2)", "snapkv(budget=256)", "pyramidkv(budget=256)", "streaming_llm(recent=252)")
    ]
    assert 0.13 < min(most) < max(most) < 0.26
    for machine, bounds in ((ZEN, (0.76, 0.93, 0.58, 0.75)), (ZEN_5, (1.08, 1.43, 0.92, 1.05))):
        every = json.loads((machine / "caches.json").read_text())["steps"]
        coded = [one for one in every if one["length"] == 32768 and one["cache"] != "keep"]
        both = [[one["ratio"] for one in coded if one["dtype"] == dtype] for dtype in ("float32", "bfloat16")]
        assert [end(ratios) for ratios in both for end in (min, max)] == pytest.approx(bounds, abs=0.006)
    sparse = {one["dtype"]: one for one in coded if one["cache"] == "mustafar"}
    said = {"float32": (0.34, 1.17), "bfloat16": (0.37, 0.94)}
    assert {name: (one["share"], one["ratio"]) for name, one in sparse.items()} == {
        name: pytest.approx(pair, abs=0.006) for name, pair in said.items()
    }


def compared(model: str, length: int, machine: Path = ZEN) -> dict[str, dict[str, Any]]:
    """What steps of a pretrained model lost, by method."""
    rows = [one for one in json.loads((machine / "decoding.json").read_text())["rows"] if one["section"] == "model"]
    return {one["method"]: one for one in rows if (one["model"], one["length"]) == (model, length)}


def test_what_choices_lose_on_smollm2() -> None:
    found = compared("smollm2", 4096, ZEN_5)
    assert {(one["texts"], one["steps"]) for one in found.values()} == {(4, 32)}
    said = {
        "oracle_topk(budget=256)": 0.006,
        "quest(budget=256)": 0.26,
        "quest(budget=512)": 0.10,
        "lserve(budget=512)": 0.21,
        "retro_infer(least=1024,probe=0.072)": 0.012,
        "magicpig": 0.024,
        "double_sparsity(budget=256)": 0.40,
        "double_sparsity(budget=256,group_factor=2)": 0.014,
    }
    assert {name: found[name]["kl"] for name in said} == pytest.approx(said, rel=0.03)
    assert all(0.1 < found[name]["read"] < 0.126 for name in said if "512" not in name)
    shares = {name: statistics.fmean(one["found"]) for name, one in found.items() if "found" in one}
    assert (shares["quest(budget=256)"], shares["quest(budget=512)"]) == pytest.approx((0.36, 0.43), abs=0.006)
    of_labels = [shares[f"double_sparsity(budget=256{more})"] for more in ("", ",group_factor=2")]
    assert of_labels == pytest.approx([0.47, 0.70], abs=0.006)
    for one in found.values():
        if "found" in one:
            assert statistics.fmean(one["found"][-8:]) > statistics.fmean(one["found"][:8]) - 0.03


def test_what_choices_lose_on_qwen() -> None:
    found = compared("qwen2.5-coder-0.5b", 8192)
    assert {(one["texts"], one["steps"]) for one in found.values()} == {(2, 32)}
    said = {
        "oracle_topk(budget=1024)": 0.003,
        "quest(budget=1024)": 0.14,
        "infllm(blocks=4,local=512)": 0.16,
        "lserve(budget=1024)": 0.23,
        "retro_infer(least=1024,probe=0.072)": 0.013,
        "magicpig": 0.063,
        "double_sparsity(budget=1024)": 0.57,
    }
    assert {name: found[name]["kl"] for name in said} == pytest.approx(said, rel=0.04)
    short = compared("qwen2.5-coder-0.5b", 2048)
    said = {"double_sparsity(budget=128,bits=4,group_factor=2)": 0.029, "oracle_topk(budget=128)": 0.014}
    assert {name: short[name]["kl"] for name in said} == pytest.approx(said, abs=0.0005)
    assert short["quest(budget=128)"]["kl"] == pytest.approx(0.26, abs=0.003)


def test_what_choices_answer_on_the_reference_model() -> None:
    rows = {
        row.method.removeprefix("dense+"): row for row in summary_rows(read_results(ZEN / "decoding_reference.jsonl"))
    }
    assert {(row.length, row.samples) for row in rows.values()} == {(16384, 8)}
    accuracy = {name: row.accuracy or 0.0 for name, row in rows.items()}
    dense = accuracy["dense"]
    same = "quest(budget=256)", "oracle_topk(budget=256)", "retro_infer(probe=0.05,segment=2048,least=1,update=256)"
    assert [accuracy[name] for name in same] == pytest.approx([dense] * 3)
    assert accuracy["double_sparsity(budget=256)"] == pytest.approx(dense, abs=0.02)
    assert rows[same[2]].read == pytest.approx(0.066, abs=0.0005)
    assert all(accuracy[f"lserve(budget={budget})"] < 0.56 * dense for budget in (256, 1024))
    assert accuracy["infllm(blocks=8,block=64,init=64,local=448)"] < 0.03


def answered(file: str) -> dict[str, SummaryRow]:
    """What a pretrained model answered, by what its steps read."""
    rows = summary_rows(read_results(ZEN_5 / file))
    assert len({(row.length, row.samples) for row in rows}) == 1
    return {row.method.partition("+")[2]: row for row in rows}


def test_what_choices_answer_on_smollm2() -> None:
    rows = answered("decoding_smollm2.jsonl")
    said = {
        "": 0.58,
        "oracle_topk(budget=256)": 0.60,
        "double_sparsity(budget=512,group_factor=2)": 0.62,
        "quest(budget=512)": 0.17,
        "lserve(budget=512)": 0.06,
        "magicpig(buffer=64)": 0.40,
        "retro_infer(probe=0.05,segment=2048,least=1,update=256)": 0.25,
    }
    assert {name: rows[name].accuracy for name in said} == {
        name: pytest.approx(x, abs=0.006) for name, x in said.items()
    }
    shares = {name: (row.step_bytes or 0) / (row.cache_bytes or 1) for name, row in rows.items() if name}
    assert shares["double_sparsity(budget=512,group_factor=2)"] == pytest.approx(0.256, abs=0.01)
    assert shares["retro_infer(probe=0.05,segment=2048,least=1,update=256)"] == pytest.approx(0.128, abs=0.01)
    assert shares["magicpig(buffer=64)"] > 1.1


def test_what_choices_answer_on_qwen() -> None:
    rows = answered("decoding_qwen.jsonl")
    assert {(row.length, row.samples) for row in rows.values()} == {(8192, 6)}
    tasks = {name: [row.tasks[task][0] for task in sorted(row.tasks, reverse=True)] for name, row in rows.items()}
    same = "oracle_topk(budget=512)", "double_sparsity(budget=1024,group_factor=2)"
    assert [tasks[name] for name in same] == [tasks[""]] * 2
    said = {
        "quest(budget=1024)": [0.92, 0.0],
        "retro_infer(probe=0.05,segment=2048,least=1,update=256)": [0.92, 0.33],
        "magicpig(buffer=64)": [0.58, 0.33],
        "lserve(budget=1024)": [0.67, 0.0],
    }
    assert {name: tasks[name] for name in said} == {name: pytest.approx(x, abs=0.006) for name, x in said.items()}
