"""The benchmark of other programs: what it asks of them, reads from them, keeps and makes of it; no program is run."""

from __future__ import annotations

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
from repository import script as loaded

REFERENCE = "transformers sdpa"


def log_probabilities(*rows: list[float]) -> np.ndarray:
    return np.log(np.array(rows, dtype=np.float32))


def test_losses_are_means_over_positions(script, tmp_path: Path) -> None:
    rows = script("contender_rows")
    np.save(tmp_path / "dense.npy", log_probabilities([0.5, 0.5], [0.25, 0.75]))
    np.save(tmp_path / "other.npy", log_probabilities([0.5, 0.5], [0.75, 0.25]))
    found = rows.closeness(tmp_path / "dense.npy", tmp_path / "other.npy")
    moved = 0.25 * np.log(1 / 3) + 0.75 * np.log(3)
    assert found["kl"] == pytest.approx(moved / 2)
    assert (found["last_kl"], found["kl_half"]) == (pytest.approx(moved), pytest.approx(moved / 2))
    assert (found["positions"], found["top1"]) == (2, 0.5)


def test_a_program_that_gives_one_position_is_compared_at_the_last(script, tmp_path: Path) -> None:
    rows = script("contender_rows")
    np.save(tmp_path / "dense.npy", log_probabilities([0.9, 0.1], [0.25, 0.75]))
    # The vocabulary is padded, and the rest is shared out anew.
    np.save(tmp_path / "one.npy", log_probabilities([0.2, 0.6, 0.2]))
    found = rows.closeness(tmp_path / "dense.npy", tmp_path / "one.npy")
    assert found["positions"] == 1
    assert found["kl"] == pytest.approx(0, abs=1e-6)
    np.save(tmp_path / "three.npy", log_probabilities(*[[0.5, 0.5]] * 3))
    with pytest.raises(ValueError, match="has 3 positions"):
        rows.closeness(tmp_path / "dense.npy", tmp_path / "three.npy")


def run(contender: str, number: int, seconds: float, token: int = 1, **more: float) -> dict:
    return {"contender": contender, "length": 64, "round": number, "seconds": seconds, "token": token, **more}


def test_ratios_are_taken_within_rounds(script) -> None:
    runs = [run(REFERENCE, 0, 1.0), run(REFERENCE, 1, 3.0), run("x", 0, 0.5), run("x", 1, 1.0, 2), run("x", 2, 0.25)]
    losses = [
        {"contender": "x", "length": 64, "positions": 4, "kl": kl, "kl_half": kl, "top1": 1, "last_kl": kl}
        for kl in (1, 3)
    ]
    first, other = script("contender_rows").summary(runs, losses, [REFERENCE, "x"])
    assert (first["contender"], first["seconds"], first["ratio"]) == (REFERENCE, 2, 1)
    assert (other["seconds"], other["rounds"], other["ratio"]) == (0.5, 3, 2.5)
    assert (other["same_first_tokens"], other["compared"]) == (1, 2)
    assert (other["kl"], other["prompts"], other["positions"]) == (2, 2, 8)
    assert "density" not in other


def test_a_loss_alone_makes_a_row(script) -> None:
    loss = {"contender": "x", "length": 8, "positions": 1, "kl": 0.5, "kl_half": 0.5, "top1": 0.0, "last_kl": 0.5}
    (row,) = script("contender_rows").summary([], [loss], ["x"])
    assert row["kl"] == 0.5
    assert "seconds" not in row


def test_answers_are_told_from_what_libraries_print(script) -> None:
    child = 'loading\n>>{"versions": {"a": "1"}}\nprogress >> 3\n>>{"seconds": 0.5, "token": 7}\n'
    assert script("contenders").parse(child) == [{"versions": {"a": "1"}}, {"seconds": 0.5, "token": 7}]


def test_a_failing_program_says_why(script) -> None:
    contenders = script("contenders")
    with pytest.raises(contenders.Unavailable, match=r"^no such library$"):
        contenders.call(["sh", "-c", "cat; echo no such library >&2; echo >&2; exit 3"], "request")
    with pytest.raises(contenders.Unavailable, match="No such file"):
        contenders.call(["/no/such/python"], "")
    assert contenders.call(["cat"], "request") == "request"


