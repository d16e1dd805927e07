"""Channels as files: the authors' form, what is written is read, and everything else is refused with a reason."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gossamer.cli.specs import parse_method
from gossamer.methods import DoubleSparsity
from gossamer.profiles import read_channels, write_channels

K = {"model.layers.0.self_attn.k_proj": [[1, 0], [0, 1]], "model.layers.1.self_attn.k_proj": [[0, 1], [1, 0]]}
QK = {name.replace("k_proj", "qk_proj"): rows * 2 for name, rows in K.items()}
CHANNELS = (((1, 0), (0, 1)), ((0, 1), (1, 0)))


def write(path: Path, data: Any) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_a_file_of_the_authors(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", QK | K | {"model.layers.0.mlp": 3})
    assert read_channels(file) == read_channels(file, "k") == CHANNELS
    assert read_channels(file, "qk") == tuple(heads * 2 for heads in CHANNELS)
    assert read_channels(write(tmp_path / "d.json", QK)) == read_channels(file, "qk")


def test_a_method_takes_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", K)
    method = parse_method(f"double_sparsity(budget=64,channels=@{file})")
    assert method == DoubleSparsity(budget=64, channels=CHANNELS)


@pytest.mark.parametrize("kind", ["k", "q", "qk"])
def test_what_is_written_is_read(tmp_path: Path, kind: str) -> None:
    write_channels(tmp_path / "c.json", CHANNELS, kind)
    assert read_channels(tmp_path / "c.json", kind) == read_channels(tmp_path / "c.json") == CHANNELS


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("no json", "c.json is"),
        ([1], "must hold an object of tables by layer, got"),
        ({}, "has no model.layers.0.self_attn.k_proj"),
        ({"model.layers.1.self_attn.k_proj": [[0]]}, "has no model.layers.0.self_attn.k_proj"),
        ({"model.layers.0.self_attn.k_proj": []}, "layer 0 must be a list (heads) of lists of channels"),
        ({"model.layers.0.self_attn.k_proj": [[0], []]}, "layer 0 must be a list (heads) of lists of channels"),
        ({"model.layers.0.self_attn.k_proj": [[0, 2]]}, "layer 0, head 0: expected each channel from 0 on once"),
        ({"model.layers.0.self_attn.k_proj": [[0, 0]]}, "layer 0, head 0: expected each channel from 0 on once"),
        ({"model.layers.0.self_attn.k_proj": [[0, True]]}, "layer 0, head 0: expected each channel from 0 on once"),
    ],
)
def test_other_files_are_refused(tmp_path: Path, data: Any, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read_channels(write(tmp_path / "c.json", data))


def test_kinds_that_there_are_none_of(tmp_path: Path) -> None:
    file = write(tmp_path / "c.json", K)
    with pytest.raises(ValueError, match="kind must be one of k, qk, q, got 'v'"):
        read_channels(file, "v")
    with pytest.raises(ValueError, match=r"has no model.layers.0.self_attn.q_proj"):
        read_channels(file, "q")
