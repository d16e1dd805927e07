"""Clips with sparse attention beside dense ones; and the small video model's data, training and folder."""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from repository import ROOT
from torch import Tensor

pytest.importorskip("diffusers")

from gossamer import methods
from gossamer.cli import main
from gossamer.cli.eval_video import side_by_side
from gossamer.evaluate.clips import series_of
from gossamer.evaluate.summary import read_results
from gossamer.evaluate.video import load_video_model
from gossamer.evaluate.video_quality import feature_distance, psnr, ssim
from gossamer.profiles import Profile
from gossamer.report.videos import clip_frontier, clip_modes

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TINY: dict[str, Any] = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=32,
    freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
)  # fmt: skip


@pytest.fixture(scope="module")
def scripts() -> dict[str, ModuleType]:
    sys.path.insert(0, str(ROOT / "models"))
    try:
        return {name: importlib.import_module(name) for name in ("moving_shapes", "train_video", "train_masked")}
    finally:
        sys.path.remove(str(ROOT / "models"))


@pytest.fixture(scope="module")
def folder(scripts: dict[str, ModuleType], tmp_path_factory: pytest.TempPathFactory) -> Path:
    train = scripts["train_video"]
    out = tmp_path_factory.mktemp("video") / "model"
    schedule = (train.Phase(2, 8, 2, 1, 1.0, 1.0), train.Phase(4, 16, 1, 1, 1.0, 0.5))
    trainer = train.Trainer(0, schedule, TINY, False)
    assert trainer.train(None, math.inf)
    trainer.export(out, (4, 16, 16))
    return out


def clip(seed: int, frames: int = 3, size: int = 24) -> Tensor:
    return torch.rand(frames, 3, size, size, generator=torch.Generator().manual_seed(seed))


def test_quality_of_equal_and_of_worse_clips() -> None:
    x = clip(0)
    assert (psnr(x, x), ssim(x, x), feature_distance(x, x)) == (math.inf, pytest.approx(1.0), 0.0)
    near, far = (x + share * (clip(1) - x) for share in (0.1, 0.6))
    assert psnr(x, near) > psnr(x, far)
    assert ssim(x, near) > ssim(x, far)
    assert feature_distance(x, near) < feature_distance(x, far)
    assert psnr(torch.zeros(1, 1, 8, 8), torch.full((1, 1, 8, 8), 0.1)) == pytest.approx(20.0)
    with pytest.raises(ValueError, match="of one shape"):
        psnr(x, x[:1])


def test_ssim_is_that_of_its_formula() -> None:
    """At one place, of a frame as large as the window."""
    x, y = clip(2, 1, 11)[:, :1].double(), clip(3, 1, 11)[:, :1].double()
    place = torch.arange(11, dtype=torch.float64) - 5
    line = torch.exp(-place.square() / 4.5)
    weights = line[:, None] * line / line.sum() ** 2
    mean_x, mean_y = (float((t[0, 0] * weights).sum()) for t in (x, y))
    var_x, var_y = (float((t[0, 0].square() * weights).sum()) - m**2 for t, m in ((x, mean_x), (y, mean_y)))
    both = float((x[0, 0] * y[0, 0] * weights).sum()) - mean_x * mean_y
    top = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4)
    expected = top / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    assert ssim(x, y) == pytest.approx(expected, rel=1e-9)


def test_clips_are_what_their_sentences_say(scripts: dict[str, ModuleType]) -> None:
    clips = scripts["moving_shapes"]
    shape = clips.Shape("red", "square", "left", 0.5, 0.5, 0.15)
    assert clips.describe([shape, shape]) == ["red", "square", "left", "and", "red", "square", "left"]
    drawn = clips.render([shape], 5, 40, 40)
    weight = (drawn[0] > 0).float()
    middle = (weight * torch.arange(40)).sum((1, 2)) / weight.sum((1, 2))
    assert torch.all(middle.diff() < -3)  # to the left, half of the frame
    assert middle[2] == pytest.approx(19.5, abs=0.6)
    assert drawn[1].max() < 0  # nothing is green
    with pytest.raises(ValueError, match="of the words"):
        clips.embed([["purple"]])
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        some = clips.draw_shapes(generator)
        assert len({one.colour for one in some}) == len(some) <= 2
        assert clips.embed([clips.describe(some)]).square().sum(-1).gt(0).sum() == 4 * len(some) - 1


