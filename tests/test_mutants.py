"""The committed result of `make mutants` is whole, and leaves few faults unnoticed and unexplained."""

from __future__ import annotations

import json
from pathlib import Path

import mutate
import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULT = json.loads((ROOT / "tests" / "mutants.json").read_text(encoding="utf-8"))


def test_the_result_names_how_it_was_made() -> None:
    assert RESULT["tool"] == "cosmic-ray"
    assert f"cosmic-ray=={RESULT['version']}\n" in (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert RESULT["seed"] == mutate.SEED
    assert len(RESULT["commit"]) == 40


def test_counts_add_up() -> None:
    assert list(RESULT["parts"]) == [part.name for part in mutate.PARTS]
    for counts in RESULT["parts"].values():
        assert counts["killed"] + counts["timed_out"] + counts["survived"] == counts["sampled"] <= counts["possible"]


def test_every_part_has_its_share() -> None:
    for counts in RESULT["parts"].values():
        assert counts["sampled"] >= min(mutate.LEAST, counts["possible"])
    assert sum(counts["sampled"] for counts in RESULT["parts"].values()) >= 300


def test_few_survive() -> None:
    counts = RESULT["parts"].values()
    assert sum(part["survived"] for part in counts) <= 0.05 * sum(part["sampled"] for part in counts)


def test_every_survivor_is_listed() -> None:
    listed = [survivor["part"] for survivor in RESULT["survivors"]]
    assert {name: listed.count(name) for name in RESULT["parts"]} == {
        name: counts["survived"] for name, counts in RESULT["parts"].items()
    }
    for survivor in RESULT["survivors"]:
        assert set(survivor) == {"part", "file", "line", "was", "now", "explanation"}
        assert (ROOT / survivor["file"]).is_file()


def test_few_survive_without_an_explanation() -> None:
    unexplained = [survivor for survivor in RESULT["survivors"] if not survivor["explanation"].strip()]
    sampled = sum(counts["sampled"] for counts in RESULT["parts"].values())
    assert len(unexplained) <= 0.05 * sampled, json.dumps(unexplained, indent=1)


@pytest.mark.parametrize("part", mutate.PARTS, ids=lambda part: part.name)
def test_a_part_has_files_and_tests(part: mutate.Part) -> None:
    assert all(list((ROOT / "src" / "gossamer").glob(pattern)) for pattern in part.sources)
    assert all((ROOT / test.partition("::")[0]).exists() for test in part.tests if test.startswith("tests/"))


def test_shares_follow_the_numbers_of_mutants() -> None:
    assert mutate.shares({"small": 4, "middle": 30, "large": 966}, 100, 15) == {"small": 4, "middle": 15, "large": 97}


def test_a_stopped_run_goes_on_after_its_last_whole_line(tmp_path: Path) -> None:
    path = tmp_path / "mutants.jsonl"
    path.write_text('{"key": "one", "tests": "t", "outcome": "killed"}\n{"key": "two", "tes')
    assert list(mutate.Outcomes(path).known) == ["one"]
    assert path.read_text().count("\n") == 1
