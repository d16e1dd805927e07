"""The benchmark of packed linear layers: what it counts, on tiny shapes, and its tables."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script as loaded


@pytest.fixture
def small(script: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    decode = script("linear_decode")
    monkeypatch.setattr(decode, "SHAPES", {"tiny": [(24, 40)]})
    monkeypatch.setattr(decode, "MODELS", {"tiny": (2, 16, 8, 24)})
    monkeypatch.setattr(decode, "PROMPTS", [(24, 40)])
    monkeypatch.setattr(decode, "FULL", decode.Setting(cache_bytes=12_000, seconds=1e-4))
    return decode


def test_it_writes_a_file_that_the_tables_read(small: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "linear_decode.json"
    threads = torch.get_num_threads()
    monkeypatch.setattr(
        sys, "argv", ["linear_decode.py", "--rounds", "2", "--threads", str(threads), "--out", str(out)]
    )
    assert small.main() == 0
    found = json.loads(out.read_text())
    row = found["layers"][0]["contenders"]
    assert row.keys() == small.CONTENDERS.keys()
    assert row["bf16"]["bytes"] == 24 * 40 * 2
    assert row["bf16"]["copies"] == 7
    assert row["bf16"]["speedup"] == 1.0
    assert row["1 bit"]["bytes"] == 24 * (32 + 16) + 16
    assert row["70% zeros, int8"]["bytes"] < row["70% zeros"]["bytes"] < row["50% zeros"]["bytes"]
    assert found["steps"][0]["products"] == 14
    assert found["steps"][0]["contenders"]["fp32"]["bytes"] == 4 * 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 24)
    assert "1 bit, made whole" in found["prompts"][0]["contenders"]
    tables = loaded("docs/linear_tables.py")
    assert tables.steps(found).count("\n") == 3 + len(small.CONTENDERS)
    assert "| tiny | 40 to 24 |" in tables.layers(found)
    assert "| 40 to 24 | 1 bit |" in tables.prompts(found)
    assert [make({"threads": 1}, tmp_path) for make in tables.MAKERS.values()] == [None, None, None]


def test_copies_share_no_memory_and_compute_the_same(small: Any) -> None:
    for name, make in small.CONTENDERS.items():
        made = small.copied(make((24, 40)), 3)
        x = torch.randn(1, 40, generator=torch.Generator().manual_seed(0)).to(small.dtype_of(name))
        assert all(torch.equal(layer(x), made[0](x)) for layer in made)
        places = [x.data_ptr() for layer in made for x in layer.state_dict().values()]
        assert len(set(places)) == len(places)


def test_speed_is_a_ratio_within_a_round(small: Any) -> None:
    series = {
        name: small.Series(wall=wall, cpu=wall)
        for name, wall in {"bf16": [4.0, 2.0, 6.0], "x": [1.0, 2.0, 2.0]}.items()
    }
    rows = small.summary({"bf16": (series["bf16"], 2), "x": (series["x"], 1)}, "bf16", {"bf16": 1, "x": 4})
    assert rows["x"]["seconds"] == 0.5
    assert rows["x"]["speedup"] == 6.0
    assert rows["bf16"]["seconds"] == 2.0
