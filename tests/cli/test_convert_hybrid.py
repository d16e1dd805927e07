"""``gossamer convert-hybrid`` on a tiny random model: a folder that runs by its profile, and one line for bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.cli import main
from gossamer.methods import AShape, Dense, LongGen
from gossamer.profiles import Profile

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")


def convert(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[Any, str]:
    assert main(["convert-hybrid", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def weights(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_a_model_is_converted_and_runs(capsys, model_path, prompt_file, tmp_path) -> None:
    out = tmp_path / "hybrid"
    options = ["--full-layers", "1/2", "--placement", "last", "--pattern", "longgen(recent=2,stride=4,block=16)"]
    data, err = convert(capsys, model_path, "-o", out, *options)
    assert data == {"out": str(out), "full_layers": [1], "steps": 0, "losses": []}
    assert f"full layers 1; run it with --profile {out / 'profile.json'}" in err
    assert [path.name for path in tmp_path.iterdir()] == ["hybrid"]
    profile = Profile.load(out / "profile.json")
    assert profile.layers[1] == (Dense(),) * 4
    assert profile.layers[0] == tuple(LongGen(1, 2, 4, head, 16) for head in range(4))
    before, after = weights(model_path), weights(out)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)

    argv = [
        "run",
        out,
        prompt_file,
        "--profile",
        out / "profile.json",
        "--min-tokens",
        0,
        "--max-new-tokens",
        1,
        "--json",
    ]
    assert main([str(part) for part in argv]) == 0
    found = json.loads(capsys.readouterr().out)
    assert 0.5 < found["density"] < 1
    assert found["dense_because"] == {"plan too dense to pay": 1}


def test_training_changes_the_weights_and_says_how_it_went(capsys, model_path, text, tmp_path) -> None:
    out = tmp_path / "hybrid"
    options = [
        "--texts",
        text,
        "--steps",
        6,
        "--length",
        128,
        "--rate",
        0.003,
        "--pattern",
        "a_shape(sink=4,window=16)",
    ]
    data, err = convert(capsys, model_path, "-o", out, "--placement", "0", *options)
    assert data["full_layers"] == [0]
    assert len(data["losses"]) == data["steps"] == 6
    assert data["losses"][-1] < data["losses"][0]
    assert "step 6/6: loss" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "text.txt"]
    assert Profile.load(out / "profile.json").layers[1] == (AShape(4, 16),) * 4
    before, after = weights(model_path), weights(out)
    assert not any(torch.equal(before[name], after[name]) for name in before)
    assert {weight.dtype for weight in after.values()} == {torch.float32}


def test_a_model_stays_in_its_dtype(capsys, model_path, text, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    half, out = tmp_path / "half", tmp_path / "hybrid"
    AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.bfloat16).save_pretrained(half)
    AutoTokenizer.from_pretrained(model_path).save_pretrained(half)
    convert(capsys, half, "-o", out, "--texts", text, "--steps", 1, "--length", 64, "--distil")
    assert {weight.dtype for weight in weights(out).values()} == {torch.bfloat16}


def test_what_was_stopped_goes_on(capsys, model_path, text, tmp_path, monkeypatch) -> None:
    out = tmp_path / "hybrid"
    options = [model_path, "-o", out, "--texts", text, "--steps", 4, "--length", 64, "--save-every", 2, "--distil"]
    with monkeypatch.context() as patch:
        patch.setattr("gossamer.calibrate.hybrid.save_hybrid", stop)
        assert main(["convert-hybrid", *map(str, options)]) == 130
    assert (tmp_path / "hybrid.partial").exists()
    assert not out.exists()
    capsys.readouterr()
    data, err = convert(capsys, *options)
    assert len(data["losses"]) == 4
    assert data["losses"][0] == pytest.approx(0, abs=1e-2)  # what it is distilled from is near
    assert "step 3/4" in err
    assert "step 2/4" not in err
    assert not (tmp_path / "hybrid.partial").exists()


def stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_bad_input_is_one_line(refused, model_path, text, tmp_path) -> None:
    out = tmp_path / "hybrid"
    argv = ["convert-hybrid", model_path, "-o", out]
    trained = [*argv, "--texts", text, "--length", 64]
    assert "--full-layers: full layers must be 0 to 2" in refused(*argv, "--full-layers", 3)
    assert "such as 12 or a share such as 1/3, got 'most'" in refused(*argv, "--full-layers", "most")
    assert "got '1/0'" in refused(*argv, "--full-layers", "1/0")
    assert "a share in [0, 1]" in refused(*argv, "--full-layers", "3/2")
    assert "leave --full-layers out" in refused(*argv, "--full-layers", 1, "--placement", "0")
    assert "this model has placement 0 to 1, got 2" in refused(*argv, "--placement", "2")
    assert "takes numbers and ranges" in refused(*argv, "--placement", "top")
    assert "unknown method 'none'" in refused(*argv, "--pattern", "none")
    assert "longgen.recent must be at least 1" in refused(*argv, "--pattern", "longgen(recent=0)")
    assert "for single heads, such as longgen or a_shape, got dense" in refused(*argv, "--pattern", "dense")
    assert "needs both --texts and --steps" in refused(*argv, "--steps", 4)
    assert "needs both --texts and --steps" in refused(*argv, "--texts", text, "--steps", 0)
    assert "--distil is a way of training" in refused(*argv, "--distil")
    assert "--length must be at least 64" in refused(*argv, "--texts", text, "--length", 63)
    assert "add --length 1024" in refused(*argv, "--texts", text)
    assert "fewer than 1000" in refused(*argv, "--texts", text, "--length", 1000)
    assert "--rate must be above 0" in refused(*trained, "--rate", "nan")
    assert "--seed must fit" in refused(*trained, "--seed", 2**63)
    assert "cannot read" in refused(*argv, "--texts", tmp_path / "none", "--length", 64)
    assert "is there already" in refused("convert-hybrid", model_path, "-o", text)
    assert "cannot write into" in refused("convert-hybrid", model_path, "-o", tmp_path / "no" / "hybrid")
    assert "no such model" in refused("convert-hybrid", tmp_path / "none", "-o", out)
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]