def test_training_steps_repeat_and_resume(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    train = scripts["train_video"]
    schedule = (train.Phase(2, 8, 2, 4, 1.0, 1.0),)
    whole = train.Trainer(0, schedule, TINY, False)
    assert whole.train(None, math.inf)
    begun = train.Trainer(0, schedule, TINY, False)
    assert not begun.train(tmp_path / "state.pt", 0.0)  # its time is over after a step
    again = train.Trainer(0, schedule, TINY, False)
    again.resume(tmp_path / "state.pt")
    assert again.step == 1
    assert again.train(None, math.inf)
    assert [row["loss"] for row in again.log] == [row["loss"] for row in whole.log]
    for one, other in zip(whole.average.values(), again.average.values(), strict=True):
        assert torch.equal(one, other)


def test_a_folder_makes_clips_of_its_words(folder: Path) -> None:
    model = load_video_model(folder)
    assert len(model.prompts) == 8
    made = [model.sample(model.prompts[0], seed, 2) for seed in (0, 0, 1)]
    assert made[0].shape == (4, 3, 16, 16)
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])
    with pytest.raises(ValueError, match="have 1 to 7 of the words and, red"):
        model.sample("a purple square", 0, 2)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_methods_are_held_beside_dense_clips(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, pictures = tmp_path / "clips.jsonl", tmp_path / "pictures"
    given = ["eval-video", str(folder), "--steps", "3", "--limit", "2", "--out", str(out)]
    tried = "dense,a_shape(window=100000),a_shape(sink=0,window=4)"
    assert main([*given, "--methods", tried, "--pictures", str(pictures)]) == 0
    head, *clips = read_results(out)
    assert head["kind"] == "run"
    assert head["model"]["parameters"] > 1000
    found = {(record["method"].split("(")[0], record["ssim"] == 1, record["prompt"]): record for record in clips}
    assert len(found) == 6
    assert sum("frames" in record for record in clips) == 3  # of the first clip of each method
    for name, same, prompt in found:
        record = found[name, same, prompt]
        assert [set(step) for step in record["by_step"]] == [{"density", "plan_s", "attention_s"}] * 3
        if same:
            assert record["by_step"][0]["density"] == 1
        else:
            assert record["by_step"][0]["density"] < 0.5
            assert record["psnr"] < 60
            assert record["distance"] > 0
    assert len(list(pictures.glob("*.png"))) == 6
    capsys.readouterr()
    before = out.read_text()
    out.write_text(before + before[:30])  # a run that was stopped in the middle of a line
    assert main([*given, "--methods", tried, "--json"]) == 0
    assert out.read_text() == before  # nothing was made again
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["clips"] for row in rows] == [2, 2, 2]
    fewer = [
        "eval-video",
        str(folder),
        "--steps",
        "2",
        "--limit",
        "1",
        "--out",
        str(out),
        "--methods",
        "dense",
        "--json",
    ]
    assert main(fewer) == 0  # other steps stand in the same file, and in a table of their own
    assert [row["clips"] for row in json.loads(capsys.readouterr().out)["rows"]] == [1]
    assert [record["kind"] for record in lines(out)] == ["run", *["clip"] * 6, "run", "clip"]
    assert rows[0]["psnr"] is None
    assert rows[0]["equal"] == 2
    assert rows[2]["ssim_interval"][0] <= rows[2]["ssim"] <= rows[2]["ssim_interval"][1]
    assert rows[2]["density"] < 0.5


