"""The benchmark of calibrated profiles: what it lays over other models, and the means that it prints."""

from __future__ import annotations

import hashlib
import json
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
from repository import ROOT

from gossamer.calibrate.candidates import METHODS, candidates
from gossamer.cli.specs import parse_method
from gossamer.evaluate.haystack import load_haystack
from gossamer.methods import AShape
from gossamer.profiles import Profile


def test_a_profile_of_another_model_is_laid_over_by_depth_and_order(script) -> None:
    profile = Profile([[AShape(layer, 1 + head) for head in range(4)] for layer in range(6)])
    laid = script("calibration").stretched(profile, 3, 2)
    assert [[(method.sink, method.window) for method in layer] for layer in laid.layers] == [
        [(0, 1), (0, 3)],
        [(2, 1), (2, 3)],
        [(4, 1), (4, 3)],
    ]


def point(mode: str, prompt: int, seconds: float, error: float) -> dict:
    figures = {"density": 0.5, "plan_s": 0.25 * seconds, "attend_s": 0.75 * seconds, "dense_s": 4.0, "error": error}
    return {"kind": "point", "direction": "first", "rival": "r", "mode": mode, "prompt": prompt} | figures


def test_ratios_are_taken_prompt_by_prompt(script, tmp_path: Path) -> None:
    lines = script("calibration_rows").Lines(tmp_path / "lines.jsonl", {"length": 64})
    for mode in ("rival", "global"):
        lines.add({"kind": "setting", "direction": "first", "rival": "r", "mode": mode, "budget": None})
    for prompt, (theirs, mine) in enumerate([(0.4, 0.1), (0.1, 0.1)]):
        lines.add(point("rival", prompt, 1.0, theirs))
        lines.add(point("global", prompt, 2.0, mine))
    rival, mine = script("calibration_rows").summary(lines)
    assert rival["time"] == pytest.approx([0.25, 0.25, 0.25, 2])
    assert mine["time over the rival's"] == pytest.approx([2, 2, 2, 2])
    assert mine["error over the rival's"][0] == pytest.approx((0.25 + 1.0) / 2)
    assert rival["error"][0] == pytest.approx(0.25)
    assert "kl" not in mine


def test_lines_go_on_only_with_the_same(script, tmp_path: Path) -> None:
    rows = script("calibration_rows")
    rows.Lines(tmp_path / "lines.jsonl", {"length": 64}).add({"kind": "setting", "direction": "first"})
    again = rows.Lines(tmp_path / "lines.jsonl", {"length": 64})
    assert len(again.find(kind="setting")) == 1
    with pytest.raises(SystemExit, match="another length; give another --out"):
        rows.Lines(tmp_path / "lines.jsonl", {"length": 65})
    (tmp_path / "other.jsonl").write_text('{"kind": "point"}\n')
    with pytest.raises(SystemExit, match="something else"):
        rows.Lines(tmp_path / "other.jsonl", {"length": 64})


def test_what_a_file_does_not_say_of_its_texts_is_unknown_and_stays_so(script, tmp_path: Path) -> None:
    rows, path = script("calibration_rows"), tmp_path / "lines.jsonl"
    rows.Lines(path, {"first": ["prose"]}).add({"kind": "setting"})
    before = path.read_bytes()
    assert len(rows.Lines(path, {"first": ["prose"], "first_sha256": ["ab"]}).find(kind="setting")) == 1
    assert path.read_bytes() == before
    rows.Lines(tmp_path / "new.jsonl", {"first": ["prose"], "first_sha256": ["ab"]})
    with pytest.raises(SystemExit, match="another first_sha256"):
        rows.Lines(tmp_path / "new.jsonl", {"first": ["prose"], "first_sha256": ["cd"]})


def test_kinds_are_told_by_what_their_texts_hold(script, tmp_path: Path) -> None:
    for name, text in (("a.md", "one " * 30), ("b.md", "two")):
        (tmp_path / name).write_text(text)
    both = f"{tmp_path}/a.md+{tmp_path}/b.md"
    found = script("calibration").kinds(Namespace(first=both, second="package,needle_multikey(turns=2)"))
    assert found["first"] == ["prose"]
    assert found["first_sha256"] == [hashlib.sha256(b"one " * 30 + b"\n\ntwo").hexdigest()]
    assert found["second"] == ["code", "needle_multikey(turns=2)"]
    assert found["second_sha256"] == [load_haystack().sha256, "needle_multikey(turns=2)"]


