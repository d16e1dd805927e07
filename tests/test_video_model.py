"""The small video model of the repository: it loads, does what it did, and its card says what its files do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from repository import ROOT, script

pytest.importorskip("diffusers")

from gossamer.evaluate.video import VideoModel, load_video_model
from gossamer.profiles import Profile

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
FOLDER = ROOT / "models" / "video"
# Of what the model says of noise: mean, deviation, and the colour of a corner.
WAS = (
    (0.66388, 1.07351, [-0.2075, -0.1121, 1.6037]),
    (0.53716, 1.2714, [-0.4762, -0.1853, 1.4067]),
)


@pytest.fixture(scope="module")
def model() -> VideoModel:
    return load_video_model(FOLDER)


def test_it_is_as_large_as_its_card_says(model: VideoModel) -> None:
    assert model.enabled.config.num_layers == 6
    count = sum(p.numel() for p in model.enabled.parameters())
    assert f"{count / 1e6:.2f} million parameters" in (FOLDER / "README.md").read_text(encoding="utf-8")


def test_a_step_is_as_it_was(model: VideoModel) -> None:
    """In fp32, of a small clip: what the transformer says of noise, with a sentence and without."""
    noise = torch.randn(1, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = model.embed("red square left")  # type: ignore[attr-defined]
    with torch.no_grad():
        found = [
            model.enabled(noise, torch.tensor([time]), words, return_dict=False)[0]
            for time, words in ((900.0, text), (300.0, torch.zeros_like(text)))
        ]
    for out, (mean, deviation, first) in zip(found, WAS, strict=True):
        assert float(out.mean()) == pytest.approx(mean, abs=2e-3)
        assert float(out.std()) == pytest.approx(deviation, abs=2e-3)
        assert out[0, :, 0, 0, 0].tolist() == pytest.approx(first, abs=5e-3)


def test_its_words_are_those_of_the_data(model: VideoModel) -> None:
    clips = script("models/moving_shapes.py")
    sentence = "green circle still and red triangle left"
    assert torch.allclose(model.embed(sentence), clips.embed([sentence.split()]))  # type: ignore[attr-defined]


def test_its_card_is_made_of_its_files() -> None:
    cards = script("models/video_card.py")
    found = json.loads((ROOT / "benchmarks" / "results" / "video_model.json").read_text())
    assert cards.card(FOLDER, found) == (FOLDER / "README.md").read_text(encoding="utf-8")
    assert found["model"]["fingerprint"] == load_video_model(FOLDER, dtype=torch.bfloat16).fingerprint()


def test_what_its_card_says_of_its_clips() -> None:
    found = json.loads((ROOT / "benchmarks" / "results" / "video_model.json").read_text())
    assert found["shares"]["colour"] > 0.9
    assert max(found["shares"][name] for name in ("motion", "shape")) < 0.5
    assert min(found["of_drawn"][name] for name in ("colour", "motion", "shape", "all")) > 0.9


@pytest.mark.parametrize("path", sorted(FOLDER.glob("profiles/*.json")), ids=lambda path: path.stem)
def test_its_profiles_fit_it(path: Path) -> None:
    profile = Profile.load(path)
    profile.check(6, 4)
    name, number = path.stem.split("-")
    fields: list[dict[str, Any]] = [head.to_dict() for layer in profile.layers for head in layer]
    if name == "orders":
        assert {head["density"] for head in fields} == {int(number) / 100}
    else:
        assert {head["method"] for head in fields} == {"sparse_vdit"}
