"""The report: pictures and their numbers agree, text is escaped, a browser shows it without errors or overflow."""

from __future__ import annotations

import base64
import csv
import json
import math
import random
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli import main
from gossamer.evaluate.summary import summary_rows
from gossamer.report.charts import figures
from gossamer.report.figure import Figure, label_styles
from gossamer.report.latency import break_even
from gossamer.report.overview import in_words, overview, short_table
from gossamer.report.page import findings, write_report

NAMES = ["needles", "density", "recall", "latency", "logits", "heads", "attention", "maps"]
# Exponent in the length, and seconds at 4096, of dense attention.
SECONDS = {"dense": (2.0, 1.0), "dense(kernel=own)": (2.0, 0.5)}
LENGTHS = (4096, 8192, 16384)
METHODS = {
    "dense": 1.0,
    "dense(kernel=own)": 1.0,
    "fast(size=1)": 0.1,
    "fast(size=4)": 0.4,
    "good(vertical_size=250,slash_size=1500,last_queries=256)": 0.2,
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
# Leaves in the DOM what it measured of the page in the frame.
MEASURE = """
const sizes = (page, what) => [...page.querySelectorAll(what)].map(e => e.getBoundingClientRect());
frame.onload = () => {
  const page = frame.contentDocument, root = page.documentElement;
  const first = page.querySelector("#overview").getBoundingClientRect().bottom;
  const folded = [...page.querySelectorAll("details")].every(e => !e.open && e.getBoundingClientRect().height < 90);
  page.querySelectorAll("details").forEach(e => e.open = true);
  found.textContent = JSON.stringify({
    first, folded,
    overflow: root.scrollWidth - root.clientWidth,
    pictures: sizes(page, "figure > svg, figure > img").map(r => [r.width, r.height]),
    sections: [...page.querySelectorAll("section")].map(s => s.id),
    loaded: [...page.images].every(i => i.complete && i.naturalWidth > 0),
    tables: [...page.querySelectorAll(".scroll")].map(e => e.scrollWidth - e.clientWidth),
    names: sizes(page, "#summary td:first-child").map(r => r.width),
    accuracies: sizes(page, "#summary td:nth-child(4)").map(r => [r.left, r.right]),
    frozen: [...new Set([...page.querySelectorAll("td:first-child")].map(e => getComputedStyle(e).position))],
    smallest: Math.min(...sizes(page, "svg text").map(r => r.height)),
  });
};
"""


def make_records(samples: int = 25) -> list[dict[str, Any]]:
    rng = random.Random(0)
    records: list[dict[str, Any]] = [
        {
            "kind": "run",
            "model": {
                "name": "<b>model</b>",
                "architecture": "Llama",
                "fingerprint": "abc",
                "layers": 2,
                "heads": 3,
                "parameters": 1000,
                "dtype": "bfloat16",
            },
            "machine": {"processor": "cpu"},
            "versions": {"torch": "2"},
            "haystack": {"name": "x", "sha256": "y", "characters": 5},
            "seed": 0,
        }
    ]
    square = base64.b64encode(bytes(range(16))).decode()
    for length in LENGTHS:
        for method, share in METHODS.items():
            head = {"method": method, "length": length, "density": share}
            for task in ("needle_single", "chain"):
                for index in range(samples):
                    score = 1.0 if method.startswith("dense") else float(rng.random() < 0.5 + share / 2)
                    depth = rng.random() if task == "needle_single" else None
                    turn = {
                        "generated": "<script>alert(1)</script>",
                        "references": ["1"],
                        "score": score,
                        "depth": depth,
                    }
                    growth, start = SECONDS.get(method, (1.1, 2.0))
                    seconds = start * (length / 4096) ** growth
                    more = {"task": task, "index": index, "turns": [turn], "score": score, "prefill_s": seconds}
                    records.append({"kind": "sample"} | head | more)
            if not method.startswith("dense"):
                grid = [[share + 0.1 * i + 0.01 * j for j in range(3)] for i in range(2)]
                figures_ = {name: grid for name in ("recall", "oracle_recall", "head_density", "relative_l2", "cosine")}
                logits = {
                    "edges": [0, 64, length],
                    "kl": [0.1, 0.2],
                    "top1": [0.9, 0.8],
                    "mean_kl": 0.2,
                    "mean_top1": 0.8,
                }
                maps = [{"layer": 0, "head": 1, "size": 4, "data": square}]
                more = {"index": 0, "mean": {"recall": 0.5, "oracle_recall": 0.6}, "logits": logits, "maps": maps}
                records.append({"kind": "fidelity", "task": "needle_single"} | head | figures_ | more)
    heads = [
        {"layer": i, "head": j, "pattern": pattern, "mass": {"sink": 0.1, "local": 0.2}}
        for i in range(2)
        for j, pattern in enumerate(("sink", "slash", "diffuse"))
    ]
    maps = [{"layer": 0, "head": 1, "size": 4, "data": square}]
    model = records[0]["model"]
    records.append(
        {
            "kind": "heads",
            "model": model,
            "task": "needle_single",
            "length": 4096,
            "index": 0,
            "heads": heads,
            "maps": maps,
        }
    )
    records.append({"kind": "unknown", "anything": 1})
    return records


RECORDS = make_records()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "report.html"
    write_report(RECORDS, out)
    return out


def test_every_picture_has_panels_and_numbers() -> None:
    made = figures(RECORDS, summary_rows(RECORDS))
    assert [figure.name for figure in made] == NAMES
    for figure in made:
        assert figure.panels
        assert len(figure.table) > 1
        assert all(len(row) == len(figure.table[0]) for row in figure.table[1:])


def test_files_are_complete_and_nothing_temporary_stays(page: Path) -> None:
    folder = page.with_name("report_csv")
    assert {path.stem for path in folder.iterdir()} == {"overview", "summary", "tasks", *NAMES}
    assert [path.name for path in page.parent.iterdir() if path.name.endswith(".tmp")] == []
    with (folder / "density.csv").open() as file:
        rows = list(csv.DictReader(file))
    expected = {(row.method, row.length): row.accuracy for row in summary_rows(RECORDS)}
    assert {(row["method"], int(row["length"])): float(row["accuracy"]) for row in rows} == expected
    assert base64.b64encode((folder / "density.csv").read_bytes()).decode() in page.read_text()


def test_the_page_stands_alone_and_escapes_what_it_shows(page: Path) -> None:
    text = page.read_text()
    assert "<script" not in text
    assert "<b>model</b>" not in text
    assert "&lt;b&gt;model&lt;/b&gt;" in text
    assert not re.search(r"(?:src|href)=['\"](?!data:|#)", text)


def test_pictures_show_the_numbers_of_the_table() -> None:
    needles = figures(RECORDS, summary_rows(RECORDS))[0]
    caption, svg = needles.panels[0]
    task, method = caption.split(", ")
    cells = [row for row in needles.table[1:] if row[:2] == [task, method]]
    shown = re.findall(r'fill="#(?:000|fff)" font-size="11">([^<]*)<', svg)
    counts = re.findall(r'font-size="9">n (\d+)<', svg)
    assert sorted(map(int, counts)) == sorted(row[6] for row in cells)
    assert len(shown) == len(cells) > 10
    assert svg.count("·") == 15 - len(cells)
    assert sorted(shown) == sorted("1" if row[5] == 1 else f"{row[5]:.2f}".replace("0.", ".") for row in cells)


def test_break_even() -> None:
    lengths = [1000, 2000, 4000]
    assert break_even(lengths, [1, 4, 16], [2, 4, 8]) == pytest.approx(2000)
    assert break_even(lengths, [1, 4, 16], [4, 8, 16]) is None
    assert break_even(lengths, [1, 4, 16], [0.5, 1, 2]) == 1000
    crossing = break_even([1000, 4000], [1, 16], [2, 8])
    assert crossing == pytest.approx(2000)
    assert math.isclose(crossing or 0, 2000)


def picture_of(name: str, records: list[dict[str, Any]] = RECORDS) -> Figure:
    return next(figure for figure in figures(records, summary_rows(records)) if figure.name == name)


def test_methods_are_compared_with_each_dense_attention() -> None:
    latency = picture_of("latency")
    header, *rows = latency.words
    assert header == [
        "method",
        "faster than dense from",
        "times as fast at 16K",
        "faster than dense(kernel=own) from",
        "times as fast at 16K",
    ]
    assert [row[0] for row in rows] == [
        "fast(size=1)",
        "fast(size=4)",
        "good(vertical_size=250,slash_size=1500,last_queries=256)",
    ]
    assert rows[0][1:] == ["about 8.64K", "1.74", "not up to 16K", "0.87"]
    assert "what it gains over dense is the kernel's doing" in latency.note
    assert latency.table[0][3:] == ["times as fast as dense", "times as fast as dense(kernel=own)"]
    own = next(row for row in latency.table if row[:2] == ["dense(kernel=own)", 16384])
    assert own[2:] == pytest.approx([8, 2, 1])


def test_all_methods_and_dense_are_told_apart_and_named() -> None:
    styles = label_styles([*METHODS, *(f"m{i}(n={j})" for i in range(12) for j in range(3))])
    assert len(set(styles.values())) == len(styles) == len(METHODS) + 36
    for name in ("latency", "logits"):
        picture = picture_of(name)
        drawn = [label for label in METHODS if name == "latency" or not label.startswith("dense")]
        assert re.findall(r"</svg> <span>(.*?)</span>", picture.legend.replace("<wbr>", "")) == drawn
    assert "</svg> <span>dense</span>" in picture_of("density").legend


def test_findings_come_from_the_figures() -> None:
    sentences = findings(summary_rows(RECORDS))
    assert len(sentences) == 3
    assert all(sentence.startswith("At 16,384 tokens") for sentence in sentences)
    assert "loses 0." in sentences[0]
    assert "computes 10.0% of the pairs" in sentences[0]
    assert not any(sentence.startswith("At 16,384 tokens dense") for sentence in sentences)
    assert "takes 0.57 times the prefill of dense, 1.15 times that of dense(kernel=own)" in sentences[0]
    few = findings(summary_rows(make_records(4)))
    assert all(re.search(r"\d samples( a task)? are too few", sentence) for sentence in few)


def test_the_first_screen_is_of_the_longest_length() -> None:
    rows = summary_rows(RECORDS)
    figure = overview(rows)
    assert [caption.partition(":")[0] for caption, _ in figure.panels] == [
        "Answers",
        "Predictions",
        "Attention mass lost against density",
    ]
    longest = [row for row in rows if row.length == max(LENGTHS)]
    assert [line[0] for line in figure.table[1:]] == [row.method for row in longest]
    answers, predictions, masses = (drawn for _, drawn in figure.panels)
    for method in METHODS:
        row = next(row for row in longest if row.method == method)
        assert f"{method}: {row.accuracy:.3f} in {row.prefill_s:.2f} s [" in answers
        dense = method.startswith("dense")
        assert (f"{method}: 0.200 in" in predictions) == (not dense)
        assert (f"{method}: loses 0.5000, its oracle 0.4000" in masses) == (not dense)
    assert predictions.count('stroke-dasharray="5 4"') == 2  # of each dense attention


def test_the_first_screen_says_five_things_in_words() -> None:
    rows = summary_rows(RECORDS)
    lines = in_words(rows)
    assert len(lines) == 4  # nothing keeps all answers here
    kept = {"difference": 0.0, "difference_interval": (-0.07, 0.07)}
    five = in_words([replace(row, **kept) if row.method == "fast(size=4)" else row for row in rows])
    assert len(five) == 5
    assert five[1].startswith("1 of 3 settings lose no answers that these samples could show.")
    assert "fast(size=4), " in five[1]
    assert "may still lose up to 0.07" in five[1]
    assert lines[0] == (
        "At 16,384 tokens (50 samples) dense takes 16.00 s and scores 1.000; dense(kernel=own) takes 8.00 s and scores "
        "1.000."
    )
    loses = [r.method for r in rows if r.length == 16384 and r.difference_interval and r.difference_interval[1] < 0]
    assert any(line.startswith(f"{len(loses)} lose measurably") for line in lines)
    assert "KL 0.2" in next(line for line in lines if line.startswith("Nearest to the predictions"))
    assert "keeps 50.0% of the attention mass, the best 60.0%" in lines[-1]
    table = short_table(rows)
    assert [row[0] for row in table[1:3]] == ["dense", "dense(kernel=own)"]
    assert all(len(row) == len(table[0]) for row in table)
    assert len(table) <= 8


def test_without_answers_and_predictions_there_is_no_first_screen(tmp_path: Path) -> None:
    heads = [record for record in RECORDS if record["kind"] in ("run", "heads")]
    write_report(heads, tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert 'id="overview"' not in text
    assert text.count("<details open") == 1
    assert text.index("<details open") < text.index("<details>")
    assert not (tmp_path / "r_csv" / "overview.csv").exists()


def test_results_of_two_models_are_refused(tmp_path: Path) -> None:
    other = json.loads(json.dumps(RECORDS[0]).replace('"abc"', '"def"'))
    with pytest.raises(ValueError, match="2 models"):
        write_report([*RECORDS, other], tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def heads_of(fingerprint: str | None) -> list[dict[str, Any]]:
    """The records, with the heads of a model of that fingerprint, or of one that is not told."""
    (heads,) = (record for record in RECORDS if record["kind"] == "heads")
    model = "<i>other</i>" if fingerprint is None else heads["model"] | {"fingerprint": fingerprint}
    return [record if record is not heads else heads | {"model": model} for record in RECORDS]


def test_heads_of_another_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"2 models \(<b>model</b> abc, <b>model</b> def\)"):
        write_report(heads_of("def"), tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_heads_that_do_not_tell_their_model_are_warned_of(tmp_path: Path) -> None:
    write_report(heads_of(None), tmp_path / "r.html")
    text = (tmp_path / "r.html").read_text()
    assert "does not tell of which model they are but its name, &lt;i&gt;other&lt;/i&gt;" in text
    write_report(RECORDS, tmp_path / "r.html")
    assert 'class="warning"' not in (tmp_path / "r.html").read_text()


def test_heads_alone_have_a_page_with_their_model(tmp_path: Path) -> None:
    write_report([record for record in RECORDS if record["kind"] == "heads"], tmp_path / "r.html")
    assert "Llama, 2 layers of 3 heads" in (tmp_path / "r.html").read_text()


def test_several_machines_are_said(tmp_path: Path) -> None:
    other = json.loads(json.dumps(RECORDS[0]).replace('"cpu"', '"gpu"'))
    write_report([*RECORDS, other], tmp_path / "r.html")
    assert "several machines" in (tmp_path / "r.html").read_text()


class TestCommand:
    def write(self, tmp_path: Path) -> Path:
        path = tmp_path / "r.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in RECORDS))
        return path

    def test_writes_the_page(self, capsys, tmp_path):
        out = tmp_path / "page.html"
        assert main(["report", str(self.write(tmp_path)), "--out", str(out)]) == 0
        captured = capsys.readouterr()
        assert captured.out == f"{out}\n"
        assert "11 CSV files" in captured.err

    def test_json_lists_files_and_rows(self, capsys, tmp_path):
        out = tmp_path / "page.html"
        assert main(["report", str(self.write(tmp_path)), "--out", str(out), "--json"]) == 0
        data = json.loads(capsys.readouterr().out)
        assert data["files"][0] == str(out)
        assert len(data["rows"]) == 15

    def test_bad_input_is_one_line(self, capsys, tmp_path):
        empty = tmp_path / "empty.jsonl"
        empty.write_text("")
        for path, message in ((tmp_path / "none", "cannot read"), (empty, "no results")):
            assert main(["report", str(path), "--out", str(tmp_path / "p.html")]) == 2
            assert message in capsys.readouterr().err
        assert not (tmp_path / "p.html").exists()

    def test_the_results_are_never_overwritten(self, capsys, tmp_path):
        results = self.write(tmp_path)
        linked = tmp_path / "linked.html"
        linked.hardlink_to(results)
        folder = tmp_path / "p_csv"
        folder.mkdir()
        (folder / "density.csv").symlink_to(results)
        before = results.read_bytes()
        for out in (results, tmp_path / "." / "r.jsonl", linked, tmp_path / "p.html"):
            assert main(["report", str(results), "--out", str(out)]) == 2
            assert "is one of the results" in capsys.readouterr().err
        assert results.read_bytes() == before
        assert not (tmp_path / "p.html").exists()

    def test_a_file_that_is_no_report_is_not_overwritten(self, capsys, tmp_path):
        results = self.write(tmp_path)
        other = tmp_path / "other.jsonl"
        other.write_bytes(results.read_bytes())
        (tmp_path / "notes.md").write_text("# Notes\n")
        folder = tmp_path / "p_csv"
        folder.mkdir()
        (folder / "maps.csv").write_bytes(results.read_bytes())
        for out, what in (("other.jsonl", "no HTML page"), ("notes.md", "no HTML page"), ("p.html", "no CSV")):
            assert main(["report", str(results), "--out", str(tmp_path / out)]) == 2
            assert what in capsys.readouterr().err
        assert other.read_bytes() == results.read_bytes()

    def test_a_report_is_written_over_an_older_one(self, tmp_path):
        results, out = self.write(tmp_path), tmp_path / "p.html"
        for title in ("one", "two"):
            assert main(["report", str(results), "--out", str(out), "--title", title]) == 0
        assert "<h1>two</h1>" in out.read_text()


def measured_by_a_browser(page: Path, width: int) -> dict[str, Any]:
    """What a script of the tests' own finds of the page in a frame of that width."""
    frame = page.with_name("frame.html")
    frame.write_text(
        f"<iframe id=frame src='{page.as_uri()}' style='width:{width}px;height:4000px;border:0'></iframe>"
        f"<pre id=found></pre><script>{MEASURE}</script>"
    )
    assert CHROMIUM is not None
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += [f"--user-data-dir={page.with_name('profile')}", "--enable-logging=stderr"]
    command += ["--virtual-time-budget=3000", "--window-size=1400,1000", "--dump-dom", frame.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert "CONSOLE" not in done.stderr, done.stderr
    measured = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert measured is not None
    return json.loads(measured[1])


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_all_pictures_without_errors_or_overflow(page: Path, width: int) -> None:
    found = measured_by_a_browser(page, width)
    assert found["overflow"] <= 0
    assert found["sections"] == ["overview", "summary", "tasks", *NAMES, "circumstances"]
    assert found["loaded"]
    assert len(found["pictures"]) >= 20
    assert all(across > 60 and down > 30 for across, down in found["pictures"])
    assert found["smallest"] > 8


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_the_first_screen_has_what_a_person_came_for(page: Path) -> None:
    found = measured_by_a_browser(page, 1280)
    assert found["folded"]
    assert found["first"] < 1000


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_wide_window_shows_all_columns(page: Path, tmp_path: Path) -> None:
    assert max(measured_by_a_browser(page, 1280)["tables"]) <= 0
    many = [r | {"task": f"{r['task']}_{r['index'] % 4}"} if r["kind"] == "sample" else r for r in RECORDS]
    write_report(many, tmp_path / "many.html")
    assert max(measured_by_a_browser(tmp_path / "many.html", 1280)["tables"]) <= 0


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium is installed")
def test_a_narrow_window_shows_accuracy_beside_names_that_stay(page: Path) -> None:
    found = measured_by_a_browser(page, 390)
    assert len(found["accuracies"]) == 15
    assert found["frozen"] == ["sticky"]
    assert max(found["names"]) < 125
    assert all(left > max(found["names"]) and right < 390 for left, right in found["accuracies"])
