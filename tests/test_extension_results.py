"""What the page of training says of extending a context is what was measured."""

from __future__ import annotations

import json
import re
import statistics
from pathlib import Path
from typing import Any

import pytest
from repository import ROOT, script

FILES = sorted((ROOT / "benchmarks" / "results").glob("*/extend_context.json"))
PAGE = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
SECTION = " ".join(PAGE.partition("## Extending a model's context")[2].partition("\n## ")[0].split())


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    (path,) = FILES
    return json.loads(path.read_text())


def test_the_stages_are_those_of_the_example(found: dict[str, Any]) -> None:
    example = script("examples/extend_context.py")
    assert found["base_stage"] == vars(example.BASE)
    assert found["long_stage"] == vars(example.LONG)
    for kind, seeds in example.SEEDS.items():
        for seed in seeds:
            part = found["parts"][f"{kind}-{seed}"]
            longest = (
                max(found["steps"][kind], found["long_stage"]["steps"]) if seed == 0 else found["long_stage"]["steps"]
            )
            assert len(part["losses"]) == len(part["densities"]) == longest
            assert part["curve"][0]["step"] == 0
    rounds = found["parts"]["time"]["rounds"]
    for kind, seconds in found["parts"]["time"]["seconds"].items():
        assert len(rounds[kind]) >= 5
        assert seconds == statistics.median(rounds[kind])
        equal = int(found["long_stage"]["steps"] * found["parts"]["time"]["seconds"]["dense"] / seconds)
        assert found["steps"][kind] == min(equal, int(found["long_stage"]["steps"] * example.MOST))


def test_tables_have_every_training_and_serving(found: dict[str, Any]) -> None:
    script("docs/tables.py")
    tables = script("docs/training_tables.py")
    _, header, rows = tables.extend_table(found)
    assert all(len(row) == len(header) for row in rows)
    assert len(rows) == 1 + sum(len(list(tables.moments(found, kind))) for kind in tables.NAMES)
    _, header, rows = tables.seeds_table(found)
    assert len(rows) == 3
    _, header, rows = tables.served_table(found)
    assert {len(row) for row in rows} == {len(header)}
    assert len(rows) == 5 + 4 * 2  # dense training is served in all ways, the others dense and as they were trained


def test_pictures_are_those_of_the_results() -> None:
    for path in FILES:
        for name in ("extend_loss", "extend_needles"):
            assert Path(ROOT / "docs" / "images" / path.parent.name / f"{name}.svg").is_file()


def test_no_figure_of_the_page_is_from_elsewhere(found: dict[str, Any]) -> None:
    """Each number with a decimal point in the section is one of those that the tables or the stages have."""
    tables = script("docs/training_tables.py")
    known = " ".join(
        str(cell)
        for make in (tables.extend_table, tables.seeds_table, tables.differences_table, tables.served_table)
        for row in make(found)[2]
        for cell in row
    )
    words = SECTION.replace("top-p 0.95", "")
    assert not [number for number in re.findall(r"\d+\.\d+", words) if number not in known]


def test_how_long_it_took(found: dict[str, Any]) -> None:
    minutes = sum(part.get("process_seconds", 0) for part in found["parts"].values()) / 60
    assert f"took {minutes:.0f} minutes of one processor" in SECTION