def test_the_page_says_which_texts_where_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"model": {"name": "m", "dtype": "bfloat16"}, "length": 64, "samples": 1, "rows": []}
    found |= {"first": ["prose"], "second": ["code", "needle_single"]}
    monkeypatch.syspath_prepend(ROOT / "docs")
    calibration_table = import_module("calibration_tables").calibration_table
    above, _, _ = calibration_table(found)
    assert "SHA-256" not in above
    above, _, _ = calibration_table(
        found | {"first_sha256": ["ab" * 32], "second_sha256": ["cd" * 32, "needle_single"]}
    )
    assert above.endswith("SHA-256 of the texts: prose `abababababab`, code `cdcdcdcdcdcd`.")


def test_memory_is_measured_on_the_shape_of_a_model_of_8b(script) -> None:
    memory = script("calibration_memory")
    assert memory.weights(memory.config(memory.LAYERS, memory.VOCABULARY, 64)) == 2 * 8_030_261_248
    tried = [parse_method(spec) for spec in memory.LARGEST]
    assert set(tried) <= set(candidates())
    assert [method.name for method in tried] == list(METHODS)
    for path in (ROOT / "benchmarks" / "results").glob("*/calibrate_memory.json"):
        found = json.loads(path.read_text())
        assert found["length"] == 32_768
        assert found["whole_gib"] <= 20


EMERALD, ICE = "intel-xeon-emerald-rapids-2-cores-amx", "intel-xeon-ice-lake-2-cores-avx512"


def held(model: str, rival: str, mode: str, figure: str, machine: str = EMERALD) -> list[float]:
    """Means of both directions."""
    path = ROOT / "benchmarks" / "results" / machine / f"calibration_{model}.json"
    rows = json.loads(path.read_text())["rows"]
    return [row[figure][0] for row in rows if row["mode"] == mode and row["rival"].startswith(rival)]


SMALL, LARGE = (f"vertical_slash(vertical_size={a},slash_size={b})" for a, b in ((500, 700), (1000, 6096)))


def test_what_the_page_says_of_searched_budgets() -> None:
    for model, rival in (("smollm2", "qwen2.5_7b"), ("qwen", "qwen2.5_7b"), ("qwen", "llama3.1_8b")):
        shared = held(model, rival, "global", "error over the rival's")
        least, most = (0.065, 0.155) if rival == "qwen2.5_7b" else (0.265, 0.275)
        assert all(least < error < most for error in shared)
        assert all(0.9 <= time < 1.055 for time in held(model, rival, "global", "time over the rival's"))
        assert all(0.2 < error < 0.465 for error in held(model, rival, "fixed", "error over the rival's"))
        assert all(0.845 < time < 0.985 for time in held(model, rival, "fixed", "time over the rival's"))
    assert held("smollm2", "qwen2.5_7b", "global", "kl over the rival's") == pytest.approx([1 / 70, 1 / 70], abs=0.001)


def test_what_the_page_says_of_small_budgets() -> None:
    for model in ("smollm2", "qwen"):
        assert all(0.805 < error < 0.935 for error in held(model, SMALL, "global", "error over the rival's"))
        assert all(0.855 < time < 0.945 for time in held(model, SMALL, "global", "time over the rival's"))
    assert all(0.32 < kl < 0.44 for kl in held("smollm2", SMALL, "global", "kl over the rival's"))


def test_what_the_page_says_of_the_reference_model() -> None:
    assert held("reference", LARGE, "global", "error over the rival's") == pytest.approx([0.39, 0.49], abs=0.006)
    assert held("reference", LARGE, "global", "time over the rival's") == pytest.approx([1.13, 0.80], abs=0.006)
    assert held("reference", SMALL, "global", "error over the rival's") == pytest.approx([0.90, 0.86], abs=0.006)
    assert held("reference", SMALL, "global", "time over the rival's") == pytest.approx([0.90, 1.04], abs=0.006)
    assert not held("reference", SMALL, "fixed", "error over the rival's")


