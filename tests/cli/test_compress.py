"""``gossamer compress`` on a tiny random model: a folder that commands load, a card, and one line for bad input."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

FEW = ("--samples", 2, "--length", 64, "--windows", 2, "--tasks", "none", "--no-times")
Refused = Callable[..., str]


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    path = tmp_path / "held_out.txt"
    path.write_text(" ".join(f"w{i * i % 89}" for i in range(400)))
    return path


def compress(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[Any, str]:
    assert main(["compress", *map(str, argv), "--json"]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out), captured.err


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_model_is_compressed_and_its_card_says_what_that_cost(capsys, model_path, text, held_out, tmp_path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import gossamer.compressed  # noqa: F401

    out = tmp_path / "small"
    measured = ["--held-out", held_out, "--windows", 2, "--tasks", "passkey", "--limit", 2, "--task-length", 256]
    measured += ["--lengths", "32,64", "--rounds", 2]
    options = ["--recipe", "sparsegpt", "--pattern", "2:4", "--set", "block=16", "--samples", 2, "--length", 64]
    data, err = compress(capsys, model_path, "-o", out, "--calibrate", text, *options, *measured)
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md", "card.json"} <= set(names(out))
    assert names(tmp_path) == ["held_out.txt", "small", "text.txt"]
    assert f"{out}: compressed by sparsegpt; its card is {out / 'README.md'}" in err
    assert data["recipe"] == {"recipe": "sparsegpt", "pattern": "2:4", "damp": 0.01, "block": 16, "bits": None}
    card = data["card"]
    assert card == json.loads((out / "card.json").read_text())
    assert card["predictions"]["tokens"] == 2 * 63
    assert card["predictions"]["kl"][0] > 0
    assert [task["task"] for task in card["tasks"]] == ["passkey"]
    assert [time["length"] for time in card["times"]] == [32, 64]
    assert card["size"]["files"] == [
        sum(path.stat().st_size for path in folder.glob("*.safetensors")) for folder in (model_path, out)
    ]
    assert card["made"]["calibrated on"] == ["text.txt"]
    page = (out / "README.md").read_text()
    assert "`pattern=2:4`" in page
    assert "held\\_out.txt" in page

    model = AutoModelForCausalLM.from_pretrained(out)
    weight = model.model.layers[0].mlp.up_proj.weight
    assert bool(((weight.unflatten(-1, (-1, 4)) != 0).sum(-1) <= 2).all())
    assert AutoTokenizer.from_pretrained(out)("w1 w2")["input_ids"] == [3, 4]


@pytest.mark.parametrize("recipe", ["billm", "int8"])
def test_recipes_written_in_another_dtype(capsys, model_path, text, held_out, tmp_path, recipe) -> None:
    out = tmp_path / "small"
    argv = [model_path, "-o", out, "--calibrate", text, "--recipe", recipe, *FEW, "--held-out", held_out]
    data, _ = compress(capsys, *argv, "--dtype", "bfloat16")
    assert data["card"]["dtypes"] == ["float32", "bfloat16"]
    assert data["card"]["recipe"]["recipe"] == recipe
    assert data["card"]["predictions"]["kl"][0] > 0
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_table_without_json(capsys, model_path, text, held_out, tmp_path) -> None:
    argv = ["compress", model_path, "-o", tmp_path / "a", "--calibrate", text, "--recipe", "rounded", *FEW]
    assert main([str(part) for part in (*argv, "--held-out", held_out)]) == 0
    out = capsys.readouterr().out
    assert "KL divergence from the original, nats" in out
    assert "bits of one of their weights" in out


def test_without_a_card(capsys, model_path, text, tmp_path) -> None:
    out = tmp_path / "small"
    options = ["--recipe", "int8", "--samples", 1, "--length", 64, "--no-card"]
    data, err = compress(capsys, model_path, "-o", out, "--calibrate", text, *options)
    assert data["card"] is None
    assert err.endswith("compressed by int8\n")
    assert not {"README.md", "card.json"} & set(names(out))


def test_lines_of_json_calibrate(capsys, model_path, text, tmp_path) -> None:
    lines = tmp_path / "lines.jsonl"
    words = text.read_text().split()
    rows = [{"text": " ".join(words[:300]), "more": 1}, {"text": " ".join(words[300:])}]
    lines.write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    options = ["--recipe", "sparsegpt", "--samples", 2, "--length", 64, "--no-card"]
    for name, file in (("lines", lines), ("plain", text)):
        compress(capsys, model_path, "-o", tmp_path / name, "--calibrate", file, *options)
    one, other = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("lines", "plain"))
    assert one == other


@pytest.fixture
def small(capsys, model_path, text, tmp_path) -> Path:
    out = tmp_path / "small"
    options = ["--recipe", "int8", "--samples", 1, "--length", 64, "--no-card"]
    compress(capsys, model_path, "-o", out, "--calibrate", text, *options)
    return out


def test_other_commands_load_it(capsys, small, prompt_file, held_out, tmp_path) -> None:
    results = tmp_path / "r.jsonl"
    sparse, fields = "a_shape(sink=4,window=64)", ["--set", "sink=4", "--set", "window=64"]
    always, loss = ["--min-tokens", 0], ["--tasks", "perplexity", "--text", held_out, "--lengths", 128]
    commands = [
        ["run", small, prompt_file, "--method", "a_shape", *fields, *always, "--max-new-tokens", 2],
        ["eval", small, "--methods", f"dense,{sparse}", *loss, "--limit", 1, *always, "--out", results],
        ["doctor", small],
    ]
    for argv in commands:
        assert main([str(part) for part in (*argv, "--json")]) == 0, (argv[0], capsys.readouterr().err)
        found = json.loads(capsys.readouterr().out)
        assert argv[0] != "run" or 0 < found["density"] < 1
        assert argv[0] != "doctor" or found["model"]["ok"]
    lines = [json.loads(line) for line in results.read_text().splitlines()[1:]]
    assert [line["kind"] for line in lines] == ["perplexity", "perplexity"]
    assert lines[0]["nats"] != lines[1]["nats"]


def test_commands_that_take_a_model_load_it_by_one_function() -> None:
    """Which imports what transformers has to know of compressed layers."""
    folder = Path(str(sys.modules["gossamer.cli"].__file__)).parent
    users = [path.name for path in folder.glob("*.py") if "AutoModelForCausalLM.from_pretrained" in path.read_text()]
    assert users == ["pretrained.py"]  # which reads GGUF files
    assert 'import_module("gossamer.compressed")' in (folder / "generation.py").read_text()


@pytest.mark.slow
def test_a_new_process_loads_it(small, prompt_file) -> None:
    command = [sys.executable, "-m", "gossamer", "run", str(small), str(prompt_file), "--max-new-tokens", "1", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["tokens"]) == 1


def test_a_folder_that_is_there_is_kept_or_replaced_whole(capsys, refused: Refused, model_path, text, tmp_path) -> None:
    out = tmp_path / "small"
    out.mkdir()
    argv = [model_path, "-o", out, "--calibrate", text, "--recipe", "int8", "--samples", 1, "--length", 64, "--no-card"]
    compress(capsys, *argv)  # an empty one is as good as none
    (out / "more.txt").write_text("")
    assert "add --overwrite" in refused("compress", *argv)
    assert (out / "more.txt").exists()
    compress(capsys, *argv, "--overwrite")
    assert "more.txt" not in names(out)
    assert names(tmp_path) == ["small", "text.txt"]

    other = tmp_path / "other"
    other.mkdir()
    (other / "letter.txt").write_text("")
    argv[2] = other
    assert "holds no model" in refused("compress", *argv, "--overwrite")
    argv[2] = text
    assert "is no folder" in refused("compress", *argv, "--overwrite")
    argv[2] = tmp_path / "link"
    argv[2].symlink_to(out)
    assert "is no folder" in refused("compress", *argv, "--overwrite")
    copy = tmp_path / "models" / "one"
    shutil.copytree(model_path, copy)
    for place in (copy, copy.parent):
        argv[0], argv[2] = copy, place
        assert "holds the model that is to be compressed" in refused("compress", *argv, "--overwrite")
    argv[2] = tmp_path / "no" / "small"
    assert "cannot write into" in refused("compress", *argv)


@pytest.mark.parametrize("where", ["compressed.model.compress", "compressed.cards.card", "cli.compress.write_whole"])
def test_what_is_stopped_leaves_nothing(capsys, model_path, text, held_out, tmp_path, monkeypatch, where) -> None:
    out = tmp_path / "small"
    out.mkdir()
    (out / "config.json").write_text("{}")

    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    argv = ["compress", model_path, "-o", out, "--calibrate", text, "--recipe", "int8", "--overwrite", *FEW]
    monkeypatch.setattr(f"gossamer.{where}", stop)
    assert main([str(part) for part in (*argv, "--held-out", held_out)]) == 130
    assert names(tmp_path) == ["held_out.txt", "small", "text.txt"]
    assert names(out) == ["config.json"]


def test_bad_input_is_one_line(refused: Refused, model_path, text, held_out, small, tmp_path) -> None:
    def said(*more: object, recipe: str = "sparsegpt", model: Path = model_path, texts: object = text) -> str:
        argv = ["compress", model, "-o", tmp_path / "out", "--recipe", recipe, "--calibrate", texts, *FEW]
        return refused(*argv, "--held-out", held_out, *more)

    assert "a recipe is one of sparsegpt, magnitude, billm" in said(recipe="gptq")
    assert "got '5:4'" in said("--pattern", "5:4")
    assert "sparsegpt.block takes int, got 'x'" in said("--set", "block=x")
    assert "sparsegpt.damp must be a number above 0" in said("--set", "damp=-1")
    assert "int8 has no field pattern; it has outliers, share" in said("--pattern", "2:4", recipe="int8")
    assert "FIELD=VALUE" in said("--set", "block")
    assert "2:5 needs inputs in multiples of 5" in said("--pattern", "2:5", "--set", "block=5")
    assert "this model takes 1024 tokens, got a length of 2048; add --length 1024" in said("--length", 2048)
    assert "--samples must be at least 1, got 0" in said("--samples", 0)
    assert "--windows must be at least 1" in said("--windows", 0)
    assert "--seed must fit" in said("--seed", 2**63)
    assert "have 600 tokens, fewer than 700" in said("--length", 700)
    assert "7 windows of 64 take more" in said("--windows", 7)
    assert "also calibrates" in said("--held-out", text)
    assert "unknown task 'x'" in said("--tasks", "x")
    assert "lengths are given as" in said("--times", "--lengths", "many")
    assert "got a length of 2048" in said("--times", "--lengths", "2k")
    assert "at least 64" in said("--tasks", "passkey", "--task-length", 63)
    assert "cannot read" in said(texts=tmp_path / "none")
    assert "no such model" in said(model=tmp_path / "none")
    assert "compressed already" in said(model=small)
    assert "--device" in said("--device", "vax")
    lines = tmp_path / "lines.jsonl"
    for content, why in (
        ('{"text": "a"}\n{"text"', "line 2: it is not JSON"),
        ('{"texts": 1}', 'line 1: it has no "text"'),
    ):
        lines.write_text(content)
        assert why in said(texts=lines)
    assert "out" not in names(tmp_path)


def change(folder: Path, key: str, to: Callable[[torch.Tensor], torch.Tensor]) -> None:
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    state = load_file(file)
    name = next(name for name in state if name.endswith(key))
    state[name] = to(state[name])
    save_file(state, file, {"format": "pt"})


def test_damaged_folders_are_one_line(refused: Refused, model_path, small, prompt_file) -> None:
    def after(damage: Callable[[], object]) -> str:
        kept = (small / "model.safetensors").read_bytes(), (small / "config.json").read_text()
        damage()
        err = refused("run", small, prompt_file)
        (small / "model.safetensors").write_bytes(kept[0])
        (small / "config.json").write_text(kept[1])
        return err

    weights, config = small / "model.safetensors", small / "config.json"

    def configured(**fields: object) -> None:
        config.write_text(json.dumps(json.loads(config.read_text()) | fields))

    whole = weights.read_bytes()
    for part in (len(whole) // 2, len(whole) - 1, 7, 0):
        assert "no language model that transformers can load" in after(
            lambda part=part: weights.write_bytes(whole[:part])
        )
    for key in (".scale", "by_row"):
        assert "its scales are not above 0 and finite" in after(
            lambda key=key: change(small, key, lambda x: x * torch.nan)
        )
    assert "it lacks 42 tensors" in after(lambda: shutil.copy(model_path / "model.safetensors", weights))
    assert "no language model" in after(lambda: configured(intermediate_size=32))
    assert "no language model" in after(lambda: configured(num_hidden_layers=1))
    assert "no language model" in after(lambda: configured(quantization_config={"quant_method": "gossamer"}))
    assert "that transformers can load" in after(lambda: configured(quantization_config=3))
    assert "NaN" in after(lambda: change(small, "input_layernorm.weight", lambda x: x * torch.nan))