def test_pictures_have_the_dense_clip_above() -> None:
    dense, other = torch.zeros(3, 3, 2, 4), torch.ones(3, 3, 2, 4)
    data = side_by_side(dense, other)
    at = data.index(b"IDAT")
    rows = zlib.decompress(data[at + 4 : data.index(b"IEND") - 8])
    width = 1 + 3 * 3 * 4
    assert len(rows) == 4 * width
    assert rows[1:width] == bytes(36)
    assert rows[2 * width + 1 : 3 * width] == b"\xff" * 36


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--limit", "0"], "--limit must be at least 1"),
        (["--out", "nowhere/clips.jsonl"], "cannot write"),
        (["--size", "height"], "--size takes NAME=NUMBER"),
        (["--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["--methods", "nothing"], "unknown method 'nothing'"),
        (["--methods", ""], "there is no method: name some with --methods, or give --profiles"),
        (["--prompts", os.devnull], "has no prompt; give a text file with one prompt a line"),
        (["--size", "height=256"], "makes clips of the size in its words.json; leave height out"),
    ],
)
def test_bad_input(folder: Path, more: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval-video", str(folder), *more]) == 2
    assert message in capsys.readouterr().err


def test_other_folders_and_files_are_refused(tmp_path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval-video", str(tmp_path)]) == 2
    assert "is no video model" in capsys.readouterr().err
    (tmp_path / "words.json").write_text("{}")
    assert main(["eval-video", str(tmp_path)]) == 2
    assert "cannot be loaded" in capsys.readouterr().err
    other = tmp_path / "other.jsonl"
    run = {"kind": "run", "format": 1, "model": {"name": "model", "fingerprint": "another"}}
    given = ["eval-video", str(folder), "--out", str(other), "--methods", "dense", "--steps", "1", "--limit", "1"]
    for content, message in (
        ([{"kind": "clip"}], "must be text, found nothing"),
        ([run, {"kind": "point2"}], "has lines of kind point2"),
        ([run], "holds clips of another model or dtype (another, now "),
    ):
        text = "".join(json.dumps(line) + "\n" for line in content)
        other.write_text(text)
        assert main(given) == 2
        assert message in capsys.readouterr().err
        assert other.read_text() == text


def test_profiles_and_other_dense_attention(folder: Path, tmp_path: Path) -> None:
    """In bfloat16, each head with its own mode; what they are held beside is our own dense kernel."""
    kinds = [methods.create("sparse_vdit", mode=mode, block=16) for mode in ("diagonal", "multi_diagonal")]
    Profile([kinds, kinds[::-1]]).save(tmp_path / "modes.json")
    out = tmp_path / "clips.jsonl"
    given = ["eval-video", str(folder), "--steps", "2", "--limit", "1", "--out", str(out), "--dtype", "bfloat16"]
    given += ["--beside", "dense(kernel=gossamer)", "--methods", "dense(kernel=gossamer)"]
    assert main([*given, "--profiles", str(tmp_path / "modes.json")]) == 0
    _, dense, modes = read_results(out)
    assert dense["psnr"] is None  # the same kernel
    assert (modes["dtype"], modes["beside"]) == ("bfloat16", "dense(kernel=gossamer)")
    assert modes["method"].startswith("modes.json(layers=")
    assert series_of(modes) == "sparse_vdit"
    assert modes["psnr"] < 60
    figures = {figure.name: figure for figure in (clip_modes([modes]), clip_frontier([dense, modes]))}
    kinds_drawn = [row[3] for row in figures["clip-modes"].table[1:]]
    assert kinds_drawn == ["diagonal", "multi_diagonal", "multi_diagonal", "diagonal"]
    assert len(figures["clips"].panels) == 3


def test_the_masked_language_model_learns_of_masks_alone(scripts: dict[str, ModuleType], tmp_path: Path) -> None:
    train_masked = scripts["train_masked"]
    schedule = (train_masked.Phase(32, 6, 3, 1.0, 1.0),)
    config = train_masked.CONFIG | {"hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2}
    config |= {"head_dim": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    tokens = np.arange(4000) % 50 + 3
    trainer = train_masked.Trainer(0, schedule, config, tokens, 60, False)
    given, masked, share = trainer.batch(schedule[0])
    assert given.shape == masked.shape == (6, 32)
    assert torch.all(share.diff() > 0)
    ascending = (given.diff(dim=1) % 50 == 1).all(dim=1)
    assert 0 < int(ascending.sum()) < 6  # the others say a passage twice
    loss = trainer.loss(schedule[0])
    assert float(loss.detach()) == pytest.approx(math.log(61), rel=0.3)  # nats of a token of which nothing is known
    assert trainer.train(tmp_path / "state.pt", math.inf)
    assert trainer.step == 3
