"""``gossamer inspect`` on a tiny random model: table, files, page, and one clear line for every bad input."""

import base64
import csv
import json
import re
import zlib
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from notes import without_notes

from gossamer.cli import main
from gossamer.report.html import POLICY

pytestmark = pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")

PATTERNS = {"sink", "local", "vertical", "slash", "block"}


def inspect(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, argv)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_prints_a_line_for_each_head(capsys, model_path, prompt_file):
    code, out, err = inspect(capsys, model_path, prompt_file)
    header, *rows = (line.split() for line in out.splitlines())
    assert code == 0
    assert header[:3] == ["layer", "head", "pattern"]
    assert [row[:2] for row in rows] == [[str(layer), str(head)] for layer in range(2) for head in range(4)]
    assert "300 tokens; 8 heads" in err


def test_json_is_one_object_with_a_head_each(capsys, model_path, prompt_file):
    code, out, _ = inspect(capsys, model_path, prompt_file, "--json", "--max-tokens", 100)
    data = json.loads(out)
    assert code == 0
    assert data["length"] == 100
    assert len(data["heads"]) == 8
    assert set(data["heads"][0]["mass"]) == PATTERNS
    assert "maps" not in data


def test_layers_and_heads_can_be_chosen(capsys, model_path, prompt_file):
    code, out, _ = inspect(capsys, model_path, prompt_file, "--json", "--layers", "1", "--heads", "0,2-3")
    assert code == 0
    assert [(head["layer"], head["head"]) for head in json.loads(out)["heads"]] == [(1, 0), (1, 2), (1, 3)]


def test_queries_can_be_sampled(capsys, model_path, prompt_file, tmp_path):
    prompt = tmp_path / "long.txt"
    prompt.write_text(" ".join([prompt_file.read_text()] * 3))
    figures = []
    for rows in (450, 900):
        code, out, _ = inspect(capsys, model_path, prompt, "--json", "--rows", rows)
        assert code == 0
        figures.append(json.loads(out))
    assert (figures[0]["rows"], figures[1]["rows"]) == (450, None)
    assert figures[0]["heads"] != figures[1]["heads"]
    for sampled, whole in zip(*(figure["heads"] for figure in figures), strict=True):
        assert sampled["mass"]["block"] == pytest.approx(whole["mass"]["block"], abs=0.2)


@pytest.fixture
def folder(capsys, model_path, prompt_file, tmp_path) -> Path:
    path = tmp_path / "some" / "where"
    code, _, err = inspect(capsys, model_path, prompt_file, "--out", path)
    assert code == 0
    assert "heads.html" in err
    return path


def test_writes_three_files_and_leaves_no_other(folder):
    assert sorted(path.name for path in folder.iterdir()) == ["heads.csv", "heads.html", "heads.jsonl"]


def test_the_record_has_a_map_of_each_head(folder):
    (line,) = (folder / "heads.jsonl").read_text().splitlines()
    record: dict[str, Any] = json.loads(line)
    assert record["kind"] == "heads"
    assert len(record["heads"]) == len(record["maps"]) == 8
    assert {len(base64.b64decode(picture["data"])) for picture in record["maps"]} == {64 * 64}


def test_a_short_prompt_says_how_many_tokens_sink_and_local_are(folder, capsys, model_path, prompt_file):
    page = (folder / "heads.html").read_text(encoding="utf-8")
    record = json.loads((folder / "heads.jsonl").read_text())
    assert {(head["sink_tokens"], head["local_tokens"]) for head in record["heads"]} == {(37, 37)}
    assert "the first 37 tokens" in page
    assert "a window of the latest 37 tokens" in page
    assert "first 64" not in page
    for head in record["heads"]:
        assert f"first 37 {head['mass']['sink']:.1%}" in page
    _, _, err = inspect(capsys, model_path, prompt_file)
    assert "sink is the first 37 tokens, local the latest 37" in err


def test_the_record_says_which_model_it_is_of(folder, model_path):
    model = json.loads((folder / "heads.jsonl").read_text())["model"]
    assert model["name"] == model_path.name
    assert re.fullmatch("[0-9a-f]{16}", model["fingerprint"])
    assert (model["layers"], model["heads"]) == (2, 4)


