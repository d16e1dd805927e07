"""The results file: what may be gone on with, what is left as it is, and what tells cells apart."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from test_runner import DENSE, job, run, without_circumstances

from gossamer.evaluate.haystack import Haystack
from gossamer.evaluate.records import cell_of, check_out, read_lines
from gossamer.evaluate.summary import read_results

SMALL = {"methods": (DENSE,), "lengths": (300,), "samples": 1, "perplexity": None, "fidelity": 0}
FOREIGN = {
    "text without a line end": b"notes",
    "text": b"notes\nmore\n",
    "binary": b"\x89PNG\x00\xff\xfe",
    "binary with lines": b"\xff\xfe\n\x00\n",
    "JSON of another program": b'{"kind": "heads"}\n',
    "JSON of another program, cut off": b'{"kind": "heads", "lay',
    "lines of another program, cut off": b'{"kind": "heads"}\n{"kind": "run", "x',
}


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_a_file_of_something_else_is_refused_and_left_as_it_is(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    for use in (lambda: check_out(path), lambda: run(path, job(**SMALL))):
        with pytest.raises(ValueError, match=r"notes\.txt is not a results file.*choose another --out"):
            use()
    assert path.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b"{", b'{"kind": "ru', b'{"kind": "run", "format": 1, "run": "c1'])
def test_a_file_that_was_cut_off_in_its_first_line_begins_again(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(content)
    check_out(path)
    assert path.read_bytes() == content
    assert len(run(path, job(**SMALL))) == 2
    assert [record["kind"] for record in read_results(path)] == ["run", "sample", "sample"]


def test_answers_with_other_line_separators_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    run(path, job(**SMALL))
    odd = "a\u2028b\u0085c\u2029d"
    lines = path.read_text().split("\n")
    record = json.loads(lines[1])
    record["turns"][0]["generated"] = odd
    lines[1] = json.dumps(record, ensure_ascii=False)
    path.write_text("\n".join(lines))
    assert run(path, job(**SMALL)) == []
    assert read_results(path)[1]["turns"][0]["generated"] == odd


def test_perplexity_of_another_text_is_another_cell(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    first = job(**SMALL | {"tasks": (), "samples": 2, "perplexity": job().haystack})
    other = Haystack("other", job().haystack.text[5000:])
    assert len(run(path, first)) == 2
    assert len(run(path, job(**SMALL | {"tasks": (), "samples": 2, "perplexity": other}))) == 2
    assert run(path, first) == []
    assert len({record["text_sha256"] for record in without_circumstances(path)}) == 2


def test_thresholds_tell_cells_apart_but_not_those_of_dense() -> None:
    line = {"kind": "sample", "task": "a", "length": 64, "index": 0, "policy": "min_tokens=2048,max_density=0.9"}
    other = {"policy": "min_tokens=0,max_density=0.9"}
    sparse, dense = (line | {"method_fields": {"method": name}} for name in ("a_shape", "dense"))
    assert cell_of(sparse) != cell_of(sparse | other)
    assert cell_of(dense) == cell_of(dense | other)


def test_no_file_is_made_before_there_is_a_line(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "r.jsonl"
    check_out(path)
    assert run(path, job(**SMALL), stop_after=1)
    assert path.exists()
    assert not list(tmp_path.glob("*.jsonl"))


def test_what_cannot_be_written_is_said_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"it is a folder; name a file with --out"):
        check_out(tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is not a folder; choose another --out"):
        check_out(tmp_path / "file" / "r.jsonl")
    if os.geteuid() != 0:  # root may write everywhere
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(ValueError, match="you may not write to"):
            check_out(tmp_path / "closed" / "r.jsonl")


def test_lines_are_numbered_in_messages() -> None:
    with pytest.raises(ValueError, match="line 2 is not a JSON object with a kind"):
        read_lines(b'{"kind": "run"}\n[1]\n', Path("r.jsonl"))
