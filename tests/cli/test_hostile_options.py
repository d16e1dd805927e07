"""Hostile names, options and environments, and models that are broken: one line on standard error and exit code 2."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from every_line import LINES, spoilt_everywhere

from gossamer.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

LONG = "x" * 300
devices = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text(text_of(LINES))
    return path


# Models


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("command", ["run", "inspect", "eval", "compare"])
def test_any_change_of_a_config_is_read_or_refused_in_one_line(
    command, refused, monkeypatch, model_path, prompt_file, tmp_path
) -> None:
    """Of what is read here: transformers answers for the rest. A folder without a tokenizer ends what is read well."""
    monkeypatch.chdir(tmp_path)
    whole = json.loads((model_path / "config.json").read_text())
    names = ("model_type", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")
    config = {"text_config": {name: whole[name] for name in names}} | {name: whole[name] for name in names}
    argv = [command, tmp_path, *([] if command in ("eval", "compare") else [prompt_file])]
    argv += ["--layers", "0", "--heads", "0"] if command == "inspect" else []
    refusals = 0
    for what, content in spoilt_everywhere(config):
        (tmp_path / "config.json").write_text(content)
        err = refused(*argv)
        refusals += "config.json" in err
        assert "config.json" in err or "no tokenizer" in err or "this model has" in err, (what, err)
    assert refusals > 100


def test_a_config_may_hold_infinity(refused, tmp_path, prompt_file) -> None:
    """Configs of transformers do: ``"time_step_limit": [0.0, Infinity]``."""
    (tmp_path / "config.json").write_text('{"model_type": "llama", "time_step_limit": [0.0, Infinity]}')
    assert "no tokenizer" in refused("run", tmp_path, prompt_file)


@pytest.mark.parametrize("command", ["run", "inspect", "eval", "compare"])
def test_models_with_names_that_are_none(command, refused, tmp_path) -> None:
    for name in (LONG, f"{LONG}/y", "a\0b"):
        assert "no such model" in refused(command, tmp_path / name)


@devices
@pytest.mark.parametrize("command", ["run", "inspect"])
def test_prompts_that_are_devices_or_have_names_that_are_none(command, refused, model_path, tmp_path) -> None:
    assert "it is a device" in refused(command, model_path, "/dev/zero")
    assert "File name too long" in refused(command, model_path, tmp_path / LONG)
    assert "null byte" in refused(command, model_path, "a\0b")


def test_standard_input_that_is_not_text(refused, model_path, monkeypatch, tmp_path) -> None:
    (tmp_path / "bytes").write_bytes(b"a \xff")
    for errors in ("strict", "surrogateescape"):
        with open(tmp_path / "bytes", encoding="utf-8", errors=errors) as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert "standard input is not UTF-8 text" in refused("run", model_path)


@pytest.fixture(params=["mlp.up_proj", "self_attn.q_proj"])
def broken_model(
    request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str], model_path: Path, tmp_path: Path
) -> tuple[Path, str]:
    """Its weights are NaN in one place; and where. One token alone has no use for queries."""
    from transformers import AutoModelForCausalLM

    path = tmp_path / "broken"
    shutil.copytree(model_path, path)
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad():
        model.get_parameter(name := f"model.layers.1.{request.param}.weight")[0, 0] = float("nan")
    model.save_pretrained(path)
    capsys.readouterr()
    return path, name


@pytest.mark.parametrize("command", ["run", "inspect", "eval", "compare", "doctor"])
def test_weights_that_are_not_numbers_are_said(command, refused, broken_model, prompt_file, tmp_path) -> None:
    more = {"run": [prompt_file], "inspect": [prompt_file, "--out", tmp_path / "heads"], "doctor": []}
    more["eval"] = ["--tasks", "perplexity", "--lengths", "64", "--limit", 1, "--out", tmp_path / "r.jsonl"]
    more["compare"] = ["--prompts", "text", "--lengths", "64", "--out", tmp_path / "r.jsonl"]
    path, name = broken_model
    err = refused(command, path, *more[command])
    assert f"predicts NaN: its weights hold NaN, {name} first" in err
    assert not (tmp_path / "r.jsonl").exists()
    assert not (tmp_path / "heads" / "heads.jsonl").exists()


# Environment and options


@pytest.mark.parametrize("command", ["run", "inspect", "eval", "compare"])
@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("GOSSAMER_BACKEND", "vax", "GOSSAMER_BACKEND='vax' is not known; use one of"),
        ("GOSSAMER_PLANNER", "flex", "GOSSAMER_PLANNER='flex' is not known; use one of"),
        ("GOSSAMER_CHECK", "yes", "GOSSAMER_CHECK='yes' is not known; use one of: 0, 1"),
        ("GOSSAMER_BACKEND", "triton", "GOSSAMER_BACKEND=triton cannot be used here: "),
        ("GOSSAMER_PLANNER", "triton", "GOSSAMER_PLANNER=triton cannot be used here: "),
        ("GOSSAMER_CPU_ISA", "vax", "GOSSAMER_CPU_ISA='vax' is not supported here; use one of"),
    ],
)
def test_what_the_environment_forces_must_run_here(
    command, variable, value, message, refused, model_path, monkeypatch, prompt_file, tmp_path
) -> None:
    from gossamer.backends import cpu

    if variable == "GOSSAMER_CPU_ISA" and not cpu.is_available():
        pytest.skip("no C++ kernels to choose from")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv(variable, value)
    assert message in refused(command, model_path, *([] if command in ("eval", "compare") else [prompt_file]))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--device", "meta"), "--device meta: its tensors have a shape and no numbers"),
        (("--device", "meta:0"), "--device meta"),
        (("--device", ""), "--device : "),
        (("--device", "warp"), "--device warp"),
        (("--limit", 100_000_000), "make 900,000,003 results, more than 1,000,000; ask for fewer samples (--limit)"),
        (("--fidelity", 10**30), "results, more than 1,000,000"),
        (("--seed", 10**400), "--seed must fit into 64 bits"),
        (("--lengths", "9" * 30), "at most 2147483647"),
        (("--lengths", "9" * 5000), "digits"),
        (("--turns", 10**9, "--tasks", "needle_single"), "turns"),
        (("--haystack", "/dev/zero"), "cannot read the haystack /dev/zero: it is a device"),
        (("--haystack", LONG), "File name too long"),
        (("--text", "/dev/zero", "--tasks", "perplexity"), "it is a device"),
        (("--out", "/dev/full"), "cannot write /dev/full: it is a device or a pipe, not a file; choose another --out"),
        (("--out", "/dev/null"), "it is a device or a pipe"),
        (("--out", LONG), "File name too long; choose another --out"),
        (("--out", f"{LONG}/r.jsonl"), "File name too long; choose another --out"),
        (("--out", "a\0b"), "null byte"),
    ],
)
@devices
def test_options_of_eval_that_cannot_be(argv, message, refused, model_path, monkeypatch, tmp_path) -> None:
    monkeypatch.chdir(tmp_path)
    given = ("--lengths", "64", *argv)
    assert message in refused("eval", model_path, *given)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--layers", "9" * 5000), "takes numbers and ranges"),
        (("--layers", "0-" + "9" * 18), "this model has layers 0 to 1"),
        (("--max-tokens", 1 - 10**30), "must be at least 2"),
        (("--out", LONG), "File name too long"),
        (("--out", "a\0b"), "null byte"),
    ],
)
def test_options_of_inspect_that_cannot_be(argv, message, refused, model_path, monkeypatch, prompt_file, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert message in refused("inspect", model_path, prompt_file, *argv)


def test_as_many_tokens_as_there_are(capsys, model_path, prompt_file) -> None:
    assert main(["inspect", str(model_path), str(prompt_file), "--max-tokens", str(10**30), "--layers", "0"]) == 0


def test_eval_goes_on_with_no_file_that_is_spoilt(refused, model_path, results) -> None:
    argv = ("eval", model_path, "--lengths", "64", "--out", results)
    for line in (LINES[0] | {"format": 99}, LINES[1] | {"score": None}, LINES[8] | {"scores": []}):
        results.write_text(text_of([LINES[0], line]))
        before = results.read_bytes()
        err = refused(*argv)
        assert "is not a results file: line 2, of kind" in err
        assert "choose another --out" in err
        assert results.read_bytes() == before
