"""Fits that are known, break-even lengths, and the command under a clock of its own."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from gossamer.calibrate.bench import Row, Shape, bench, break_even, costs_of, kernel_cost, planning_costs
from gossamer.calibrate.candidates import candidates
from gossamer.calibrate.fit import fit, held_out_errors
from gossamer.cli import main
from gossamer.cli.bench import _search_space as search_space
from gossamer.cli.bench import _table as table
from gossamer.cli.specs import parse_method
from gossamer.methods import AShape, Dense, PerHead, VerticalSlash, available
from gossamer.profiles.costs import TERMS, Costs
from gossamer.report.svg import svg_file
from gossamer.report.timings import timings

SHAPE = Shape(2, 1, 8)


def ticking(step: float = 1.0) -> Callable[[], float]:
    ticks = itertools.count()
    return lambda: next(ticks) * step


def test_known_coefficients_are_found() -> None:
    terms = torch.rand(30, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [1, 1e3, 1e9, 1]
    )
    true = torch.tensor([3.0, 0.0, 2e-9, 0.5], dtype=torch.float64)
    torch.testing.assert_close(fit(terms, terms @ true), true, atol=1e-9, rtol=1e-6)
    assert float(held_out_errors(terms, terms @ true).max()) < 1e-6


def test_no_coefficient_is_below_zero_where_least_squares_would_have_one() -> None:
    terms = torch.tensor([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]], dtype=torch.float64)
    found = fit(terms, torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))
    assert found[0] > 0
    assert found[1] == 0


def test_a_sample_that_others_do_not_explain_is_missed() -> None:
    terms = torch.ones(5, 1, dtype=torch.float64)
    seconds = torch.tensor([1.0, 1, 1, 1, 4], dtype=torch.float64)
    assert held_out_errors(terms, seconds)[4] == pytest.approx(0.75)


@pytest.mark.parametrize("seconds", [[], [0.0], [-1.0]])
def test_seconds_that_are_none_are_refused(seconds: list[float]) -> None:
    with pytest.raises(ValueError, match="at least one sample, and seconds above 0"):
        fit(torch.ones(len(seconds), 1, dtype=torch.float64), torch.tensor(seconds, dtype=torch.float64))


def test_break_even_is_between_the_lengths_where_it_turns() -> None:
    assert break_even([100, 400], [1.0, 2.0], [2.0, 1.0]) == pytest.approx(200)
    assert break_even([100, 400], [2.0, 2.0], [1.0, 1.0]) == 100
    assert break_even([100, 400], [2.0, 1.0], [1.0, 1.0]) is None


def test_rows_have_the_medians_of_the_clock() -> None:
    rows = list(bench(SHAPE, [AShape(1, 8), AShape(1, 16)], [40, 80], rounds=2, clock=ticking(0.5)))
    assert [(row.method, row.length) for row in rows] == [
        (AShape(1, 8), 40),
        (AShape(1, 16), 40),
        (AShape(1, 8), 80),
        (AShape(1, 16), 80),
    ]
    assert {(row.plan_s, row.attend_s, row.dense_s) for row in rows} == {(0.5, 0.5, 0.5)}
    assert rows[0].density < rows[1].density < 1


def test_costs_name_the_break_even_of_each_method() -> None:
    def row(method: AShape, length: int, attend: float) -> Row:
        return Row(method, length, 0.5, attend, length / 100, 0.5)

    fast, slow = AShape(1, 8), AShape(1, 16)
    costs = costs_of(SHAPE, [row(fast, 400, 0.5), row(fast, 100, 1.5), row(slow, 100, 9), row(slow, 400, 9)])
    assert [(p.method["window"], p.shortest, p.longest, p.heads, p.groups) for p in costs.break_even] == [
        (8, 100, 400, 2, 1),
        (16, 100, 400, 2, 1),
    ]
    assert costs.break_even[0].tokens == pytest.approx(100 * 4 ** (1 / 3))
    assert costs.break_even[1].tokens is None


def test_a_kernel_whose_every_call_takes_as_long_costs_calls_alone() -> None:
    cost = kernel_cost(SHAPE, [64, 130], rounds=1, clock=ticking())
    assert cost.seconds == pytest.approx({name: float(name == "calls") for name in TERMS}, abs=1e-6)
    assert cost.worst < 1e-6
    assert cost.lengths == (64, 130)


def test_planning_is_timed_for_each_method_at_each_length() -> None:
    found = planning_costs(SHAPE, [AShape(1, 8), VerticalSlash(40, 64)], [64, 130], rounds=2, clock=ticking(0.5))
    assert [entry.method for entry in found] == [AShape(1, 8).to_dict(), VerticalSlash(40, 64).to_dict()]
    assert {(e.heads, e.groups, e.lengths, e.seconds) for e in found} == {(2, 1, (64, 130), (0.5, 0.5))}


@pytest.mark.parametrize(
    ("specs", "more"),
    [
        ("a_shape(window=16)", [AShape(window=16)]),
        ("flexprefill,per_head", candidates(["flexprefill"])[1:]),
        ("a_shape", []),
    ],
)
def test_planning_is_measured_of_what_is_tried_and_of_what_is_named(specs: str, more: list[Any]) -> None:
    named = [parse_method(spec) for spec in specs.split(",")]
    found = search_space(specs, named)
    assert len(found) == len(set(found))
    assert set(found) >= {*candidates()[1:], *more}
    assert not any(isinstance(method, (Dense, PerHead)) for method in found)


def test_the_command_writes_costs_and_keeps_those_of_other_shapes(tmp_path: Path, capsys, monkeypatch) -> None:
    path = tmp_path / "cache" / "costs.json"
    monkeypatch.setenv("GOSSAMER_COST_MODEL", str(path))
    sizes = ["--lengths", "64,128", "--rounds", "1", "--heads", "2", "--groups", "1", "--methods", "a_shape(window=16)"]
    for dim in ("8", "16"):
        assert main(["bench", *sizes, "--head-dim", dim, "--cost-model", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["rows"]) == 2
    costs = Costs.load(path)
    assert [cost.kernel.head_dim for cost in costs.kernels] == [8, 16]
    for kernel in (cost.kernel for cost in costs.kernels):
        for method in (*candidates()[1:], AShape(window=16)):
            assert (costs.planning_seconds(json.loads(json.dumps(method.to_dict())), kernel, 2, 1, 100) or 0) > 0
    shorter = [{"64,128": "33"}.get(size, size) for size in sizes]  # replaces nothing
    assert main(["bench", *shorter, "--head-dim", "8", "--cost-model"]) == 0
    assert f"not written, for one up to 128 tokens stands in {path}" in capsys.readouterr().out
    assert Costs.load(path) == costs
    assert main(["bench", *sizes, "--head-dim", "8"]) == 0
    assert "a_shape(window=16) is faster than dense" in capsys.readouterr().out
    path.write_text("mine")
    monkeypatch.setattr("gossamer.cli.bench.bench", None)  # nothing is timed that could not be kept
    assert main(["bench", *sizes, "--head-dim", "8", "--cost-model"]) == 2
    assert path.read_text() == "mine"


def test_the_picture_has_every_method_with_its_break_even_and_its_share_of_planning() -> None:
    def row(method: AShape, length: int, attend: float, dense: float) -> Row:
        return Row(method, length, 0.25 * attend, 0.75 * attend, dense, 0.5)

    turns, always, never = AShape(1, 8), AShape(1, 16), AShape(1, 32)
    rows = [row(turns, 256, 2.0, 1.0), row(turns, 1024, 2.0, 4.0), row(always, 256, 0.5, 1.0)]
    rows += [row(always, 1024, 0.5, 4.0), row(never, 256, 9.0, 1.0), row(never, 1024, 9.0, 4.0)]
    content = svg_file(timings(rows, "<4 heads>"))
    root = ElementTree.fromstring(content)
    assert content.startswith("<svg ")
    texts = [text.text or "" for text in root.iter("{http://www.w3.org/2000/svg}text")]
    hints = [text.text for text in root.iter("{http://www.w3.org/2000/svg}title")]
    assert "Seconds of attention by length: <4 heads>" in texts
    names = [text for text in texts if text.startswith(("dense", "a_shape"))]
    assert [name.split("; ")[-1] for name in names] == [
        "dense",
        "faster than dense from: about 0.5K",
        "faster than dense from: 0.25K, the shortest",
        "faster than dense from: not up to 1K",
    ]
    assert "0.5K" in texts  # beside the line
    assert "dense: 4 at 1K tokens" in hints
    assert sum(hint.endswith(": 25% at 0.25K tokens") for hint in hints if hint) == 3
    dotted = [
        line for line in root.iter("{http://www.w3.org/2000/svg}polyline") if line.get("stroke-dasharray") == "1 3"
    ]
    (line,) = dotted
    first, second = (float(point.split(",")[0]) for point in (line.get("points") or "").split())
    assert first == second == pytest.approx((52 + 708) / 2, abs=3)  # the middle, in logarithms


def test_one_length_and_no_seconds_are_drawn_all_the_same() -> None:
    ElementTree.fromstring(svg_file(timings([Row(AShape(1, 8), 100, 0.0, 0.0, 0.0, 0.5)], "")))


def test_the_command_draws_a_picture(tmp_path: Path, capsys) -> None:
    path = tmp_path / "b.svg"
    sizes = ["--lengths", "64,128", "--rounds", "1", "--heads", "2", "--groups", "1", "--head-dim", "8"]
    sizes += ["--methods", "a_shape(window=16)"]
    assert main(["bench", *sizes, "--picture", str(path)]) == 0
    assert "a_shape(window=16)" in path.read_text()
    for name, message in (("b.png", "ends in .svg"), ("none/b.svg", "no such folder"), ("", "ends in .svg")):
        capsys.readouterr()
        assert main(["bench", *sizes, "--picture", str(tmp_path / name)]) == 2
        captured = capsys.readouterr()
        assert (captured.out, captured.err.count("\n")) == ("", 1)
        assert message in captured.err
    path.unlink()
    path.mkdir()
    assert main(["bench", *sizes, "--picture", str(path)]) == 2
    assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--heads", "3"], "must be a multiple of the 2"),
        (["--lengths", "a"], "--lengths takes numbers"),
        (["--rounds", "0"], "--rounds must be at least 1"),
        (["--methods", "x"], "unknown method 'x'"),
        (["--methods", "a_shape,dense"], "dense cannot be timed by itself: it is what the others are timed beside"),
        (["--methods", "a_shape,per_head"], "per_head cannot be timed by itself: it needs a model"),
        (["--cost-model", "/dev/null/costs.json"], "cannot write into"),
        (["none"], "no such model"),
        pytest.param(
            ["--device", "cuda"], "--device cuda", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="")
        ),
    ],
)
def test_bad_input_is_refused_in_one_line_before_anything_is_timed(bad, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("gossamer.cli.bench.bench", None)
    assert main(["bench", *bad]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert message in err


def test_all_methods_are_those_that_need_no_model_and_the_others_are_named(capsys) -> None:
    sizes = ["--lengths", "300", "--rounds", "1", "--heads", "2", "--groups", "1", "--head-dim", "16"]
    assert main(["bench", *sizes, "--methods", "all", "--json"]) == 0
    captured = capsys.readouterr()
    timed = {row["method"]["method"] for row in json.loads(captured.out)["rows"]}
    left = {line.split()[1] for line in captured.err.splitlines() if " is left out: it needs a model (" in line}
    assert {"a_shape", "flexprefill", "xattention"} < timed
    assert {"per_head", "moa", "seer_attention"} < left
    assert timed.isdisjoint(left)
    assert timed | left == set(available()) - {"dense"}


def test_a_method_that_is_named_twice_is_timed_once(capsys) -> None:
    sizes = ["--lengths", "64", "--rounds", "1", "--heads", "2", "--groups", "1", "--head-dim", "16"]
    assert main(["bench", *sizes, "--methods", "a_shape,a_shape(window=9),a_shape", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["method"]["window"] for row in rows] == [3968, 9]


def test_the_table_has_the_share_of_planning() -> None:
    row = Row(AShape(1, 8), 100, 0.5, 1.5, 4.0, 0.5)
    assert row.planning == row.to_dict()["planning"] == 0.25
    header, line = (table([row]).splitlines()[i] for i in (0, -1))
    assert "planning" in header
    assert " 25% " in line
