"""The examples that train with zeros in weights run, and what the pages say of them is what was measured."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT, script

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
RESULTS = ROOT / "benchmarks" / "results"


def section(page: str, title: str) -> str:
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    return " ".join(text.partition(f"## {title}\n")[2].partition("\n## ")[0].split())


@pytest.fixture(scope="module")
def trained() -> dict[str, Any]:
    (path,) = sorted(RESULTS.glob("*/sparse_training.json"))
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def recovered() -> dict[str, Any]:
    (path,) = sorted(RESULTS.glob("*/recover_pruned.json"))
    return json.loads(path.read_text())


@pytest.fixture
def sparse_training(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The example on a text of a moment's length."""
    example = script("examples/sparse_training.py")
    for module in (example, sys.modules["character_model"]):
        monkeypatch.setattr(module, "TOKENS", 16)
    for name, value in {"BATCH": 2, "HELD_OUT": 2, "EVERY": 1}.items():
        monkeypatch.setattr(example, name, value)
    monkeypatch.setattr(example, "characters", lambda: torch.arange(2000) * 7 % 128)
    return example


def test_training_with_sparse_weights_runs_and_goes_on(sparse_training: Any, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "found.json"
    given = ["--steps", "2", "--seeds", "1", "--out", str(out)]
    sparse_training.main([*given, "--kinds", "dense,bdwp"])
    first = json.loads(out.read_text())["rows"]
    sparse_training.main(given)
    found = json.loads(out.read_text())
    assert found["rows"][:2] == first
    assert [row["kind"] for row in found["rows"]] == ["dense", "bdwp", *list(sparse_training.KINDS)[1:-1]]
    starts = {row["kind"]: row["curve"][0] for row in found["rows"]}
    assert starts["forward"] == starts["bdwp"] == starts["shared+decay"]  # same weights, same forward product
    assert [step for step, _ in first[0]["curve"]] == [0, 1, 2]
    lines = capsys.readouterr().out.splitlines()[-5:]
    assert [line.split()[-4:] for line in lines if line.startswith("bdwp")] == [["50%", "2", "of", "3"]]
    with pytest.raises(SystemExit, match="trainings of another steps"):
        sparse_training.main(["--steps", "3", "--out", str(out)])


def test_recovering_runs_and_reads_what_is_packed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    example, out = script("examples/recover_pruned.py"), tmp_path / "found.json"
    sizes: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}

    def dense_model() -> Any:
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()

    ids = np.arange(400, dtype=np.uint16) * 3 % 40
    monkeypatch.setattr(example, "dense_model", dense_model)
    monkeypatch.setattr(example, "load_text", lambda folder: SimpleNamespace(train=ids, held_out=ids))
    for name, value in {"LENGTH": 12, "CALIBRATION": 2, "HELD_OUT": 2, "AT": (0, 1)}.items():
        monkeypatch.setattr(example, name, value)
    example.main(["--steps", "2", "--seeds", "1", "--out", str(out), "--work", str(tmp_path)])
    found = json.loads(out.read_text())
    assert [row["kind"] for row in found["rows"]] == list(example.KINDS)
    for row in found["rows"]:
        assert [point["step"] for point in row["curve"]] == [0, 1, 2]
        assert row["packed"] == {name: row["curve"][-1][name] for name in ("loss", "kl")}
        assert row["zeros"] == pytest.approx(int(row["kind"].split("-")[1]) / 100, abs=0.01)
        assert row["curve"][0]["kl"] > 0
    assert found["dense"]["kl"] == 0
    assert "sparsegpt-70" in capsys.readouterr().out


def test_settings_and_counts_are_those_of_the_example(trained: dict[str, Any]) -> None:
    example = script("examples/sparse_training.py")
    assert (trained["steps"], trained["batch"]) == (example.STEPS, example.BATCH)
    assert trained["macs"] == example.macs_of(trained["pattern"])
    assert {(row["kind"], row["seed"]) for row in trained["rows"]} == {
        (kind, seed) for kind in example.KINDS for seed in range(example.SEEDS)
    }
    assert all(row["bits"] == row["curve"][-1][1] for row in trained["rows"])


def test_pruned_models_are_those_of_the_example(recovered: dict[str, Any]) -> None:
    example = script("examples/recover_pruned.py")
    assert (recovered["steps"], recovered["rate"]) == (example.STEPS, example.RATE)
    assert {(row["kind"], row["seed"]) for row in recovered["rows"]} == {
        (kind, seed) for kind in example.KINDS for seed in range(example.SEEDS)
    }
    for row in recovered["rows"]:
        # Some weights of the model were 0 before.
        assert 0 <= row["zeros"] - int(row["kind"].split("-")[1]) / 100 < 0.01
        assert row["packed"]["loss"] == pytest.approx(row["curve"][-1]["loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("page", "title", "file", "make"),
    [
        ("compressing.md", "Recovering", "recovered", "recover_table"),
        ("training.md", "N:M in both directions", "trained", "sparse_training_table"),
    ],
)
def test_no_figure_of_a_section_is_from_elsewhere(page: str, title: str, file: str, make: str, request: Any) -> None:
    """Each number with a decimal point, and each share, is one that the table has."""
    script("docs/tables.py")
    above, header, rows = getattr(script("docs/weights_tables.py"), make)(request.getfixturevalue(file))
    assert all(len(row) == len(header) for row in rows)
    known = " ".join([above, *(str(cell) for row in rows for cell in row)])
    words = re.sub(r"\d{4}\.\d{5}|```.*?```|`[^`]*`", "", section(page, title))
    numbers = re.findall(r"\d+\.\d+|\d+%", words)
    assert numbers
    assert [number for number in numbers if number not in known] == []


def test_perplexities_are_of_the_mean_loss(recovered: dict[str, Any]) -> None:
    _, header, rows = script("docs/weights_tables.py").recover_table(recovered)
    for row in rows:
        losses = [float(cell) for name, cell in zip(header, row, strict=True) if name.startswith("after ")]
        for name, loss in (("perplexity before", losses[0]), ("after", losses[-1])):
            assert float(row[header.index(name)]) == pytest.approx(math.exp(loss), rel=2e-3)
