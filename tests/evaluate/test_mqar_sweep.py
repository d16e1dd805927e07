"""Training models of associative recall: cells, the file of results, and going on where a sweep was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from gossamer.evaluate.mqar import Forgetting, Plain, Stacked
from gossamer.evaluate.mqar.data import IGNORED
from gossamer.evaluate.mqar.mixers import parse_mixer
from gossamer.evaluate.mqar.network import RecallModel
from gossamer.evaluate.mqar.settings import FIGURE_2, QUICK, SETTINGS, Cell, Setting
from gossamer.evaluate.mqar.summary import recall_rows, recall_table
from gossamer.evaluate.mqar.sweep import RecallFile, left, sweep
from gossamer.evaluate.mqar.training import evaluate, sequences, train
from gossamer.evaluate.summary import read_results

TINY = Setting(
    name="tiny",
    about="for tests",
    tasks=(Plain(16, 16, 2),),
    widths=(8,),
    rates=(0.01, 0.003),
    mixers=("dense", "random_topk(2)"),
    seeds=(0, 1),
    examples=32,
    test_examples=16,
    epochs=3,
    batch=16,
    dropout=0.1,
)


class Killed(BaseException):
    """As a signal that ends the process would: nothing of ours catches it."""


def facts(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{name: value for name, value in record.items() if name not in ("run", "seconds")} for record in records]


def run(path: Path, setting: Setting = TINY, **how: Any) -> list[dict[str, Any]]:
    results = RecallFile(path, setting)
    return [*sweep(setting, results, **how)]


def test_every_cell_has_a_line_and_none_is_trained_twice(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    made = run(path)
    assert len(made) == 8
    assert run(path) == []
    assert facts(read_results(path)[1:]) == facts(made)
    assert [path] == list(tmp_path.iterdir())
    again = run(path, replace(TINY, seeds=(0, 1, 2)))
    assert [record["seed"] for record in again] == [2] * 4
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["kind"] for line in lines].count("run") == 2
    assert lines[0]["machine"]["processor"]
    assert lines[0]["versions"]["torch"] == torch.__version__
    assert lines[0]["mqar"]["about"] == "for tests"


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_killed_sweep_goes_on_to_the_same_numbers(tmp_path: Path, epoch: int) -> None:
    """Killed after an epoch of the second cell. Dropout and random keys make chance count."""
    whole = run(tmp_path / "whole.jsonl")
    path, seen = tmp_path / "r.jsonl", list[int]()

    def kill(done: int, epochs: int, outcome: Any) -> None:
        seen.append(done)
        if len(seen) == 3 + epoch:
            raise Killed

    with pytest.raises(Killed):
        run(path, progress=kill)
    assert len(read_results(path)) == 2  # the run and one cell: nothing of the cell that was killed
    assert {file.name for file in tmp_path.iterdir()} == {"whole.jsonl", "r.jsonl", *["r.jsonl.partial"] * (epoch > 1)}
    after: list[int] = []
    assert len(run(path, progress=lambda done, epochs, outcome: after.append(done))) == 7
    # The epoch that was not yet kept is made again, and no other.
    assert after[0] == epoch
    assert facts(
        read_results(path)[1:] if epoch == 0 else [r for r in read_results(path) if r["kind"] == "mqar"]
    ) == facts(whole)


def test_a_write_that_is_stopped_leaves_the_file_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "r.jsonl"
    one = replace(TINY, mixers=("dense",), seeds=(0,), rates=(0.01,))
    run(path, one)
    before = path.read_bytes()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(Killed()))
    with pytest.raises(Killed):
        run(path, replace(one, seeds=(1,)))
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["r.jsonl"]


def test_a_line_that_was_cut_off_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    made = run(path, replace(TINY, seeds=(0,)))
    content = path.read_bytes()
    path.write_bytes(content[:-30])
    assert facts(run(path, replace(TINY, seeds=(0,)))) == facts(made[-1:])
    assert len(read_results(path)) == 6


def test_another_file_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_text("a diary\n")
    with pytest.raises(ValueError, match="not a results file"):
        RecallFile(path, TINY)
    path.unlink()
    results = RecallFile(path, TINY)
    results.partial.write_bytes(b"something else")
    with pytest.raises(ValueError, match="no file of a training to go on with"):
        next(sweep(TINY, results))
    assert results.partial.read_bytes() == b"something else"


def test_what_is_kept_of_another_cell_is_not_gone_on_with(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    cells = list(TINY.cells())
    train(cells[0], TINY, kept=kept)
    fresh, after = train(cells[1], TINY), train(cells[1], TINY, kept=kept)
    assert facts([fresh]) == facts([after])


def test_torchs_state_of_chance_is_left_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    train(next(TINY.cells()), TINY)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rate_that_suffices_makes_those_after_it_needless(tmp_path: Path) -> None:
    setting = replace(TINY, first_enough=True, enough=1e-9, mixers=("dense",), epochs=1)
    made = run(tmp_path / "r.jsonl", setting)
    reached = {record["seed"] for record in made if record["rate"] == 0.01 and record["accuracy"] > 0}
    second = {record["seed"] for record in made if record["rate"] == 0.003}
    assert second == {0, 1} - reached
    assert reached
    assert list(left(setting, RecallFile(tmp_path / "r.jsonl", setting))) == []


def test_training_stops_when_it_is_enough() -> None:
    found = train(next(TINY.cells()), replace(TINY, enough=1e-9, epochs=50))
    assert len(found["curve"]) < 50
    assert found["curve"][-1] > 0
    assert found["steps"] == 2 * len(found["curve"])


def test_a_training_that_diverges_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the third step, whose logits are made to overflow."""
    calls: list[int] = []
    forward = RecallModel.forward

    def overflow(self: RecallModel, tokens: torch.Tensor, where: torch.Tensor | None = None) -> torch.Tensor:
        calls.append(1) if self.training else None
        return forward(self, tokens, where) * (float("inf") if len(calls) == 3 else 1.0)

    monkeypatch.setattr(RecallModel, "forward", overflow)
    found = train(next(TINY.cells()), TINY)
    assert found["accuracy"] == 0
    assert found["diverged"] == 2
    assert len(found["curve"]) == 2
    assert found["loss"] is None


