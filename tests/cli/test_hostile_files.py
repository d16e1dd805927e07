"""Broken and hostile input: one line on standard error and exit code 2, never a traceback, and nothing left behind."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from every_line import LINES, OTHERS, UNREADABLE, spoilt_everywhere

from gossamer import Profile
from gossamer.cli import main
from gossamer.evaluate.schema import KINDS
from gossamer.methods import AShape, VerticalSlash
from gossamer.profiles import Provenance

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

LONG = "x" * 300
devices = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no such device here")


def text_of(lines: list[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in lines)


@pytest.fixture
def results(tmp_path: Path) -> Path:
    path = tmp_path / "r.jsonl"
    path.write_text(text_of(LINES))
    return path


# Results


def test_the_lines_have_every_kind_and_every_field() -> None:
    assert {line["kind"] for line in LINES} == set(KINDS)
    for kind, schema in KINDS.items():
        known = {*schema.needed, *schema.more}
        assert {name for line in LINES if line["kind"] == kind for name in line} == known | {"kind"}


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("kind", KINDS)
def test_any_change_of_a_line_is_drawn_or_refused_in_one_line(kind: str, capsys, tmp_path) -> None:
    """Each field, item and name of the line, nested ones too, replaced by JSON of other types, or left out."""
    line = next(line for line in LINES if line["kind"] == kind)
    # Not all lines: a page of few is drawn sooner.
    others = [other for other in LINES if other is not line and other["kind"] in ("run", "sample", kind)]
    before = text_of(others)
    path, page = tmp_path / "r.jsonl", tmp_path / "p.html"
    codes = []
    for what, spoilt in spoilt_everywhere(line):
        path.write_text(f"{before}{spoilt}\n")
        code = main(["report", str(path), "--out", str(page)])
        err = capsys.readouterr().err
        said = [text for text in err.splitlines() if not text.startswith("note: ")]
        assert code in (0, 2), what
        assert len(said) == 1, (what, err)
        if code == 2 and "are of 2 models" not in err:
            assert f"{path} is not a results file: line {len(others) + 1}" in err, (what, err)
            assert len(err) < 1200, what
        codes.append(code)
    assert codes.count(2) > len(codes) / 2
    assert sorted(found.name for found in tmp_path.iterdir()) == ["p.html", "p_csv", "r.jsonl"]


@pytest.mark.parametrize(
    ("at", "change", "message"),
    [
        (0, {"format": 99}, "line 1, of kind 'run': format must be 1, which is all that this version reads, found 99"),
        (0, {"model": {"name": "m"}}, "model.fingerprint must be text, found nothing"),
        (1, {"score": "high"}, "line 2, of kind 'sample': score must be a number, 0 to 1, found 'high'"),
        (1, {"score": True}, "score must be a number, 0 to 1, found true"),
        (1, {"turns": [{"score": 1.5}]}, "turns[0].score must be a number, 0 to 1, found 1.5"),
        (1, {"turns": {}}, "turns must be a list, found {}"),
        (1, {"length": 0}, "length must be an integer, 1 to 1,099,511,627,776, found 0"),
        (1, {"prefill_s": -1}, "prefill_s must be seconds, 0 to 1e9, found -1"),
        (1, {"kind": [1]}, "kind must be text, found [1]"),
        (1, {"dense_because": {"short": "x"}}, "dense_because['short'] must be an integer, 0 or more, found 'x'"),
        (6, {"recall": [[0.5]]}, "head_density must be a list of as many layers and heads as recall"),
        (6, {"recall": []}, "recall must be a list that is not empty, found []"),
        (
            6,
            {"maps": [{"layer": 0, "head": 0, "size": 3, "data": "AAAA"}]},
            "must be base64 of 3 x 3 bytes, found 3 by",
        ),
        (6, {"maps": [{"layer": 0, "head": 0, "size": 1, "data": "?"}]}, "maps[0].data must be base64, found '?'"),
        (7, {"heads": []}, "heads must be a list that is not empty"),
        (7, {"model": {"name": "m"}}, "model.fingerprint must be text, found nothing"),
        (8, {"scores": {"a": 1}}, "scores['a'] must be an object, found 1"),
    ],
)
def test_a_message_says_which_field_of_which_line_is_wrong(at, change, message, refused, results) -> None:
    lines = [line | change if i == at else line for i, line in enumerate(LINES)]
    results.write_text(text_of(lines))
    err = refused("report", results, "--out", results.with_name("p.html"))
    assert f"{results} is not a results file: line {at + 1}" in err
    assert message in err


def test_buckets_that_do_not_fit_their_edges_are_refused(refused, results) -> None:
    for change, message in (
        ({"edges": [0]}, "logits.edges must be two or more ascending positions, found [0]"),
        ({"edges": [0, 64, 64]}, "two or more ascending positions"),
        ({"kl": [0.1]}, "logits.kl must be a list of 2 numbers, one between two edges each, found 1 of them"),
    ):
        results.write_text(text_of([*LINES[:6], LINES[6] | {"logits": LINES[6]["logits"] | change}]))
        assert message in refused("report", results, "--out", results.with_name("p.html"))


def test_lines_of_other_versions_are_left_out_and_said(capsys, refused, results) -> None:
    other = {"kind": "weather\n", "method": [], "length": {}}
    results.write_text(text_of([*LINES, other, other]))
    assert main(["report", str(results), "--out", str(results.with_name("p.html"))]) == 0
    assert "left out: 2 of kind weather\\n\n" in capsys.readouterr().err
    results.write_text(text_of([LINES[0], other]))
    err = refused("report", results, "--out", results.with_name("p.html"))
    assert "no results that this version knows, only lines of kind 'weather\\n'" in err


@pytest.mark.parametrize("content", ["[]", "3", '"kind"', "null", "{}", *OTHERS.values(), *UNREADABLE.values()])
def test_lines_that_are_no_objects_are_refused(content, refused, results) -> None:
    results.write_text(f"{text_of(LINES)}{content}\n")
    err = refused("report", results, "--out", results.with_name("p.html"))
    assert f"is not a results file: line {len(LINES) + 1} is " in err


@devices
def test_devices_are_neither_read_nor_written(refused, results) -> None:
    """A report as root would put a file in the place of a device, and one to /dev/full_csv beside it."""
    page = results.with_name("p.html")
    assert "it is a device" in refused("report", "/dev/full", "--out", page)
    for device in ("/dev/full", "/dev/null"):
        assert "it is a device or a pipe" in refused("report", results, "--out", device)
    assert not os.path.isfile("/dev/full")
    assert not os.path.exists("/dev/full_csv")
    assert not page.exists()


def test_long_names_are_refused_and_leave_nothing(refused, results) -> None:
    folder = results.parent
    assert "File name too long" in refused("report", folder / LONG, "--out", folder / "p.html")
    assert "File name too long" in refused("report", results, "--out", folder / f"{LONG}.html")
    # A name that is just not too long leaves none for the folder of tables.
    assert "_csv" in refused("report", results, "--out", folder / ("x" * 253))
    assert [path.name for path in folder.iterdir()] == ["r.jsonl"]


def test_a_name_with_room_for_its_tables_alone_is_long_enough(results) -> None:
    page = results.with_name(f"{'x' * 250}.html")
    assert main(["report", str(results), "--out", str(page)]) == 0
    assert page.is_file()


@pytest.mark.parametrize("name", ["", "/", "..", "a\0b"])
def test_names_that_are_none_are_refused(name, refused, results) -> None:
    refused("report", results, "--out", name)
    refused("report", name)


def test_a_folder_in_the_place_of_a_page_is_named(refused, results) -> None:
    assert "it is a folder" in refused("report", results, "--out", results.parent)
    results.with_name("p_csv").write_text("")
    assert "p_csv: File exists" in refused("report", results, "--out", results.with_name("p.html"))
    assert sorted(path.name for path in results.parent.iterdir()) == ["p_csv", "r.jsonl"]


def test_a_title_that_is_not_unicode_is_refused(refused, results) -> None:
    """As Python hands on the bytes of a command line that are not UTF-8."""
    err = refused("report", results, "--out", results.with_name("p.html"), "--title", "a\udcffb")
    assert "--title must be UTF-8 text, got a\\udcffb" in err
    assert [path.name for path in results.parent.iterdir()] == ["r.jsonl"]


def test_a_name_that_is_not_unicode_is_no_hindrance(capsys, refused, results) -> None:
    other = os.fsdecode(os.fsencode(results.parent) + b"/r\xff.jsonl")
    page = os.fsdecode(os.fsencode(results.parent) + b"/p\xff.html")
    os.rename(results, other)
    assert main(["report", other, "--out", page]) == 0
    assert "p\\udcff.html\n" in capsys.readouterr().out
    assert os.path.isfile(page)
    os.truncate(other, 0)
    assert "r\\udcff.jsonl holds no results" in refused("report", other, "--out", page)


def test_a_message_is_one_line_whatever_a_name_holds(refused, tmp_path) -> None:
    assert "a\\nb\\x1b[2J" in refused("report", tmp_path / "a\nb\x1b[2J")
    assert "a\\nb" in refused("run", tmp_path / "a\nb")


# Profiles


LAYER = (VerticalSlash(exact=False), AShape(1, 2))
PROFILES = {
    "ours": Profile((LAYER,), ((0.1, None),), Provenance("m", "a", "s", (1,), "x", "1")).to_dict(),
    "published": [{"0": ["vertical_and_slash", 10, 20, 0.9], "1": ["stream_llm", 1, 2, 0.5]}],
}


@pytest.mark.usefixtures("one_parser")
@pytest.mark.parametrize("profile", PROFILES.values(), ids=PROFILES)
def test_any_change_of_a_profile_is_read_or_refused_in_one_line(profile, refused, tmp_path) -> None:
    """With no model, so that what is read well is refused for that."""
    path = tmp_path / "p.json"
    refusals = 0
    for what, content in spoilt_everywhere(profile):
        path.write_text(content)
        err = refused("run", tmp_path / "none", "--profile", path)
        if "no such model" not in err:
            assert "p.json" in err, what
            assert len(err) < 1200, what
            refusals += 1
    assert refusals > 100


def test_no_text_of_a_profile_reaches_the_terminal_as_it_is(capsys, tmp_path) -> None:
    paths = [tmp_path / name for name in ("one.json", "other.json")]
    for path, gates in zip(paths, ("a\n\x1b[2Jb", "c\r"), strict=True):
        text = json.dumps({"schema": 2, "methods": [[{"method": "seer_attention", "gates": gates}]]})
        path.write_text(text)
    assert main(["profile", "show", str(paths[0])]) == 0
    assert main(["profile", "diff", *map(str, paths)]) == 1
    out = capsys.readouterr().out
    assert out.count("a\\n\\x1b[2Jb") == 2
    assert all(line.isprintable() for line in out.split("\n"))


def test_every_field_of_a_method_in_a_profile_is_checked(tmp_path) -> None:
    data = Profile(((VerticalSlash(),),)).to_dict()
    for wrong in ("no", 1, None, [1]):
        data["methods"][0][0]["exact"] = wrong
        with pytest.raises(ValueError, match=r"layer 0, head 0: vertical_slash.exact must be true or false"):
            Profile.from_dict(data)


@devices
def test_a_profile_that_is_a_device_or_has_a_long_name_is_refused(refused, tmp_path) -> None:
    for name, message in (("/dev/full", "it is a device"), (tmp_path / LONG, "File name too long")):
        assert message in refused("run", tmp_path / "none", "--profile", name)
