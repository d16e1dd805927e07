"""Files of other projects as profiles and back, other models; and files that were spoilt."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gossamer import Profile
from gossamer.cli import main
from gossamer.methods import AShape, BlockSparse, Dense, TriShape, VerticalSlash, XAttention
from gossamer.profiles import Provenance
from gossamer.profiles.costs import Costs
from gossamer.profiles.imports import import_profile
from gossamer.profiles.tables import read_duo, read_moa, read_table

PUBLISHED = [
    {"0": ["vertical_and_slash", 1000, 6096, 0.9], "1": ["stream_llm", 100, 800, 43215.0]},
    {"0": ["block_sparse", 70, 0, 0.5], "1": ["vertical_and_slash", 30, 800, 1.0]},
]
GATES = "0.91\t0.12\t0.5\n0.25\t0.8\t1.0\n"


def written(path: Path, data: object) -> Path:
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    return path


def test_published_lists_survive_the_round_trip(tmp_path: Path) -> None:
    profile = import_profile(written(tmp_path / "p.json", PUBLISHED))
    assert profile.layers[0] == (VerticalSlash(1000, 6096), AShape(100, 800))
    assert profile.to_minference() == PUBLISHED


@pytest.mark.parametrize("method", [TriShape(), VerticalSlash(3, 4, exact=True), BlockSparse(3, 32)])
def test_what_the_published_form_cannot_hold_is_named(method) -> None:
    with pytest.raises(ValueError, match="layer 0, head 1: MInference's format holds vertical_slash, a_shape, block"):
        Profile(((AShape(), method),)).to_minference()


def test_gates_become_full_and_streaming_heads(tmp_path: Path) -> None:
    written(tmp_path / "full_attention_heads.tsv", "0.9\t0.1\n0.2\t0.8\n")
    written(tmp_path / "config.json", {"sink_size": 5, "recent_size": 7})
    streaming = AShape(5, 7)
    assert import_profile(tmp_path).layers == ((Dense(), streaming), (streaming, Dense()))
    assert import_profile(tmp_path, heads=4).layers[0] == (Dense(), Dense(), streaming, streaming)
    assert import_profile(tmp_path, sparsity=1.0).layers[0] == (streaming, streaming)
    with pytest.raises(ValueError, match="has 2 heads a layer; 3 is no multiple"):
        import_profile(tmp_path, heads=3)
    for heads in (0, 200_000, 2 * 10**30):  # as many would fill the memory
        with pytest.raises(ValueError, match="heads must be 1 to 100,000, got"):
            import_profile(tmp_path, heads=heads)


def test_the_file_of_gates_stands_for_its_folder(tmp_path: Path) -> None:
    """Its numbers lie in [0, 1], as thresholds do."""
    path = written(tmp_path / "full_attention_heads.tsv", "0.9\t0.1\n")
    written(tmp_path / "config.json", {"sink_size": 5, "recent_size": 7})
    for form in (None, "duo"):
        assert import_profile(path, form).layers == ((Dense(), AShape(5, 7)),)


@pytest.mark.parametrize("data", [{}, {"model.layers.0.self_attn.q_proj": [[3, 1]]}])
def test_an_object_of_none_of_the_formats_is_named(data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"t\.json is none of the formats profile, minference, duo, moa, thresholds"):
        import_profile(written(tmp_path / "t.json", data))


def test_lines_become_windows_of_a_length(tmp_path: Path) -> None:
    path = written(tmp_path / "moa.json", {"alphas": [[1024, 0]], "betas": [[0, 0.5]]})
    assert import_profile(path, length=8192).layers == ((AShape(64, 960), AShape(64, 4032)),)
    with pytest.raises(ValueError, match="say for which length"):
        import_profile(path)
    with pytest.raises(ValueError, match="length must be at most 2147483647 tokens, got 10"):
        import_profile(path, length=10**30)


@pytest.mark.parametrize("content", ["[[0.9, 0.5]]", '{"threshold": [[0.9, 0.5]]}', "0.9\t0.5\n"])
def test_tables_of_thresholds_become_methods(content: str, tmp_path: Path) -> None:
    assert import_profile(written(tmp_path / "t", content)).layers == ((XAttention(0.9), XAttention(0.5)),)


def test_provenance_and_figures_survive_the_round_trip() -> None:
    origin = Provenance("m", config_hash="ab", prompts_hash="cd", kernel="cpu/avx512", machine="a processor")
    profile = Profile(((Dense(), AShape()),), None, origin, ((0.1, None),), ((1e-3, 2e-3),))
    assert Profile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile
    for name, message in (("errors", "an error is a number"), ("costs", "a cost is a number")):
        with pytest.raises(ValueError, match=f"layer 0, head 0: {message} or null, got 'x'"):
            Profile.from_dict(profile.to_dict() | {name: [["x", 1]]})
    with pytest.raises(ValueError, match="kernel of a profile's provenance must be text"):
        Profile.from_dict(profile.to_dict() | {"provenance": {"kernel": 3}})


# Other models


def test_another_model_is_refused_with_the_reason() -> None:
    profile = Profile.uniform(2, 4, Dense())
    profile.check(2, 4)
    with pytest.raises(ValueError, match="for 2 layers of 4 heads, but this model has 3 layers of 4"):
        profile.check(3, 4)


# Spoilt files


def spoilt(text: bytes, draw: random.Random) -> bytes:
    pieces = (b"", b"9" * 30, b"[", b"}", b"null", b"-1", b"\xff", b"1e999", b'"schema"', b"nan", b"\t", b"\n")
    changed = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed))
        changed[at : at + draw.choice((0, 1, 9))] = draw.choice(pieces)
        changed = changed or bytearray(b" ")
    return bytes(changed)


@pytest.mark.parametrize("name", ["full_attention_heads.tsv", "config.json"])
def test_folders_of_gates_changed_at_random_are_read_or_refused(name: str, tmp_path: Path) -> None:
    good = {"full_attention_heads.tsv": GATES, "config.json": json.dumps({"sink_size": 64, "recent_size": 256})}
    for other, text in good.items():
        written(tmp_path / other, text)
    draw, refused, done = random.Random(0), [], 0
    for _ in range(300):
        (tmp_path / name).write_bytes(spoilt(good[name].encode(), draw))
        try:
            done += len(import_profile(tmp_path, heads=6).layers)
        except ValueError as error:
            refused.append(str(error))
    assert len(refused) > 150
    assert done  # some are left as they were, or fine
    assert max(map(len, refused)) < 1000
    assert all("\n" not in message for message in refused)


@pytest.mark.parametrize(
    "good", [PUBLISHED, Profile(((AShape(), Dense()),)).to_dict(), {"alphas": [[1]], "betas": [[0]]}, [[0.5]]]
)
def test_bytes_changed_at_random_are_read_or_refused(good: object, tmp_path: Path) -> None:
    draw, path, text = random.Random(0), tmp_path / "p.json", json.dumps(good).encode()
    refused = []
    for _ in range(300):
        path.write_bytes(spoilt(text, draw))
        try:
            import_profile(path, length=100)
        except ValueError as error:
            refused.append(len(str(error)))
    assert len(refused) > 150
    assert max(refused) < 1000


@pytest.mark.parametrize(
    "read",
    [Profile.load, Costs.load, import_profile, read_moa, read_duo, lambda path: read_table(path, "gates")],
    ids=["profile", "costs", "import", "moa", "duo", "table"],
)
def test_files_too_large_are_refused_before_they_are_read(read: Callable[[Path], Any], tmp_path: Path) -> None:
    """No memory would hold them; they take no room on the disk."""
    folder = tmp_path if read is read_duo else None
    path = tmp_path / "full_attention_heads.tsv"
    with path.open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"full_attention_heads.tsv is too large: it has more than 67,108,864 bytes"):
        read(folder or path)


def test_the_config_of_gates_may_not_be_too_large(tmp_path: Path) -> None:
    written(tmp_path / "full_attention_heads.tsv", GATES)
    with (tmp_path / "config.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(ValueError, match=r"config.json is too large"):
        read_duo(tmp_path)


# The command


def test_the_command_shows_compares_and_converts(tmp_path: Path, capsys) -> None:
    path, ours, back = written(tmp_path / "p.json", PUBLISHED), tmp_path / "ours.json", tmp_path / "back.json"
    assert main(["profile", "convert", str(path), "-o", str(ours)]) == 0
    assert main(["profile", "convert", str(ours), "-o", str(back), "--to", "minference"]) == 0
    assert json.loads(back.read_text()) == PUBLISHED
    assert main(["profile", "diff", str(path), str(ours)]) == 0
    assert "0 of 4 heads differ" in capsys.readouterr().out
    written(path, [PUBLISHED[0], PUBLISHED[0]])
    assert main(["profile", "diff", str(path), str(ours), "--json"]) == 1
    assert [d["layer"] for d in json.loads(capsys.readouterr().out)["differing"]] == [1, 1]
    assert main(["profile", "show", str(path)]) == 0
    assert "2 layers of 2 heads" in capsys.readouterr().out


def test_the_command_writes_over_profiles_alone(tmp_path: Path, capsys) -> None:
    path, notes, empty = (tmp_path / name for name in ("p.json", "notes.txt", "empty.json"))
    written(path, PUBLISHED)
    notes.write_text("mine")
    empty.touch()
    for place, code in ((notes, 2), (tmp_path, 2), (empty, 0), (empty, 0), (path, 0)):
        assert main(["profile", "convert", str(path), "-o", str(place)]) == code
        assert ("is no profile: it would be lost" in capsys.readouterr().err) == bool(code)
    assert notes.read_text() == "mine"
    assert Profile.load(path) == Profile.load(empty)


def test_the_command_shows_where_a_profile_is_from_on_a_line_each(tmp_path: Path, capsys) -> None:
    origin = Provenance("m\x1b[2J\nx", lengths=(100, 200), held_out="error 0.1 [0.05, 0.2]")
    Profile(((Dense(), AShape()),), None, origin, ((0.1, None),), ((0.5, 1.0),)).save(tmp_path / "p.json")
    assert main(["profile", "show", str(tmp_path / "p.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:6] == [
        "1 layers of 2 heads",
        "model: m\\x1b[2J\\nx",
        "lengths: 100, 200",
        "held_out: error 0.1 [0.05, 0.2]",
        "errors: mean 0.1, from 0.1 to 0.1",
        "costs: mean 0.75, from 0.5 to 1",
    ]


def test_the_command_refuses_in_one_line(tmp_path: Path, capsys) -> None:
    for data in ("{", "{}", "<html>", [[2.0]], [{"0": ["flex_vertical_and_slash", [0.9, 4096], [0.9, 4096], 1.0]}]):
        assert main(["profile", "show", str(written(tmp_path / "p.json", data))]) == 2
        message = capsys.readouterr().err
        assert (message.count("\n"), message.count("p.json")) == (1, 1)
    assert main(["profile", "show", str(tmp_path / "none")]) == 2
