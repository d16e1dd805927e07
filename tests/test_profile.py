"""Profiles on disk: round trips, the published format, and files that are wrong."""

import json

import pytest

from gossamer import HeadPattern, Profile
from gossamer.profiles import Provenance


@pytest.fixture
def profile() -> Profile:
    layer = (
        HeadPattern("vertical_slash", (512, 2048), 0.96),
        HeadPattern("a_shape", (128, 3968)),
        HeadPattern("block_sparse", (100,)),
        HeadPattern("dense"),
    )
    return Profile((layer, layer[::-1]), Provenance("a model", "LlamaForCausalLM", "one", (30_000,), "recall", "0.1"))


def test_round_trip(profile: Profile, tmp_path) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    assert Profile.load(path) == profile
    assert [p.name for p in tmp_path.iterdir()] == ["profile.json"]


def test_a_failed_save_keeps_the_old_file(profile: Profile, tmp_path, monkeypatch) -> None:
    path = tmp_path / "profile.json"
    profile.save(path)
    monkeypatch.setattr(json, "dump", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        Profile.uniform(1, 1, HeadPattern("dense")).save(path)
    assert Profile.load(path) == profile


def test_published_pattern_files_are_read(tmp_path) -> None:
    path = tmp_path / "pattern.json"
    layer = {
        "0": ["vertical_and_slash", 1000, 6096, 0.9],
        "1": ["stream_llm", 100, 800, 0.8],
        "2": ["block_sparse", 100, 0, 1],
    }
    path.write_text(json.dumps([layer]))
    loaded = Profile.load(path)
    assert [p.kind for p in loaded.patterns[0]] == ["vertical_slash", "a_shape", "block_sparse"]
    assert [p.budget for p in loaded.patterns[0]] == [(1000, 6096), (100, 800), (100,)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99 is not supported; this version reads schema 1"),
        ({"patterns": []}, "at least one layer"),
        ({"patterns": [[{"pattern": "spiral"}]]}, "layer 0: unknown pattern 'spiral'"),
        ({"patterns": [[{"pattern": "a_shape", "sink": 1}]]}, r"missing fields \['window'\]"),
        ({"patterns": [[{"pattern": "dense", "sink": 1}]]}, r"unknown fields \['sink'\]"),
        ({"patterns": [[{"pattern": "block_sparse", "blocks": -4}]]}, "non-negative integers"),
        ({"patterns": [[{"pattern": "block_sparse", "blocks": "many"}]]}, "non-negative integers"),
        ({"patterns": [["dense"]]}, "layer 0"),
        ({"patterns": [[{"pattern": "dense"}], [{"pattern": "dense"}] * 2]}, "same number of heads"),
    ],
)
def test_wrong_files_are_named(profile: Profile, change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile.from_dict(profile.to_dict() | change)


def test_a_file_that_is_not_json(tmp_path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        Profile.load(path)


def test_a_published_file_with_a_hole(tmp_path) -> None:
    with pytest.raises(ValueError, match="layer 0, head 0"):
        Profile.from_minference([{"1": ["stream_llm", 1, 2, 3]}])
