"""examples/character_model.py trains each kind of attention on the same samples, and says what each reads."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def test_the_example_prints_a_table_and_writes_its_trainings(monkeypatch: Any, tmp_path: Path, capsys: Any) -> None:
    example, out = script("examples/character_model.py"), tmp_path / "found.json"
    monkeypatch.setattr(example, "TOKENS", 32)
    monkeypatch.setattr(example, "BATCH", 2)
    monkeypatch.setattr(example, "HELD_OUT", 2)
    monkeypatch.setattr(example, "characters", lambda: torch.arange(4000) * 7 % 128)
    given = ["character_model.py", "--steps", "2", "--seeds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", [*given, "--kinds", "dense,fixed(8),combiner(8)"])
    assert example.main() == 0
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in shown] == ["attention", "dense", "fixed(8)", "combiner(8)"]
    assert [line.split()[-2] for line in shown[2:]] == ["36%", "36%"]
    rows = json.loads(out.read_text())["rows"]
    assert [(row["kind"], row["seed"]) for row in rows[:4]] == [
        *(("dense", 0), ("fixed(8)", 0), ("combiner(8)", 0), ("dense", 1)),
    ]
    assert all(0 < row["bits"] < 20 for row in rows)


def test_routing_stands_beside_local_heads_of_the_same_number() -> None:
    kinds = script("examples/character_model.py").KINDS.split(",")
    assert kinds.index("convolution(3)+routing(32)") == kinds.index("convolution(3)+window_heads(32)") + 1


def test_training_lowers_the_loss(monkeypatch: Any) -> None:
    example = script("examples/character_model.py")
    monkeypatch.setattr(example, "TOKENS", 16)
    text = torch.arange(2000) % 5
    few, many = (example.trained("window(4)", text, text, steps, 0)["bits"] for steps in (1, 40))
    assert many < 0.7 * few


def test_the_repositorys_text_is_long_enough() -> None:
    example = script("examples/character_model.py")
    text = example.characters()
    assert len(text) > 100 * example.TOKENS
    assert int(text.max()) < example.CHARACTERS
