"""The script that tries the papers' claims, its figures, and the rules that read clips back, on tiny clips."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import script

pytest.importorskip("diffusers")

from gossamer.profiles import Profile

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
TINY: dict[str, Any] = dict(
    patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=12, in_channels=3, out_channels=3, text_dim=32,
    freq_dim=16, ffn_dim=16, num_layers=2, rope_max_seq_len=32,
)  # fmt: skip
SMALL: dict[str, Any] = {
    "STEPS": 4, "LOOKED": (0, 1, 2, 3), "SEARCH": (1, 2), "ORDERED": (1,), "TRIED": (2,), "SCORED": 1,
    "QUARTER": 1, "BLOCK": 16, "TILES": (1,), "PROMPTS": ("red square left", "blue circle up"),
}  # fmt: skip
METHODS = ("attention_tile", "window_blocks", "random_blocks", "oracle_blocks")
claims = script("docs/claim_tables.py")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results of the whole script, of a model of random weights with clips of 256 tokens."""
    train = script("models/train_video.py")
    folder = tmp_path_factory.mktemp("claims")
    trainer = train.Trainer(0, (train.Phase(2, 8, 2, 1, 1.0, 1.0),), TINY, False)
    assert trainer.train(None, float("inf"))
    trainer.export(folder / "model", (4, 16, 16))
    tried = script("models/video_claims.py")
    given = ["claims", str(folder / "model"), "--out", str(folder / "claims.jsonl"), "--profiles", str(folder)]
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SMALL.items():
            patch.setattr(tried, name, value)
        patch.setattr(sys, "argv", given)
        tried.main()
    return folder


def test_masks_are_best_where_they_were_found(made: Path) -> None:
    found = claims.Claims(made / "claims.jsonl")
    assert found.clips == 4
    for at in SMALL["LOOKED"]:
        own = found.recall("own", at, at)[0]
        others = [found.recall(source, at)[0] for source in ("seed", "prompt", "window", "random")]
        earlier = [found.recall("own", at, step)[0] for step in SMALL["LOOKED"] if step < at]
        assert 0.2 < max(others + earlier) < own < 1


def test_every_table_is_made(made: Path) -> None:
    found = claims.Claims(made / "claims.jsonl")
    for name, make in claims.TABLES.items():
        above, header, rows = make(found)
        assert above, name
        assert rows, name
        assert {len(row) for row in rows} == {len(header)}, name


def test_bounds_have_the_same_number_of_blocks_and_drift_is_of_later_steps(made: Path) -> None:
    found = claims.Claims(made / "claims.jsonl")
    density = {name: found.figure(found.of("tiles", method=name), "density")[0] for name in METHODS}
    assert all(density[METHODS[0]] <= other < density[METHODS[0]] + 1 / 16 for other in density.values())
    assert {line["step"] for line in found.of("drift")} == {2, 3}
    assert all(line["mean"] >= 0 for line in found.of("drift"))
    cached, fresh = (found.of("search", step=2, adaptive=False, cached=flag) for flag in (True, False))
    assert len(cached) == len(fresh) == 4 * TINY["num_layers"]


def test_tables_of_heads_are_judged_on_other_prompts(made: Path) -> None:
    found = claims.Claims(made / "claims.jsonl")
    own, chosen = (found.modes(0.1, table) for table in ("own", "chosen"))
    assert own[0][0] + 0.1 * own[1] <= chosen[0][0] + 0.1 * chosen[1]
    assert found.orders(1, "own")[0] >= found.orders(1, "recalled")[0]
    assert sorted(line["chose"] for line in found.of("modes")) == [False, False, True, True]
    assert claims.argmin([[[0.5, 0.1]]], [[[0.0, 1.0]]], 0.1) == [[1]]
    assert claims.argmin([[[0.5, 0.1]]], [[[0.0, 1.0]]], 0.9) == [[0]]
    assert sorted(x for layer in claims.shuffled([[0, 1], [2, 3]])[0] for x in layer) == [0, 1, 2, 3]


def test_profiles_come_to_their_densities(made: Path) -> None:
    profiles = {path.stem: Profile.load(path) for path in made.glob("*.json")}
    assert len(profiles) == 6
    costs = [torch.tensor(profiles[f"modes-{n}"].costs).mean().item() for n in (15, 25, 40)]
    assert costs == sorted(costs)
    assert abs(costs[1] - 0.25) < 0.15  # modes of four heads come in steps
    densities = {head.to_dict()["density"] for layer in profiles["orders-30"].layers for head in layer}
    assert densities == {0.3}


def test_what_is_drawn_is_read_back() -> None:
    rules = script("models/video_fidelity.py")
    clips = script("models/moving_shapes.py")
    generator = torch.Generator().manual_seed(3)
    right = []
    for _ in range(25):
        shapes = clips.draw_shapes(generator)
        clip = rules.drawn(shapes, (8, 32, 32))
        noise = 0.03 * torch.randn(clip.shape, generator=generator)
        right.append(rules.judged(shapes, (clip + noise).clamp(0, 1)))
    assert sum(one["all"] for one in right) >= 23
    square = [clips.Shape("red", "square", "left", 0.5, 0.5, 0.15)]
    others = {"colour": "blue", "motion": "up", "kind": "circle"}
    for name, value in others.items():
        other = [clips.Shape(**{**vars(square[0]), name: value})]
        judged = rules.judged(square, rules.drawn(other, (8, 32, 32)))
        assert not judged["all"]
        assert judged["colour"] is (name != "colour")
    assert not rules.judged(square, torch.full((8, 3, 32, 32), 0.1))["colour"]


def test_a_card_has_the_figures_of_its_files(made: Path) -> None:
    cards = script("models/video_card.py")
    clip = {"prompt": "red square left", "colour": True, "motion": False, "shape": True, "all": False}
    drawn = {"colour": 1.0, "motion": 0.99, "shape": 0.98, "all": 0.97, "clips": 200}
    found = {"steps": 20, "clips": [clip, clip], "of_drawn": drawn, "model": {"dtype": "bfloat16"}}
    folder = made / "model"
    text = cards.card(folder, found)
    assert "| motions right | 0 of 2 | 0.990 |" in text
    assert "clips of 4 frames of 16 x 16 pixels" in text
    cards.write_curve(folder, json.loads((folder / "training_log.json").read_text()) | {"steps": 1})
    assert (folder / "curve.svg").read_text().startswith("<svg")
