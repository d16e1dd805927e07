"""``gossamer bench --ring``: what it prints, and what it refuses."""

from __future__ import annotations

import json

import pytest

from gossamer.cli import main

SIZES = ["bench", "--heads", "4", "--groups", "2", "--head-dim", "8", "--pairs-per-second", "1e9,4e8"]


def simulated(capsys: pytest.CaptureFixture, *more: str) -> dict:
    assert main([*SIZES, "--json", *more]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_layout_that_fits_is_simulated(capsys: pytest.CaptureFixture) -> None:
    found = simulated(capsys, "--ring", "4", "--lengths", "1024,2048", "--inner", "2")
    rows = [(row["layout"], row["length"]) for row in found["rows"]]
    kinds = ("contiguous", "zigzag", "striped", "hierarchical")
    assert rows == [(kind, length) for length in (1024, 2048) for kind in kinds]
    assert all(len(row["imbalance"]) == 4 for row in found["rows"])
    assert found["pairs_per_second"] == {"forward": 1e9, "backward": 4e8}


def test_half_the_bandwidth_takes_twice_as_long_where_it_is_waited_for(capsys: pytest.CaptureFixture) -> None:
    def seconds(bandwidth: str) -> float:
        given = ("--ring", "2", "--lengths", "2048", "--layouts", "striped", "--bandwidth", bandwidth)
        return simulated(capsys, *given, "--plan", "dense")["rows"][0]["forward_s"]

    assert seconds("1e-6") == pytest.approx(2 * seconds("2e-6"), rel=0.05)


@pytest.mark.parametrize("plan", ["dense", "a_shape(sink=64,window=128)", "planted(verticals=10,slashes=3)"])
def test_plans_are_made_and_timed_here(plan: str, capsys: pytest.CaptureFixture) -> None:
    assert main(["bench", "--heads", "2", "--groups", "1", "--head-dim", "8", "--ring", "2", "--plan", plan]) == 0
    out = capsys.readouterr().out
    assert "striped" in out
    assert "imbalance is the largest over the mean work of a step" in out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--ring", "0"], "--ring must be 1 to 4096"),
        (["--ring", "2", "--unit", "0"], "--unit must be 1"),
        (["--ring", "2", "--unit", "96"], "--unit must be a multiple"),
        (["--ring", "2", "--layouts", "spiral"], "must be one of contiguous"),
        (["--ring", "2", "--layouts", "hierarchical"], "give inner="),
        (["--ring", "2", "--plan", "planted(rows=3)"], "planted takes verticals"),
        (["--ring", "2", "--plan", "planted(slashes=many)"], "planted takes verticals"),
        (["--ring", "2", "--plan", "nonesuch"], "nonesuch"),
        (["--ring", "2", "--plan", "seer_attention"], "seer_attention"),
        (["--ring", "2", "--bandwidth", "0"], "bandwidth must be above 0"),
        (["--ring", "2", "--pairs-per-second", "fast"], "takes two numbers"),
    ],
)
def test_what_it_cannot_simulate_it_says(options: list[str], message: str, capsys: pytest.CaptureFixture) -> None:
    assert main([*SIZES, "--lengths", "512", *options]) == 2
    assert message in capsys.readouterr().err
