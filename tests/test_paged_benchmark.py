"""benchmarks/paged.py measures both ways, and says where keys were copied after all."""

import json
import sys

import pytest

from gossamer.backends import cpu


@pytest.mark.skipif(not cpu.is_available(), reason="needs the C++ kernels")
def test_a_chunk_over_pages_is_measured_both_ways(script, monkeypatch, tmp_path):
    paged, out = script("paged"), tmp_path / "paged.json"
    monkeypatch.setattr(paged, "HEADS", 4)
    monkeypatch.setattr(paged, "GROUPS", 2)
    given = ["paged.py", "--lengths", "512", "--chunk", "128", "--rounds", "1", "--out", str(out)]
    for methods in ("a_shape", "pbs"):
        monkeypatch.setattr(sys, "argv", [*given, "--methods", methods])
        assert paged.main() == 0
    rows = {(row["method"], row["layout"]): row for row in json.loads(out.read_text())["rows"]}
    assert set(rows) == {(method, layout) for method in ("a_shape", "pbs") for layout in ("amx", "vec")}
    for (method, _), row in rows.items():
        assert row["copies"] == (method == "pbs")
        assert all(len(row["ways"][way]["each_s"]) == 1 for way in ("copied", "in place"))