def test_the_csv_has_the_figures_of_the_record(folder):
    record = json.loads((folder / "heads.jsonl").read_text())
    with (folder / "heads.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row, head in zip(rows, record["heads"], strict=True):
        assert (row["layer"], row["head"], row["pattern"]) == (str(head["layer"]), str(head["head"]), head["pattern"])
        assert float(row["sink"]) == pytest.approx(head["mass"]["sink"], abs=1e-6)
        assert int(row["window"]) == head["window"]
        assert len(row["columns"].split()) == len(head["columns"])


class Page(HTMLParser):
    """Tags that are left open or closed wrongly, identifiers, and every reference."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.policies: list[str | None] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        if ("http-equiv", "Content-Security-Policy") in attrs:
            self.policies.append(dict(attrs)["content"])
        for name, value in attrs:
            if name == "id":
                self.ids.append(value or "")
            if name in ("href", "src"):
                self.references.append(value or "")

    def handle_endtag(self, tag):
        while self.open and self.open[-1] in ("li", "dt", "dd", "td", "th") and self.open[-1] != tag:
            self.open.pop()
        assert self.open.pop() == tag


def test_the_page_is_whole_and_refers_to_nothing_outside(folder):
    page = Page((folder / "heads.html").read_text(encoding="utf-8"))
    assert page.open == []
    assert page.policies == [POLICY]
    assert page.ids == [f"l{layer}h{head}" for layer in range(2) for head in range(4)]
    links = [reference for reference in page.references if not reference.startswith("data:image/png;base64,")]
    assert sorted(links) == sorted(["data:,", *(f"#{name}" for name in page.ids)])


def test_the_pictures_are_the_maps(folder):
    text = (folder / "heads.html").read_text(encoding="utf-8")
    images = re.findall(r'src="data:image/png;base64,([^"]+)"', text)
    maps = json.loads((folder / "heads.jsonl").read_text())["maps"]
    for image, picture in zip(images, maps, strict=True):
        png = base64.b64decode(image)
        size = int.from_bytes(png[png.index(b"IDAT") - 4 :][:4], "big")
        rows = zlib.decompress(png[png.index(b"IDAT") + 4 :][:size])
        assert b"".join(rows[at + 1 : at + 65] for at in range(0, len(rows), 65)) == base64.b64decode(picture["data"])


def test_names_on_the_page_are_escaped(capsys, model_path, prompt_file, tmp_path):
    prompt = tmp_path / "<b>&.txt"
    prompt.write_text(prompt_file.read_text())
    inspect(capsys, model_path, prompt, "--out", tmp_path, "--layers", 0)
    text = (tmp_path / "heads.html").read_text()
    assert "&lt;b&gt;&amp;.txt" in text
    assert "<b>&.txt" not in text


def bad(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    """The one line that a bad command line gives."""
    code, out, err = inspect(capsys, *argv)
    err = without_notes(err)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--layers", "2", "this model has layers 0 to 1, got 2"),
        ("--layers", "0-4", "got 4"),
        ("--heads", "4", "heads 0 to 3, got 4"),
        ("--heads", "x", "ranges such as 0,3-5, got 'x'"),
        ("--heads", "3-1", "got '3-1'"),
        ("--heads", "", "got ''"),
        ("--rows", "0", "--rows must be at least 2, got 0"),
        ("--max-tokens", "1", "--max-tokens must be at least 2, got 1"),
        ("--dtype", "int4", "int4"),
    ],
)
def test_bad_option(capsys, model_path, prompt_file, option, value, expected):
    assert expected in bad(capsys, model_path, prompt_file, option, value)


def test_missing_model(capsys, tmp_path, prompt_file):
    assert "no such model" in bad(capsys, tmp_path / "nowhere", prompt_file)


def test_missing_prompt(capsys, model_path, tmp_path):
    assert "no such prompt file" in bad(capsys, model_path, tmp_path / "nothing.txt")


def test_prompt_of_one_token(capsys, model_path, tmp_path):
    (tmp_path / "short.txt").write_text("w1")
    assert "at least 2" in bad(capsys, model_path, tmp_path / "short.txt")


def test_prompt_longer_than_the_model_allows(capsys, model_path, prompt_file, tmp_path):
    prompt = tmp_path / "long.txt"
    prompt.write_text(" ".join([prompt_file.read_text()] * 4))
    assert "1200 tokens, but this model takes 1024; add --max-tokens 1024" in bad(capsys, model_path, prompt)


def test_out_that_is_a_file(capsys, model_path, prompt_file):
    assert "is a file; give a folder" in bad(capsys, model_path, prompt_file, "--out", prompt_file)


def test_out_below_a_file(capsys, model_path, prompt_file):
    assert "cannot make the folder" in bad(capsys, model_path, prompt_file, "--out", prompt_file / "x")


def test_a_name_that_a_folder_has_is_an_error_and_leaves_no_rest(capsys, model_path, prompt_file, tmp_path):
    (tmp_path / "heads.jsonl" / "x").mkdir(parents=True)
    assert "cannot write" in bad(capsys, model_path, prompt_file, "--out", tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["heads.jsonl"]
