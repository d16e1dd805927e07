"""What a search keeps on the disk: no figure that could not be read again, and nothing of others' files."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny import VOCAB, tiny_llama

from gossamer import methods
from gossamer.calibrate.prices import Pairs
from gossamer.calibrate.search import measure
from gossamer.calibrate.store import Store
from gossamer.evaluate.subject import Subject

TRIED = [methods.create("dense"), methods.create("a_shape", sink=4, window=20)]


ASKED = SimpleNamespace(key="a prompt", length=100, source=0, held_out=False)
PROMPTS: Any = SimpleNamespace(
    listed=[ASKED], tokens=lambda sample: torch.arange(2, 102)[None] % VOCAB, name=lambda source: "numbers.txt"
)


@pytest.mark.filterwarnings("ignore:gossamer runs its torch reference path:RuntimeWarning")
def test_attention_that_is_no_number_is_refused_where_it_is_met(tmp_path: Path) -> None:
    of, path = Subject(tiny_llama(), None, "tiny"), tmp_path / "figures"
    with torch.no_grad():
        of.model.model.layers[1].self_attn.v_proj.weight[8:] = math.nan  # of the second key/value head
    for _ in range(2):  # what was written before can be read again
        with pytest.raises(ValueError, match=r"layer 1, head 2: the error on numbers.txt at 100 tokens is no finite"):
            measure(of, PROMPTS, TRIED, Pairs(), Store(path, {}))
    assert len(path.read_text().splitlines()) == 2


@pytest.mark.parametrize("content", ["my notes", "null", "null\n", '{"model": "m", "other'])
def test_a_file_of_something_else_is_never_cut_off_or_written_to(tmp_path: Path, content: str) -> None:
    path = tmp_path / "figures"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"holds no figures to go on with|holds figures of another kind"):
        Store(path, {"model": "m"})
    assert path.read_text() == content
