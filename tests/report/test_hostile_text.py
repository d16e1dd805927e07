"""Text of a results file in pages and tables: markup stays text, no script runs, no formula is made of it."""

from __future__ import annotations

import csv
import html
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from every_line import LINES

from gossamer.cli import main
from gossamer.report import write_report
from gossamer.report.html import POLICY, Html, breakable, document, element, join, text
from gossamer.report.spreadsheet import csv_text

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
RUNS = "document.documentElement.dataset.ran=1"
MARKUP = (
    f"'\"></text></title></style></textarea></script>--><script>{RUNS}</script>"
    f"<img src=x onerror={RUNS}><svg onload={RUNS}></svg><a href='javascript:{RUNS}'>&lt;"
)
# As long, and as many words, but nothing that HTML knows.
HARMLESS = re.sub("[<>&'\"]", "x", MARKUP)


def with_text(value: Any, added: str, name: str = "") -> Any:
    """All text of a record with something at its end, names of objects that are not fields too."""
    if isinstance(value, dict):
        free = name in ("machine", "versions", "mass", "scores", "dense_because", "task_fields", "kernels", "ruler_vt")
        return {(key + added if free else key): with_text(item, added, key) for key, item in value.items()}
    if isinstance(value, list):
        return [with_text(item, added, name) for item in value]
    return value + added if isinstance(value, str) and name not in ("kind", "data", "frames") else value


class Tags(HTMLParser):
    """Every tag with the names of its attributes, in order; places where a line may break are left out."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, ...]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag != "wbr":
            self.tags.append((tag, *(name for name, _ in attrs)))


@pytest.fixture(scope="module")
def page_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    def make(added: str) -> str:
        folder = tmp_path_factory.mktemp("page")
        results = folder / "r.jsonl"
        results.write_text("".join(json.dumps(with_text(line, added)) + "\n" for line in LINES))
        title = ["--title", f"title{added}"]
        assert main(["report", str(results), "--out", str(folder / "p.html"), *title]) == 0
        return (folder / "p.html").read_text(encoding="utf-8")

    return make


def test_markup_in_any_text_adds_no_tag(page_of: Callable[[str], str]) -> None:
    page = page_of(MARKUP)
    tags = Tags(page).tags
    assert tags == Tags(page_of(HARMLESS)).tags
    assert len(tags) > 100
    assert not {tag for tag, *_ in tags} & {"script", "iframe", "object", "embed", "base", "form"}
    assert not [name for _, *names in tags for name in names if name.startswith("on")]
    # What is shown is there, as text: the model, a method, a task, what a processor is, what an old page ran dense for.
    shown = page.replace("<wbr>", "")
    for name in ("model", "fast", "needle_single", "a processor", "package", "title"):
        assert html.escape(name + MARKUP) in shown


def test_a_name_of_a_model_that_heads_have_alone_is_escaped(tmp_path: Path) -> None:
    heads = [line | {"model": MARKUP} for line in LINES if line["kind"] == "heads"]
    write_report(heads, tmp_path / "p.html")
    page = (tmp_path / "p.html").read_text(encoding="utf-8")
    assert html.escape(MARKUP) in page
    assert "<script" not in page


def test_numbers_of_a_model_that_are_markup_are_escaped_even_unread(tmp_path: Path) -> None:
    """`write_report` takes records that no reader has checked."""
    lines = json.loads(json.dumps(LINES))
    lines[0]["model"] |= {"heads": MARKUP}
    write_report(lines, tmp_path / "p.html")
    assert "<script" not in (tmp_path / "p.html").read_text(encoding="utf-8")


def test_the_page_forbids_scripts_and_requests(page_of: Callable[[str], str]) -> None:
    page = page_of("")
    assert f'<meta http-equiv="Content-Security-Policy" content="{html.escape(POLICY)}">' in page.partition("<title")[0]
    assert "default-src 'none'" in POLICY
    assert "script-src" not in POLICY


def test_what_is_not_markup_is_escaped_wherever_it_goes() -> None:
    assert text("<b>") == "&lt;b&gt;"
    assert text(Html("<b>")) == "<b>"
    assert element("p", "<b>", element("i", "&"), 1, title='"', class_="'") == (
        '<p title="&quot;" class="&#x27;">&lt;b&gt;<i>&amp;</i>1</p>'
    )
    # An attribute is text, even where it was markup; and so is a string that was formed of markup.
    assert element("p", title=Html("<b>")) == '<p title="&lt;b&gt;"></p>'
    assert element("p", element("b") + "") == "<p>&lt;b&gt;&lt;/b&gt;</p>"
    assert join(("<", element("br")), "&") == "&lt;&amp;<br>"
    assert breakable("<a>(b=1,c)") == "&lt;a&gt;<wbr>(b=<wbr>1,<wbr>c)"
    assert element("img", alt=None, src="x") == '<img src="x">'
    assert text("\ud800") == "?"
    assert "<title>&lt;b&gt;</title>" in document("<b>", "", "<i>")
    assert "&lt;i&gt;" in document("<b>", "", "<i>")


def run_by_a_browser(page: str, folder: Path) -> bool:
    """Whether any script of a page ran."""
    path = folder / "page.html"
    path.write_text(page, encoding="utf-8")
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    command += ["--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    root = re.search(r"<html[^>]*>", done.stdout)
    assert root is not None, done.stdout
    return "data-ran" in root[0]


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_no_script_runs_in_a_browser(page_of: Callable[[str], str], tmp_path: Path) -> None:
    policy = element("meta", http_equiv="Content-Security-Policy", content=POLICY)
    page = page_of(MARKUP)
    assert page.count(policy) == 1
    # Escaping alone keeps scripts from running, and so does the policy alone.
    assert not run_by_a_browser(page.replace(policy, ""), tmp_path)
    assert not run_by_a_browser(page, tmp_path)
    spoilt = page.replace("</h1>", f"</h1>{MARKUP}", 1)
    assert not run_by_a_browser(spoilt, tmp_path)
    assert run_by_a_browser(spoilt.replace(policy, ""), tmp_path)


@pytest.mark.parametrize("cell", ["=1+2", "+cmd|' /C calc'!A0", "-2+3", "@SUM(A1)", "\t=1", "-A1", "=", "+", "-1 [=1]"])
def test_text_that_a_spreadsheet_would_run_is_quoted(cell: str) -> None:
    (row,) = csv.reader(csv_text([[cell, 1]]).splitlines())
    assert row == [f"'{cell}", "1"]


@pytest.mark.parametrize(
    "cell", [-1, -0.5, 1e-7, None, "", "-", "-0.010", "+0.010 [-0.100, +0.200]", "-5%", "1:0.5", "a=1", "dense"]
)
def test_numbers_and_plain_text_are_not_quoted(cell: Any) -> None:
    (row,) = csv.reader(csv_text([[cell, 1]]).splitlines())
    assert row == ["" if cell is None else str(cell), "1"]


def test_labels_of_a_results_file_are_quoted_in_every_table(tmp_path: Path) -> None:
    lines = json.loads(json.dumps(LINES))
    for line in lines:
        line.pop("method_fields", None)
        for name in ("method", "task"):
            if name in line:
                line[name] = f"=HYPERLINK({line[name]})"
    write_report(lines, tmp_path / "p.html")
    found = 0
    for path in (tmp_path / "p_csv").glob("*.csv"):
        with path.open(newline="") as file:
            cells = [cell for row in csv.reader(file) for cell in row]
        assert not [cell for cell in cells if cell.startswith("=")]
        found += sum(cell.startswith("'=") for cell in cells)
    assert found > 20
