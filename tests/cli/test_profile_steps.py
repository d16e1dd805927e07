"""Profiles on the command line that say what decode steps read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer import Profile
from gossamer.cli import main
from gossamer.cli.specs import parse_policies
from gossamer.methods import AShape, Quest


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    Profile.uniform(2, 2, AShape(4, 8)).save(path)
    return path


def test_convert_puts_it_in_and_takes_it_out(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both, back = tmp_path / "both.json", tmp_path / "back.json"
    assert main(["profile", "convert", str(file), "-o", str(both), "--decode", "quest(budget=512)"]) == 0
    assert Profile.load(both).decode == Quest(budget=512)
    assert main(["profile", "show", str(both)]) == 0
    assert "decode: quest(budget=512)\n" in capsys.readouterr().out
    assert main(["profile", "diff", str(file), str(both)]) == 1
    assert "0 of 4 heads differ\ndecode: all and quest(budget=512)\n" in capsys.readouterr().out
    assert main(["profile", "diff", str(file), str(both), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["decode"] == ["all", "quest(budget=512)"]
    assert main(["profile", "convert", str(both), "-o", str(back), "--decode", "none"]) == 0
    assert json.loads(back.read_text()) == json.loads(file.read_text())
    assert main(["profile", "diff", str(file), str(back)]) == 0


def test_what_chooses_nothing_is_refused_and_nothing_written(file: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "out.json"
    assert main(["profile", "convert", str(file), "-o", str(out), "--decode", "a_shape"]) != 0
    assert "must be a method that chooses what a decode step reads, got a_shape" in capsys.readouterr().err
    assert not out.exists()


def test_a_profiles_steps_hold_until_others_are_asked_for(file: Path) -> None:
    from dataclasses import replace

    profile = replace(Profile.load(file), decode=Quest(budget=512))
    own = parse_policies("dense,per_head", None, profile, None)
    assert [policy.decode for policy in own] == [None, Quest(budget=512)]
    others = parse_policies("per_head", "none,quest(budget=64)", profile, None)
    assert [policy.decode for policy in others] == [None, Quest(budget=64)]