def test_sequences_are_those_of_the_seed_and_of_no_test() -> None:
    cell = next(TINY.cells())
    first, later = (sequences(cell, TINY, epoch).inputs for epoch in (0, 1))
    assert torch.equal(first, later)
    fresh = replace(TINY, fresh=True)
    assert not torch.equal(sequences(cell, fresh, 0).inputs, sequences(cell, fresh, 1).inputs)
    assert len(sequences(cell, TINY, None)) == 16
    other = replace(cell, mixer=parse_mixer("window(2)"), width=32, rate=0.1)
    assert torch.equal(sequences(other, TINY, 0).inputs, first)
    assert not torch.equal(sequences(replace(cell, seed=1), TINY, 0).inputs, first)


def test_answers_are_counted_by_distance() -> None:
    task = Plain(16, 16, 2)
    model = RecallModel(task, parse_mixer("dense"), 8).eval()
    examples = task.make(300, seed=0)
    found = evaluate(model, examples)
    where = examples.labels != IGNORED
    logits = model(examples.inputs, where)
    right = logits.argmax(-1) == examples.labels[where]
    assert found.accuracy == pytest.approx(float(right.double().mean()))
    assert found.loss == pytest.approx(float(F.cross_entropy(logits, examples.labels[where]).detach()), rel=1e-5)
    low, expected = 0, []
    for edge in (1, 2, 4, 8, 16):
        here = (examples.distances[where] > low) & (examples.distances[where] <= edge)
        expected += [[edge, int(right[here].sum()), int(here.sum())]] if here.any() else []
        low = edge
    assert found.by_distance == expected
    assert sum(asked for *_, asked in expected) == 600


@pytest.mark.parametrize("task", [Stacked(16, 4, 2), Forgetting(16, 16, 2, updates=1)], ids=str)
@pytest.mark.parametrize("mlp", [0, 2])
def test_a_model_reads_what_came_before_alone(task: Any, mlp: int) -> None:
    torch.manual_seed(0)
    model = RecallModel(task, parse_mixer("window(3)+dense"), 8, mlp=mlp).eval()
    inputs = task.make(3, seed=0).inputs
    other = inputs.clone()
    other[:, -1] = 1 + (other[:, -1] % 7)
    out, changed = model(inputs), model(other)
    assert out.shape == (3, task.length, 16)
    torch.testing.assert_close(out[:, :-1], changed[:, :-1])


