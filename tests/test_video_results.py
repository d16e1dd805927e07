"""What the page on diffusers says of the small video model is what was measured."""

from __future__ import annotations

import re
from functools import cache
from typing import Any

import pytest
from repository import ROOT, script

from gossamer.evaluate.clips import ClipRow, clip_rows
from gossamer.evaluate.summary import read_results

FOLDER = ROOT / "benchmarks" / "results" / "amd-epyc-zen5-2-cores-avx512-bf16"


@cache
def claims() -> Any:
    return script("docs/claim_tables.py").Claims(FOLDER / "video_claims.jsonl")


def prose(table: str) -> str:
    """What the page says below a table, on one line."""
    page = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    below = page.partition(f"<!-- table: {table} -->")[2]
    return " ".join(re.split(r"\n(?:#|<!--)", below)[0].split())


def said(table: str, *values: float, digits: int = 3) -> bool:
    return all(f"{value:.{digits}f}" in prose(table) for value in values)


def test_masks_last_for_a_while_and_serve_other_clips() -> None:
    def recall(source: str, at: int, step: int) -> float:
        return claims().recall(source, at, step)[0]

    assert claims().clips == 6
    assert said("video_recall", recall("own", 8, 4), recall("own", 8, 8), recall("own", 19, 4), recall("own", 19, 19))
    assert said("video_recall", recall("prompt", 4, 4), recall("own", 4, 4), recall("prompt", 19, 19))
    for at in (4, 8, 12, 16, 19):
        assert recall("prompt", at, at) > 0.95 * recall("own", at, at)
        assert recall("window", at, at) < 0.75 * recall("own", at, at)
    assert recall("prompt", 19, 19) > recall("own", 19, 4)


def test_an_old_lse_and_budgets_by_head_change_nothing_that_shows() -> None:
    found = claims()
    off = found.figure(found.of("drift", step=19), "sums")[0]
    assert f"{off:.1f}" in prose("video_search")
    for step in (8, 12, 16, 19):
        values = {
            (adaptive, cached): found.figure(found.of("search", step=step, adaptive=adaptive, cached=cached), "error")
            for adaptive in (False, True)
            for cached in (False, True)
        }
        low, high = values[False, False][1]
        assert all(low < mean < high for mean, _ in values.values())
        if step == 12:
            assert said("video_search", values[True, True][0], values[False, True][0])
    density = {flag: found.figure(found.of("search", adaptive=flag), "density")[0] for flag in (False, True)}
    assert 0 < density[True] - density[False] < 0.01


def test_early_steps_are_fragile() -> None:
    found = claims()
    parts = {part: found.figure(found.of("stretch", part=part), "psnr") for part in ("first", "last")}
    assert parts["first"][1][1] < parts["last"][1][0]
    assert parts["last"][0] - parts["first"][0] == pytest.approx(15, abs=1)


def test_modes_belong_to_heads() -> None:
    for weight in (0.03, 0.1, 0.5):
        chosen, shuffled, own = (claims().modes(weight, table)[0] for table in ("chosen", "shuffled", "own"))
        assert chosen[1][1] < shuffled[1][0]
        assert own[0] <= chosen[0] < 1.3 * own[0]
    assert claims().modes(0.1, "shuffled")[0][0] > 3 * claims().modes(0.1, "chosen")[0][0]


def test_orders_belong_to_heads_and_the_score_finds_not_the_best() -> None:
    found = {table: claims().orders(1, table) for table in ("FHW", "chosen", "shuffled", "recalled", "own")}
    assert said("video_orders", *(found[table][0] for table in ("FHW", "chosen", "shuffled", "recalled")))
    assert found["chosen"][1][0] > max(found["FHW"][1][1], found["shuffled"][1][1])
    assert found["recalled"][1][0] > found["chosen"][1][1]
    assert found["own"][0] - found["recalled"][0] < 0.005


def test_reference_frames_do_not_show() -> None:
    found = claims()
    for frames in (1, 2, 4):
        error = {
            name: found.figure(found.of("tiles", frames=frames, method=name), "error")[0]
            for name in ("attention_tile", "window_blocks", "random_blocks", "oracle_blocks")
        }
        assert error["oracle_blocks"] < error["window_blocks"] < error["attention_tile"]
        assert error["attention_tile"] > 0.95 * error["random_blocks"]


@cache
def clips() -> dict[str, ClipRow]:
    """By label, without thresholds and hashes."""
    rows = clip_rows(read_results(FOLDER / "video_clips.jsonl"))
    return {script("docs/video_tables.py").named_shortly(row.method): row for row in rows}


def psnr(name: str) -> float:
    value = clips()[name].psnr
    assert value is not None
    return value


def test_every_setting_has_the_same_three_clips() -> None:
    assert len(clips()) == 23
    assert {row.clips for row in clips().values()} == {3}
    names = {row.series for row in clips().values()}
    assert names == {
        "adaspa(search=[0,12])", "adaspa(search=[4,12])", "sparse_vdit", "paro", "attention_tile", "window_blocks",
        "random_blocks", "oracle_blocks",
    }  # fmt: skip


def test_what_the_page_says_of_clips() -> None:
    early = "adaspa(sparsity=0.9,search=[0,12])"
    names = ("random_blocks", "window_blocks", "orders-20", early, "oracle_blocks", "attention_tile(frames=2)")
    assert said("video_clips", *(psnr(name) for name in names), digits=1)
    assert said("video_clips", psnr("window_blocks(density=0.4)"), psnr("random_blocks(density=0.4)"), digits=1)
    assert said("video_clips", psnr("modes-25"), psnr("modes-40"), digits=1)
    shares = {
        early: 16,
        "attention_tile(frames=2)": 29,
        "modes-25": 24,
        "modes-40": 36,
        "window_blocks(density=0.4)": 41,
    }
    for name, share in shares.items():
        assert round(100 * clips()[name].density) == share
        assert f"{share}%" in prose("video_clips")
    for bound in ("window_blocks", "random_blocks"):
        assert psnr(bound) < min(psnr(name) for name in ("orders-20", "modes-15", early)) - 2
    assert abs(psnr("attention_tile(frames=2)") - psnr("window_blocks(density=0.4)")) < 0.5


def test_pictures_are_drawn_of_the_clips() -> None:
    folder = ROOT / "docs" / "images" / FOLDER.name
    for name in ("video_frontier", "video_frames", "video_modes"):
        assert (folder / f"{name}.svg").stat().st_size < 200_000
    drawn = (folder / "video_frontier.svg").read_text()
    assert all(f">{row.series}<" in drawn for row in clips().values())
