"""``doctor``, ``methods``, and the entry point."""

import json
import subprocess
import sys

import pytest

import gossamer
from gossamer.cli import main


def test_doctor_json_names_an_executor_for_each_dtype(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["executor"]) == {"float32", "float16", "bfloat16", "float64"}
    assert report["self_test"] == dict.fromkeys(report["executor"], "ok")
    assert report["executor"]["float64"] == "reference"
    assert report["packages"]["torch"]


def test_doctor_says_why_the_kernels_are_off(capsys, monkeypatch):
    monkeypatch.setattr("gossamer.backends.cpu.is_available", lambda: False)
    monkeypatch.setattr("gossamer.backends.cpu.why_unavailable", lambda: "no compiler was found")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no compiler was found" in out
    assert "slower than dense" in out


def test_doctor_reports_an_executor_that_fails(capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction set")

    monkeypatch.setattr("gossamer.backends.execute", broken)
    assert main(["doctor"]) == 0
    assert "error: no such instruction set" in capsys.readouterr().out


def test_methods_json_rebuilds_every_method(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [entry["method"] for entry in listed] == gossamer.methods.available()
    for entry in listed:
        assert entry.pop("summary")
        gossamer.methods.from_dict(entry)


def test_methods_table_names_every_method(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert all(f"{name}: " in out for name in gossamer.methods.available())


@pytest.mark.parametrize("argv", [[], ["fly"]])
def test_no_or_unknown_command(capsys, argv):
    assert main(argv) == 2
    err = capsys.readouterr().err
    assert err.startswith("gossamer: ")
    assert err.count("\n") == 1


def test_entry_point():
    command = [sys.executable, "-m", "gossamer", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout == f"gossamer {gossamer.__version__}\n"