def test_positions_are_for_attention_alone() -> None:
    of = {
        spec: RecallModel(Plain(), parse_mixer(spec), 8).places is not None
        for spec in ("dense", "convolution(3)+dense")
    }
    assert of == {"dense": True, "convolution(3)+dense": False}


def test_the_papers_setting_is_there_by_name() -> None:
    assert {(task.length, task.pairs) for task in FIGURE_2.tasks} == {(64, 4), (128, 8), (256, 16), (512, 64)}
    assert {task.vocabulary for task in FIGURE_2.tasks} == {8192}
    assert FIGURE_2.widths == (64, 128, 256, 512)
    assert FIGURE_2.rates == pytest.approx((1e-4, 4.6416e-4, 2.15443e-3, 1e-2), rel=1e-4)
    assert [FIGURE_2.batch_of(length) for length in (64, 128, 256, 512)] == [512, 512, 256, 128]
    assert (FIGURE_2.epochs, FIGURE_2.examples, FIGURE_2.mlp, FIGURE_2.enough) == (64, 100_000, 0, 0.99)
    assert list(SETTINGS) == [setting.name for setting in SETTINGS.values()] == ["quick", "small", "routers", "figure2"]
    assert SETTINGS["quick"] == QUICK
    assert all(parse_mixer(spec).label == spec for setting in SETTINGS.values() for spec in setting.mixers)


@pytest.mark.parametrize(
    "change",
    [{"seeds": ()}, {"epochs": 0}, {"rates": (0.0,)}, {"widths": (7,)}, {"enough": 0.0}, {"dropout": 1.0}],
    ids=str,
)
def test_a_wrong_setting_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(change))):
        replace(TINY, **change)


def line(mixer: str, seed: int, rate: float, accuracy: float, **more: Any) -> dict[str, Any]:
    cell = Cell(parse_mixer(mixer), Plain(256, 64, 8), 32, rate, seed)
    counts = {"by_distance": [[4, 1, 2], [8, 1, 2], [16, int(4 * accuracy), 4]]}
    costs = {"state": 128, "reads": 16.25, "accuracy": accuracy, "steps": 10}
    return {"kind": "mqar", "training": {}, "setting": "quick"} | cell.to_dict() | costs | counts | more


def test_the_best_rate_of_each_seed_counts() -> None:
    records = [line("dense", 0, 0.01, 0.25), line("dense", 0, 0.001, 0.75), line("dense", 1, 0.01, 0.5)]
    records += [line("window(4)", 0, 0.01, 0.0), {"kind": "run"}]
    dense, window = recall_rows(records)
    assert (dense.accuracy, dense.low, dense.high, dense.seeds) == (0.625, 0.5, 0.75, 2)
    assert dense.share == 0.5
    assert dense.by_distance == ((4, 2, 4), (8, 2, 4), (16, 5, 8))
    assert window.mixer == "window(4)"
    table = recall_table([dense, window])
    assert table[0] == [
        "mixer",
        "width",
        "accuracy",
        "of seeds",
        "seeds",
        "to 8",
        "to 16",
        "guess",
        "state",
        "logits",
        "of dense",
        "steps",
    ]
    assert table[1] == ["dense", "32", "0.625", "0.500-0.750", "2", "0.50", "0.62", "0.125", "128", "16.2", "50%", "10"]


def test_other_trainings_and_tasks_have_rows_of_their_own() -> None:
    other = Plain(256, 64, 8, fillers="random").label
    records = [
        line("dense", 0, 0.01, 0.5),
        line("dense", 0, 0.01, 1.0, training={"epochs": 2}),
        line("dense", 0, 0.01, 0.0, task=other),
    ]
    rows = recall_rows(records)
    assert [row.accuracy for row in rows] == [0.5, 1.0, 0.0]
    assert recall_table(rows)[3][1] == "plain(vocabulary=256,length=64,pairs=8,fillers=random)"
