"""The runner: a killed evaluation goes on and ends with the same lines; wrong files are refused."""

from __future__ import annotations

import copy
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from subjects_for_tests import DENSE, SPARSE, job, run, subject, without_circumstances  # noqa: E402
from tokenizers_for_tests import HAYSTACK  # noqa: E402

from gossamer import Policy, Profile, methods  # noqa: E402
from gossamer.evaluate import runner, tasks  # noqa: E402
from gossamer.evaluate.haystack import Haystack  # noqa: E402
from gossamer.evaluate.perplexity import Windows  # noqa: E402
from gossamer.evaluate.records import cell_of, label_of, policy_fields, relabel  # noqa: E402
from gossamer.evaluate.runner import ResultsFile, make_header  # noqa: E402
from gossamer.evaluate.subject import Subject  # noqa: E402
from gossamer.evaluate.summary import read_results, summary_rows  # noqa: E402
from gossamer.profiles.costs import BreakEven, Costs, Kernel, forget  # noqa: E402
from gossamer.profiles.machine import Machine  # noqa: E402


def test_each_cell_gives_one_line(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    new = run(path, job())
    kinds = [record["kind"] for record in new]
    assert kinds.count("sample") == 2 * 2 * 2 * 3
    assert kinds.count("perplexity") == 2 * 2 * 3
    assert kinds.count("fidelity") == 2  # dense is not compared with itself
    assert len({cell_of(record) for record in new}) == len(new)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines] == ["run", *kinds]
    assert json.loads(json.dumps(new)) == lines[1:]


def test_fidelity_takes_prompts_of_each_kind_that_is_named(tmp_path: Path) -> None:
    methods_ = (DENSE, SPARSE, Policy(methods.create("a_shape", sink=4, window=32), min_tokens=0, max_density=2.0))
    work = job(methods=methods_, samples=0, fidelity=2, fidelity_of=("needle_single", "perplexity"), lengths=(300,))
    of, path = subject(), tmp_path / "r.jsonl"
    assert len(run(path, replace(work, fidelity=1), stop_after=3, of=of)) == 3
    new = run(path, work, of=of)
    records = [*map(json.loads, path.read_text().splitlines())]
    records = [record for record in records if record["kind"] != "run"]
    found = {(r["task"], r["index"], r["method"]) for r in records}
    assert len(records) == len(found) == 2 * 2 * 2
    assert len(new) == 5
    assert {r["kind"] for r in records} == {"fidelity"}
    windows = Windows(of, HAYSTACK, 0)
    of_text = [r for r in records if r["task"] == "perplexity"]
    assert {(r["text"], r["start"]) for r in of_text} == {("test", windows.start(300, i)) for i in (0, 1)}
    dense, _ = of.hidden_states(windows.tokens(300, 0), DENSE)
    with torch.inference_mode():
        expected = of.model(windows.tokens(300, 0), labels=windows.tokens(300, 0)).loss
    assert of_text[0]["logits"]["dense_nats"] == pytest.approx(float(expected), rel=1e-4)
    assert of_text[0]["prompt_tokens"] == dense.shape[0] == 300


@pytest.mark.parametrize("stop_after", [1, 7, 20])
def test_an_interrupted_run_ends_with_the_same_lines(tmp_path: Path, stop_after: int) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    total = len(run(whole, job()))
    run(parts, job(), stop_after)
    with parts.open("a") as file:
        file.write('{"kind": "sample", "method": "cut o')
    assert len(run(parts, job())) == total - stop_after
    assert without_circumstances(parts) == without_circumstances(whole)
    assert run(parts, job()) == []


def test_the_sparse_method_runs_and_is_recorded(tmp_path: Path) -> None:
    new = run(tmp_path / "r.jsonl", job(fidelity=0, perplexity=None))
    dense = [record for record in new if record["method"] == "dense"]
    sparse = [record for record in new if record["method"].startswith("a_shape")]
    assert all(record["density"] == 1.0 for record in dense)
    assert all(0.2 < record["density"] < 0.6 for record in sparse)
    assert any(a["turns"][0]["generated"] != b["turns"][0]["generated"] for a, b in zip(dense, sparse, strict=True))


def test_another_architecture_runs_end_to_end(tmp_path: Path) -> None:
    new = run(tmp_path / "r.jsonl", job(lengths=(300,), samples=1), of=subject("qwen3"))
    assert {record["kind"] for record in new} == {"sample", "perplexity", "fidelity"}