def test_contenders_take_turns(script) -> None:
    visits = script("contenders").visits
    of = Namespace(what="loss,time", prompts=1, rounds=2, lengths=[8, 16])
    assert [(what, name, number) for what, name, _, number in visits(["a", "b"], of) if what == "time"] == [
        ("time", "a", 0),
        ("time", "b", 0),
        ("time", "b", 1),
        ("time", "a", 1),
    ]
    assert [visit[1:] for visit in visits(["a"], of) if visit[0] == "loss"] == [("a", 8, 0), ("a", 16, 0)]


def test_the_last_position_is_among_those_compared(script) -> None:
    kept = script("contenders").kept
    assert kept(64, 16) == [15, 31, 47, 63]
    assert kept(65, 16) == [0, 16, 32, 48, 64]


def test_what_is_measured_is_not_measured_again(script, tmp_path: Path) -> None:
    contenders = script("contenders")
    about = {"machine": {}, "model": {"name": "m"}, "threads": 2}
    report = contenders.Report(tmp_path / "r.json", about)
    report.cannot("vllm", "not installed")
    report.add("runs", [run(REFERENCE, 0, 1.0)], REFERENCE, {"torch": "2"})
    again = contenders.Report(tmp_path / "r.json", about)
    assert not again.lacks("runs", contender=REFERENCE, round=0, length=64)
    assert again.lacks("runs", contender=REFERENCE, round=1, length=64)
    written = json.loads((tmp_path / "r.json").read_text())
    assert written["unavailable"] == {"vllm": "not installed"}
    assert written["rows"][0]["seconds"] == 1.0
    again.add("runs", [run("vllm", 0, 1.0)], "vllm", {})
    assert json.loads((tmp_path / "r.json").read_text())["unavailable"] == {}
    with pytest.raises(SystemExit, match="another model"):
        contenders.Report(tmp_path / "r.json", about | {"model": {"name": "n"}})


def test_contenders_have_names_of_their_own_and_none_is_a_list(script) -> None:
    names = script("contenders").CONTENDERS
    assert all(name == contender.name and "," not in name for name, contender in names.items())
    assert next(iter(names)) == REFERENCE


def test_openvino_reads_in_the_chunks_of_its_scheduler(script) -> None:
    chunks = script("contender_openvino").chunks
    (whole,) = chunks(320, {"mode": "XATTENTION"})
    assert (whole.start, whole.stop, whole.blocks, whole.sparse) == (0, 320, tuple(range(10)), True)
    assert [chunk.sparse for chunk in chunks(320, {})] == [False]
    first, middle, last = chunks(
        320,
        {
            "mode": "TRISHAPE",
            "chunk": 128,
            "num_last_dense_tokens_in_prefill": 64,
            "num_retained_start_tokens_in_cache": 32,
            "num_retained_recent_tokens_in_cache": 32,
        },
    )
    assert first.blocks == (0, 1, 2, 3)
    assert middle.blocks == (0, 3, 4, 5, 6, 7)  # of the four blocks before it, the first and the last
    assert (last.sparse, last.blocks) == (False, tuple(range(10)))


def test_distributions_by_token(script) -> None:
    child = script("contender_child")
    found = child.by_token([(2, np.log(0.25)), (0, np.log(0.75))])
    assert np.exp(found[0]) == pytest.approx([0.75, 0, 0.25], abs=1e-6)
    with pytest.raises(ValueError, match="position 3 alone"):
        child.only_last([1, 2, 3, 4], [2, 3])


def test_tables(script) -> None:
    tables = loaded("docs/contender_tables.py")
    row = {"contender": "x", "length": 4096, "seconds": 2.0, "rounds": 3, "ratio": 1.5, "same_first_tokens": 2}
    row |= {"compared": 3, "kl": 3e-9, "top1": 1.0, "positions": 256}
    found = {"model": {"name": "m"}, "threads": 2, "versions": {"x": {"lib": "1.0"}}, "unavailable": {"y": "broken"}}
    times, missing = tables.contender_tables(found | {"rows": [row]})
    assert times[0].startswith("**m**, 2 threads")
    assert "lib 1.0" in times[0]
    assert times[2] == [("4,096", "`x`", "2.00", 3, "1.50", "2 of 3", "", "", "< 0.00001", "1.000", 256)]
    assert missing[2] == [("`y`", "broken")]
