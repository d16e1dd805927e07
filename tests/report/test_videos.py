"""Rows, tables and pictures of clips beside dense ones."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from gossamer.evaluate.clips import clip_rows, clip_table, series_of, step_means, step_table
from gossamer.methods import create
from gossamer.report import write_report
from gossamer.report.png import png
from gossamer.report.videos import choice_of, clip_frames, clip_frontier, clip_modes, clip_steps


def clip(method: str, prompt: str, psnr: float | None, density: float = 0.25, **more: Any) -> dict[str, Any]:
    name, _, inside = method.partition("(")
    fields = dict(part.split("=") for part in inside.removesuffix(")").split(";") if part)
    known = create(name, **{field: eval(value) for field, value in fields.items()}) if name != "dense" else create(name)
    steps = [{"density": 1.0, "plan_s": 0.0, "attention_s": 1.0}] + 3 * [
        {"density": density, "plan_s": 0.125, "attention_s": 0.25}
    ]
    record = {
        "kind": "clip", "method": method, "method_fields": known.to_dict(), "model": "m", "prompt": prompt, "seed": 0,
        "steps": 4, "seconds": 3.0, "psnr": psnr, "ssim": 0.5 if psnr else 1.0, "distance": 0.1 if psnr else 0.0,
        "by_step": steps,
    }  # fmt: skip
    return record | more


SOME = [
    clip("dense", "a", None, 1.0),
    clip("adaspa", "a", 10.0, frames=base64.b64encode(png(bytes(12), 2, 2, 3)).decode()),
    clip("adaspa", "b", 20.0),
    clip("adaspa(sparsity=0.5)", "a", 30.0, 0.5),
    clip("adaspa(search=(0,12))", "a", 12.0),
]


def test_rows_are_means_over_clips() -> None:
    dense, adaspa, less, early = clip_rows([*SOME, clip("adaspa", "b", 40.0)])  # the last line of a clip counts
    assert (dense.psnr, dense.equal, dense.density, dense.psnr_interval) == (None, 1, 1.0, None)
    assert (adaspa.clips, adaspa.psnr, adaspa.density) == (2, 25.0, (1 + 3 * 0.25) / 4)
    assert adaspa.psnr_interval == (10.0, 40.0)
    assert (adaspa.plan_s, adaspa.attention_s, adaspa.seconds) == (0.375, 1.75, 3.0)
    assert less.series == adaspa.series == "adaspa"
    assert early.series == "adaspa(search=[0,12])"
    assert [row[3] for row in clip_table([dense, adaspa])] == ["PSNR", "-", "25.0 [10.0, 40.0]"]


def test_clips_of_unlike_settings_are_apart() -> None:
    longer = clip("adaspa", "a", 30.0) | {
        "steps": 8,
        "by_step": 8 * [{"density": 0.5, "plan_s": 0.0, "attention_s": 1.0}],
    }
    one, other = clip_rows([SOME[1], SOME[2], longer])
    assert (one.method, one.clips, one.psnr) == ("adaspa steps=4", 2, 15.0)
    assert (other.method, other.clips, other.psnr, other.series) == ("adaspa steps=8", 1, 30.0, "adaspa steps=8")
    assert [len(steps) for steps in step_means([SOME[1], longer]).values()] == [4, 8]
    assert [row[0] for row in clip_frames([*SOME, longer]).table[1:]] == ["adaspa steps=4"]


def test_methods_of_one_model_are_one_series() -> None:
    heads = [[create("paro", order=order).to_dict() for order in ("FHW", "WHF")]]
    by_head = {"method": "orders.json(layers=abc)", "method_fields": {"method": "per_head", "layers": heads}}
    record = clip("dense", "a", 9.0) | by_head
    assert series_of(record) == "paro"
    assert [row[1:4] for row in clip_modes([record, record]).table[1:]] == [[0, 0, "FHW"], [0, 1, "WHF"]]
    assert series_of(record | {"method_fields": {"method": "unheard", "density": 1}}) == "unheard"
    assert choice_of({"method": "sparse_vdit", "mode": "stripe", "share": 0.1}) == ("stripe", "0.1")
    assert choice_of({"method": "sparse_vdit", "mode": "skip", "share": 0.1}) == ("skip", "")


def test_steps_are_summed_by_quarters() -> None:
    header, dense, *_ = step_table(SOME)
    assert len(header) == 9
    assert step_table(SOME)[2] == ["adaspa", "1.000", *3 * ["0.250"], "1.00", *3 * ["0.38"]]
    assert dense[0] == "dense"
    rows = clip_steps(SOME).table
    assert rows[0] == ["method", "step", "density", "plan s", "attention s"]
    assert len(rows) == 1 + 4 * 4


def test_the_page_has_the_pictures(tmp_path: Path) -> None:
    assert [len(figure.panels) for figure in (clip_frontier(SOME), clip_frames(SOME), clip_modes(SOME))] == [3, 1, 0]
    page, *tables = write_report(SOME, tmp_path / "page.html")
    text = page.read_text()
    assert "What clips lose" in text
    assert "data:image/png;base64," in text
    assert {path.name for path in tables} >= {"clips.csv", "clip-frames.csv", "clip-steps.csv"}
    assert clip_frontier([]).panels == clip_steps([]).panels == []


@pytest.mark.parametrize("psnr", [None, 12.5])
def test_one_clip_alone_is_drawn(psnr: float | None) -> None:
    assert len(clip_frontier([clip("adaspa", "a", psnr)]).panels) == (2 if psnr is None else 3)