def test_files_of_other_models_haystacks_and_seeds_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(path, job(), 1)
    with pytest.raises(ValueError, match="another seed"):
        run(path, job(seed=5))
    with pytest.raises(ValueError, match="another model"):
        run(path, job(), of=subject("qwen3"))
    changed = subject()
    with torch.no_grad():
        next(changed.model.parameters()).mul_(1.5)
    with pytest.raises(ValueError, match="another model"):
        run(path, job(), of=changed)
    path.write_text("not json\n")
    with pytest.raises(ValueError, match="line 1 is not JSON: "):
        run(path, job())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"methods": ()}, "no method"),
        ({"methods": (DENSE, DENSE)}, "dense is given twice"),
        ({"tasks": (), "perplexity": None}, "no task"),
        ({"tasks": (), "fidelity": 1}, "fidelity needs a task"),
        ({"samples": 0, "fidelity": 0}, "samples must be at least 1"),
        (
            {"fidelity_of": ("passkey",)},
            "prompts of needle_single, .*, perplexity, got 'passkey'",
        ),
        ({"lengths": (10,)}, "at least 64"),
    ],
)
def test_bad_jobs_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        job(**changes)


def test_labels_name_what_differs_from_the_defaults() -> None:
    assert label_of(DENSE) == "dense"
    assert label_of(SPARSE) == "a_shape(sink=4,window=64,min_tokens=0,max_density=2)"
    assert label_of(Policy(methods.create("max_relative", alpha=0.02))) == "max_relative(alpha=0.02)"
    assert label_of(Policy(methods.create("dense"), min_tokens=0)) == "dense"  # its thresholds decide nothing
    steps = Policy(methods.create("a_shape", sink=4), min_tokens=0, decode=methods.create("quest", budget=64))
    assert label_of(steps) == "a_shape(sink=4,min_tokens=0)+quest(budget=64)"
    line = policy_fields(steps)
    assert relabel(line | {"method": "old"}) == line
    assert cell_of(line | {"kind": "sample"}) != cell_of(
        policy_fields(replace(steps, decode=None)) | {"kind": "sample"}
    )


def test_labels_tell_profiles_apart() -> None:
    labels = set()
    for sink in (4, 8):
        profile = replace(Profile.uniform(1, 4, methods.AShape(sink, 64)), name="mine.json")
        labels.add(label_of(Policy.of(profile)))
    assert len(labels) == 2
    assert all(re.fullmatch("mine[.]json[(]layers=[0-9a-f]{6}[)]", label) for label in labels)


def test_a_profile_of_another_name_is_another_row_and_keeps_its_own_when_read() -> None:
    profile = Profile.uniform(1, 4, methods.AShape(4, 64))
    lines = [
        {"kind": "sample"} | policy_fields(Policy.of(replace(profile, name=name))) for name in ("", "a.json", "b.json")
    ]
    assert [line["method"].split("(")[0] for line in lines] == ["minference", "a.json", "b.json"]
    assert len(set(map(cell_of, lines))) == 3
    assert [relabel(line | {"method": "old"}) for line in lines] == lines


def test_labels_of_methods_show_short_lists_and_need_no_defaults(monkeypatch) -> None:
    @dataclass(frozen=True)
    class Listed(methods.Method):
        name = "listed"
        sizes: tuple[int, ...]
        wide: bool = False

        def plan(self, call: Any) -> Any: ...

    monkeypatch.setattr("gossamer.evaluate.records.class_of", lambda name: Listed)
    assert label_of(Policy(Listed((1, 2)))) == "listed(sizes=[1,2])"
    assert label_of(Policy(Listed((1, 2), True), min_tokens=0)) == "listed(sizes=[1,2],wide=True,min_tokens=0)"


def test_labels_of_old_lines_gain_the_thresholds() -> None:
    line = {"kind": "sample", "method": "a_shape", "method_fields": methods.create("a_shape").to_dict()}
    assert relabel(line | {"policy": "min_tokens=0,max_density=0.9"})["method"] == "a_shape(min_tokens=0)"
    assert relabel(line | {"policy": "min_tokens=2048,max_density=0.9"})["method"] == "a_shape"
    foreign = line | {"method": "new(x=1)", "method_fields": {"method": "new", "x": 1}, "policy": "min_tokens=0"}
    assert relabel(foreign) == foreign


def test_lengths() -> None:
    assert runner.parse_lengths("16k,4k,500,4096") == (500, 4096, 16384)
    for bad in ("", "4q", "k", "-1", "0"):
        with pytest.raises(ValueError, match="4k,16k"):
            runner.parse_lengths(bad)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs SIGKILL")
