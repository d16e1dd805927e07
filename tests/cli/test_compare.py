"""``gossamer compare`` on a tiny random model: the table, the file that goes on, and one clear line for bad input."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest

from gossamer import Profile
from gossamer.cli import compare, main
from gossamer.methods import AShape
from gossamer.methods.registry import available, class_of

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

SMALL = ("--lengths", "300", "--prompts", "mqar,text", "--min-tokens", "0", "--rounds", "1")
METHODS = "a_shape(sink=4,window=64),a_shape(sink=2,window=20)"


def compared(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["compare", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_table_with_a_star_before_what_no_other_beats(capsys, model_path: Path, tmp_path: Path) -> None:
    out_file = tmp_path / "c.jsonl"
    argv = (model_path, "--methods", METHODS, *SMALL, "--out", out_file)
    code, out, err = compared(capsys, *argv)
    assert code == 0
    assert out.splitlines()[0].split()[:5] == ["setting", "length", "density", "recall", "error"]
    assert "* a_shape(" in out
    assert "the best that plans can do" in out
    assert str(out_file) in err
    kinds = [json.loads(line)["kind"] for line in out_file.read_text().splitlines()]
    assert (kinds.count("point"), kinds.count("bounds")) == (4, 2)
    before = out_file.read_bytes()
    code, again, _ = compared(capsys, *argv, "--json")
    assert code == 0
    assert out_file.read_bytes() == before
    rows = json.loads(again)["rows"]
    assert [row["prompts"] for row in rows] == [2, 2]
    assert all(0 < row["density"] < 1 for row in rows)
    fewer = compared(capsys, model_path, "--methods", "a_shape(sink=4,window=64)", *SMALL, "--out", out_file, "--json")
    assert [row["method"] for row in json.loads(fewer[1])["rows"]] == ["a_shape(sink=4,window=64,min_tokens=0)"]
    assert main(["report", str(out_file), "--out", str(tmp_path / "page.html")]) == 0
    assert "What each setting costs and loses" in (tmp_path / "page.html").read_text()


def test_a_name_alone_stands_for_its_settings(capsys, model_path: Path, tmp_path: Path) -> None:
    argv = (
        model_path,
        "--methods",
        "a_shape,minference",
        *SMALL,
        "--layers",
        "1",
        "--out",
        tmp_path / "c.jsonl",
        "--json",
    )
    code, out, _ = compared(capsys, *argv)
    assert code == 0
    rows = json.loads(out)["rows"]
    assert len(rows) == len(class_of("a_shape").settings) + 1  # minference has none but its defaults
    points = [json.loads(line) for line in (tmp_path / "c.jsonl").read_text().splitlines()]
    assert {tuple(record["observed"]) for record in points if record["kind"] == "point"} == {(1,)}


def test_all_are_the_methods_that_have_settings() -> None:
    names = [name for name in available() if class_of(name).settings]
    assert {"max_relative", "vertical_slash", "a_shape"} <= set(names)
    assert "dense" not in names
    assert "per_head" not in names


def test_all_have_the_profile_beside_them() -> None:
    given = Namespace(methods="all", min_tokens=5)
    profile = Profile.uniform(2, 4, AShape(4, 64))
    without, beside = (compare._policies(given, one) for one in (None, replace(profile, name="p.json")))
    assert beside[:-1] == without
    assert (beside[-1].method, beside[-1].name, beside[-1].min_tokens) == (profile.method, "p.json", 5)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("--methods", "no_such"), "unknown method 'no_such'"),
        (("--methods", "a_shape(window=x)"), "a_shape.window takes int"),
        (("--rounds", "0"), "--rounds must be at least 1"),
        (("--layers", "9"), "this model has layers 0 to 1"),
        (("--prompts", "no_such"), "no_such"),
        (("--lengths", "x"), "lengths are given as"),
        (("--device", "meta"), "--device meta"),
        (("--text", "/no/such/file"), "cannot read"),
        (("--chat",), "no chat template"),
    ],
)
def test_bad_input_is_one_line(capsys, model_path: Path, tmp_path: Path, given, message) -> None:
    code, out, err = compared(capsys, model_path, *SMALL, "--methods", METHODS, "--out", tmp_path / "c.jsonl", *given)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "c.jsonl").exists()
