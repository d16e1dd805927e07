"""``doctor``, ``methods``, and the entry point."""

import json
import subprocess
import sys
from dataclasses import dataclass
from typing import ClassVar

import pytest

import gossamer
from gossamer.cli import main
from gossamer.methods import Method, registry


def test_doctor_json_names_a_backend_for_each_dtype(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    dtypes = {name for name in report["backend"] if " on " not in name}
    assert dtypes == {"float32", "float16", "bfloat16", "float64"}
    assert report["self_test"] == dict.fromkeys(report["backend"], "ok")
    assert report["backend"]["float64"] == "torch"
    assert report["packages"]["torch"]


def test_doctor_tells_the_backend_that_is_forced(capsys, monkeypatch):
    monkeypatch.setenv("GOSSAMER_BACKEND", "torch")
    monkeypatch.setenv("GOSSAMER_CHECK", "1")
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report["backend"].values()) == {"torch"}
    assert report["environment"]["GOSSAMER_BACKEND"] == "torch"
    assert report["environment"]["GOSSAMER_CHECK"] == "1"


def test_doctor_says_why_the_kernels_are_off(capsys, monkeypatch):
    monkeypatch.setattr("gossamer.backends.cpu.is_available", lambda: False)
    monkeypatch.setattr("gossamer.backends.cpu.why_unavailable", lambda: "no compiler was found")
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "no compiler was found" in out
    assert "slower than dense" in out


def test_doctor_reports_a_backend_that_fails(capsys, monkeypatch):
    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no such instruction set")

    monkeypatch.setattr("gossamer.backends.attend", broken)
    assert main(["doctor"]) == 0
    assert "error: no such instruction set" in capsys.readouterr().out


def test_doctor_reports_a_backend_that_is_wrong(capsys, monkeypatch):
    attend = gossamer.backends.attend
    monkeypatch.setattr("gossamer.backends.attend", lambda call, plan: (attend(call, plan)[0] + 1, None))
    assert main(["doctor"]) == 0
    assert "backend for float32: WRONG: off by 1.0e+00" in capsys.readouterr().out


def test_doctor_verifies_a_model(capsys, model_path, tmp_path, monkeypatch):
    assert main(["doctor", str(model_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["model"]
    assert found["ok"]
    assert all(check["sparse_calls"] for check in found["checks"][:-1])
    assert main(["doctor", str(model_path)]) == 0
    assert "LlamaForCausalLM: the same as without gossamer" in capsys.readouterr().out
    monkeypatch.setattr("gossamer.integrations.transformers.masks._says_nothing", lambda *_: True)
    assert main(["doctor", str(model_path)]) == 1
    assert "NOT the same" in capsys.readouterr().out
    assert main(["doctor", str(tmp_path)]) == 2
    assert "no language model" in capsys.readouterr().err


def test_methods_json_rebuilds_every_method(capsys):
    assert main(["methods", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["methods"]
    assert [entry["method"] for entry in listed] == gossamer.methods.available()
    for entry in listed:
        assert entry["summary"]
        assert entry["package"] is None
        made = gossamer.methods.from_dict({"method": entry["method"]} | entry["fields"])
        assert made == gossamer.methods.create(entry["method"])
    assert [entry["method"] for entry in listed if entry["profile"]] == ["minference", "per_head"]


@dataclass(frozen=True)
class Theirs(Method):
    """Another's method.

    With more to say.
    """

    name: ClassVar[str] = "theirs"
    share: float
    sizes: tuple[int, ...] = (1, 2)

    def plan(self, call):
        raise NotImplementedError


@pytest.fixture
def a_package_with_methods(tmp_path, monkeypatch):
    """One that is here, and one whose module is gone."""
    metadata = tmp_path / "their_package-2.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 2.0\n")
    (metadata / "entry_points.txt").write_text(
        f"[gossamer.methods]\ntheirs = {__name__}:Theirs\ngone = no_such_module:Gone\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    registry._installed.cache_clear()
    yield
    registry._installed.cache_clear()


@pytest.mark.usefixtures("a_package_with_methods")
def test_methods_of_other_packages_are_listed_with_their_package(capsys):
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "theirs: Another's method.\n    sizes=[1,2] share (required)\n    from their-package 2.0\n" in out
    assert "gone: the entry point gone = no_such_module:Gone does not load: No module named 'no_such_module'" in out
    assert main(["methods", "--json"]) == 0
    *_, gone, theirs = json.loads(capsys.readouterr().out)["methods"]
    assert (theirs["method"], theirs["required"], theirs["package"]) == ("theirs", ["share"], "their-package 2.0")
    assert theirs["fields"] == {"sizes": [1, 2]}
    assert set(gone) == {"method", "error", "package"}


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


def test_doctor_of_a_model_with_an_unknown_backend_is_one_line(capsys, monkeypatch, model_path):
    monkeypatch.setenv("GOSSAMER_BACKEND", "vax")
    assert main(["doctor", str(model_path)]) == 2
    captured = capsys.readouterr()
    assert "GOSSAMER_BACKEND='vax' is not known" in captured.err
    assert captured.err.count("\n") == 1
    assert "WRONG" not in captured.out


def test_doctor_says_which_cost_model_is_at_hand(monkeypatch, capsys) -> None:
    monkeypatch.setenv("GOSSAMER_COST_MODEL", "off")
    assert main(["doctor"]) == 0
    assert "none: GOSSAMER_COST_MODEL=off" in capsys.readouterr().out
