"""Profiles as files: round trips, the published format, and files that are wrong."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gossamer import Method, Policy, Profile
from gossamer.methods import AShape, BlockSparse, Dense, LServe, MInference, PerHead, Quest, TriShape, VerticalSlash
from gossamer.profiles import Provenance

LAYER: tuple[Method, ...] = (VerticalSlash(512, 2048), AShape(128, 3968), BlockSparse(9), Dense())
# No field has its default.
PROVENANCE = Provenance("a model", "LlamaForCausalLM", "one", (30_000, 50_000), "recall", "0.1")
PROFILE = Profile((LAYER, LAYER[::-1]), ((0.9, None, 0.8, 1.0), (None, None, 0.1, 0.2)), PROVENANCE)


def test_a_profile_survives_the_round_trip_through_a_file(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)
    assert Profile.load(path) == PROFILE
    assert Profile.load(str(path)) == PROFILE


@pytest.mark.parametrize(
    ("file", "name"), [("mine.json", "mine.json"), ("a\nb\x1b[1m", r"a\nb\x1b[1m"), ("\udc80", r"\udc80")]
)
def test_a_loaded_profile_has_its_files_name_and_never_saves_it(tmp_path: Path, file: str, name: str) -> None:
    path = tmp_path / file
    PROFILE.save(path)
    loaded = Profile.load(path)
    assert (loaded.name, Policy.of(loaded).name, loaded.shard(0, 2, 4).name) == (name, name, name)
    assert "name" not in loaded.to_dict()
    assert Policy.of(PROFILE).name == "per_head"


@pytest.mark.parametrize("profile", [PROFILE, replace(PROFILE, scores=None), Profile(((AShape(),),))])
def test_a_profile_survives_the_round_trip_through_a_dictionary(profile: Profile) -> None:
    data = profile.to_dict()
    assert json.loads(json.dumps(data)) == data
    assert Profile.from_dict(data) == profile


def test_a_dictionary_names_its_schema_and_its_shape() -> None:
    data = PROFILE.to_dict()
    assert (data["schema"], data["layers"], data["heads"]) == (2, 2, 4)
    assert data["methods"][1][3] == {"method": "vertical_slash"} | LAYER[0].to_dict()
    assert "scores" not in replace(PROFILE, scores=None).to_dict()


def test_a_profile_may_hold_what_steps_read(tmp_path: Path) -> None:
    profile = replace(PROFILE, decode=Quest(budget=512))
    profile.save(tmp_path / "both.json")
    loaded = Profile.load(tmp_path / "both.json")
    assert loaded == profile != PROFILE
    assert Policy.of(loaded) == Policy(profile.method, decode=Quest(budget=512))
    assert Policy.of(loaded).name == "both.json+quest"
    assert "decode" not in PROFILE.to_dict()
    gates = ((1.0, 0.0, 0.0, 1.0),) * 2
    parts = [replace(PROFILE, decode=LServe(gates=gates)).shard(rank, 2).decode for rank in range(2)]
    assert [part.gates[0] for part in parts if isinstance(part, LServe)] == [(1.0, 0.0), (0.0, 1.0)]


@pytest.mark.parametrize("steps", [{"method": "a_shape"}, {"method": "quest", "budget": 1}, {"method": "none"}, 3])
def test_what_chooses_nothing_of_a_cache_is_refused(steps: Any) -> None:
    with pytest.raises(ValueError, match="a profile's decode"):
        Profile.from_dict(PROFILE.to_dict() | {"decode": steps})


def test_provenance_that_is_missing_is_empty() -> None:
    data = PROFILE.to_dict()
    del data["provenance"]
    assert Profile.from_dict(data) == replace(PROFILE, provenance=Provenance())


def test_provenance_of_a_later_version_is_passed_over() -> None:
    data = PROFILE.to_dict()
    data["provenance"]["weather"] = "fine"
    assert Profile.from_dict(data) == PROFILE


def test_a_saved_profile_leaves_no_other_file(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_saved_profile_may_be_read_by_whom_other_files_may_be_read(tmp_path: Path) -> None:
    PROFILE.save(tmp_path / "profile.json")
    (tmp_path / "other").write_text("")
    assert (tmp_path / "profile.json").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "profile.json"
    PROFILE.save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="disk full"):
        Profile.uniform(1, 1, Dense()).save(path)
    assert Profile.load(path) == PROFILE
    assert [found.name for found in tmp_path.iterdir()] == ["profile.json"]


def test_a_figure_that_is_no_number_is_not_saved(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for value in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="not JSON compliant"):
            replace(PROFILE, errors=((value,) * 4,) * 2).save(path)
    assert not path.exists()


# What it holds


def test_a_profile_knows_its_heads() -> None:
    assert PROFILE.heads == 4


def test_a_uniform_profile_has_one_method() -> None:
    assert Profile.uniform(2, 3, AShape(1, 2)).layers == ((AShape(1, 2),) * 3,) * 2


def test_layers_may_be_lists() -> None:
    assert Profile([[AShape()]]) == Profile(((AShape(),),))  # type: ignore[arg-type]


def test_patterns_of_minference_run_as_minference() -> None:
    layers = (LAYER[:3],)
    assert Profile(layers).method == MInference(layers)


@pytest.mark.parametrize("other", [Dense(), TriShape()])
def test_any_other_method_makes_it_a_profile_of_methods(other: Method) -> None:
    layers = ((*LAYER[:2], other),)
    assert type(Profile(layers).method) is PerHead
    assert Profile(layers).method == PerHead(layers)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"layers": ()}, ValueError, "a profile needs at least one layer"),
        ({"layers": ((),)}, ValueError, r"the same number of heads in each, got \[0\]"),
        ({"layers": ((Dense(),), (Dense(), Dense()))}, ValueError, r"the same number of heads in each, got \[1, 2\]"),
        ({"layers": (("dense",),)}, TypeError, "must hold methods for single heads, got str"),
        ({"layers": ((Dense(),),), "scores": ((1.0, 2.0),)}, ValueError, r"\[layer\]\[head\] as its methods, \[1\]"),
        ({"layers": ((Dense(),),), "scores": ()}, ValueError, r"scores must be .* \[1\] heads"),
    ],
)
def test_bad_profiles_are_named(given: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Profile(**given)


# Files that are wrong


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 99}, "schema 99 is not supported; this version reads schema 2"),
        ({"schema": None}, "schema null is not supported"),
        ({"methods": []}, "at least one layer"),
        ({"methods": None}, r"methods must be a list \(layers\) of lists"),
        ({"methods": [{"method": "dense"}]}, r"methods must be a list \(layers\) of lists"),
        ({"methods": [[{"method": "dense"}, {"method": "spiral"}]]}, "layer 0, head 1: unknown method 'spiral'"),
        ({"methods": [[{"method": "a_shape", "windw": 1}]]}, "layer 0, head 0: .* has no field 'windw'"),
        ({"methods": [[{"method": "block_sparse", "blocks": -4}]]}, "layer 0, head 0: .* at least 1, got -4"),
        ({"methods": [[{"method": "block_sparse", "blocks": "many"}]]}, "layer 0, head 0: .* integer, got 'many'"),
        ({"methods": [["dense"]]}, "layer 0, head 0: a method's dictionary needs the key 'method'"),
        ({"scores": [1.0]}, r"scores must be a list \(layers\) of lists"),
        ({"scores": [[1.0]]}, r"as its methods, \[4, 4\] heads"),
        ({"scores": [["high"]]}, "layer 0, head 0: a score is a number or null, got 'high'"),
        ({"provenance": "mine"}, "provenance must be an object"),
        ({"provenance": {"lengths": 3}}, "its lengths a list"),
        ({"provenance": {"lengths": [1.5]}}, "lengths of a profile's provenance must be integers, got 1.5"),
        ({"provenance": {"model": 3}}, "model of a profile's provenance must be text, got 3"),
        ({"layers": 3}, "layers of a profile must be how many its methods are for, 2, got 3"),
        ({"heads": 4.0}, "heads of a profile must be how many its methods are for, 4, got 4.0"),
        ({"layers": None}, "layers of a profile must be how many .* 2, got null"),
        ({"methods": [[{"method": "dense"}] * 4], "scores": None}, "layers of a profile must be how many .* 1, got 2"),
        ({"methods": [[{"method": "per_head"}]]}, "methods: per_head.layers must hold methods for single heads"),
        ({"methods": [[{"method": "dense", "name": 1}]]}, "layer 0, head 0: method 'dense' has no field 'name'"),
    ],
)
def test_wrong_dictionaries_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile.from_dict(PROFILE.to_dict() | change)


def test_a_models_name_from_a_file_is_shown_on_one_short_line() -> None:
    named = replace(PROFILE, provenance=Provenance("a\n\x1b[31m" + "x" * 100_000))
    with pytest.raises(ValueError, match="but this model has 3 layers of 4") as caught:
        named.check(3, 4)
    assert len(str(caught.value)) < 250
    assert str(caught.value).isprintable()


def test_something_else_than_a_dictionary_is_named() -> None:
    with pytest.raises(ValueError, match="schema 'str' is not supported"):
        Profile.from_dict("profile")  # type: ignore[arg-type]


def test_a_file_that_is_not_json_is_named(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    path.write_text("{")
    with pytest.raises(ValueError, match=r"profile\.json is not JSON"):
        Profile.load(path)


def test_a_file_that_is_not_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "profile.json")


# The published format


def test_published_pattern_files_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pattern.json"
    layers = [
        {
            "0": ["vertical_and_slash", 1000, 6096, 0.9],
            "1": ["stream_llm", 100, 800, 0.8],
            "2": ["block_sparse", 70, 0, 1],
        },
        {"2": ["stream_llm", 1, 2], "1": ["stream_llm", 3, 4, 0.5], "0": ["stream_llm", 5, 6, 0]},
    ]
    path.write_text(json.dumps(layers))
    loaded = Profile.load(path)
    assert loaded.layers == (
        (VerticalSlash(1000, 6096), AShape(100, 800), BlockSparse(70)),
        (AShape(5, 6), AShape(3, 4), AShape(1, 2)),
    )
    assert loaded.scores == ((0.9, 0.8, 1.0), (0.0, 0.5, None))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ({"1": ["stream_llm", 1, 2, 3]}, "layer 0 has no head 0: MInference's format names its 1 heads 0 to 0"),
        ({"0": ["stream_llm", 1, 2, 3], "2": ["stream_llm", 1, 2, 3]}, "layer 0 has no head 1: .* its 2 heads 0 to 1"),
        ({"0": ["spiral", 1, 2, 3]}, "layer 0, head 0: unknown type 'spiral' of MInference's format; known: vertical"),
        ({"0": [{}, 1, 2, 3]}, r"layer 0, head 0: .* got \[{}, 1, 2, 3\]"),
        ({"0": ["stream_llm", 0.9, 2, 3]}, "layer 0, head 0: budgets of MInference's stream_llm are whole numbers"),
        (
            {"0": ["stream_llm", 1, 2], "1": ["flex_vertical_and_slash", [0.9, 4096], [0.95, 4096], 1.0]},
            r"layer 0, head 1: MInference's format has flex_vertical_and_slash .* \[\[0.9, 4096\], \[0.95, 4096\]\]"
            r".* give a file with vertical_and_slash, stream_llm, block_sparse, or .* flexprefill",
        ),
        (
            {"0": [["stream_llm", 100, 800, 31], ["block_sparse", 100, 1, 44]]},
            "layer 0, head 0: a list of candidates, from a search .* did not choose; keep the best",
        ),
        ({"0": ["stream_llm", 1]}, r"layer 0, head 0: .* got \['stream_llm', 1\]"),
    ],
)
def test_wrong_published_files_are_named(layer: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Profile.from_minference([layer])


@pytest.mark.parametrize(
    ("window", "message"), [(-2, "window must be at least 1, got -2"), ("wide", "'wide'"), (None, "None")]
)
def test_a_wrong_number_in_a_published_file_says_where(window: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"layer 1, head 0: .*{message}"):
        Profile.from_minference([{"0": ["stream_llm", 1, 2, 3]}, {"0": ["stream_llm", 1, window, 3]}])