def test_a_killed_process_leaves_a_file_that_goes_on(tmp_path: Path) -> None:
    """The real thing: kill -9 in the middle, start again, compare with one run."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "import torch, test_runner\n"
        "torch.set_num_threads(1)\n"
        "test_runner.run(Path(sys.argv[1]), test_runner.job(), pause=0.05)\n"
    )
    here = str(Path(__file__).parent)
    killed, whole = tmp_path / "killed.jsonl", tmp_path / "whole.jsonl"
    process = subprocess.Popen([sys.executable, str(script), str(killed), here])
    deadline = time.time() + 60
    while time.time() < deadline and (not killed.exists() or killed.read_bytes().count(b"\n") < 6):
        time.sleep(0.005)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    there = killed.read_bytes().count(b"\n")
    assert there >= 6
    run(killed, copy.deepcopy(job()))
    run(whole, job())
    assert there < whole.read_bytes().count(b"\n")
    assert without_circumstances(killed) == without_circumstances(whole)
    tables = []
    for path in (killed, whole):
        rows = summary_rows(read_results(path))
        tables.append(
            [{k: v for k, v in row.to_dict().items() if k not in ("prefill_s", "speedup", "token_s")} for row in rows]
        )
    assert tables[0] == tables[1]


def test_a_warm_up_comes_before_what_is_timed_and_only_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, str]] = []
    monkeypatch.setattr(Subject, "warm_up", lambda of, tokens, policy: seen.append((len(tokens), policy.method.name)))
    path = tmp_path / "r.jsonl"
    run(path, job(fidelity=0))
    assert seen == [(300, "dense"), (300, "a_shape"), (400, "dense"), (400, "a_shape")]
    seen.clear()
    run(path, job(fidelity=0))
    assert seen == []
    run(path, job(fidelity=0, lengths=(300,), samples=4))
    assert seen == [(300, "dense"), (300, "a_shape")]


def test_a_sample_that_cannot_be_made_names_task_and_length(tmp_path: Path) -> None:
    of, work = subject(), job(tasks=(tasks.create("needle_single"), tasks.create("common_words")))
    with ResultsFile(tmp_path / "r.jsonl", make_header(of, work)) as results:
        windows = work.windows(of)
        todo = runner.pending(work, results, windows)
        with pytest.raises(ValueError, match=r"^common_words at 300 tokens: .*ask for a longer length, or leave"):
            runner.check(of, work, todo, windows)
        fits = [cell for cell in todo if cell.what == "needle_single"]
        assert runner.check(of, work, fits, windows) == []


def test_a_haystack_that_is_just_long_enough_is_noted(tmp_path: Path) -> None:
    of, text = subject(), Haystack("short", HAYSTACK.text[:1800])
    pair = (tasks.create("needle_single"), tasks.create("passkey"))
    work = job(tasks=pair, lengths=(300,), haystack=text, perplexity=None)
    with ResultsFile(tmp_path / "r.jsonl", make_header(of, work)) as results:
        notes = runner.check(of, work, runner.pending(work, results, None), None)
    assert len(notes) == 1
    assert "all samples of needle_single hide things in the same passage" in notes[0]


def test_cost_grows_with_the_square_where_attention_is_most_of_it() -> None:
    of = subject()
    assert 1.9 < runner.relative_cost(of, 20) / runner.relative_cost(of, 10) < 2.1
    assert 3.9 < runner.relative_cost(of, 2_000_000) / runner.relative_cost(of, 1_000_000) < 4.1


def test_committed_cells_are_not_run_again() -> None:
    records = read_results(Path(__file__).parents[2] / "benchmarks" / "results" / "reference_eval.jsonl")
    done = {cell_of(record) for record in records if record["kind"] != "run"}
    policies = {r["method"]: Policy(methods.from_dict(r["method_fields"])) for r in records if "method" in r}
    made = {r["task"]: tasks.create(**_renamed(r["task_fields"])) for r in records if "task_fields" in r}
    first = made.pop("needle_single")
    work = job(
        methods=tuple(policies.values()),
        tasks=(first, *made.values()),
        lengths=(16384, 32768),
        samples=10,
        perplexity=None,
    )
    assert list(work.labels) == list(policies)
    assert {cell_of(cell.head) for cell in runner.all_cells(work, None)} == done


def _renamed(fields: dict[str, Any]) -> dict[str, Any]:
    return {"name" if key == "task" else key: value for key, value in fields.items()}


def test_what_depends_on_the_machine_is_recorded_as_the_number_that_was_used(tmp_path: Path, monkeypatch) -> None:
    method, model = methods.create("a_shape", sink=1, window=8), subject()
    point = BreakEven(Kernel.of(model.query()), method.to_dict(), 4, 2, 33.0, 16, 128)
    Costs(Machine.here(), break_even=(point,)).save(tmp_path / "costs.json")
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(tmp_path / "costs.json"))
    forget()
    resolved = job(methods=(Policy(method), Policy.of("dense"))).on(model)
    assert resolved.labels == ("a_shape(sink=1,window=8,min_tokens=33)", "dense")
    forget()