def test_what_the_page_says_of_answers() -> None:
    assert held("reference", SMALL, "dense", "score") == pytest.approx([0.91], abs=0.005)
    assert held("reference", SMALL, "rival", "score") == pytest.approx([0.91, 0.91], abs=0.005)
    assert held("reference", SMALL, "global", "score") == pytest.approx([0.13, 0.13], abs=0.005)


def test_what_the_page_says_of_last_queries() -> None:
    def found(rival: str, mode: str, figure: str) -> list[float]:
        return held("reference", rival, mode, figure, ICE)

    assert [found(SMALL, mode, "score") for mode in ("dense", "rival", "asked")] == [[1.0], [1.0, 1.0], [1.0, 1.0]]
    assert found(SMALL, "global", "score") == pytest.approx([0.19, 0.22], abs=0.005)
    for mode in ("global", "asked"):
        assert all(time < 1.005 for time in found(SMALL, mode, "time over the rival's"))
        assert all(error < 1 for error in found(SMALL, mode, "error over the rival's"))
        assert all(0.995 < time < 1.045 for time in found(LARGE, mode, "time over the rival's"))
        assert all(0.105 < error < 0.175 for error in found(LARGE, mode, "error over the rival's"))
        assert all(kl < 0.0015 for kl in found(LARGE, mode, "kl over the rival's"))
    assert all(kl < 0.4 for kl in found(SMALL, "global", "kl over the rival's"))
    assert found(SMALL, "asked", "kl over the rival's") == pytest.approx([0.83, 0.76], abs=0.005)
    assert found(SMALL, "rival", "last kl") == pytest.approx([0.033, 0.036], abs=0.0005)
    assert found(SMALL, "asked", "last kl") == pytest.approx([0.022, 0.028], abs=0.0005)
    assert found(LARGE, "fixed", "time over the rival's") == pytest.approx([0.78, 0.77], abs=0.005)
    assert found(LARGE, "fixed", "error over the rival's") == pytest.approx([0.62, 0.36], abs=0.005)
    assert found(LARGE, "rival", "time") == pytest.approx([0.5, 0.5], abs=0.01)


def test_what_the_page_says_of_last_queries_on_smollm2() -> None:
    def found(mode: str, figure: str) -> float:
        (mean,) = held("smollm2", SMALL, mode, figure, ICE)
        return mean

    assert [found(mode, "error over the rival's") for mode in ("asked", "global")] == pytest.approx(
        [0.77, 0.76], abs=0.005
    )
    assert [found(mode, "kl over the rival's") for mode in ("asked", "global")] == pytest.approx(
        [0.38, 0.34], abs=0.005
    )
    assert [found(mode, "last kl") for mode in ("asked", "global", "rival")] == pytest.approx(
        [0.06, 0.14, 0.05], abs=0.005
    )
    assert all(0.98 < found(mode, "time over the rival's") < 1.015 for mode in ("asked", "global"))
    scores = [8 * found(mode, "score") for mode in ("dense", "asked", "rival", "global")]
    assert scores == pytest.approx([7, 5, 5, 3])


def test_what_the_page_says_of_last_queries_on_qwen() -> None:
    def found(figure: str, *modes: str) -> list[float]:
        return [held("qwen", SMALL, mode, figure, ICE)[0] for mode in modes]

    assert found("error over the rival's", "asked", "global") == pytest.approx([0.90, 0.73], abs=0.005)
    assert found("kl over the rival's", "asked", "global") == pytest.approx([0.78, 0.19], abs=0.005)
    assert found("time over the rival's", "asked", "global") == pytest.approx([1.02, 1.06], abs=0.006)
    assert found("last kl", "asked", "global", "rival") == pytest.approx([0.08, 0.14, 0.05], abs=0.005)
    assert found("score", "dense", "rival", "asked", "global") == pytest.approx([0.80, 0.73, 0.57, 0.57], abs=0.005)
