"""``gossamer train-gates`` on a tiny random model: files that methods take, and one clear line for bad input."""

from __future__ import annotations

import json
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.methods.seer_gates import SeerGates
from gossamer.profiles import read_duo

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def train(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[Any, str]:
    assert main(["train-gates", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def test_gates_of_seer_are_trained_and_run(capsys, model_path, prompt_file, text, tmp_path) -> None:
    out = tmp_path / "gates.safetensors"
    options = ["--texts", text, "-o", out, "--steps", 4, "--length", 128, "--block", 32, "--rate", 0.01]
    data, err = train(capsys, model_path, *options)
    assert data["kind"] == "seer"
    assert data["steps"] == len(data["losses"]) == 4
    assert "step 4/4: loss" in err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates.safetensors", "text.txt"]
    gates = SeerGates.load(out)
    assert (len(gates.layers), gates.block) == (2, 32)
    assert gates.layers[0].keys.shape == (4, 24, 8)

    method = ["--method", "seer_attention", "--set", f"gates={out}", "--set", "threshold=0.3", "--set", "last_blocks=0"]
    argv = ["run", model_path, prompt_file, *method, "--min-tokens", 0, "--max-new-tokens", 1, "--json"]
    assert main([str(part) for part in argv]) == 0
    assert 0 < json.loads(capsys.readouterr().out)["density"] < 1


def test_what_was_stopped_goes_on(capsys, model_path, text, tmp_path, monkeypatch) -> None:
    out = tmp_path / "gates"
    options = [model_path, "--texts", text, "-o", out, "--steps", 4, "--length", 64, "--save-every", 2]
    with monkeypatch.context() as patch:
        patch.setattr("gossamer.methods.seer_gates.SeerGates.save", stop)
        assert main(["train-gates", *map(str, options)]) == 130
    assert (tmp_path / "gates.partial").exists()
    capsys.readouterr()
    data, err = train(capsys, *options)
    assert len(data["losses"]) == 4
    assert "step 3/4" in err
    assert "step 2/4" not in err
    assert not (tmp_path / "gates.partial").exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_bad_input_is_one_line(refused, model_path, text, tmp_path) -> None:
    out = tmp_path / "gates"
    argv = ["train-gates", model_path, "--texts", text, "-o", out]
    assert "--length 1024" in refused(*argv)
    assert "fewer than 1000" in refused(*argv, "--length", 1000)
    assert "--steps must be at least 1, got 0" in refused(*argv, "--steps", 0)
    assert "--length must be at least 64" in refused(*argv, "--length", 63)
    assert "--rate must be above 0" in refused(*argv, "--rate", 0)
    assert "--rate must be above 0" in refused(*argv, "--rate", "nan")
    assert "--block must be at least 1" in refused(*argv, "--block", 0)
    assert "--seed must fit" in refused(*argv, "--seed", 2**63)
    assert "cannot read" in refused("train-gates", model_path, "--texts", tmp_path / "none", "-o", out, "--length", 64)
    assert "is there already" in refused("train-gates", model_path, "--texts", text, "-o", text)
    assert "cannot write into" in refused("train-gates", model_path, "--texts", text, "-o", tmp_path / "no" / "gates")
    assert "no such model" in refused("train-gates", tmp_path / "none", "--texts", text, "-o", out)
    assert not out.exists()


def test_gates_of_duo_are_trained_and_run(capsys, model_path, prompt_file, text, tmp_path) -> None:
    out = tmp_path / "gates"
    options = ["--texts", text, "-o", out, "--kind", "duo", "--steps", 3, "--length", 128, "--rate", 0.2]
    few = ["--passkeys", 2, "--words", 4, "--sink", 4, "--recent", 16]
    data, _ = train(capsys, model_path, *options, *few)
    assert data["kind"] == "duo"
    assert len(data["losses"]) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gates", "text.txt"]
    method = read_duo(out)
    assert (method.sink, method.recent) == (4, 16)
    assert [len(layer) for layer in method.gates] == [2, 2]
    assert any(gate != 1.0 for layer in method.gates for gate in layer)

    fields = ["--set", f"gates=@{out}", "--set", "sink=4", "--set", "recent=16"]
    argv = ["run", model_path, prompt_file, "--method", "duo_attention", *fields]
    assert main([str(part) for part in (*argv, "--min-tokens", 0, "--max-new-tokens", 1, "--json")]) == 0
    assert 0.5 < json.loads(capsys.readouterr().out)["density"] < 0.7


def test_bad_options_of_duo_are_one_line(refused, model_path, text, tmp_path) -> None:
    argv = ["train-gates", model_path, "--texts", text, "-o", tmp_path / "gates", "--kind", "duo", "--length", 128]
    assert "10 passkeys of 32 words take" in refused(*argv)
    assert "1 to 10 passkeys, got 11" in refused(*argv, "--passkeys", 11)
    assert "--words must be at least 1" in refused(*argv, "--words", 0)
    assert "--recent must be at least 1" in refused(*argv, "--recent", 0)
    assert "--sink must be at least 0" in refused(*argv, "--sink", -1)
