"""The dtype that --dtype auto takes: by what the processor multiplies fast, and said."""

import json
from pathlib import Path

import pytest
import torch
from notes import without_notes

from gossamer.cli import machine, main


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch):
    """Makes the processor one with these flags."""
    return lambda flags: monkeypatch.setattr(machine, "cpu_info", lambda: f"model name\t: Test\nflags\t\t: {flags}\n")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("avx2 fma f16c", torch.float32),
        ("avx2 avx512f avx512bw avx512_fp16", torch.float32),
        ("avx2 avx512f avx512_bf16", torch.bfloat16),
        ("avx2 amx_tile amx_bf16", torch.bfloat16),
        ("asimd bf16", torch.bfloat16),
        ("", torch.float32),
    ],
)
def test_auto_is_bfloat16_where_there_are_instructions_for_it(processor, flags, expected) -> None:
    processor(flags)
    assert machine.fast_dtype()[0] == expected


@pytest.mark.parametrize(("flags", "dtype"), [("avx2", "float32"), ("avx512_bf16", "bfloat16")])
def test_the_model_runs_in_it_and_one_line_says_so(
    processor, flags, dtype, capsys, model_path: Path, prompt_file: Path, tmp_path: Path
) -> None:
    processor(flags)
    common = [str(model_path), "--lengths", "64", "--limit", "1", "--tasks", "perplexity", "--methods", "dense"]
    assert main(["eval", *common, "--out", str(tmp_path / "r.jsonl"), "--text", str(prompt_file)]) == 0
    assert json.loads((tmp_path / "r.jsonl").read_text().splitlines()[0])["model"]["dtype"] == dtype
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dtype ")]
    assert len(said) == 1
    assert said[0].startswith(f"dtype {dtype}: this processor ")


def test_a_dtype_that_was_asked_for_is_taken_and_not_explained(processor, capsys, model_path, prompt_file) -> None:
    processor("avx512_bf16")
    argv = [str(model_path), str(prompt_file), "--max-new-tokens", "1", "--dtype", "float32"]
    assert main(["run", *argv]) == 0
    err = capsys.readouterr().err
    assert err == without_notes(err)


def test_doctor_shows_it(processor, capsys) -> None:
    processor("avx2")
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["dtype_auto"]["cpu"]
    assert found["dtype"] == "float32"
    assert "no instructions" in found["because"]
    assert main(["doctor"]) == 0
    assert "--dtype auto" in capsys.readouterr().out
