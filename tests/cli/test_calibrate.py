"""``gossamer calibrate`` on a tiny random model: a profile, the same bytes again, and one clear line for bad input."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gossamer import AttentionCall
from gossamer.calibrate import search
from gossamer.cli import main
from gossamer.profiles import Profile
from gossamer.profiles.costs import Costs, Kernel, KernelCost, forget
from gossamer.profiles.machine import Machine

pytest.importorskip("scipy")
pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
TWO = "a_shape(sink=4,window=20),a_shape(sink=4,window=40)"
SMALL = ("--lengths", "150", "--samples", "1", "--methods", "a_shape,block_sparse")


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("texts")
    made = []
    for name, factor in (("prose.txt", 3), ("code.txt", 7)):
        made.append(folder / name)
        made[-1].write_text(" ".join(f"w{i * i * factor % 97}" for i in range(400)))
    return made[0], made[1]


@pytest.mark.parametrize(
    "mode",
    [("--budget", "0.9"), ("--mode", "fixed", "--budget", "0.6"), ("--mode", "cheapest", "--error", "0.05")],
    ids=str,
)
def test_the_same_inputs_give_the_same_bytes(capsys, model_path, texts, tmp_path, mode) -> None:
    argv = list(map(str, (model_path, "--prompts", texts[0], "--held-out", texts[1], *SMALL, *mode)))
    made = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        assert main(["calibrate", *argv, "-o", str(folder / "p.json"), "--json"]) == 0
        said = json.loads(capsys.readouterr().out)
        assert sorted(path.name for path in folder.iterdir()) == ["p.json", "p.json.jsonl"]
        made.append([path.read_bytes() for path in sorted(folder.iterdir())])
    assert made[0] == made[1]
    assert set(said["figures"]) == {"calibration", "held_out"}
    held_out = said["figures"]["held_out"]
    low, high = held_out["intervals"]["error"]
    assert (held_out["prompts"], low <= held_out["error"] <= high) == (2, True)
    profile = Profile.load(tmp_path / "one" / "p.json")
    assert (len(profile.layers), profile.heads) == (2, 4)
    known = json.loads(profile.provenance.samples)
    assert known["figures"] == said["figures"]
    assert f"error {held_out['error']:.4f} [{low:.4f}, {high:.4f}] on 2 held-out" in profile.provenance.held_out
    assert known["sources"] == ["prose.txt", "code.txt"]
    assert known["figures"]["calibration"]["error"] < 0.5


@pytest.mark.parametrize("where", ["layer", "profile"])
def test_a_killed_command_goes_on_and_ends_with_the_same_bytes(
    model_path, texts, tmp_path, monkeypatch, capsys, where
) -> None:
    argv = ["calibrate", str(model_path), "--prompts", str(texts[0]), "--methods", TWO, "--lengths", "150", "-o"]
    measured: list[int | None] = []
    measure_layer = search.measure_layer

    def counted(call: AttentionCall, *given: Any, **more: Any) -> Any:
        measured.append(call.layer)
        if where == "layer" and len(measured) == 4:
            raise KeyboardInterrupt
        return measure_layer(call, *given, **more)

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    assert main([*argv, str(tmp_path / "one" / "p.json")]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(search, "measure_layer", counted)
        if where == "profile":
            patch.setattr(Profile, "save", killed)
        assert main([*argv, str(tmp_path / "two" / "p.json")]) == 130
        assert ("the same command goes on with" in capsys.readouterr().err) == (where == "layer")
        assert [path.name for path in (tmp_path / "two").iterdir()] == ["p.json.partial"]
        stopped = len(measured)
        patch.undo()
        patch.setattr(search, "measure_layer", counted)
        assert main([*argv, str(tmp_path / "two" / "p.json")]) == 0
    # Two prompts and two that are held out, of two layers each; none is measured twice.
    assert (stopped, len(measured)) == ((4, 9) if where == "layer" else (8, 8))
    files = [
        [(path.name, path.read_bytes()) for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")
    ]
    assert files[0] == files[1]
    assert [name for name, _ in files[0]] == ["p.json", "p.json.jsonl"]


def test_weights_say_whose_errors_count(model_path, texts, tmp_path) -> None:
    path, out = tmp_path / "weights.json", tmp_path / "p.json"
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "--methods", TWO, "--budget", "0.5", "-o", out]
    assert main(list(map(str, argv))) == 0
    assert "weights_sha256" not in json.loads(Profile.load(out).provenance.samples)
    weights = [[0.0] * 4, [0.0, 0.0, 2.0, 0.0]]
    for content in (weights, {"weights": weights}):
        path.write_text(json.dumps(content))
        assert main([*map(str, argv), "--weights", str(path)]) == 0
        profile = Profile.load(out)
        dense = [(i, j) for i, layer in enumerate(profile.layers) for j, m in enumerate(layer) if m.name == "dense"]
        assert dense == [(1, 2)]
        assert {method.to_dict().get("window") for layer in profile.layers for method in layer} == {None, 20}
    assert len(json.loads(profile.provenance.samples)["weights_sha256"]) == 64


def test_weights_of_another_shape_and_other_files_are_refused(model_path, texts, tmp_path, refused) -> None:
    path = tmp_path / "weights.json"
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "-o", tmp_path / "p.json"]
    for content in ([[1.0] * 4], [[1.0] * 3] * 2, [[1.0] * 4, [1.0, 1.0, 1.0, -1.0]]):
        path.write_text(json.dumps(content))
        assert "a number, 0 or more, for each of 2 layers of 4 heads" in refused(*argv, "--weights", path)
    path.write_text('{"others": []}')
    assert "has no weights" in refused(*argv, "--weights", path)
    assert "cannot read" in refused(*argv, "--weights", tmp_path / "no_such.json")


def test_costs_of_a_machine_are_those_of_its_cost_model(model_path, texts, tmp_path, monkeypatch, refused) -> None:
    path, out = tmp_path / "costs.json", tmp_path / "p.json"
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(path))
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "--cost", "machine", "--budget", "1", "-o", out]
    argv += ["--dtype", "float32"]  # of the kernel below
    forget()
    assert "no cost model of this machine is at hand" in refused(*argv)
    q = torch.zeros(1, 1, 1, 8)
    of_head = Kernel.of(AttentionCall(q, q, q))
    for kernel in (replace(of_head, head_dim=16), of_head):
        Costs(Machine.here(), (KernelCost(kernel, {"pairs": 1.0}, 0.0, 0.0, 1, (1,)),)).save(path)
        forget()
        if kernel != of_head:
            assert "head dimension 8, only" in refused(*argv)
    assert main(list(map(str, argv))) == 0
    forget()
    known = json.loads(Profile.load(out).provenance.samples)
    assert (known["cost"], len(known["costs_sha256"])) == ("machine", 64)
    # A second for each pair makes planning nothing, to some digits.
    assert main([*map(str, argv), "--cost", "pairs", "-o", str(tmp_path / "q.json")]) == 0
    costs = [torch.tensor(Profile.load(tmp_path / name).costs) for name in ("p.json", "q.json")]
    torch.testing.assert_close(*costs, atol=1e-4, rtol=0)


def test_costs_of_a_machine_that_knows_planning_give_the_same_bytes(model_path, texts, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(tmp_path / "costs.json"))
    sizes = ["--lengths", "64,150", "--rounds", "1", "--heads", "4", "--groups", "2", "--head-dim", "8"]
    assert main(["bench", *sizes, "--cost-model"]) == 0
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "--cost", "machine", "--budget", "9"]
    made = []
    for name in ("one.json", "two.json"):
        assert main([*map(str, argv), "--dtype", "float32", "-o", str(tmp_path / name)]) == 0
        made.append((tmp_path / name).read_bytes())
    assert made[0] == made[1]


def test_costs_are_those_of_the_machine_where_they_are_known_else_pairs(
    model_path, texts, tmp_path, monkeypatch, capsys
) -> None:
    path, out = tmp_path / "costs.json", tmp_path / "p.json"
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(path))
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "--budget", "9", "--dtype", "float32", "-o", out]
    q = torch.zeros(1, 1, 1, 8)
    kernel = Kernel.of(q)
    for known, message in (
        (None, "there is no"),
        (replace(kernel, head_dim=16), f"it knows no {kernel}"),
        (kernel, None),
    ):
        if known is not None:
            Costs(Machine.here(), (KernelCost(known, {"pairs": 1.0}, 0.0, 0.0, 1, (1,)),)).save(path)
        forget()
        assert main(list(map(str, argv))) == 0
        err = capsys.readouterr().err
        assert ("note: costs are counted in pairs" in err) == (message is not None)
        assert message is None or message in err
        kind = "pairs" if message else "machine"
        assert Profile.load(out).provenance.kernel == f"{kind} on {kernel}"
        assert json.loads(Profile.load(out).provenance.samples)["cost"] == kind
    forget()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", "my notes", "p.json exists and is no profile: it would be lost"),
        ("p.json", '[{"0": ["stream_llm", 1, 2, 0.5]}]', "p.json exists and is no profile"),
        ("p.json.jsonl", '{"kind": "run"}\n', "p.json.jsonl exists and is no line of gossamer calibrate"),
        ("p.json.jsonl", "\x00", "p.json.jsonl exists and is no line"),
    ],
)
def test_other_files_are_not_written_over(refused, model_path, texts, tmp_path, name, content, message) -> None:
    (tmp_path / name).write_text(content)
    assert message in refused("calibrate", model_path, "--prompts", texts[0], *SMALL, "-o", tmp_path / "p.json")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [(name, content)]


def test_what_was_measured_is_kept_where_no_choice_is_cheap_enough(capsys, model_path, texts, tmp_path) -> None:
    argv = ("calibrate", model_path, "--prompts", texts[0], *SMALL, "-o", tmp_path / "p.json", "--budget")
    assert main(list(map(str, (*argv, "0.0001")))) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "ask for at least that" in message
    assert "p.json.partial, so that the same command with another bound" in message
    assert [path.name for path in tmp_path.iterdir()] == ["p.json.partial"]
    assert main(list(map(str, (*argv, "1")))) == 0


def test_scipy_is_asked_for_before_anything_is_measured(refused, model_path, texts, tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    argv = ("calibrate", model_path, "--prompts", texts[0], *SMALL, "--mode", "fixed", "-o", tmp_path / "p.json")
    assert "needs scipy: pip install 'gossamer[calibrate]'" in refused(*argv)
    assert not list(tmp_path.iterdir())


def test_devices_are_not_written_to(refused, model_path, texts) -> None:
    assert "is no profile" in refused("calibrate", model_path, "--prompts", texts[0], *SMALL, "-o", "/dev/full")


def test_empty_files_and_earlier_results_are_written_over(model_path, texts, tmp_path) -> None:
    argv = ["calibrate", model_path, "--prompts", texts[0], *SMALL, "--budget", "0.9", "-o", tmp_path / "p.json"]
    for name in ("p.json", "p.json.jsonl"):
        (tmp_path / name).touch()
    for _ in range(2):
        assert main(list(map(str, argv))) == 0
    assert Profile.load(tmp_path / "p.json").heads == 4


def test_the_partial_file_of_another_search_is_named(refused, model_path, texts, tmp_path, monkeypatch, capsys) -> None:
    argv = ("calibrate", model_path, "--prompts", texts[0], *SMALL, "--budget", "0.9", "-o", tmp_path / "p.json")
    with monkeypatch.context() as patch:
        patch.setattr(Profile, "save", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert main(list(map(str, argv))) == 130
    capsys.readouterr()
    for change, what in (
        (("--seed", "1"), "prompts"),
        (("--methods", "a_shape"), "candidates"),
        (("--cost", "measured"), "cost"),
        (("--dtype", "float16"), "kernel, model"),
    ):
        assert f"holds figures of another {what}" in refused(*argv, *change)
    assert main([*map(str, argv), "--budget", "0.95", "--objective", "mass"]) == 0  # chosen from the same figures
    profile = Profile.load(tmp_path / "p.json")
    of_errors, chosen_by = profile.provenance.metric.split("; ")
    assert (of_errors, chosen_by) == (
        "relative L2 error of the output, mean over the prompts that chose",
        "chosen by mass",
    )
    figures = json.loads(profile.provenance.samples)["figures"]["calibration"]
    assert float(torch.tensor(profile.errors).mean()) == pytest.approx(figures["error"])
    assert figures["loss"] == pytest.approx(1 - figures["recall"])


def test_a_bound_on_the_logits(capsys, model_path, texts, tmp_path) -> None:
    argv = [model_path, "--prompts", texts[0], *SMALL, "--mode", "cheapest", "--kl", "0.001", "-o", tmp_path / "p.json"]
    assert main(["calibrate", *map(str, argv)]) == 0
    captured = capsys.readouterr()
    assert re.split("  +", captured.out.splitlines()[0])[2:] == ["cost", "error", "of the last queries", "recall"]
    assert re.search(r"^held out +2 .* 0\.\d{4} \[0\.\d{4}, 0\.\d{4}\]", captured.out, re.MULTILINE)
    assert "KL" in captured.err


def test_the_profile_runs_and_the_report_draws_it(model_path, texts, tmp_path) -> None:
    out = tmp_path / "p.json"
    argv = [model_path, "--prompts", texts[0], *SMALL, "--budget", "0.8", "-o", out]
    assert main(["calibrate", *map(str, argv)]) == 0
    assert main(["report", f"{out}.jsonl", "--out", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert "Methods by layer and head" in page
    assert "p.json, global: layers down, heads across" in page.replace("<wbr>", "")
    assert "What budgets buy" in page
    assert "Held-out against calibration error" in page
    row = page[page.index("<td>held out</td>") :]
    assert re.match(r"<td>held out</td><td>2</td>(<td>0\.\d{4} <small>\[0\.\d{4}, 0\.\d{4}\]</small></td>){3}", row)
    argv = [model_path, "--methods", "per_head", "--profile", out, "--lengths", "150", "--limit", "1", "--rounds", "1"]
    more = ["--prompts", "text", "--text", texts[1], "--min-tokens", "0", "--out", tmp_path / "c.jsonl"]
    assert main(["compare", *map(str, (*argv, *more))]) == 0


def test_a_profile_of_a_model_alike_is_noted_and_of_another_refused(
    model_path, texts, tmp_path, capsys, refused
) -> None:
    out, prompt = tmp_path / "p.json", tmp_path / "prompt.txt"
    assert (
        main(["calibrate", *map(str, (model_path, "--prompts", texts[0], *SMALL, "--budget", "0.8", "-o", out))]) == 0
    )
    prompt.write_text("w1 w2 w3 w4")
    data = json.loads(out.read_text())
    argv = (model_path, prompt, "--method", "per_head", "--profile", out, "--max-new-tokens", "1")
    evaluated = ("eval", model_path, "--methods", "per_head", "--profile", out, "--lengths", "300", "--limit", "1")
    capsys.readouterr()

    def made_for(**config: Any) -> None:
        known = json.loads(data["provenance"]["config"]) | config
        out.write_text(json.dumps(data | {"provenance": data["provenance"] | {"config": json.dumps(known)}}))

    for config, noted in (({}, False), ({"rotary": [[5, "default", 1]]}, True)):
        made_for(**config)
        assert main(["run", *map(str, argv)]) == 0
        assert ("note: the profile was made for model" in capsys.readouterr().err) == noted
    made_for(num_key_value_heads=1)
    for refusing in (("run", *argv), (*evaluated, "--out", tmp_path / "r.jsonl")):
        assert "num_key_value_heads 1 (here 2)" in refused(*refusing)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--mode", "cheapest"), "needs one bound"),
        (("--mode", "cheapest", "--kl", "1", "--error", "1"), "needs one bound"),
        (("--error", "1"), "are for --mode cheapest"),
        (("--mode", "cheapest", "--kl", "1", "--held-out-samples", "0"), "held-out prompts"),
        (("--budget", "nan"), "--budget must be a number"),
        (("--nearly", "0.1", "--dense-above", "0.5"), "--nearly and --dense-above: for --mode fixed alone"),
        (("--held-out", "a.txt", "--held-out-samples", "0"), "--held-out names texts to judge on"),
        (("--methods", "no_such"), "unknown method 'no_such'"),
        (("--methods", "per_head"), "single one"),
        (("--methods", "a_shape(windows=3)"), "windows"),
        (("--samples", "0"), "--samples must be at least 1"),
        (("-o", "/no/such/p.json"), "no such folder"),
    ],
)
def test_bad_input_is_one_line(refused, model_path, texts, tmp_path, given, message) -> None:
    argv = ("calibrate", model_path, "--prompts", texts[0], *SMALL, "-o", tmp_path / "p.json", *given)
    assert message in refused(*argv).splitlines()[-1]
