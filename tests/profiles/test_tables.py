"""Numbers by layer and head: the authors' formats, round trips, and files that are wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gossamer.methods import DuoAttention, MoA
from gossamer.profiles import read_duo, read_moa, read_table, write_duo, write_moa

GATES = ((0.25, 1.0, 0.0), (0.1, 0.30000000000000004, 0.5))


def folder(
    path: Path, table: str = "0.5\t0.25\n1.0\t0\n", config: str = '{"sink_size": 128, "recent_size": 256}'
) -> Path:
    (path / "full_attention_heads.tsv").write_text(table)
    (path / "config.json").write_text(config)
    return path


def test_duo_survives_the_round_trip_through_a_folder(tmp_path: Path) -> None:
    write_duo(tmp_path / "new" / "folder", GATES, sink=5, recent=7)
    assert read_duo(tmp_path / "new" / "folder") == DuoAttention(GATES, sink=5, recent=7)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "full_attention_heads.tsv",
    ]


def test_the_authors_form_of_numbers_is_read(tmp_path: Path) -> None:
    table = "9.961252570152282715e-01\t-1.000000000000000000e-03\n1.200000000000000000e+00\t0.000000000000000000e+00\n"
    read = read_duo(folder(tmp_path, "# a comment\n" + table + "\n"))
    assert read.gates == ((0.9961252570152283, 0.0), (1.0, 0.0))
    assert (read.sink, read.recent, read.sparsity) == (128, 256, 0.5)


def test_fields_of_the_caller_come_first(tmp_path: Path) -> None:
    read = read_duo(folder(tmp_path), sink=64, sparsity=0.75)
    assert (read.sink, read.recent, read.sparsity) == (64, 256, 0.75)
    with pytest.raises(ValueError, match="unexpected keyword argument 'sinks'"):
        read_duo(tmp_path, sinks=3)


def test_a_table_is_read_from_each_form(tmp_path: Path) -> None:
    expected = ((0.5, 0.25), (1.0, 0.0))
    assert read_table(folder(tmp_path), "gates") == expected
    assert read_table(tmp_path / "full_attention_heads.tsv", "gates") == expected
    (tmp_path / "list.json").write_text(" [[0.5, 0.25], [1, 0]]")
    assert read_table(tmp_path / "list.json", "gates") == expected
    (tmp_path / "object.json").write_text(json.dumps({"alphas": [[0.5, 0.25], [1, 0]], "betas": [[1], [2]]}))
    assert read_table(str(tmp_path / "object.json"), "alphas") == expected
    assert read_table(tmp_path / "object.json", "betas") == ((1.0,), (2.0,))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "must be a list"),
        ("0.5 0.25\n", "line 1: expected numbers between tabs, got '0.5 0.25'"),
        ("0.5\n\n0.5\tx\n", "line 3: expected numbers"),
        ("0.5\tnan\n", "layer 0, head 1: expected a finite number, got nan"),
        ("inf\n", "layer 0, head 0: expected a finite number, got inf"),
        ("0.5\t0.5\n0.5\n", "the same number of heads in each layer"),
        (b"\xff\xfe", "not ASCII text"),
        (b"\x00\x01", "line 1: expected numbers"),
        ("{", "is not JSON"),
        ("[[NaN]]", "a number in it is nan"),
        ("[" * 100 + "]" * 100, "nested too deeply"),
        ("[]", r"must be a list \(layers\) of lists"),
        ("[[]]", "must be a list"),
        ('[{"0": 1}]', "must be a list"),
        ('[["1"]]', "layer 0, head 0: expected a finite number, got '1'"),
        ("[[1], [true]]", "layer 1, head 0: expected a finite number, got true"),
        ("{}", "has no gates; it has nothing"),
        ('{"alphas": 1, "betas": 2}', "has no gates; it has 'alphas', 'betas'"),
        ('{"gates": null}', "gates must be a list .* got null"),
        ("[" + ",".join(["[1]"] * 100_001) + "]", "more than any model"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "table"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ValueError, match=message) as caught:
        read_table(path, "gates")
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 300 + len(str(path))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("[]", "sink_size must be an integer, got null"),
        ('{"sink_size": 1.5, "recent_size": 2}', "sink_size must be an integer, got 1.5"),
        ('{"sink_size": 1, "recent_size": true}', "recent_size must be an integer, got true"),
        ('{"sink_size": 1, "recent_size": 0}', "recent must be at least 1, got 0"),
        ("{", "config.json is not JSON"),
    ],
)
def test_other_configs_are_refused(tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_duo(folder(tmp_path, config=config))


def test_what_is_not_there_is_an_error_of_the_system(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_table(tmp_path, "gates")
    with pytest.raises(OSError, match="device"):
        read_table("/dev/zero", "gates")


def test_spans_survive_the_round_trip_through_a_file(tmp_path: Path) -> None:
    method = MoA([[1024.0, -0.125], [0.0, 3.0]], [[0.5, 1.0], [0.0, 0.1]])
    write_moa(tmp_path / "moa.json", method)
    assert read_moa(tmp_path / "moa.json") == method
    assert read_moa(tmp_path / "moa.json", sink=3).sink == 3
    data = json.loads((tmp_path / "moa.json").read_text())
    (tmp_path / "more.json").write_text(json.dumps(data | {"permutation": [[1, 0], [0, 1]]}))
    assert read_moa(tmp_path / "more.json") == method


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"alphas": [[1]]}', "has no betas"),
        ('{"alphas": [[1]], "betas": [[1, 2]]}', "must be for the same layers and heads"),
        ('{"alphas": [[1]], "betas": [["1"]]}', "betas, layer 0, head 0: expected a finite number, got '1'"),
    ],
)
def test_spans_that_are_none_are_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "moa.json").write_text(content)
    with pytest.raises(ValueError, match=f"moa.json.*{message}"):
        read_moa(tmp_path / "moa.json")
    with pytest.raises(ValueError, match=str(tmp_path)):
        read_moa(tmp_path / "moa.json", sinks=3)
